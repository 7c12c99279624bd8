import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from reference import greedy, primed_loss, sgd_step
from tiny import (
    WORDS,
    answered_dataset,
    chat_dataset,
    difference,
    prompt_dataset,
    tiny_model,
    tiny_tokenizer,
    weights,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_promptkd import DataCollatorForPrimedDistillation, PrimedDistillTrainer, PrimingTemplate
from trl_promptkd.data.primed import prompts_of_views


PRIMING = PrimingTemplate("red blue green ")
GREEDY = {"do_sample": False}
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}


def make_trainer(args, student=None, teacher="tiny", dataset=None, **kwargs):
    kwargs.setdefault("processing_class", tiny_tokenizer())
    kwargs.setdefault("priming", PRIMING)
    return PrimedDistillTrainer(
        model=tiny_model(seed=1) if student is None else student,
        teacher_model=tiny_model(seed=2, num_hidden_layers=3) if teacher == "tiny" else teacher,
        args=args,
        train_dataset=answered_dataset() if dataset is None else dataset,
        **kwargs,
    )


def keep_windows(trainer):
    """Record what the trainer trains on, as (prompt ids, teacher prompt ids, completion ids)."""
    windows, original = [], trainer.get_batch_samples

    def record(*args):
        batches, count = original(*args)
        rows = []
        for batch in batches:
            completions = [
                ids[labels != -100].tolist() for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            ]
            rows += list(zip(*prompts_of_views(batch), completions, strict=True))
        windows.append(rows)
        return batches, count

    trainer.get_batch_samples = record
    return windows


class TestOneStep:
    """One whole step against the row-by-row implementation in `reference.py`."""

    @pytest.mark.parametrize(("beta", "skew"), [(1.0, 0.0), (0.0, 0.0), (0.3, 0.0), (1.0, 0.1), (0.0, 0.1)])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    def test_equals_rows_alone(self, make_primed_args, family, beta, skew):
        student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
        args = make_primed_args(gradient_accumulation_steps=2, kd_beta=beta, skew=skew, **SGD)
        reference, before = copy.deepcopy(student), weights(teacher)
        trainer = make_trainer(args, student, teacher)
        windows = keep_windows(trainer)
        trainer.train()

        (rows,) = windows
        assert len({len(prompt) for prompt, _, _ in rows}) > 1  # there is padding
        tokenizer, data = tiny_tokenizer(), answered_dataset().to_list()
        for prompt, teacher_prompt, completion in rows:
            row = next(r for r in data if tokenizer(r["prompt"])["input_ids"] == prompt)
            assert teacher_prompt == tokenizer("red blue green " + row["prompt"])["input_ids"]
            assert completion == [*tokenizer(row["completion"])["input_ids"], 0]
        count = sum(len(completion) for _, _, completion in rows)
        expected = primed_loss(reference, teacher, rows, args.alpha, args.kd_temperature, beta, skew)
        norm = sgd_step(reference, expected["loss"] / count, 0.05)
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(float(expected["loss"].detach()) / count, rel=1e-3)
        assert log["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert difference(weights(trainer.model), weights(reference)) < 1e-4
        assert difference(weights(teacher), before) == 0
        assert all(parameter.grad is None for parameter in teacher.parameters())
        for key, name in (
            ("ce", "ce"),
            ("kd", "kd"),
            ("kl/student_teacher", "kl"),
            ("entropy/student", "student_entropy"),
            ("entropy/teacher", "teacher_entropy"),
            ("teacher/top1_agreement", "agree"),
            ("mean_token_accuracy", "right"),
        ):
            assert log[key] == pytest.approx(expected[name] / count, rel=1e-3, abs=1e-6), key
        assert log["completion_tokens"] == count
        assert log["dropped_rows"] == 0
        weighted = args.alpha * log["ce"] + (1 - args.alpha) * args.kd_temperature**2 * log["kd"]
        assert log["loss"] == pytest.approx(weighted, rel=1e-5)

    def test_the_priming_gain_is_of_the_first_of_sixteen_micro_batches(self, make_primed_args):
        teacher = tiny_model(seed=2)
        trainer = make_trainer(
            make_primed_args(gradient_accumulation_steps=2, max_steps=9), teacher=teacher, dataset=answered_dataset(16)
        )
        windows = keep_windows(trainer)
        calls = []
        trainer.teacher_model.get_decoder().layers[0].register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        assert len(calls) == 9 * 2 + 2
        logs = trainer.state.log_history
        assert [index for index, log in enumerate(logs) if "priming/gain_nats" in log] == [0, 8]
        first = windows[0][:2]
        expected = primed_loss(teacher, teacher, first, 0.5, 1.0)["gain"]
        assert logs[0]["priming/gain_nats"] == pytest.approx(expected / sum(len(row[2]) for row in first), rel=1e-3)

    def test_what_only_stands_in_logs_is_worked_out_for_logged_steps(self, make_primed_args, monkeypatch):
        from trl_promptkd.trainer import primed_distill_trainer

        asked, original = [], primed_distill_trainer.primed_loss_sums

        def spy(*args, **kwargs):
            asked.append(kwargs["with_metrics"])
            return original(*args, **kwargs)

        monkeypatch.setattr(primed_distill_trainer, "primed_loss_sums", spy)
        trainer = make_trainer(make_primed_args(max_steps=4, logging_steps=4))
        trainer.train()
        assert asked == [True, False, False, True]  # the first one for the gain
        assert {"entropy/student", "teacher/top1_agreement", "kl/student_teacher"} <= trainer.state.log_history[
            0
        ].keys()

    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    @pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (1.0, 5.942), (0.0, 1.0), (0.5, 1.0)])
    def test_is_zero_where_teacher_and_student_are_one_and_nothing_is_primed(
        self, make_primed_args, family, beta, temperature
    ):
        args = make_primed_args(alpha=0.0, kd_beta=beta, kd_temperature=temperature, per_device_train_batch_size=4)
        trainer = make_trainer(args, tiny_model(family), tiny_model(family), priming=None)
        trainer.train()
        log = trainer.state.log_history[0]
        assert abs(log["loss"]) < 1e-5
        assert abs(log["kl/student_teacher"]) < 1e-5
        assert log["teacher/top1_agreement"] == 1.0
        assert "priming/gain_nats" not in log

    @pytest.mark.parametrize("lora", [False, True])
    def test_mixed_precision_is_close(self, make_primed_args, lora):
        """bfloat16 is TRL's default; the self-teacher of a LoRA student goes through the same autocast as the student."""
        losses = []
        for bf16 in (False, True):
            args = make_primed_args(bf16=bf16, alpha=0.0, gradient_checkpointing=True, max_steps=2)
            peft_config = LoraConfig(task_type="CAUSAL_LM", r=4) if lora else None
            trainer = make_trainer(args, teacher=None if lora else "tiny", peft_config=peft_config)
            trainer.train()
            losses.append(trainer.state.log_history[1]["loss"])
            if lora:
                plain = make_trainer(
                    make_primed_args(bf16=bf16, alpha=0.0), teacher=None, priming=None, peft_config=peft_config
                )
                plain.train()
                assert abs(plain.state.log_history[0]["loss"]) < 1e-5
        assert losses[1] == pytest.approx(losses[0], rel=0.05)

    @pytest.mark.parametrize("chunk", [1, 5, None])
    def test_chunks_change_nothing(self, make_primed_args, chunk):
        results = []
        for size in (1024, chunk):
            trainer = make_trainer(make_primed_args(loss_chunk_size=size, **SGD))
            trainer.train()
            results.append(weights(trainer.model))
        assert difference(*results) < 1e-5


class TestTokenCounts:
    @pytest.mark.parametrize("source", ["dataset", "student"])
    def test_the_split_of_a_window_changes_nothing(self, make_primed_args, source):
        """Trap 1."""
        results = []
        for rows, micro_batches in ((4, 1), (2, 2), (1, 4)):
            args = make_primed_args(
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=micro_batches,
                response_source=source,
                max_steps=2,
                **SGD,
            )
            trainer = make_trainer(args)
            trainer.train()
            log = trainer.state.log_history[0]
            results.append((weights(trainer.model), log["loss"], log["completion_tokens"], log["ce"]))
        for other in results[1:]:
            assert difference(other[0], results[0][0]) < 1e-4
            assert other[1:] == pytest.approx(results[0][1:], rel=1e-4)

    def test_the_end_of_text_is_trained_on(self, make_primed_args):
        """Trap 9: also where it is the pad token."""
        for pad_is_eos in (True, False):
            trainer = make_trainer(
                make_primed_args(), dataset=chat_dataset(), processing_class=tiny_tokenizer(pad_is_eos=pad_is_eos)
            )
            batch = next(iter(trainer.get_train_dataloader()))
            for view in ("", "teacher_"):
                ends = batch[view + "input_ids"][batch[view + "labels"] == 0]
                assert len(ends) == 2


class TestSources:
    def run(self, args, dataset, **kwargs):
        trainer = make_trainer(args, dataset=dataset, **kwargs)
        windows = keep_windows(trainer)
        trainer.train()
        return trainer, [row for window in windows for row in window]

    @pytest.mark.parametrize("make", [prompt_dataset, answered_dataset])
    def test_the_primed_teacher_writes_the_answers(self, make_primed_args, make, tmp_path):
        teacher = tiny_model(seed=2)
        args = make_primed_args(response_source="teacher", generation_kwargs=GREEDY, max_steps=4)
        trainer, rows = self.run(args, make(), teacher=teacher, eval_dataset=make(3))
        assert args.alpha == pytest.approx(0.6093, abs=1e-4)
        assert len(rows) == 8
        for _, teacher_prompt, completion in rows:
            assert completion == greedy(teacher, teacher_prompt, 6, 0)
        assert (tmp_path / "run" / "_teacher_answers").is_dir()
        # It is a data set that anybody can open
        stored = Dataset.from_parquet([str(p) for p in (tmp_path / "run" / "_teacher_answers").iterdir()])
        assert set(stored.column_names) == {"key", "prompt", "completion", "completion_ids"}
        assert stored[0]["prompt"].startswith("red blue green")
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] > 0
        assert trainer.evaluate(make(3))["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)

    def test_the_students_own_samples(self, make_primed_args):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        reference = copy.deepcopy(student)
        args = make_primed_args(response_source="student", generation_kwargs=GREEDY, **SGD)
        assert args.alpha == 0.0
        trainer, rows = self.run(args, prompt_dataset(), student=student, teacher=teacher)
        for prompt, teacher_prompt, completion in rows:
            assert teacher_prompt == [23, 24, 25, *prompt]
            assert completion == greedy(reference, prompt, 6, 0)
        count = sum(len(row[2]) for row in rows)
        log = trainer.state.log_history[0]
        expected = primed_loss(reference, teacher, rows, 0.0, args.kd_temperature)
        assert log["loss"] == pytest.approx(float(expected["loss"].detach()) / count, rel=1e-3)
        assert log["rollout/mean_length"] == count / len(rows)
        assert log["completion_tokens"] == count

    def test_student_samples_differ_from_step_to_step_but_not_from_run_to_run(self, make_primed_args):
        args = {"response_source": "student", "max_steps": 3, "learning_rate": 0.0}
        dataset = Dataset.from_list([{"prompt": "the cat"}] * 8)
        first, second = (self.run(make_primed_args(**args), dataset)[1] for _ in range(2))
        assert first == second
        assert len({tuple(row[2]) for row in first}) > 1

    def test_conversations_and_streams(self, make_primed_args):
        trainer, rows = self.run(make_primed_args(), chat_dataset().to_iterable_dataset())
        assert len(rows) == 2
        assert trainer.state.log_history[0]["loss"] > 0

    def test_columns_are_variables_of_the_template(self, make_primed_args):
        dataset = answered_dataset().add_column("color", ["green"] * 8)
        _, rows = self.run(make_primed_args(), dataset, priming=PrimingTemplate("{{ color }} "))
        assert all(teacher_prompt == [25, *prompt] for prompt, teacher_prompt, _ in rows)

    def test_the_teacher_may_see_the_reference_answer(self, make_primed_args):
        _, rows = self.run(make_primed_args(), answered_dataset(), priming="reference_answer")
        for _, teacher_prompt, completion in rows:
            answer = completion[:-1]
            assert answer in [teacher_prompt[i : i + len(answer)] for i in range(len(teacher_prompt))]

    def test_a_collator_of_ones_own(self, make_primed_args):
        own = DataCollatorForPrimedDistillation(tiny_tokenizer(), PRIMING)
        losses = []
        for collator in (None, own):
            trainer = make_trainer(make_primed_args(), data_collator=collator)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    @pytest.mark.parametrize("fault", ["fewer", "another order"])
    def test_a_collator_with_other_completions_in_the_views_is_refused(self, make_primed_args, fault):
        own = DataCollatorForPrimedDistillation(tiny_tokenizer(), PRIMING)

        def broken(rows):
            batch = own(rows)
            if fault == "fewer":
                batch["teacher_labels"][0] = -100
            else:
                for name in ("teacher_input_ids", "teacher_attention_mask", "teacher_labels"):
                    batch[name] = batch[name].flip(0)
            return batch

        with pytest.raises(ValueError, match="two views hold different completions"):
            make_trainer(make_primed_args(), data_collator=broken).train()

    def test_a_collator_of_ones_own_cannot_have_answers_written(self, make_primed_args):
        own = DataCollatorForPrimedDistillation(tiny_tokenizer(), PRIMING)
        with pytest.raises(ValueError, match="needs rows that the trainer prepares, but `data_collator` is set"):
            make_trainer(make_primed_args(response_source="teacher"), data_collator=own)

    def test_long_rows_are_dropped_and_their_number_is_logged(self, make_primed_args):
        trainer, rows = self.run(make_primed_args(teacher_max_length=9, max_steps=2), answered_dataset(8))
        dropped = trainer.state.log_history[0]["dropped_rows"]
        assert 0 < dropped < 8
        assert len(trainer.train_dataset) == 8 - dropped
        assert all(len(row[1]) + len(row[2]) <= 9 for row in rows)

    def test_shuffle_and_group_by_length(self, make_primed_args):
        args = make_primed_args(shuffle_dataset=True, train_sampling_strategy="group_by_length", max_steps=4)
        _, rows = self.run(args, answered_dataset(8))
        assert len({tuple(row[0]) for row in rows}) == 8

    def test_unused_columns_may_be_removed(self, make_primed_args):
        trainer, _ = self.run(make_primed_args(remove_unused_columns=True), answered_dataset())
        assert trainer.state.log_history[0]["loss"] > 0


class TestRows:
    """What the trainer makes of the user's rows; see test_data.py, test_chat_template.py and test_tokenize.py."""

    @pytest.mark.parametrize("source", ["teacher", "student"])
    def test_answers_that_are_not_trained_on_are_not_looked_at(self, make_primed_args, source):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template += "{% if add_generation_prompt %}red{% endif %}"  # as one that opens thoughts
        dataset = chat_dataset(4)
        args = make_primed_args(response_source=source, alpha=0.0)
        make_trainer(args, dataset=dataset, eval_dataset=dataset, processing_class=tokenizer).train()
        with pytest.raises(
            ValueError, match="Row 0 of `train_dataset`: The chat template writes a prompt differently"
        ):
            make_trainer(make_primed_args(), dataset=dataset, processing_class=tokenizer)

    def test_a_transform_is_honoured_in_both_data_sets(self, make_primed_args):
        data = answered_dataset(4).with_transform(
            lambda batch: {"prompt": ["the cat"] * len(batch["prompt"]), "completion": batch["completion"]}
        )
        trainer = make_trainer(make_primed_args(), dataset=data, eval_dataset=data, priming=PrimingTemplate("red "))
        for dataset in (trainer.train_dataset, trainer.eval_dataset):
            assert dataset["prompt_ids"][:] == [[12, 13]] * 4
            assert dataset["teacher_prompt_ids"][:] == [[23, 12, 13]] * 4
        trainer.train()
        trainer.evaluate(data)


class TestTeachers:
    def test_full_student_has_a_frozen_copy_of_its_start(self, make_primed_args):
        student = tiny_model(seed=1)
        start = copy.deepcopy(student)
        trainer = make_trainer(make_primed_args(max_steps=3, alpha=0.0, **SGD), student, teacher=None)
        trainer.train()
        assert difference(weights(trainer.model), weights(start)) > 1e-3
        assert difference(weights(trainer.teacher_model), weights(start)) == 0

    def test_lora_student_holds_one_copy_of_the_weights(self, make_primed_args):
        trainer = make_trainer(make_primed_args(), teacher=None, peft_config=LoraConfig(task_type="CAUSAL_LM", r=4))
        assert trainer.teacher_model is None
        size = sum(parameter.numel() for parameter in tiny_model().parameters())
        held = {
            id(p): p.numel()
            for value in vars(trainer).values()
            if isinstance(value, torch.nn.Module)
            for p in value.parameters()
        }
        adapter = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
        assert sum(held.values()) == size + adapter

    def test_the_first_step_equals_that_with_a_separate_teacher(self, make_primed_args):
        results = []
        for teacher in (None, tiny_model(seed=1)):
            torch.manual_seed(0)
            trainer = make_trainer(
                make_primed_args(alpha=0.3, **SGD),
                tiny_model(seed=1),
                teacher,
                peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
            )
            trainer.train()
            results.append((weights(trainer.model), trainer.state.log_history[0]["loss"]))
        assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
        assert difference(results[0][0], results[1][0]) < 1e-5

    def test_the_priming_moves_into_the_adapter(self, make_primed_args):
        """Prompt internalisation: the loss against the primed start falls, also on rows that were not trained on."""
        args = make_primed_args(
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            alpha=0.0,
            kd_temperature=1.0,
            response_source="student",
            logging_steps=20,
        )
        pairs = [{"prompt": f"{a} {b}"} for a in WORDS for b in WORDS]
        trainer = make_trainer(
            args,
            teacher=None,
            dataset=Dataset.from_list(pairs[::2]),
            eval_dataset=Dataset.from_list(pairs[1::40]),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8),
        )
        before = trainer.evaluate()["eval_kl/student_teacher"]
        trainer.train()
        after = trainer.evaluate()["eval_kl/student_teacher"]
        assert before > 0.05
        assert after < 0.85 * before

    def test_answers_of_a_self_teacher_stay_when_its_adapter_has_learned(self, make_primed_args):
        """PEFT freezes an adapter that is switched off, which must not make it look like a part of the teacher."""
        args = make_primed_args(response_source="teacher", max_steps=3, learning_rate=0.1)
        for rank in (4, 8):
            trainer = make_trainer(args, teacher=None, peft_config=LoraConfig(task_type="CAUSAL_LM", r=rank))
            answers = trainer.train_dataset["completion_ids"][:]
            trainer.train()
            trainer.evaluate(answered_dataset())
            files = sorted(path.name for path in Path(args.output_dir, "_teacher_answers").iterdir())
            assert len(files) == 1
            trainer.predict(answered_dataset())
            assert trainer._prepare(answered_dataset(), "x")["completion_ids"][:] == answers

    @pytest.mark.parametrize("settings", [{"bias": "all"}, {"init_lora_weights": "olora"}])
    def test_an_adapter_that_changes_its_base_cannot_have_it_as_teacher(self, make_primed_args, settings):
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
        with pytest.raises(ValueError, match=r"student's adapter has .*Pass `teacher_model`"):
            make_trainer(make_primed_args(), tiny_model("gpt2"), teacher=None, peft_config=peft_config)
        make_trainer(make_primed_args(), tiny_model("gpt2"), tiny_model("gpt2", seed=2), peft_config=peft_config)

    def test_none_for_both_is_warned_about(self, make_primed_args, caplog, propagate):
        make_trainer(make_primed_args(), teacher=None, priming=None)
        assert "`teacher_model` and `priming` are both None" in caplog.text

    def test_names_are_loaded_by_the_trainer(self, make_primed_args, tmp_path):
        for name, seed in (("student", 1), ("teacher", 2)):
            tiny_model(seed=seed).save_pretrained(tmp_path / name)
            tiny_tokenizer().save_pretrained(tmp_path / name)
        args = make_primed_args(
            teacher_model_name_or_path=str(tmp_path / "teacher"), teacher_model_init_kwargs={"dtype": "bfloat16"}
        )
        trainer = PrimedDistillTrainer(
            model=str(tmp_path / "student"), args=args, train_dataset=answered_dataset(), priming="teacher"
        )
        assert trainer.teacher_model.dtype == torch.bfloat16
        trainer.train()
        assert trainer.state.log_history[0]["loss"] > 0

    @pytest.mark.parametrize("bits", [4, 8])
    def test_quantized_student_and_teacher(self, make_primed_args, tmp_path, bits):
        pytest.importorskip("bitsandbytes")
        size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
        for name, seed in (("student", 1), ("teacher", 2)):
            tiny_model(seed=seed, **size).save_pretrained(tmp_path / name)
        quantized = {"quantization_config": {f"load_in_{bits}bit": True}}
        trainer = make_trainer(
            make_primed_args(max_steps=3, teacher_model_init_kwargs=quantized),
            str(tmp_path / "student"),
            str(tmp_path / "teacher"),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        )
        assert getattr(trainer.teacher_model, f"is_loaded_in_{bits}bit")
        adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_B" in n}
        trainer.train()
        assert all((p - adapter[n]).abs().max() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)
        assert trainer.state.log_history[0]["loss"] > 0

    def test_padded_vocabularies_are_compared_on_the_real_ids(self, make_primed_args):
        """Trap 8: the logits of ids that stand for nothing must not matter."""
        losses = []
        for size in (40, 64):
            teacher = tiny_model(seed=2, vocab_size=64)
            teacher.resize_token_embeddings(size)
            trainer = make_trainer(make_primed_args(), tiny_model(seed=1, vocab_size=48), teacher)
            assert trainer.shared_vocab_size == len(tiny_tokenizer())
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_lora_dropout_stays_and_the_models_own_goes(self, make_primed_args):
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1)
        trainer = make_trainer(
            make_primed_args(), tiny_model("gpt2"), tiny_model("gpt2", seed=2), peft_config=peft_config
        )
        rates = {
            "lora" if "lora_dropout" in name else "own": module.p
            for name, module in trainer.model.named_modules()
            if isinstance(module, torch.nn.Dropout)
        }
        assert rates == {"lora": 0.1, "own": 0.0}


class TestResume:
    @pytest.mark.parametrize("source", ["dataset", "student", "teacher"])
    @pytest.mark.parametrize("lora", [False, True])
    def test_six_steps_equal_three_and_three(self, make_primed_args, tmp_path, lora, source):
        """Trap 19."""

        def run(folder, resume=None):
            args = make_primed_args(
                output_dir=str(tmp_path / folder),
                max_steps=6,
                gradient_accumulation_steps=2,
                response_source=source,
                save_strategy="steps",
                save_steps=3,
            )
            peft_config = LoraConfig(task_type="CAUSAL_LM", r=4) if lora else None
            trainer = make_trainer(args, dataset=answered_dataset(16), peft_config=peft_config)
            trainer.train(resume_from_checkpoint=resume)
            return weights(trainer.model), [log["loss"] for log in trainer.state.log_history[:6]]

        student, losses = run("whole")
        again, losses_again = run("resumed", str(tmp_path / "whole" / "checkpoint-3"))
        assert difference(student, again) <= 1e-6
        assert losses == pytest.approx(losses_again, rel=1e-6)


class TestEvaluation:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_equals_rows_alone(self, make_primed_args, family):
        student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
        args = make_primed_args(per_device_eval_batch_size=3)
        trainer = make_trainer(args, student, teacher, eval_dataset=answered_dataset(7))
        metrics = trainer.evaluate()
        tokenizer = tiny_tokenizer()
        rows = []
        for row in answered_dataset(7):
            prompt = tokenizer(row["prompt"])["input_ids"]
            rows.append((prompt, [23, 24, 25, *prompt], [*tokenizer(row["completion"])["input_ids"], 0]))
        with torch.no_grad():
            expected = primed_loss(student, teacher, rows, args.alpha, args.kd_temperature)
            first = primed_loss(student, teacher, rows[:3], args.alpha, args.kd_temperature)
        count = sum(len(row[2]) for row in rows)
        assert metrics["eval_loss"] == pytest.approx(float(expected["loss"]) / count, rel=1e-3)
        assert metrics["eval_ce"] == pytest.approx(expected["ce"] / count, rel=1e-3)
        assert metrics["eval_kl/student_teacher"] == pytest.approx(expected["kl"] / count, rel=1e-3)
        gain = first["gain"] / sum(len(row[2]) for row in rows[:3])
        assert metrics["eval_priming/gain_nats"] == pytest.approx(gain, rel=1e-3)

    def test_several_sets_raw_data_and_metrics(self, make_primed_args):
        shapes = []

        def compute_metrics(prediction):
            shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
            return {"x": 1.0}

        sets = {"a": answered_dataset(4), "b": chat_dataset(4)}
        trainer = make_trainer(make_primed_args(), eval_dataset=sets, compute_metrics=compute_metrics)
        metrics = trainer.evaluate()
        assert {"eval_a_loss", "eval_b_kl/student_teacher", "eval_a_x"} <= metrics.keys()
        assert "eval_loss" in trainer.evaluate(chat_dataset(4))
        assert trainer.predict(chat_dataset(4)).metrics["test_loss"] == pytest.approx(metrics["eval_b_loss"], rel=1e-6)
        assert shapes[0][0][:2] == shapes[0][1]

    def test_raw_sets_with_a_template_that_uses_columns(self, make_primed_args):
        trainer = make_trainer(make_primed_args(), priming="reference_answer")
        metrics = trainer.evaluate({"a": answered_dataset(4), "b": chat_dataset(4)})
        assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()

    @pytest.mark.parametrize("source", ["dataset", "student"])
    def test_evaluation_does_not_change_training(self, make_primed_args, source):
        results = []
        for strategy in ("no", "steps"):
            args = make_primed_args(max_steps=3, eval_strategy=strategy, eval_steps=1, response_source=source)
            trainer = make_trainer(args, eval_dataset=answered_dataset(4))
            trainer.train()
            results.append(weights(trainer.model))
        assert difference(*results) == 0

    def test_student_samples_are_the_same_at_every_evaluation(self, make_primed_args):
        trainer = make_trainer(make_primed_args(response_source="student"), eval_dataset=prompt_dataset(4))
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


class TestOutputs:
    def test_saved_parts_load_again(self, make_primed_args, tmp_path):
        trainer = make_trainer(make_primed_args())
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
        assert difference(weights(loaded), weights(trainer.model)) == 0
        lora = make_trainer(make_primed_args(), peft_config=LoraConfig(task_type="CAUSAL_LM", r=4))
        lora.train()
        lora.save_model(str(tmp_path / "lora"))
        loaded = PeftModel.from_pretrained(tiny_model(seed=1), tmp_path / "lora")
        expected = {n: p for n, p in lora.model.named_parameters() if "lora_" in n}
        assert all(torch.equal(p, expected[n]) for n, p in loaded.named_parameters() if "lora_" in n)

    def test_model_card(self, make_primed_args, tmp_path):
        trainer = make_trainer(make_primed_args(), priming=PrimingTemplate("Mind the ``` here. ", "suffix"))
        trainer.create_model_card(model_name="x")
        card = (tmp_path / "run" / "README.md").read_text()
        for part in (
            "2412.17846",
            "goyal2024enhancing",
            "````\nMind the ``` here. \n````",
            "after the question",
            "| `alpha` | `0.6093",
        ):
            assert part in card
        assert "primed-distillation" in card.split("---")[1]
        make_trainer(make_primed_args(), teacher=None, priming=None).create_model_card(model_name="x")
        card = (tmp_path / "run" / "README.md").read_text()
        assert "no priming" in card
        assert "own starting weights" in card

    def test_completions_are_printed_and_kept(self, make_primed_args, tmp_path, capsys):
        args = make_primed_args(log_completions=True, num_completions_to_print=1, response_source="student")
        make_trainer(args).train()
        (file,) = (tmp_path / "run" / "completions").iterdir()
        assert len(Dataset.from_parquet(str(file))) == 2
        assert "Prompt" in capsys.readouterr().out

    def test_the_callers_arguments_and_data_are_left_alone(self, make_primed_args):
        args, dataset = make_primed_args(), answered_dataset()
        before = json.dumps(args.to_dict(), default=str)
        make_trainer(args, dataset=dataset)
        assert json.dumps(args.to_dict(), default=str) == before
        assert dataset.to_list() == answered_dataset().to_list()


class TestQuantizationReceipt:
    def test_of_the_trainers_teacher(self, make_primed_args, tmp_path):
        pytest.importorskip("bitsandbytes")
        tiny_model(seed=2, hidden_size=64, intermediate_size=64, num_key_value_heads=4).save_pretrained(tmp_path)
        args = make_primed_args(teacher_model_init_kwargs={"quantization_config": {"load_in_4bit": True}})
        trainer = make_trainer(args, teacher=str(tmp_path))
        receipt = trainer.quantization_receipt(num_rows=4)
        assert receipt["num_rows"] == 4
        assert 0 < receipt["kl_full_quantized"] < 3
        full = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert trainer.quantization_receipt(full, num_rows=4) == receipt
        with pytest.raises(ValueError, match="is quantized itself"):
            trainer.quantization_receipt(trainer.teacher_model)
        trainer.teacher_model.config._name_or_path = ""
        with pytest.raises(ValueError, match="no name to load it by"):
            trainer.quantization_receipt()

    def test_is_refused_without_a_quantized_teacher(self, make_primed_args):
        with pytest.raises(ValueError, match="The teacher is not quantized"):
            make_trainer(make_primed_args()).quantization_receipt()
        trainer = make_trainer(make_primed_args(), teacher=None, peft_config=LoraConfig(task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="needs a teacher of its own"):
            trainer.quantization_receipt()


class TestRefusals:
    """Bad input comes back with what to do; see also test_priming.py, test_primed_collator.py, test_primed_distill_config.py."""

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"dataset": Dataset.from_dict({"prompt": [], "completion": []})}, ValueError, "`train_dataset` is empty"),
            (
                {"dataset": Dataset.from_dict({"text": ["x"]})},
                ValueError,
                "neither a `messages` nor a `prompt` column",
            ),
            ({"dataset": prompt_dataset(2)}, ValueError, "without answers.*`response_source` is 'dataset'.*'teacher'"),
            ({"eval_dataset": prompt_dataset(2)}, ValueError, "`eval_dataset` holds prompts without answers"),
            ({"priming": "techer"}, ValueError, "`priming` is 'techer'"),
            (
                {"priming": PrimingTemplate("{{ gold }}")},
                ValueError,
                r"'gold', which `train_dataset` does not have. Its columns are \['completion', 'prompt'\]",
            ),
            ({"priming": PrimingTemplate("{{ prompt.__class__ }}")}, ValueError, "sandbox does not allow"),
            ({"priming": PrimingTemplate("x", "system")}, ValueError, "needs conversations"),
            ({"formatting_func": str}, ValueError, "`formatting_func` is not supported"),
            ({"compute_loss_func": str}, ValueError, "`compute_loss_func` is not supported"),
            (
                {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")},
                ValueError,
                r"prompt learning for the \*student\*",
            ),
        ],
    )
    def test_come_before_any_weights(self, make_primed_args, kwargs, error, message):
        kwargs = {"dataset": answered_dataset(), **kwargs}
        with pytest.raises(error, match=message):
            make_trainer(make_primed_args(), student="no/such-student", teacher="no/such-teacher", **kwargs)

    def test_streams_for_teacher_answers(self, make_primed_args):
        with pytest.raises(ValueError, match="`train_dataset` is streamed"):
            make_trainer(make_primed_args(response_source="teacher"), dataset=prompt_dataset().to_iterable_dataset())

    def test_different_tokenizers_come_before_any_weights(self, make_primed_args, tmp_path):
        tiny_tokenizer(["imagine", *WORDS[1:]]).save_pretrained(
            tmp_path
        )  # no weights there: they must not be asked for
        with pytest.raises(ValueError, match="first token that differs has id 6, which is 'suppose' for the student"):
            make_trainer(make_primed_args(), teacher=str(tmp_path))

    def test_one_object_for_both(self, make_primed_args):
        student = tiny_model()
        with pytest.raises(ValueError, match="the very object that is trained"):
            make_trainer(make_primed_args(), student, student)
        wrapped = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM"))
        for models in ((wrapped, student), (student, wrapped)):
            with pytest.raises(ValueError, match="the very object that is trained"):
                make_trainer(make_primed_args(), *models)

    def test_a_config_of_another_trainer(self, make_args):
        with pytest.raises(TypeError, match="PromptKDConfig; PrimedDistillTrainer needs a"):
            make_trainer(make_args())

    @pytest.mark.parametrize(("role", "sizes"), [("student", (8, 128)), ("teacher", (128, 8))])
    def test_more_positions_than_a_model_has(self, make_primed_args, role, sizes):
        models = [tiny_model("gpt2", n_positions=size) for size in sizes]
        with pytest.raises(ValueError, match=f"The {role} has 8 positions, but the longest row needs"):
            make_trainer(make_primed_args(), *models)

    def test_an_evaluation_row_that_is_too_long_for_the_teacher(self, make_primed_args):
        long = Dataset.from_dict({"prompt": ["the cat " * 70], "completion": ["sat"]})
        models = tiny_model("gpt2"), tiny_model("gpt2", seed=2)
        with pytest.raises(ValueError, match="The student has 128 positions"):
            make_trainer(make_primed_args(), *models, eval_dataset={"a": long})
        with pytest.raises(ValueError, match="The student has 128 positions"):
            make_trainer(make_primed_args(), *models).evaluate(long)

    def test_a_template_that_drops_the_priming_text(self, make_primed_args):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
        )
        with pytest.raises(ValueError, match=r"does not reach the teacher.*placement 'system'"):
            make_trainer(
                make_primed_args(),
                dataset=chat_dataset(),
                processing_class=tokenizer,
                priming=PrimingTemplate("red", "system"),
            )

    def test_a_template_that_refuses_a_system_role(self, make_primed_args):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            + tokenizer.chat_template
        )
        with pytest.raises(ValueError, match=r"roles \['system', 'user'\]: System role not supported.*no system role"):
            make_trainer(
                make_primed_args(),
                dataset=chat_dataset(),
                processing_class=tokenizer,
                priming=PrimingTemplate("red", "system"),
            )

    def test_bad_logits_stop_before_they_reach_the_student(self, make_primed_args):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        trainer = make_trainer(make_primed_args(), student, teacher)
        teacher.get_output_embeddings().weight.data.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="The loss is nan at step 1"):
            trainer.train()
        assert all(value.isfinite().all() for value in weights(student).values())
