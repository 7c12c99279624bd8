"""What only response priming does. What both trainers promise is in test_trl_conventions.py and its neighbours."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
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
from trainers import GREEDY, PRIMING, SGD, keep_windows, lora, trained_rows
from transformers import AutoModelForCausalLM

from trl_promptkd import DataCollatorForPrimedDistillation, PrimingTemplate


class TestOneStep:
    """One whole step against the row-by-row implementation in `reference.py`."""

    @pytest.mark.parametrize(("beta", "skew"), [(1.0, 0.0), (0.0, 0.0), (0.3, 0.0), (1.0, 0.1), (0.0, 0.1)])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    def test_equals_rows_alone(self, primed, family, beta, skew):
        student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
        reference, before = copy.deepcopy(student), weights(teacher)
        trainer = primed(student, teacher, gradient_accumulation_steps=2, kd_beta=beta, skew=skew, **SGD)
        args = trainer.args
        rows = trained_rows(trainer)

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

    def test_the_priming_gain_is_of_the_first_of_sixteen_micro_batches(self, primed):
        teacher = tiny_model(seed=2)
        settings = {"gradient_accumulation_steps": 2, "max_steps": 9}
        trainer = primed(teacher_model=teacher, train_dataset=answered_dataset(16), **settings)
        windows, calls = keep_windows(trainer), []
        teacher.get_decoder().layers[0].register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        assert len(calls) == 9 * 2 + 2
        logs = trainer.state.log_history
        assert [index for index, log in enumerate(logs) if "priming/gain_nats" in log] == [0, 8]
        first = windows[0][0]
        expected = primed_loss(teacher, teacher, first, 0.5, 1.0)["gain"]
        assert logs[0]["priming/gain_nats"] == pytest.approx(expected / sum(len(row[2]) for row in first), rel=1e-3)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    @pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (1.0, 5.942), (0.0, 1.0), (0.5, 1.0)])
    def test_is_zero_where_teacher_and_student_are_one_and_nothing_is_primed(self, primed, family, beta, temperature):
        settings = {"alpha": 0.0, "kd_beta": beta, "kd_temperature": temperature, "per_device_train_batch_size": 4}
        trainer = primed(tiny_model(family), tiny_model(family), priming=None, **settings)
        trainer.train()
        log = trainer.state.log_history[0]
        assert abs(log["loss"]) < 1e-5
        assert abs(log["kl/student_teacher"]) < 1e-5
        assert log["teacher/top1_agreement"] == 1.0
        assert "priming/gain_nats" not in log

    @pytest.mark.parametrize("itself", [False, True])
    def test_mixed_precision_is_close(self, primed, itself):
        """bfloat16 is TRL's default. A LoRA student that is its own teacher has one autocast for both."""
        parts = {"teacher_model": None, "peft_config": lora()} if itself else {}
        losses = []
        for bf16 in (False, True):
            trainer = primed(bf16=bf16, alpha=0.0, gradient_checkpointing=True, max_steps=2, **parts)
            trainer.train()
            losses.append(trainer.state.log_history[1]["loss"])
            if itself:
                plain = primed(bf16=bf16, alpha=0.0, priming=None, **parts)
                plain.train()
                assert abs(plain.state.log_history[0]["loss"]) < 1e-5
        assert losses[1] == pytest.approx(losses[0], rel=0.05)


class TestSources:
    @pytest.mark.parametrize("rows", [prompt_dataset, answered_dataset])
    def test_the_primed_teacher_writes_the_answers(self, primed, rows, tmp_path):
        teacher = tiny_model(seed=2)
        settings = {"response_source": "teacher", "generation_kwargs": GREEDY, "max_steps": 4}
        trainer = primed(teacher_model=teacher, train_dataset=rows(), eval_dataset=rows(3), **settings)
        assert trainer.args.alpha == pytest.approx(0.6093, abs=1e-4)
        found = trained_rows(trainer)
        assert len(found) == 8
        for _, teacher_prompt, completion in found:
            assert completion == greedy(teacher, teacher_prompt, 6, 0)
        # What was written is a data set that anybody can open
        stored = Dataset.from_parquet([str(p) for p in (tmp_path / "run" / "_teacher_answers").iterdir()])
        assert set(stored.column_names) == {"key", "prompt", "completion", "completion_ids"}
        assert stored[0]["prompt"].startswith("red blue green")
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] > 0
        assert trainer.evaluate(rows(3))["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)

    def test_the_students_own_samples(self, primed):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        reference = copy.deepcopy(student)
        settings = {"response_source": "student", "generation_kwargs": GREEDY, **SGD}
        trainer = primed(student, teacher, train_dataset=prompt_dataset(), **settings)
        assert trainer.args.alpha == 0.0
        rows = trained_rows(trainer)
        for prompt, teacher_prompt, completion in rows:
            assert teacher_prompt == [23, 24, 25, *prompt]
            assert completion == greedy(reference, prompt, 6, 0)
        count = sum(len(row[2]) for row in rows)
        log = trainer.state.log_history[0]
        expected = primed_loss(reference, teacher, rows, 0.0, trainer.args.kd_temperature)
        assert log["loss"] == pytest.approx(float(expected["loss"].detach()) / count, rel=1e-3)
        assert log["rollout/mean_length"] == count / len(rows)
        assert log["completion_tokens"] == count

    def test_student_samples_differ_from_step_to_step_but_not_from_run_to_run(self, primed):
        settings = {"response_source": "student", "max_steps": 3, "learning_rate": 0.0}
        dataset = Dataset.from_list([{"prompt": "the cat"}] * 8)
        first, second = (trained_rows(primed(train_dataset=dataset, **settings)) for _ in range(2))
        assert first == second
        assert len({tuple(row[2]) for row in first}) > 1

    def test_columns_are_variables_of_the_template(self, primed):
        dataset = answered_dataset().add_column("color", ["green"] * 8)
        rows = trained_rows(primed(train_dataset=dataset, priming=PrimingTemplate("{{ color }} ")))
        assert all(teacher_prompt == [25, *prompt] for prompt, teacher_prompt, _ in rows)

    def test_the_teacher_may_see_the_reference_answer(self, primed):
        for _, teacher_prompt, completion in trained_rows(primed(priming="reference_answer")):
            answer = completion[:-1]
            assert answer in [teacher_prompt[i : i + len(answer)] for i in range(len(teacher_prompt))]

    @pytest.mark.parametrize("fault", ["fewer", "another order"])
    def test_a_collator_with_other_completions_in_the_views_is_refused(self, primed, fault):
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
            primed(data_collator=broken).train()

    def test_a_collator_of_ones_own_cannot_have_answers_written(self, primed):
        own = DataCollatorForPrimedDistillation(tiny_tokenizer(), PRIMING)
        with pytest.raises(ValueError, match="needs rows that the trainer prepares, but `data_collator` is set"):
            primed(response_source="teacher", data_collator=own)

    def test_long_rows_are_dropped_and_their_number_is_logged(self, primed):
        trainer = primed(teacher_max_length=9, max_steps=2)
        rows = trained_rows(trainer)
        dropped = trainer.state.log_history[0]["dropped_rows"]
        assert 0 < dropped < 8
        assert len(trainer.train_dataset) == 8 - dropped
        assert all(len(row[1]) + len(row[2]) <= 9 for row in rows)

    def test_shuffle_and_group_by_length_without_unused_columns(self, primed):
        settings = {"train_sampling_strategy": "group_by_length", "max_steps": 4, "remove_unused_columns": True}
        rows = trained_rows(primed(shuffle_dataset=True, **settings))
        assert len({tuple(row[0]) for row in rows}) == 8


class TestTeachers:
    def test_a_lora_student_holds_one_copy_of_the_weights(self, primed):
        trainer = primed(teacher_model=None, peft_config=lora())
        modules = [value for value in vars(trainer).values() if isinstance(value, torch.nn.Module)]
        held = {id(p): p.numel() for module in modules for p in module.parameters()}
        adapter = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
        assert sum(held.values()) == tiny_model().num_parameters() + adapter

    def test_the_priming_moves_into_the_adapter(self, primed):
        """Prompt internalisation: the loss against the primed start falls, also on rows that were not trained on."""
        pairs = [{"prompt": f"{a} {b}"} for a in WORDS for b in WORDS]
        trainer = primed(
            teacher_model=None,
            peft_config=lora(r=8),
            train_dataset=Dataset.from_list(pairs[::2]),
            eval_dataset=Dataset.from_list(pairs[1::40]),
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            alpha=0.0,
            kd_temperature=1.0,
            response_source="student",
            logging_steps=20,
        )
        before = trainer.evaluate()["eval_kl/student_teacher"]
        trainer.train()
        after = trainer.evaluate()["eval_kl/student_teacher"]
        assert before > 0.05
        assert after < 0.85 * before

    def test_answers_of_a_self_teacher_stay_when_its_adapter_has_learned(self, primed, monkeypatch):
        """PEFT freezes an adapter that is switched off, which must not make it look like a part of the teacher."""
        answers = []
        for rank in (4, 8):
            settings = {"response_source": "teacher", "max_steps": 3, "learning_rate": 0.1}
            trainer = primed(teacher_model=None, peft_config=lora(r=rank), **settings)
            answers.append(trainer.train_dataset["completion_ids"][:])
            trainer.train()
            with monkeypatch.context() as patch:
                patch.setattr(trainer.model, "generate", None)  # nothing is left to be written
                trainer.evaluate(answered_dataset())
                trainer.predict(answered_dataset())
        assert len(list(Path(trainer.args.output_dir, "_teacher_answers").iterdir())) == 1
        assert answers[0] == answers[1]

    def test_an_adapter_that_changes_its_base_cannot_have_it_as_teacher(self, primed):
        with pytest.raises(ValueError, match=r"student's adapter has .*Pass `teacher_model`"):
            primed(tiny_model("gpt2"), teacher_model=None, peft_config=lora(init_lora_weights="olora"))
        primed(tiny_model("gpt2"), tiny_model("gpt2", seed=2), peft_config=lora(init_lora_weights="olora"))

    def test_none_for_both_is_warned_about(self, primed, caplog, propagate):
        primed(teacher_model=None, priming=None)
        assert "`teacher_model` and `priming` are both None" in caplog.text

    def test_lora_dropout_stays_and_the_models_own_goes(self, primed):
        trainer = primed(tiny_model("gpt2"), tiny_model("gpt2", seed=2), peft_config=lora(lora_dropout=0.1))
        rates = {
            "lora" if "lora_dropout" in name else "own": module.p
            for name, module in trainer.model.named_modules()
            if isinstance(module, torch.nn.Dropout)
        }
        assert rates == {"lora": 0.1, "own": 0.0}


class TestEvaluation:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_equals_rows_alone(self, primed, family):
        student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
        trainer = primed(student, teacher, per_device_eval_batch_size=3, eval_dataset=answered_dataset(7))
        args, metrics = trainer.args, trainer.evaluate()
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

    def test_raw_sets_with_a_template_that_uses_columns(self, primed):
        metrics = primed(priming="reference_answer").evaluate({"a": answered_dataset(4), "b": chat_dataset(4)})
        assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()

    def test_student_samples_are_the_same_at_every_evaluation(self, primed):
        trainer = primed(response_source="student", eval_dataset=prompt_dataset(4))
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


class TestQuantizationReceipt:
    def test_of_the_trainers_teacher(self, primed, tmp_path):
        pytest.importorskip("bitsandbytes")
        tiny_model(seed=2, hidden_size=64, intermediate_size=64, num_key_value_heads=4).save_pretrained(tmp_path)
        quantized = {"quantization_config": {"load_in_4bit": True}}
        trainer = primed(teacher_model=str(tmp_path), teacher_model_init_kwargs=quantized)
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

    def test_is_refused_without_a_quantized_teacher(self, primed):
        with pytest.raises(ValueError, match="The teacher is not quantized"):
            primed().quantization_receipt()
        with pytest.raises(ValueError, match="needs a teacher of its own"):
            primed(teacher_model=None, peft_config=lora()).quantization_receipt()


class TestRefusals:
    """See also test_bad_inputs.py, test_priming.py and test_primed_collator.py."""

    def test_evaluation_rows_without_answers(self, primed):
        with pytest.raises(ValueError, match="`eval_dataset` holds prompts without answers"):
            primed("no/such-student", "no/such-teacher", eval_dataset=prompt_dataset(2))

    @pytest.mark.parametrize(("role", "sizes"), [("student", (8, 128)), ("teacher", (128, 8))])
    def test_more_positions_than_a_model_has(self, primed, role, sizes):
        models = [tiny_model("gpt2", n_positions=size) for size in sizes]
        with pytest.raises(ValueError, match=f"The {role} has 8 positions, but the longest row needs"):
            primed(*models)

    def test_an_evaluation_row_that_is_too_long_for_the_student(self, primed):
        long = Dataset.from_dict({"prompt": ["the cat " * 70], "completion": ["sat"]})
        models = tiny_model("gpt2"), tiny_model("gpt2", seed=2)
        with pytest.raises(ValueError, match="The student has 128 positions"):
            primed(*models, eval_dataset={"a": long})
        with pytest.raises(ValueError, match="The student has 128 positions"):
            primed(*models).evaluate(long)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (
                lambda text: text.replace("in messages %}", "in messages if m['role'] != 'system' %}"),
                r"does not reach the teacher.*placement 'system'",
            ),
            (
                lambda text: (
                    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + text
                ),
                r"roles \['system', 'user'\]: No system role.*no system role",
            ),
        ],
    )
    def test_a_chat_template_without_system_role(self, primed, template, message):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template(tokenizer.chat_template)
        parts = {"train_dataset": chat_dataset(), "priming": PrimingTemplate("red", "system")}
        with pytest.raises(ValueError, match=message):
            primed(processing_class=tokenizer, **parts)
