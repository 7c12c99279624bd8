"""`padding_free=True`: the rows of a micro-batch stand end to end in one sequence, and nothing else changes."""

import pytest
import torch
from tiny import VOCAB_SIZE, answered_dataset, tiny_model, tiny_tokenizer, weights
from trainers import GREEDY, PRIMING, lora

from trl_promptkd import build_teacher_cache


# One step of this changes each weight by its gradient
BY_GRADIENT = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
LOGGED = [
    *("loss", "grad_norm", "ce", "kd", "kl/student_teacher", "entropy/student", "entropy/teacher"),
    *("teacher/top1_agreement", "mean_token_accuracy", "completion_tokens", "num_tokens"),
]


def teacher_of(family):
    return tiny_model(family, seed=2, num_hidden_layers=3, **({"layer_types": None} if "gemma" in family else {}))


def step(primed, padding_free, **settings):
    """One step's gradient by weight, its log, and the shapes of what the student's decoder was given."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **BY_GRADIENT, **settings}
    torch.manual_seed(0)  # of an adapter
    trainer = primed(padding_free=padding_free, **settings)
    decoder, shapes = trainer.model.get_decoder(), []
    decoder.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    shapes = [shape for shape in shapes if shape != (1, 1)]  # without those of its head alone
    return {name: before[name] - after[name] for name in before}, trainer.state.log_history[0], shapes


def assert_same_step(primed, make_settings, logged=LOGGED):
    """That a padded and a padding-free run take the same step. Returns the shapes that each gave to the student."""
    (padded, padded_log, padded_shapes), (free, free_log, free_shapes) = (
        step(primed, padding_free, **make_settings()) for padding_free in (False, True)
    )
    assert sum(gradient.norm() for gradient in padded.values()) > 0.1
    for name, gradient in padded.items():
        torch.testing.assert_close(
            free[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in logged:
        assert free_log[name] == pytest.approx(padded_log[name], rel=1e-5, abs=1e-5), name
    assert free_log["completion_tokens"] > 0
    return padded_shapes, free_shapes


class TestOneStep:
    @pytest.mark.parametrize(
        ("family", "checkpointing"),
        [("llama", True), ("qwen2", False), ("qwen3", True), ("gemma2", True), ("gemma3", False)],
    )
    def test_equals_the_padded_one(self, primed, family, checkpointing):
        padded, free = assert_same_step(
            primed,
            lambda: {
                "model": tiny_model(family, seed=1),
                "teacher_model": teacher_of(family),
                "gradient_checkpointing": checkpointing,
            },
            [*LOGGED, "priming/gain_nats"],
        )
        assert [rows for rows, _ in padded] == [4, 4]
        assert [rows for rows, _ in free] == [1, 1]
        assert all(tokens < rows * width for (rows, width), (_, tokens) in zip(padded, free, strict=True))

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
    def test_equals_the_padded_one_with_a_cached_teacher(self, primed, family, tmp_path):
        cache = tmp_path / "cache"
        build_teacher_cache(teacher_of(family), answered_dataset(), cache, tiny_tokenizer(), PRIMING, "exact")
        assert_same_step(
            primed,
            lambda: {"model": tiny_model(family, seed=1), "teacher_model": None, "teacher_cache": str(cache)},
        )

    def test_equals_the_padded_one_with_the_students_start_as_teacher(self, primed):
        assert_same_step(
            primed,
            lambda: {
                "model": tiny_model(seed=1),
                "teacher_model": None,
                "peft_config": lora(init_lora_weights="gaussian"),
            },
        )

    def test_equals_the_padded_one_with_several_teachers(self, primed):
        names = ["a", "b", "own", "a"]
        rows = answered_dataset().add_column("teacher", [names[row % 4] for row in range(8)])
        assert_same_step(
            primed,
            lambda: {
                "model": tiny_model(seed=1),
                "teacher_model": {"a": tiny_model(seed=2), "b": teacher_of("llama"), "own": None},
                "train_dataset": rows,
            },
        )

    def test_equals_the_padded_one_on_the_students_samples(self, primed):
        assert_same_step(
            primed,
            lambda: {
                "model": tiny_model(seed=1),
                "teacher_model": tiny_model(seed=2),
                "response_source": "student",
                "generation_kwargs": GREEDY,
            },
        )

    def test_one_row_at_a_time_is_the_same(self, primed):
        assert_same_step(primed, lambda: {"model": tiny_model("gemma2", seed=1), "per_device_train_batch_size": 1})


class TestEvaluation:
    def test_equals_the_padded_one(self, primed):
        def seen(prediction):
            return {"shape": float(prediction.predictions.shape[-1])}

        found = []
        for padding_free in (False, True):
            settings = {"padding_free": padding_free, "per_device_eval_batch_size": 3, "compute_metrics": seen}
            found.append(primed(tiny_model("gemma3", seed=1), eval_dataset=answered_dataset(7), **settings).evaluate())
        padded, free = found
        assert free["eval_shape"] == VOCAB_SIZE
        for name in ("eval_loss", "eval_ce", "eval_kd", "eval_kl/student_teacher", "eval_priming/gain_nats"):
            assert free[name] == pytest.approx(padded[name], rel=1e-5, abs=1e-5), name


class TestRowsThatSeeEachOther:
    """A row that depends on those before it: refused before training, by a measurement."""

    @pytest.mark.parametrize("family", ["mamba", "opt", "bloom"])
    def test_a_student_is_refused(self, primed, family):
        primed(tiny_model(family, seed=1), tiny_model(seed=2))
        with pytest.raises(
            ValueError, match=r"The student \(\w+\) gives rows that stand end to end .*`padding_free=False`"
        ):
            primed(tiny_model(family, seed=1), tiny_model(seed=2), padding_free=True)

    def test_a_teacher_is_refused(self, primed):
        with pytest.raises(ValueError, match=r"The teacher \(MambaForCausalLM\) gives rows that stand end to end"):
            primed(tiny_model(seed=1), tiny_model("mamba", seed=2), padding_free=True)

    def test_a_cached_teacher_may_be_such_a_model(self, primed, tmp_path):
        cache = tmp_path / "cache"
        build_teacher_cache(tiny_model("mamba", seed=2), answered_dataset(), cache, tiny_tokenizer(), PRIMING, "exact")
        primed(teacher_model=None, teacher_cache=str(cache), padding_free=True)


def test_the_settings_stay_as_they_were_given(primed):
    trainer = primed(padding_free=True, max_length=20)
    assert trainer.args.padding_free
