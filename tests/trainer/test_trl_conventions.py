"""What TRL and transformers document for every trainer, against both trainers here.

More of it is in test_both_trainers.py. What is refused is in test_bad_inputs.py.
"""

import contextlib
import json
import math
import os
import sqlite3
import subprocess
import sys

import pytest
import torch
from paths import SUPPORT
from peft import get_peft_model
from tiny import answered_dataset, chat_dataset, prompt_dataset, tiny_model, tiny_tokenizer, weights
from trainers import BEST, EVALUATES, adapter_of, all_rows, equal, keep_windows, logged, lora, trained, trained_parts
from transformers import TrainerCallback


def as_conversation(row):
    roles = {"prompt": "user", "completion": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in row.items()}


class TestData:
    @pytest.mark.parametrize(
        ("rows", "convert"),
        [
            (chat_dataset, None),
            (answered_dataset, None),
            (answered_dataset, as_conversation),
            (prompt_dataset, None),
            (prompt_dataset, as_conversation),
        ],
    )
    def test_every_format_with_other_columns_beside_it(self, make, rows, convert):
        data = rows().map(convert) if convert else rows()
        samples = {"response_source": "student"} if rows is prompt_dataset and make.method == "primed" else {}
        alone = make(train_dataset=data, **samples)
        beside = make(train_dataset=data.add_column("label", list(range(len(data)))), **samples)
        assert equal(trained(alone), trained(beside))
        assert math.isfinite(logged(alone, "loss")[0])

    def test_a_stream_is_trained_on_for_max_steps(self, make):
        trainer = make(max_steps=3, train_dataset=chat_dataset().to_iterable_dataset())
        trainer.train()
        assert trainer.state.global_step == 3
        assert all(loss > 0 for loss in logged(trainer, "loss"))
        with pytest.raises(ValueError, match="max_steps"):
            make(max_steps=-1, train_dataset=answered_dataset().to_iterable_dataset()).train()

    def test_dataset_num_proc_changes_nothing(self, make):
        one, two = make(), make(dataset_num_proc=2)
        assert one.train_dataset.to_list() == two.train_dataset.to_list()

    @pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
    def test_sampling_strategies(self, make, strategy):
        sampler = make(max_steps=4, train_sampling_strategy=strategy)._get_train_sampler()
        names = {"random": "Random", "sequential": "Sequential", "group_by_length": "LengthGrouped"}
        assert names[strategy] in type(sampler).__name__

    @pytest.mark.parametrize(
        "name", ["group_by_length", "jit_mode_eval", "save_safetensors", "max_prompt_length", "no_such"]
    )
    def test_fields_that_do_not_exist_are_refused(self, make, name):
        with pytest.raises(TypeError, match=name):
            make.args(**{name: True})


class TestModels:
    def test_a_peft_config_and_a_peft_model_are_one(self, make):
        config = lora(target_modules=["q_proj"])
        torch.manual_seed(3)
        wrapped = get_peft_model(tiny_model(seed=1), config)
        start = adapter_of(wrapped)
        by_config, by_model = make(peft_config=config, max_steps=2), make(wrapped, max_steps=2)
        with torch.no_grad():
            for name, parameter in by_config.model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        assert equal(trained(by_config), trained(by_model))
        assert all(p.requires_grad == ("lora" in n) for n, p in by_model.model.named_parameters())

    @pytest.mark.parametrize("dtype", [None, "auto", "float32", "bfloat16", torch.bfloat16])
    def test_names_and_init_kwargs_of_student_and_teacher(self, make, tmp_path, dtype):
        tiny_model(seed=1).save_pretrained(tmp_path / "student")
        tiny_model(seed=2).to(torch.float16).save_pretrained(tmp_path / "teacher")
        for name in ("student", "teacher"):
            tiny_tokenizer().save_pretrained(tmp_path / name)
        kwargs = None if dtype is None else {"dtype": dtype, "attn_implementation": "eager"}
        trainer = make(
            str(tmp_path / "student"),
            None,
            processing_class=None,
            model_init_kwargs=kwargs,
            teacher_model_name_or_path=str(tmp_path / "teacher"),
            teacher_model_init_kwargs=kwargs,
        )
        named = {None: None, "auto": None, "float32": torch.float32}.get(dtype, torch.bfloat16)
        assert trainer.model.dtype == (named or torch.float32)
        assert trainer.teacher_model.dtype == (named or torch.float16)  # as it was saved
        if kwargs is not None:
            assert trainer.args.teacher_model_init_kwargs == {"dtype": dtype, "attn_implementation": "eager"}
            assert trainer.teacher_model.config._attn_implementation == "eager"
            trainer.train()
            assert math.isfinite(logged(trainer, "loss")[0])
        if make.method == "promptkd":
            assert trainer.prompt_embeddings().dtype == torch.float32


class TestOptimization:
    @pytest.mark.parametrize(
        "optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "lion_32bit", "adamw_bnb_8bit"]
    )
    def test_optimizers(self, make, optim):
        if optim in ("lion_32bit", "adamw_bnb_8bit"):
            pytest.importorskip("bitsandbytes")
        trainer = make(optim=optim, max_steps=2, learning_rate=0.01)
        start, end = weights(trainer.model), trained(trainer)
        assert not equal(start, {name: end[name] for name in start})
        assert all(value.isfinite().all() for value in end.values())

    @pytest.mark.parametrize("teacher", ["another", "below the adapter", "a copy"])
    def test_neftune_is_for_the_students_training_pass_only(self, make, teacher):
        def run(alpha):
            torch.manual_seed(0)
            trainer = make(
                teacher_model="tiny" if teacher == "another" else None,
                peft_config=lora(init_lora_weights=False) if teacher == "below the adapter" else None,
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
            windows = keep_windows(trainer)
            trainer.train()
            first = trainer.state.log_history[0].items()
            untimed = {name: value for name, value in first if not name.endswith(("runtime", "per_second"))}
            return trainer, untimed, all_rows(windows)

        (plain, plain_eval, plain_samples), (noisy, noisy_eval, noisy_samples) = run(None), run(20.0)
        assert noisy_eval == plain_eval
        assert noisy_samples == plain_samples
        assert logged(noisy, "entropy/teacher")[0] == pytest.approx(logged(plain, "entropy/teacher")[0], rel=1e-6)
        assert logged(noisy, "loss")[0] != pytest.approx(logged(plain, "loss")[0], rel=1e-3)
        assert not hasattr(noisy.model.get_input_embeddings(), "neftune_noise_alpha")

    def test_a_batch_that_is_too_large_starts_the_run_anew(self, make):
        """`auto_find_batch_size`: what the failed attempt has added to gradients and means is not in the next one."""
        settings = {"gradient_accumulation_steps": 2, "max_steps": 2}
        found = make(auto_find_batch_size=True, per_device_train_batch_size=4, **settings)
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
        fresh = make(per_device_train_batch_size=asked[2], **settings)
        assert equal(end, trained(fresh))
        assert logged(found, "loss") == logged(fresh, "loss")
        assert logged(found, "entropy/teacher") == logged(fresh, "entropy/teacher")

    def test_settings_that_only_spare_memory(self, make):
        plain = trained(make(max_steps=2))
        assert equal(plain, trained(make(max_steps=2, torch_empty_cache_steps=1)))
        kept = trained(make(max_steps=2, gradient_checkpointing=False))
        assert all(torch.allclose(value, kept[name], atol=1e-5) for name, value in plain.items())


class TestEvaluation:
    def test_raw_data_and_several_sets(self, make):
        name = "forward_kl" if make.method == "promptkd" else "kl/student_teacher"
        trainer = make(eval_dataset={"a": answered_dataset(4), "b": chat_dataset(4)})
        metrics = trainer.evaluate()
        assert {"eval_a_loss", "eval_b_loss", f"eval_a_{name}", f"eval_b_{name}"} <= metrics.keys()
        assert f"eval_{name}" in trainer.evaluate(chat_dataset(4))
        assert trainer.predict(chat_dataset(4)).metrics["test_loss"] == pytest.approx(metrics["eval_b_loss"], rel=1e-6)

    def test_compute_metrics_after_preprocessed_logits(self, make):
        def preprocess(logits, labels):
            assert logits.shape == (*labels.shape, 40)  # the student's
            return logits.argmax(dim=-1)

        def accuracy(prediction):
            shown = prediction.label_ids[:, 1:] != -100
            hits = prediction.predictions[:, :-1][shown] == prediction.label_ids[:, 1:][shown]
            return {"accuracy": float(hits.mean()), "tokens": int(shown.sum())}

        trainer = make(
            eval_dataset=answered_dataset(4), compute_metrics=accuracy, preprocess_logits_for_metrics=preprocess
        )
        metrics = trainer.evaluate()
        assert metrics["eval_tokens"] == sum(map(len, trainer.eval_dataset["completion_ids"]))
        if make.method == "primed":
            assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"])

    def test_batch_eval_metrics(self, make):
        calls = []

        def count(prediction, compute_result):
            calls.append(compute_result)
            return {"batches": float(len(calls))} if compute_result else {}

        trainer = make(eval_dataset=answered_dataset(8), compute_metrics=count, batch_eval_metrics=True)
        assert trainer.evaluate()["eval_batches"] == 2.0
        assert calls == [False, True]

    def test_on_start_and_several_sets(self, make):
        sets = {"a": answered_dataset(4), "b": answered_dataset(2)}
        trainer = make(eval_dataset=sets, eval_on_start=True, **EVALUATES)
        trainer.train()
        assert [entry["step"] for entry in trainer.state.log_history if "eval_b_loss" in entry] == [0, 1]
        assert len(logged(trainer, "eval_a_loss")) == 2

    @pytest.mark.parametrize("save_only_model", [False, True])
    def test_the_best_model_is_loaded_at_the_end(self, make, save_only_model):
        kept = {}

        class Keep(TrainerCallback):
            def on_save(self, args, state, control, model, **kwargs):
                kept[state.global_step] = trained_parts(trainer)

            def on_evaluate(self, args, state, control, metrics, **kwargs):
                metrics["eval_score"] = -abs(state.global_step - 2)

        trainer = make(
            prompt={"encoder": "mlp" if save_only_model else "embedding"},
            max_steps=3,
            learning_rate=0.01,
            eval_dataset=answered_dataset(4),
            metric_for_best_model="score",
            greater_is_better=True,
            save_only_model=save_only_model,
            callbacks=[Keep()],
            **BEST,
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        assert equal(trained_parts(trainer), kept[2])
        assert not equal(kept[2], kept[3])


class TestCallbacks:
    def test_events_in_their_order(self, make):
        events = []

        class Record(TrainerCallback):
            pass

        for name in dir(TrainerCallback):
            if name.startswith("on_"):
                setattr(Record, name, lambda self, *a, _name=name, **k: events.append(_name))
        make(max_steps=1, gradient_accumulation_steps=2, callbacks=[Record()]).train()
        names = (
            "init_end train_begin epoch_begin step_begin substep_end pre_optimizer_step optimizer_step step_end log"
        )
        assert events == [f"on_{name}" for name in [*names.split(), "epoch_end", "log", "train_end"]]

    def test_input_tokens_are_counted(self, make):
        trainer, total = make(max_steps=2, include_num_input_tokens_seen="non_padding"), []
        original = trainer.compute_loss

        def record(model, inputs, *args, **kwargs):
            total.append(int(inputs["attention_mask"].sum()))
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = record
        trainer.train()
        assert trainer.state.num_input_tokens_seen == sum(total) > 0


TRACKIO_RUN = """
import json, sys
from pathlib import Path
from trainers import Maker

trainer = Maker(sys.argv[1], Path(sys.argv[2]))(max_steps=2, report_to="trackio", project="conventions")
trainer.train()
print(json.dumps(trainer.state.log_history))
"""


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
        folders = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
        environment = {**os.environ, **folders, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}
        command = [sys.executable, "-c", TRACKIO_RUN, make.method, str(tmp_path)]
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
