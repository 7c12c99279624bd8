"""What TRL and transformers document for every trainer, against both trainers here.

Conventions that another test holds are listed in `ELSEWHERE`, so that this file names all of them.
"""

import ast
import contextlib
import json
import math
import os
import sqlite3
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from peft import LoraConfig, get_peft_model
from tiny import answered_dataset, chat_dataset, prompt_dataset, tiny_model, tiny_tokenizer, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
)


ELSEWHERE = {
    "a model by its name, and `processing_class=None`": [
        "test_promptkd_trainer.py::TestStudents::test_names_are_loaded_by_the_trainer",
        "test_primed_distill_trainer.py::TestTeachers::test_names_are_loaded_by_the_trainer",
    ],
    "4-bit students": [
        "test_promptkd_trainer.py::TestStudents::test_quantized_student_and_teacher",
        "test_primed_distill_trainer.py::TestTeachers::test_quantized_student_and_teacher",
    ],
    "`resume_from_checkpoint=True`, and resuming to the bit": [
        "test_checkpoints.py::TestCheckpointToResume::test_newest_by_number",
        "test_promptkd_trainer.py::TestResume::test_six_steps_equal_three_and_three",
        "test_primed_distill_trainer.py::TestResume::test_six_steps_equal_three_and_three",
    ],
    "a collator of one's own": [
        "test_promptkd_trainer.py::TestDataSources::test_a_collator_of_ones_own",
        "test_primed_distill_trainer.py::TestSources::test_a_collator_of_ones_own",
    ],
    "`evaluate()` and `predict()` of raw data": [
        "test_promptkd_trainer.py::TestEvaluation::test_raw_data_and_several_sets",
        "test_primed_distill_trainer.py::TestEvaluation::test_several_sets_raw_data_and_metrics",
    ],
    "evaluation does not change training": [
        "test_promptkd_trainer.py::TestEvaluation::test_evaluation_does_not_change_training",
        "test_primed_distill_trainer.py::TestEvaluation::test_evaluation_does_not_change_training",
    ],
    "the caller's `args` and data are left alone": [
        "test_promptkd_trainer.py::TestOutputs::test_the_callers_arguments_are_left_alone",
        "test_primed_distill_trainer.py::TestOutputs::test_the_callers_arguments_and_data_are_left_alone",
    ],
    "model cards": [
        "test_promptkd_trainer.py::TestOutputs::test_model_card",
        "test_primed_distill_trainer.py::TestOutputs::test_model_card",
    ],
    "`log_completions`": [
        "test_promptkd_trainer.py::TestOutputs::test_completions_are_printed_and_kept",
        "test_primed_distill_trainer.py::TestOutputs::test_completions_are_printed_and_kept",
    ],
    "generation metrics, and early stopping on them": [
        "test_callbacks.py::TestGenerationMetricsCallback::test_early_stopping_sees_the_metrics_wherever_it_was_passed",
    ],
    "`formatting_func`, `compute_loss_func` and `torch_compile` are refused, and much else": [
        "test_bad_inputs.py::test_bad_input_gives_an_error_that_says_what_to_do",
    ],
}


class Maker:
    """Makes a trainer of either method for a short run on tiny models."""

    def __init__(self, method, make_args, make_primed_args):
        self.method = method
        self.trainer_class, self.config_class, self.make_args = (
            (PromptKDTrainer, PromptKDConfig, make_args)
            if method == "promptkd"
            else (PrimedDistillTrainer, PrimedDistillConfig, make_primed_args)
        )

    def __call__(self, model=None, teacher_model="tiny", train_dataset=None, peft_config=None, **rest):
        taken = ("eval_dataset", "compute_metrics", "callbacks", "preprocess_logits_for_metrics", "processing_class")
        kwargs = {name: rest.pop(name) for name in taken if name in rest}
        kwargs.setdefault("processing_class", tiny_tokenizer())
        prompt = rest.pop("prompt", {})
        if self.method == "promptkd":
            text = "suppose you are a student ."
            kwargs["prompt_encoder_config"] = PromptEncoderConfig(**{"prompt_init_text": text, **prompt})
        else:
            kwargs["priming"] = "teacher"
        return self.trainer_class(
            model=tiny_model(seed=1) if model is None else model,
            teacher_model=tiny_model(seed=2)
            if isinstance(teacher_model, str) and teacher_model == "tiny"
            else teacher_model,
            args=self.make_args(**rest),
            train_dataset=answered_dataset() if train_dataset is None else train_dataset,
            peft_config=peft_config,
            **kwargs,
        )


@pytest.fixture(params=["promptkd", "primed"])
def make(request, make_args, make_primed_args):
    return Maker(request.param, make_args, make_primed_args)


def trained(trainer):
    """All that training changes."""
    trainer.train()
    return weights(trainer.model) | (
        {"prompt": trainer.prompt_embeddings()} if hasattr(trainer, "soft_prompt") else {}
    )


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def as_conversation(row):
    roles = {"prompt": "user", "completion": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in row.items()}


class TestData:
    @pytest.mark.parametrize("conversational", [False, True])
    @pytest.mark.parametrize("form", ["messages", "prompt_completion", "prompt"])
    def test_every_format_with_other_columns_beside_it(self, make, form, conversational):
        data = {"messages": chat_dataset, "prompt_completion": answered_dataset, "prompt": prompt_dataset}[form]()
        if form == "messages" and not conversational:
            pytest.skip("`messages` are conversations")
        if form != "messages" and conversational:
            data = data.map(as_conversation)
        settings = {"response_source": "student"} if form == "prompt" and make.method == "primed" else {}
        alone = make(train_dataset=data, **settings)
        beside = make(train_dataset=data.add_column("label", list(range(len(data)))), **settings)
        assert equal(trained(alone), trained(beside))
        assert math.isfinite(logged(alone, "loss")[0])

    def test_a_stream_is_trained_on_for_max_steps(self, make):
        whole, streamed = make(max_steps=3), make(max_steps=3, train_dataset=answered_dataset().to_iterable_dataset())
        streamed.train()
        assert streamed.state.global_step == 3
        with pytest.raises(ValueError, match="max_steps"):
            make(max_steps=-1, train_dataset=answered_dataset().to_iterable_dataset()).train()
        assert len(whole.train_dataset) == 8

    def test_dataset_num_proc_changes_nothing(self, make):
        one, two = make(), make(dataset_num_proc=2)
        assert one.train_dataset.to_list() == two.train_dataset.to_list()

    @pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
    def test_sampling_strategies(self, make, strategy):
        seen = []

        class Rows(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append(state.global_step)

        trainer = make(max_steps=4, train_sampling_strategy=strategy, callbacks=[Rows()])
        sampler = trainer._get_train_sampler()
        names = {"random": "Random", "sequential": "Sequential", "group_by_length": "LengthGrouped"}
        assert names[strategy] in type(sampler).__name__
        trainer.train()
        assert seen == [1, 2, 3, 4]

    def test_packing_and_its_like_are_refused(self, make):
        for field in ("packing", "padding_free", "assistant_only_loss"):
            with pytest.raises(ValueError, match=f"`{field}=True` has no meaning"):
                make.make_args(**{field: True})
        with pytest.raises(ValueError, match="`completion_only_loss=False` has no meaning"):
            make.make_args(completion_only_loss=False)
        with pytest.raises(ValueError, match="`torch_compile` is True"):
            make(torch_compile=True)

    @pytest.mark.parametrize(
        "name", ["group_by_length", "jit_mode_eval", "save_safetensors", "max_prompt_length", "no_such"]
    )
    def test_fields_that_do_not_exist_are_refused(self, make, name):
        with pytest.raises(TypeError, match=name):
            make.make_args(**{name: True})


class TestModels:
    def test_a_peft_config_and_a_peft_model_are_one(self, make):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=True)
        torch.manual_seed(3)
        wrapped = get_peft_model(tiny_model(seed=1), config)
        start = {n: v for n, v in weights(wrapped).items() if "lora" in n}
        by_config, by_model = make(peft_config=config, max_steps=2), make(model=wrapped, max_steps=2)
        with torch.no_grad():
            for name, parameter in by_config.model.named_parameters():
                if "lora" in name:
                    parameter.copy_(start[name])
        assert equal(trained(by_config), trained(by_model))
        assert all(p.requires_grad == ("lora" in n) for n, p in by_model.model.named_parameters())

    @pytest.mark.parametrize("dtype", [None, "auto", "float32", "bfloat16", torch.bfloat16])
    def test_init_kwargs_of_student_and_teacher(self, make, tmp_path, dtype):
        tiny_model(seed=1).save_pretrained(tmp_path / "student")
        tiny_model(seed=2).to(torch.float16).save_pretrained(tmp_path / "teacher")
        kwargs = None if dtype is None else {"dtype": dtype, "attn_implementation": "eager"}
        trainer = make(
            model=str(tmp_path / "student"),
            teacher_model=str(tmp_path / "teacher"),
            model_init_kwargs=kwargs,
            teacher_model_init_kwargs=kwargs,
        )
        named = {None: None, "auto": None, "float32": torch.float32}.get(dtype, torch.bfloat16)
        assert trainer.model.dtype == (named or torch.float32)
        assert trainer.teacher_model.dtype == (named or torch.float16)  # as it was saved
        if kwargs is not None:
            assert trainer.teacher_model.config._attn_implementation == "eager"
        if named is not None or dtype == "auto":
            trainer.train()
            assert math.isfinite(logged(trainer, "loss")[0])

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("form", ["dict", "BitsAndBytesConfig"])
    def test_a_quantization_config_of_the_teacher(self, make, tmp_path, bits, form):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        tiny_model(seed=2, hidden_size=64, intermediate_size=64, num_key_value_heads=4).save_pretrained(tmp_path / "t")
        quantized = {f"load_in_{bits}bit": True}
        config = quantized if form == "dict" else BitsAndBytesConfig(**quantized)
        trainer = make(
            teacher_model=str(tmp_path / "t"), teacher_model_init_kwargs={"quantization_config": config}, max_steps=2
        )
        assert getattr(trainer.teacher_model, f"is_loaded_in_{bits}bit")
        assert all(math.isfinite(loss) for loss in [trainer.train().training_loss, *logged(trainer, "loss")])

    def test_tags(self, make, tmp_path):
        trainer = make(output_dir=str(tmp_path / "out"))
        trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "trl" in trainer._tag_names
        for tag in trainer._tag_names:
            assert f"- {tag}\n" in card
            assert tag in trainer.model.model_tags


class TestOptimization:
    @pytest.mark.parametrize(
        "optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "lion_32bit", "adamw_bnb_8bit"]
    )
    def test_optimizers(self, make, optim):
        if optim in ("lion_32bit", "adamw_bnb_8bit"):
            pytest.importorskip("bitsandbytes")
        trainer = make(optim=optim, max_steps=2, learning_rate=0.01)
        start = weights(trainer.model)
        end = trained(trainer)
        assert not equal(start, {name: end[name] for name in start})
        assert all(value.isfinite().all() for value in end.values())
        if make.method == "promptkd":  # the prompt's is its own
            assert type(trainer.prompt_optimizer.optimizer) is torch.optim.AdamW

    @pytest.mark.parametrize("teacher", ["another", "below the adapter", "a copy"])
    def test_neftune_is_for_the_students_training_pass_only(self, make, teacher):
        def run(alpha):
            torch.manual_seed(0)
            lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
            trainer = make(
                teacher_model="tiny" if teacher == "another" else None,
                peft_config=lora if teacher == "below the adapter" else None,
                neftune_noise_alpha=alpha,
                eval_dataset=answered_dataset(4),
                eval_strategy="steps",
                eval_steps=9,
                max_steps=2,
                learning_rate=0.0,  # the second window's samples come from the same weights, and after a training pass
                eval_on_start=True,
                # Its teacher is then asked with the prompt as it starts
                **({"prompt_update": "simultaneous"} if make.method == "promptkd" else {"response_source": "student"}),
            )
            sampled, original = [], trainer.rollouts.sample

            def record(*args, **kwargs):
                step = args[2]  # below 0 in evaluation
                samples = original(*args, **kwargs)
                sampled.extend([samples] if step >= 0 else [])
                return samples

            trainer.rollouts.sample = record
            trainer.train()
            times = ("runtime", "per_second")
            return (
                trainer,
                {k: v for k, v in trainer.state.log_history[0].items() if not k.endswith(times)},
                sampled,
            )

        (plain, plain_eval, plain_samples), (noisy, noisy_eval, noisy_samples) = run(None), run(20.0)
        assert noisy_eval == plain_eval
        assert noisy_samples == plain_samples
        assert logged(noisy, "entropy/teacher")[0] == pytest.approx(logged(plain, "entropy/teacher")[0], rel=1e-6)
        assert logged(noisy, "loss")[0] != pytest.approx(logged(plain, "loss")[0], rel=1e-3)
        assert not hasattr(noisy.model.get_input_embeddings(), "neftune_noise_alpha")

    def test_a_batch_that_is_too_large_starts_the_run_anew(self, make):
        """`auto_find_batch_size`: what the failed attempt has added to gradients and means is not in the next one."""
        found = make(
            auto_find_batch_size=True, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2
        )
        original, asked = found.compute_loss, []

        def too_large(model, inputs, *args, **kwargs):
            asked.append(inputs["input_ids"].size(0))
            if asked[-1] == 4 and len(asked) == 2:
                raise RuntimeError("CUDA out of memory.")
            return original(model, inputs, *args, **kwargs)

        found.compute_loss = too_large
        end = trained(found)
        assert asked[:2] == [4, 4]
        assert asked[2] < 4
        fresh = make(per_device_train_batch_size=asked[2], gradient_accumulation_steps=2, max_steps=2)
        assert equal(end, trained(fresh))
        assert logged(found, "loss") == logged(fresh, "loss")
        assert logged(found, "entropy/teacher") == logged(fresh, "entropy/teacher")

    def test_settings_that_only_spare_memory(self, make):
        plain = trained(make(max_steps=2))
        assert equal(plain, trained(make(max_steps=2, torch_empty_cache_steps=1)))
        checkpointed = trained(make(max_steps=2, activation_checkpointing=True))
        assert all(torch.allclose(value, checkpointed[name], atol=1e-5) for name, value in plain.items())


class TestEvaluation:
    def test_compute_metrics_after_preprocessed_logits(self, make):
        def preprocess(logits, labels):
            return logits.argmax(dim=-1)

        def accuracy(prediction):
            shown = prediction.label_ids[:, 1:] != -100
            hits = prediction.predictions[:, :-1][shown] == prediction.label_ids[:, 1:][shown]
            return {"accuracy": float(hits.mean()), "tokens": int(shown.sum())}

        trainer = make(
            eval_dataset=answered_dataset(4), compute_metrics=accuracy, preprocess_logits_for_metrics=preprocess
        )
        metrics = trainer.evaluate()
        expected = sum(map(len, trainer.eval_dataset["completion_ids"]))
        assert metrics["eval_tokens"] == expected
        if make.method == "primed":
            assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"])

    def test_batch_eval_metrics(self, make):
        calls = []

        def count(prediction, compute_result):
            calls.append(compute_result)
            return {"batches": float(len(calls))} if compute_result else {}

        trainer = make(
            eval_dataset=answered_dataset(8),
            compute_metrics=count,
            batch_eval_metrics=True,
            per_device_eval_batch_size=4,
        )
        assert trainer.evaluate()["eval_batches"] == 2.0
        assert calls == [False, True]

    def test_on_start_and_several_sets(self, make):
        sets = {"a": answered_dataset(4), "b": answered_dataset(2)}
        trainer = make(eval_dataset=sets, eval_strategy="steps", eval_steps=1, eval_on_start=True)
        trainer.train()
        steps = [e["step"] for e in trainer.state.log_history if "eval_b_loss" in e]
        assert steps == [0, 1]
        assert len(logged(trainer, "eval_a_loss")) == 2

    def test_the_best_model_is_loaded_at_the_end(self, make, tmp_path):
        kept = {}

        class Keep(TrainerCallback):
            def on_save(self, args, state, control, model, **kwargs):
                kept[state.global_step] = final(trainer)

            def on_evaluate(self, args, state, control, metrics, **kwargs):
                metrics["eval_score"] = -abs(state.global_step - 2)

        def final(trainer):
            prompt = {"prompt": trainer.prompt_embeddings().clone()} if hasattr(trainer, "soft_prompt") else {}
            return weights(trainer.model) | prompt

        trainer = make(
            max_steps=3,
            learning_rate=0.01,
            eval_dataset=answered_dataset(4),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
            callbacks=[Keep()],
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        assert equal(final(trainer), kept[2])
        assert not equal(kept[2], kept[3])


class TestSearch:
    def test_is_refused_and_names_the_script(self, make):
        with pytest.raises(NotImplementedError, match=r"`examples/search\.py` makes one for each trial"):
            make().hyperparameter_search(n_trials=1)


class TestCallbacks:
    def test_events_in_their_order(self, make):
        events = []

        class Record(TrainerCallback):
            pass

        names = [name for name in dir(TrainerCallback) if name.startswith("on_")]
        for name in names:
            setattr(Record, name, lambda self, *a, _name=name, **k: events.append(_name))
        make(max_steps=1, gradient_accumulation_steps=2, callbacks=[Record()]).train()
        assert events == [
            *("on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end"),
            *(
                "on_pre_optimizer_step",
                "on_optimizer_step",
                "on_step_end",
                "on_log",
                "on_epoch_end",
                "on_log",
                "on_train_end",
            ),
        ]

    def test_early_stopping(self, make):
        trainer = make(
            max_steps=6,
            learning_rate=0.0,
            eval_dataset=answered_dataset(4),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        )
        trainer.train()
        assert trainer.state.global_step == 3

    def test_input_tokens_are_counted(self, make):
        trainer, total = make(max_steps=2, include_num_input_tokens_seen="non_padding"), []
        original = trainer.compute_loss

        def record(model, inputs, *args, **kwargs):
            total.append(int(inputs["attention_mask"].sum()))
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = record
        trainer.train()
        assert trainer.state.num_input_tokens_seen == sum(total) > 0


class TestReports:
    def test_tensorboard(self, make, tmp_path, monkeypatch):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        trainer = make(max_steps=2, report_to="tensorboard", eval_dataset=answered_dataset(4), eval_strategy="epoch")
        trainer.train()
        events = accumulator.EventAccumulator(str(tmp_path / "events"))
        events.Reload()
        for name in ("loss", "entropy/teacher", "entropy/student"):
            values = [event.value for event in events.Scalars(f"train/{name}")]
            assert values == pytest.approx(logged(trainer, name))
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2]

    @pytest.mark.slow
    def test_trackio(self, make, tmp_path):
        """In a process of its own: Trackio takes its folder's name from the environment when it is imported."""
        pytest.importorskip("trackio")
        environment = {
            **os.environ,
            "TRACKIO_DIR": str(tmp_path / "trackio"),
            "HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(
                [*(str(ROOT / "tests" / name) for name in ("support", "trainer")), *sys.path]
            ),
        }
        command = [sys.executable, "-c", TRACKIO_RUN, make.method, str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        history = [entry for entry in json.loads(done.stdout.splitlines()[-1]) if "loss" in entry]
        (database,) = (tmp_path / "trackio").glob("*.db")
        with contextlib.closing(sqlite3.connect(database)) as connection:
            rows = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
        kept = [row for row in rows if "train/loss" in row]
        assert len(kept) == len(history) == 2
        for row, entry in zip(kept, history, strict=True):
            for name in ("loss", "entropy/teacher", "entropy/student"):
                assert row[f"train/{name}"] == pytest.approx(entry[name])


TRACKIO_RUN = """
import json, sys
from pathlib import Path
from runs import short_run
from test_trl_conventions import Maker
from trl_promptkd import PrimedDistillConfig, PromptKDConfig

folder = Path(sys.argv[2])
make = Maker(
    sys.argv[1],
    lambda **settings: short_run(PromptKDConfig, folder, settings),
    lambda **settings: short_run(PrimedDistillConfig, folder, settings),
)
trainer = make(max_steps=2, report_to="trackio", project="conventions")
trainer.train()
print(json.dumps(trainer.state.log_history))
"""


class TestElsewhere:
    def test_the_tests_that_hold_the_other_conventions_are_there(self):
        for names in ELSEWHERE.values():
            for name in names:
                path, *parts = name.split("::")
                (file,) = (ROOT / "tests").rglob(path)
                body = ast.parse(file.read_text()).body
                for part in parts:
                    found = [node for node in body if getattr(node, "name", None) == part]
                    assert found, name
                    body = found[0].body
