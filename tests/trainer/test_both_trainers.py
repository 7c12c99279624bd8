"""What both trainers promise. What TRL's users expect of any trainer is in test_trl_conventions.py."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import answered_dataset, chat_dataset, difference, tiny_model, tiny_tokenizer, weights
from trainers import PROMPT_TEXT, SAVES, SGD, Maker, adapter_of, equal, logged, lora, trained, trained_parts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_promptkd import DataCollatorForPrimedDistillation, PrimingTemplate
from trl_promptkd.data import DataCollatorForPromptCompletion, tokenize_row


class TestOneStep:
    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("promptkd", {"prompt_update": "simultaneous"}),
            ("promptkd", {"prompt_update": "sequential"}),
            ("primed", {"response_source": "dataset", "max_steps": 2}),
            ("primed", {"response_source": "student", "max_steps": 2}),
        ],
    )
    def test_the_split_of_a_window_changes_nothing(self, tmp_path, method, settings):
        """Traps 1 and 20: on-policy, sampled; `sequential` depends on the split a little, by its definition."""
        make, results = Maker(method, tmp_path), []
        for rows, micro_batches in ((4, 1), (2, 2), (1, 4)):
            split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
            parts = trained(trainer := make(**split, **settings, **SGD))
            log = trainer.state.log_history[0]
            values = [log[name] for name in ("loss", "completion_tokens", "ce") if name in log]
            results.append((parts.pop("prompt", torch.zeros(())), parts, values))
        is_exact = settings.get("prompt_update") != "sequential"
        for soft_prompt, student, values in results[1:]:
            assert (soft_prompt - results[0][0]).abs().max() < 1e-4
            assert difference(student, results[0][1]) < (1e-4 if is_exact else 1e-2)
            assert not is_exact or values == pytest.approx(results[0][2], rel=1e-4)

    def test_a_student_that_takes_no_count_of_tokens_gets_the_same_gradients(self, make):
        """Older versions of transformers divide the loss of such a model by the number of micro-batches."""
        ends = []
        for accepts in (True, False):
            student = tiny_model(seed=1)
            student.accepts_loss_kwargs = accepts
            ends.append(trained(make(student, gradient_accumulation_steps=2, **SGD)))
        assert equal(*ends)

    @pytest.mark.parametrize("chunk", [1, 5, None])
    def test_chunks_change_nothing(self, make, chunk):
        settings = {**SGD, **({"prompt_update": "simultaneous"} if make.method == "promptkd" else {})}
        whole, parts = (trained(make(loss_chunk_size=size, **settings)) for size in (1024, chunk))
        if make.method == "promptkd":
            assert (whole.pop("prompt") - parts.pop("prompt")).abs().max() < 1e-4
        assert difference(whole, parts) < 1e-5


class TestRows:
    """What the trainers make of the user's rows; see test_data.py, test_chat_template.py and test_tokenize.py."""

    @pytest.mark.parametrize(
        ("method", "ignores", "trains_on"),
        [
            ("promptkd", {"lmbda": 1.0}, {"lmbda": 0.5}),
            ("promptkd", {"lmbda": 0.5, "seq_kd": True}, {"lmbda": 0.5}),
            ("primed", {"response_source": "teacher", "alpha": 0.0}, {"response_source": "dataset"}),
            ("primed", {"response_source": "student"}, {"response_source": "dataset"}),
        ],
    )
    def test_answers_are_looked_at_only_if_they_are_trained_on(self, tmp_path, method, ignores, trains_on):
        tokenizer, make = tiny_tokenizer(), Maker(method, tmp_path)
        tokenizer.chat_template += "{% if add_generation_prompt %}red{% endif %}"  # as one that opens thoughts
        parts = {"train_dataset": chat_dataset(4), "eval_dataset": chat_dataset(4), "processing_class": tokenizer}
        trainer = make(**parts, **ignores)
        assert all(ids[-2:] == [3, 23] for ids in trainer.train_dataset["prompt_ids"])
        trainer.train()
        message = "Row 0 of `train_dataset`: The chat template writes a prompt differently"
        with pytest.raises(ValueError, match=message):
            make(**parts, **trains_on)

    def test_a_transform_is_honoured_in_both_data_sets(self, make):
        data = answered_dataset(4).with_transform(
            lambda batch: {"prompt": ["the cat"] * len(batch["prompt"]), "completion": batch["completion"]}
        )
        trainer = make(train_dataset=data, eval_dataset=data)
        for dataset in (trainer.train_dataset, trainer.eval_dataset):
            assert dataset["prompt_ids"][:] == [[12, 13]] * 4
            if make.method == "primed":
                assert dataset["teacher_prompt_ids"][:] == [[23, 24, 25, 12, 13]] * 4
        trainer.train()
        trainer.evaluate(data)

    def test_a_collator_of_ones_own(self, make):
        tokenizer = tiny_tokenizer()
        if make.method == "promptkd":
            pad = DataCollatorForPromptCompletion(tokenizer.pad_token_id)
            own = lambda rows: pad([tokenize_row(row, tokenizer) for row in rows])  # noqa: E731
        else:
            own = DataCollatorForPrimedDistillation(tokenizer, PrimingTemplate("red blue green "))
        losses = [logged(trained_trainer(make(data_collator=collator)), "loss")[0] for collator in (None, own)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def trained_trainer(trainer):
    trainer.train()
    return trainer


class TestTeachers:
    @pytest.mark.parametrize(("bits", "form"), [(4, dict), (8, BitsAndBytesConfig)])
    def test_quantized_student_and_teacher(self, make, tmp_path, bits, form):
        pytest.importorskip("bitsandbytes")
        size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
        for name, seed in (("student", 1), ("teacher", 2)):
            tiny_model(seed=seed, **size).save_pretrained(tmp_path / name)
        four_bit, student = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, str(tmp_path / "student")
        if make.method == "promptkd":  # which has no such argument
            student, four_bit = AutoModelForCausalLM.from_pretrained(student, **four_bit), {}
        trainer = make(
            student,
            str(tmp_path / "teacher"),
            max_steps=3,
            teacher_model_init_kwargs={"quantization_config": form(**{f"load_in_{bits}bit": True})},
            peft_config=lora(target_modules=["q_proj", "v_proj"]),
            **four_bit,
        )
        assert getattr(trainer.teacher_model, f"is_loaded_in_{bits}bit")
        before, after = adapter_of(trainer.model), trained(trainer)
        modules = [module for model in (trainer.model, trainer.teacher_model) for module in model.modules()]
        states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in modules]
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
        assert all((after[n] - value).abs().max() > 0 for n, value in before.items() if "lora_B" in n)
        assert all(0 < loss < 100 for loss in logged(trainer, "loss"))

    def test_another_tokenizer_beside_a_loaded_teacher_is_refused(self, make, tmp_path):
        tiny_tokenizer(["imagine"]).save_pretrained(tmp_path)
        tiny_model(seed=2).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="different tokenizers"):
            make(teacher_model=AutoModelForCausalLM.from_pretrained(tmp_path))

    def test_the_model_below_the_students_adapter_and_the_other_way_round_are_refused(self, make):
        base = tiny_model()
        wrapped = get_peft_model(base, lora())
        for models in ((wrapped, base), (base, wrapped)):
            with pytest.raises(ValueError, match="the very object that is trained"):
                make(*models)

    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_dropout_is_off_in_modules_and_in_functional_calls(self, make, family):
        """TRL's own switch leaves out models that call dropout as a function, such as OPT."""
        trainer = make(tiny_model(family), tiny_model(family, seed=2))
        model, ids = trainer.model.train(), torch.tensor([[7, 8, 9]])
        torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits, atol=0, rtol=0)


class TestSelfDistillation:
    def test_a_full_student_has_a_frozen_copy_of_its_start(self, make):
        student = tiny_model(seed=1)
        start = copy.deepcopy(student)
        trainer = make(student, None, max_steps=3, **SGD)
        trainer.train()
        assert difference(weights(trainer.model), weights(start)) > 1e-3
        assert difference(weights(trainer.teacher_model), weights(start)) == 0
        ids = torch.tensor([[7, 8, 9]])
        with torch.no_grad():  # the copy's forward is its own, not the student's
            torch.testing.assert_close(trainer.teacher_model(input_ids=ids).logits, start(input_ids=ids).logits)

    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_a_lora_student_is_its_own_teacher_with_the_adapter_off(self, make, checkpointing):
        student = tiny_model(seed=1)
        start = copy.deepcopy(student)
        settings = {"max_steps": 3, "learning_rate": 0.1, "gradient_checkpointing": checkpointing}
        trainer = make(student, None, peft_config=lora(), **settings)
        assert trainer.teacher_model is None
        trainer.train()
        ids = torch.tensor([[7, 8, 9, 10]])
        with torch.no_grad():
            expected = start(input_ids=ids).logits
            assert (trainer.model(input_ids=ids).logits - expected).abs().max() > 1e-3
            with trainer.model.disable_adapter():
                torch.testing.assert_close(trainer.model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert all(p.requires_grad == ("lora_" in n) for n, p in trainer.model.named_parameters())

    def test_the_first_step_equals_that_with_a_separate_teacher(self, make):
        """The adapter moves the student from the start: a teacher's pass with it on would be another teacher's."""
        results = []
        for teacher in (None, tiny_model(seed=1)):
            torch.manual_seed(0)
            trainer = make(tiny_model(seed=1), teacher, peft_config=lora(init_lora_weights=False), **SGD)
            parts = trained(trainer)
            results.append((parts.pop("prompt", torch.zeros(())), parts, logged(trainer, "loss")[0]))
        assert results[0][2] == pytest.approx(results[1][2], rel=1e-5)
        assert difference(results[0][1], results[1][1]) < 1e-5
        assert (results[0][0] - results[1][0]).abs().max() < 1e-4

    def test_evaluating_first_leaves_the_student_to_be_prepared_for_training(self, make):
        """accelerate marks what it has prepared for evaluation, and would then leave it out of data parallelism."""
        trainer = make(teacher_model=None, eval_dataset=answered_dataset(4), peft_config=lora())
        trainer.evaluate()
        assert not getattr(trainer.model, "_is_accelerate_prepared", False)
        trainer.train()
        assert logged(trainer, "loss")[0] > 0

    @pytest.mark.parametrize(
        "settings",
        [
            {"modules_to_save": ["lm_head"]},
            {"trainable_token_indices": [3, 4]},
            {"target_modules": ["lm_head", "q_proj"]},
        ],
    )
    def test_an_adapter_of_the_head_or_the_embeddings_needs_a_teacher_of_its_own(self, make, settings):
        with pytest.raises(ValueError, match=r"cannot be its own teacher|lm_head"):
            make(get_peft_model(tiny_model(), lora(**settings)), None)


class TestResume:
    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("promptkd", {"prompt": {"encoder": "embedding"}}),
            ("promptkd", {"prompt": {"encoder": "mlp"}}),
            ("primed", {"response_source": "dataset"}),
            ("primed", {"response_source": "student"}),
            ("primed", {"response_source": "teacher"}),
        ],
    )
    @pytest.mark.parametrize("adapter", [False, True])
    def test_six_steps_equal_three_and_three(self, tmp_path, method, settings, adapter):
        """Trap 19, and the base class's habit of taking `teacher_prompt/` for an adapter of the student."""
        settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", **settings}
        if "prompt" in settings:
            settings["prompt"] |= {"prompt_learning_rate": 0.01, "prompt_warmup_steps": 2}

        def run(folder, resume=None):
            make, peft_config = Maker(method, tmp_path / folder), lora() if adapter else None
            trainer = make(save_steps=3, peft_config=peft_config, train_dataset=answered_dataset(16), **settings)
            trainer.train(resume_from_checkpoint=resume)
            return trained_parts(trainer), trainer.state.log_history[:6]

        parts, history = run("whole")
        again, history_again = run("resumed", str(tmp_path / "whole" / "run" / "checkpoint-3"))
        assert difference(parts, again) <= 1e-6
        keys = ("loss", "kl/prompt_gain", "prompt/learning_rate", "rollout/mean_length")
        for key in keys if method == "promptkd" else keys[:1]:
            assert [log[key] for log in history] == pytest.approx([log[key] for log in history_again], rel=1e-6)

    def test_an_adapter_of_another_name(self, make, tmp_path):
        results = []
        for resume in (None, str(tmp_path / "run" / "checkpoint-1")):
            torch.manual_seed(0)
            student = get_peft_model(tiny_model(seed=1), lora(), adapter_name="mine")
            trainer = make(student, max_steps=2, **SAVES)
            trainer.train(resume_from_checkpoint=resume)
            results.append(weights(trainer.model))
        assert difference(*results) <= 1e-6


class TestOutputs:
    @pytest.mark.parametrize(
        ("method", "overrides", "parts"),
        [
            (
                "promptkd",
                {},
                [
                    "2402.12842",
                    "kim2024promptkd",
                    "| `num_virtual_tokens` | `7` |",
                    PROMPT_TEXT,
                    "`prompt_update` | `sequential`",
                    "`prompt_share` | `1.0`",
                    "teacher_prompt",
                ],
            ),
            (
                "primed",
                {"priming": PrimingTemplate("Mind the ``` here. ", "suffix")},
                [
                    "2412.17846",
                    "goyal2024enhancing",
                    "````\nMind the ``` here. \n````",
                    "after the question",
                    "| `alpha` | `0.6093",
                ],
            ),
            ("primed", {"teacher_model": None, "priming": None}, ["no priming", "own starting weights"]),
        ],
    )
    def test_model_card(self, tmp_path, method, overrides, parts):
        trainer = Maker(method, tmp_path)(**overrides)
        trainer.create_model_card(model_name="x")
        card = (tmp_path / "run" / "README.md").read_text()
        for part in parts:
            assert part in card
        headings = ["# x\n", "## Data", "## How to load it", "## Settings", "## Versions", "## Citations", "```bibtex"]
        places = [card.index(heading) for heading in headings]
        assert places == sorted(places)
        assert card.rstrip().endswith("```")
        assert card.count("\n## ") == 5  # no heading twice
        for empty in ("<", "``\n\n```", "|  |", "| |", " \n", "None"):
            assert empty not in card.replace("here. \n", "")
        tags = {"trl", {"promptkd": "promptkd", "primed": "primed-distillation"}[method]}
        assert tags <= set(trainer.model.model_tags)
        for tag in trainer.model.model_tags:
            assert f"- {tag}\n" in card

    def test_completions_are_printed_and_kept(self, make, tmp_path, capsys):
        source = {} if make.method == "promptkd" else {"response_source": "student"}
        make(log_completions=True, num_completions_to_print=1, **source).train()
        (file,) = (tmp_path / "run" / "completions").iterdir()
        table = Dataset.from_parquet(str(file))
        assert table.column_names[:5] == ["step", "prompt", "completion", "length", "ended"]
        assert len(table) == 2
        assert "Prompt" in capsys.readouterr().out

    def test_nothing_is_pickled_by_us(self, make, tmp_path):
        make(**SAVES).train()
        files = {path.name for path in (tmp_path / "run" / "checkpoint-1").rglob("*") if path.is_file()}
        theirs = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}  # the Trainer's own
        assert not {name for name in files - theirs if name.endswith((".pt", ".pth", ".bin", ".pkl"))}

    def test_the_callers_arguments_and_data_are_left_alone(self, make):
        args, dataset = make.args(), answered_dataset()
        before = json.dumps(args.to_dict(), default=str)
        make(args=args, train_dataset=dataset).train()
        assert json.dumps(args.to_dict(), default=str) == before
        assert dataset.to_list() == answered_dataset().to_list()
