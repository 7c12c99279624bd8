"""`prompt_share`: the soft prompt's gradient from a part of a window's rows. The whole step is in
test_promptkd_trainer.py."""

import copy

import pandas
import pytest
import torch
from reference import log_probs, promptkd_step
from tiny import difference, prompt_dataset, tiny_model, tiny_tokenizer, weights
from trainers import GREEDY, SAVES, SGD, all_rows, equal, keep_windows, logged, trained, trained_parts

from trl_promptkd.trainer.window import teaching_rows


QUIET = {"logging_steps": 100, "logging_first_step": False}
BOTH_UPDATES = pytest.mark.parametrize("update", ["sequential", "simultaneous"])


class TestTeachingRows:
    @pytest.mark.parametrize(
        ("sizes", "share", "expected"),
        [
            ([8], 1.0, [8]),
            ([8], 0.25, [2]),
            ([2, 2, 2, 2], 0.5, [2, 2, 0, 0]),
            ([2, 2, 1], 0.5, [2, 1, 0]),
            ([4, 4], 0.01, [1, 0]),
            ([50, 50], 0.07, [7, 0]),  # 0.07 * 100 is 7.000000000000001
            ([1, 1, 1], 2 / 3, [1, 1, 0]),
        ],
    )
    def test_are_the_first_of_the_window_rounded_up(self, sizes, share, expected):
        assert teaching_rows(sizes, share) == expected


def kept_gradient(trainer):
    """The prompt's gradient, clipped, with which its optimizer steps; filled in when it does."""
    kept = []

    def keep(optimizer, args, kwargs):
        kept.append(optimizer.param_groups[0]["params"][0].grad.clone())

    original = trainer.create_scheduler

    def create(*args, **kwargs):
        made = original(*args, **kwargs)
        trainer.prompt_optimizer.optimizer.register_step_pre_hook(keep)
        return made

    trainer.create_scheduler = create
    return kept


class TestOneStep:
    """Against the row-by-row implementation in `reference.py`."""

    @BOTH_UPDATES
    @pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
    @pytest.mark.parametrize(
        ("accumulation", "rows", "sizes"),
        [(1, 8, [8]), (2, 8, [4, 4]), (4, 8, [2, 2, 2, 2]), (4, 7, [2, 2, 2, 1]), (2, 5, [4, 1])],
    )
    def test_equals_rows_alone(self, promptkd, accumulation, rows, sizes, share, update):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        ref_student, ref_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
        trainer = promptkd(
            student,
            teacher,
            prompt={"prompt_learning_rate": 0.01},
            train_dataset=prompt_dataset(rows),
            per_device_train_batch_size=sizes[0],
            gradient_accumulation_steps=accumulation,
            prompt_update=update,
            prompt_share=share,
            generation_kwargs=GREEDY,
            **SGD,
        )
        soft_prompt = trainer.prompt_embeddings().clone()
        windows, gradients = keep_windows(trainer), kept_gradient(trainer)
        trainer.train()

        (window,) = windows
        assert [len(batch) for batch in window] == sizes
        settings = {"prompt_update": update, "weight": 1.0, "share": share}
        loss, prompt_norm, norm = promptkd_step(ref_student, ref_teacher, soft_prompt, window, 0.05, 0.01, **settings)
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(loss, rel=1e-5)
        assert log["prompt/grad_norm"] == pytest.approx(prompt_norm, rel=1e-4)
        assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)
        (gradient,) = gradients
        torch.testing.assert_close(gradient, soft_prompt.grad, atol=1e-6, rtol=1e-4)
        assert difference(weights(trainer.model), weights(ref_student)) < 1e-6

    @BOTH_UPDATES
    def test_the_rows_are_the_first_of_the_data(self, promptkd, update):
        """Rows go to micro-batches by length, but those that teach are not the longest ones."""
        dataset = prompt_dataset(8)
        trainer = promptkd(
            train_dataset=dataset,
            gradient_accumulation_steps=4,
            train_sampling_strategy="sequential",
            prompt_update=update,
            prompt_share=0.5,
        )
        windows = keep_windows(trainer)
        trainer.train()
        found = [prompt for prompt, _ in all_rows(windows)]
        expected = tiny_tokenizer()(list(dataset["prompt"]))["input_ids"]
        assert sorted(found[:4]) == sorted(expected[:4])
        assert sorted(found[4:]) == sorted(expected[4:])
        lengths = [len(prompt) + len(completion) for prompt, completion in all_rows(windows)]
        assert lengths[4:] == sorted(lengths[4:], reverse=True)

    @BOTH_UPDATES
    def test_a_prompt_that_does_not_learn_makes_the_share_irrelevant(self, promptkd, update):
        settings = {"prompt": {"prompt_learning_rate": 0.0}, "generation_kwargs": GREEDY, "prompt_update": update}
        ends = [trained(promptkd(prompt_share=share, **settings, **SGD)) for share in (0.3, 1.0)]
        assert torch.equal(ends[0]["prompt"], ends[1]["prompt"])
        assert difference(*ends) < 1e-6


class TestPasses:
    """Of the teacher: rows, and whether with gradient."""

    @staticmethod
    def of_a_step(promptkd, **settings):
        trainer = promptkd(per_device_train_batch_size=8 // settings.get("gradient_accumulation_steps", 1), **settings)
        passes = []
        trainer.teacher_model.get_decoder().layers[0].register_forward_hook(
            lambda module, args, output: passes.append((len(args[0]), torch.is_grad_enabled()))
        )
        trainer.train()
        return passes

    @pytest.mark.parametrize(
        ("accumulation", "update", "expected"),
        [
            (1, "sequential", [(2, False), (2, True), (8, False)]),
            (1, "simultaneous", [(6, False), (2, False), (2, True)]),
            (4, "sequential", [(2, False), (2, True), *[(2, False)] * 4]),
            (4, "simultaneous", [(2, False), (2, True), *[(2, False)] * 3]),
        ],
    )
    def test_rows_that_do_not_teach_get_one_without_gradient(self, promptkd, accumulation, update, expected):
        settings = {"gradient_accumulation_steps": accumulation, "prompt_update": update, "prompt_share": 0.25}
        assert self.of_a_step(promptkd, **settings, **QUIET) == expected
        assert self.of_a_step(promptkd, **settings) == expected  # a logged step measures rows that teach

    def test_without_regularizer_the_plain_teacher_has_none_unless_the_step_is_logged(self, promptkd):
        settings = {"prompt_share": 0.5, "prompt_update": "simultaneous", "regularization_coef": 0.0}
        assert self.of_a_step(promptkd, **settings, **QUIET) == [(4, False), (4, True)]
        assert self.of_a_step(promptkd, **settings) == [(4, False), (4, False), (4, True)]


@pytest.mark.parametrize("update", ["sequential", "simultaneous"])
class TestLogs:
    @staticmethod
    def run(promptkd, update):
        """Five of eight rows teach, one of them in the second micro-batch."""
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        trainer = promptkd(
            copy.deepcopy(student),
            teacher,
            prompt={"prompt_learning_rate": 0.01},
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            prompt_update=update,
            prompt_share=0.6,
            log_completions=True,
            num_completions_to_print=0,
        )
        before = trainer.prompt_embeddings().clone()
        windows = keep_windows(trainer)
        trainer.train()
        rows, after = all_rows(windows), trainer.prompt_embeddings()
        assert [len(batch) for batch in windows[0]] == [4, 4]
        values = []
        with torch.no_grad():
            for index, (prompt, completion) in enumerate(rows):
                ids, first = prompt + completion, len(prompt)
                q, p = log_probs(student, ids, first), log_probs(teacher, ids, first)
                old = log_probs(teacher, ids, first, before)
                learned = old
                if update == "sequential" and index >= 4:
                    learned = log_probs(teacher, ids, first, after)
                sums = {"sL": (q, learned), "sp": (q, p), "Ps": (old, q), "Pp": (old, p)}
                values.append({name: (a.exp() * (a - b)).sum().item() for name, (a, b) in sums.items()})
        return trainer, rows, values

    def test_values_are_those_of_the_rows_that_were_measured(self, promptkd, update):
        trainer, rows, values = self.run(promptkd, update)

        def mean(name, number):
            return sum(row[name] for row in values[:number]) / sum(len(completion) for _, completion in rows[:number])

        log = trainer.state.log_history[0]
        assert log["kl/student_prompted"] == pytest.approx(mean("sL", 8), rel=1e-4)
        assert log["loss"] == pytest.approx(mean("sL", 8), rel=1e-4)
        assert log["kl/student_plain"] == pytest.approx(mean("sp", 5), rel=1e-4)
        assert log["kl/prompted_plain"] == pytest.approx(mean("Pp", 5), rel=1e-4)
        assert log["kl/prompted_student"] == pytest.approx(mean("Ps", 5), rel=1e-4)
        assert log["kl/prompt_gain"] == pytest.approx(mean("sp", 5) - mean("sL", 5), rel=1e-3)

    def test_printed_rows_have_the_kl_to_the_plain_teacher_if_they_teach(self, promptkd, update):
        trainer, rows, values = self.run(promptkd, update)
        table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_00001.parquet")
        tokenizer, plain = tiny_tokenizer(), []
        for index, ((prompt, completion), value) in enumerate(zip(rows, values, strict=True)):
            texts = (tokenizer.decode(prompt), tokenizer.decode(completion))
            (row,) = table[(table["prompt"] == texts[0]) & (table["completion"] == texts[1])].to_dict("records")
            assert row["kl/student_prompted"] == pytest.approx(value["sL"] / len(completion), rel=1e-3)
            plain.append(row["kl/student_plain"])
            assert index >= 5 or plain[-1] == pytest.approx(value["sp"] / len(completion), rel=1e-3)
        assert [value != value for value in plain] == [False] * 5 + [True] * 3  # NaN


class TestRuns:
    @BOTH_UPDATES
    def test_a_resumed_run_is_the_same_to_the_bit(self, promptkd, update):
        settings = {**SAVES, "max_steps": 3, "gradient_accumulation_steps": 2, "train_dataset": prompt_dataset(10)}
        settings |= {"prompt_share": 0.5, "prompt_update": update}
        straight = trained(promptkd(**settings))
        resumed = promptkd(**settings)
        resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-1")
        assert equal(trained_parts(resumed), straight)

    @pytest.mark.parametrize("share", [0.5, 1.0])
    def test_the_prompt_steps_as_often_as_the_student(self, promptkd, share):
        """Windows of two micro-batches; the data ends within every second one."""
        rows = prompt_dataset(6).to_iterable_dataset()
        trainer = promptkd(max_steps=3, gradient_accumulation_steps=2, prompt_share=share, train_dataset=rows)
        gradients = kept_gradient(trainer)
        trainer.train()
        assert len(gradients) == len(logged(trainer, "loss")) == 3
