"""Both trainers with kinds of models that need care: mixtures of experts, models of images and texts, padded vocabularies."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from reference import log_probs, primed_loss, promptkd_step
from tiny import (
    EXPERTS,
    WORDS,
    answered_dataset,
    difference,
    prompt_dataset,
    tiny_model,
    tiny_multimodal_model,
    tiny_tokenizer,
    weights,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trl_promptkd import PrimedDistillTrainer, PrimingTemplate, PromptEncoderConfig, PromptKDTrainer
from trl_promptkd.generation.rollouts import generate_completions, rollout_config, sample_completions


PROMPT = PromptEncoderConfig(prompt_init_text="suppose you are a student .", prompt_learning_rate=0.01)
PRIMING = PrimingTemplate("red blue ")


def promptkd(args, student, teacher, dataset=None, **kwargs):
    kwargs = {"processing_class": tiny_tokenizer(), "prompt_encoder_config": PROMPT, **kwargs}
    dataset = prompt_dataset() if dataset is None else dataset
    return PromptKDTrainer(student, teacher, args, train_dataset=dataset, **kwargs)


def primed(args, student, teacher, dataset=None, **kwargs):
    kwargs = {"processing_class": tiny_tokenizer(), "priming": PRIMING, **kwargs}
    dataset = answered_dataset() if dataset is None else dataset
    return PrimedDistillTrainer(student, args, train_dataset=dataset, teacher_model=teacher, **kwargs)


@torch.no_grad()
def padded_samples(model):
    """What the model itself generates for a padded batch, greedily."""
    ids = torch.tensor([[7, 8, 9, 10], [0, 0, 11, 12]])
    return model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=4, do_sample=False)


class TestExperts:
    @pytest.mark.parametrize("family", EXPERTS)
    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    def test_students_train_on_their_samples_and_are_saved_as_they_were_loaded(
        self, method, family, make_args, make_primed_args, tmp_path
    ):
        student, teacher = tiny_model(family, seed=1), tiny_model(seed=2)
        student.save_pretrained(tmp_path / "start")
        if method == "promptkd":
            trainer = promptkd(make_args(max_steps=2), student, teacher)
        else:
            trainer = primed(make_primed_args(max_steps=2, response_source="student"), student, teacher)
        before = weights(student)
        trainer.train()
        assert difference(weights(trainer.model), before) > 0
        trainer.save_model(tmp_path / "end")
        start, end = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("start", "end"))
        assert {name for name in start if start[name] != end.get(name)} <= {"_name_or_path"}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end").eval()
        assert padded_samples(loaded).shape == (2, 8)
        assert not loaded.config.output_router_logits

    def test_a_student_by_name_is_saved_as_it_was_loaded(self, make_args, tmp_path):
        tiny_model("mixtral", router_aux_loss_coef=0.02).save_pretrained(tmp_path / "start")
        tiny_tokenizer().save_pretrained(tmp_path / "start")
        args = make_args(router_aux_loss_coef=0.0)
        trainer = promptkd(args, str(tmp_path / "start"), tiny_model(seed=2), processing_class=None)
        trainer.train()
        assert trainer.model.config.router_aux_loss_coef == 0.02
        assert trainer.model.config.output_router_logits is False

    def test_a_configuration_that_asks_for_router_logits_stays_and_changes_nothing(self, make_args):
        student = tiny_model("mixtral", output_router_logits=True)
        trainer = promptkd(make_args(), student, tiny_model("qwen2_moe", seed=2, output_router_logits=True))
        trainer.train()
        trainer.evaluate(answered_dataset(3))
        assert student.config.output_router_logits is True
        assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))

    def test_a_step_equals_rows_alone(self, make_args):
        """No load-balancing loss is in it."""
        student, teacher = tiny_model("qwen2_moe", seed=1), tiny_model("mixtral", seed=2)
        args = make_args(learning_rate=0.05, lr_scheduler_type="constant", optim="sgd")
        reference, teacher_copy = copy.deepcopy(student), copy.deepcopy(teacher)
        trainer = promptkd(args, student, teacher, answered_dataset(2))
        start = trainer.prompt_embeddings().clone()
        windows, original = [], trainer.get_batch_samples
        trainer.get_batch_samples = lambda *a: windows.append(original(*a)) or windows[-1]
        trainer.train()
        ((batch,), _), *_ = windows
        rows = [
            (ids[mask.bool() & (labels == -100)].tolist(), ids[labels != -100].tolist())
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        ]
        loss, *_ = promptkd_step(reference, teacher_copy, start, [rows], 0.05, 0.01)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
        assert difference(weights(trainer.model), weights(reference)) < 1e-4


class TestMultimodal:
    """Models of images and texts, on rows of text."""

    @pytest.mark.parametrize("role", ["student", "teacher", "both"])
    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    @pytest.mark.parametrize("family", ["gemma3", "llava"])
    def test_loss_and_gradient_equal_their_own_forward(self, family, method, role, make_args, make_primed_args):
        text = "gemma3" if family == "gemma3" else "qwen2"
        student = tiny_model(text, seed=1) if role == "teacher" else tiny_multimodal_model(family, seed=1)
        teacher = tiny_model(text, seed=2) if role == "student" else tiny_multimodal_model(family, seed=2)
        settings = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
        settings["per_device_train_batch_size"] = 3
        reference = copy.deepcopy(student)
        prompt_ids = tiny_tokenizer()
        rows = [
            (prompt_ids(row["prompt"])["input_ids"], [*prompt_ids(row["completion"])["input_ids"], 0])
            for row in answered_dataset(3)
        ]
        if method == "primed":
            trainer = primed(make_primed_args(alpha=0.5, **settings), student, teacher, answered_dataset(3))
            trainer.train()
            views = [(prompt, [*prompt_ids("red blue")["input_ids"], *prompt], answer) for prompt, answer in rows]
            loss = primed_loss(reference, teacher, views, 0.5, trainer.args.kd_temperature)["loss"]
        else:
            args = make_args(lmbda=0.0, prompt_update="simultaneous", **settings)
            trainer = promptkd(args, student, teacher, answered_dataset(3))
            prompt = trainer.prompt_embeddings()
            trainer.train()
            loss = 0
            for question, answer in rows:
                q = log_probs(reference, question + answer, len(question))
                with torch.no_grad():
                    p = log_probs(teacher, question + answer, len(question), prompt)
                loss = loss + (q.exp() * (q - p)).sum()
        loss = loss / sum(len(answer) for _, answer in rows)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), abs=1e-5, rel=1e-5)
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        assert difference(weights(trainer.model), weights(reference)) < 1e-5 * 0.05 * 100

    def test_on_policy_with_an_adapter_saved_and_loaded(self, make_args, tmp_path):
        for name, seed in (("student", 1), ("teacher", 2)):
            tiny_multimodal_model(seed=seed).save_pretrained(tmp_path / name)
            tiny_tokenizer().save_pretrained(tmp_path / name)
        trainer = promptkd(
            make_args(max_steps=2),
            str(tmp_path / "student"),
            str(tmp_path / "teacher"),
            processing_class=None,
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        )
        trainer.train()
        trainer.evaluate(answered_dataset(2))
        trainer.save_model(tmp_path / "end")
        assert type(trainer.model.get_base_model()).__name__ == "Gemma3ForConditionalGeneration"
        assert type(trainer.teacher_model).__name__ == "Gemma3ForConditionalGeneration"

    def test_a_teacher_that_is_no_causal_model_by_name_is_loaded(self, make_primed_args, tmp_path):
        tiny_multimodal_model("llava", seed=2).save_pretrained(tmp_path)
        trainer = primed(make_primed_args(), tiny_model("qwen2", seed=1), str(tmp_path))
        expected = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert difference(weights(trainer.teacher_model), weights(expected)) == 0


class TestPaddedVocabularies:
    """Both models have 48 entries, of which the tokenizer knows 30."""

    @staticmethod
    def models():
        tokenizer = tiny_tokenizer(WORDS)
        padded = [tiny_model(seed=seed, vocab_size=48) for seed in (1, 2)]
        cut = copy.deepcopy(padded)
        for model in cut:
            model.resize_token_embeddings(len(tokenizer))
        return tokenizer, padded, cut

    def test_no_sampled_id_is_without_a_token(self, make_args):
        tokenizer, (student, teacher), _ = self.models()
        args = make_args(per_device_train_batch_size=500, max_new_tokens=10)
        trainer = promptkd(args, student, teacher, processing_class=tokenizer)
        config = rollout_config(student, teacher, tokenizer, args)
        config.eos_token_id = None
        prompts = [[7, 8]] * 1000
        samples = sample_completions(
            student, trainer.accelerator, prompts, config, 0, args, vocab_size=trainer.shared_vocab_size
        )
        assert sum(map(len, samples)) == 10_000
        assert max(max(ids) for ids in samples) < 30
        unbounded = generate_completions(student, prompts, config)
        assert max(max(ids) for ids in unbounded) >= 30  # else the test could not fail

    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    def test_losses_and_gradients_equal_those_of_cut_models(self, method, make_args, make_primed_args):
        tokenizer, padded, cut = self.models()
        logs, grown = [], []
        for student, teacher in (padded, cut):
            settings = {"optim": "sgd", "max_steps": 3, "learning_rate": 0.05}
            if method == "promptkd":
                trainer = promptkd(make_args(**settings), student, teacher, processing_class=tokenizer)
            else:
                args = make_primed_args(response_source="student", **settings)
                trainer = primed(args, student, teacher, processing_class=tokenizer)
            trainer.train()
            logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
            grown.append(student.model.layers[0].self_attn.q_proj.weight.detach())
        assert logs[0] == pytest.approx(logs[1], rel=1e-6)
        torch.testing.assert_close(*grown, atol=1e-6, rtol=1e-6)

    def test_rows_of_answers_cost_the_same(self, make_primed_args):
        tokenizer, padded, cut = self.models()
        rows = Dataset.from_list(
            [{"prompt": "the cat", "completion": " sat on"}, {"prompt": "a", "completion": " dog"}]
        )
        found = []
        for student, teacher in (padded, cut):
            trainer = primed(make_primed_args(alpha=0.5), student, teacher, rows, processing_class=tokenizer)
            trainer.train()
            found.append(trainer.state.log_history[0])
        for name in ("loss", "ce", "kd", "entropy/teacher"):
            assert found[0][name] == pytest.approx(found[1][name], rel=1e-6), name
