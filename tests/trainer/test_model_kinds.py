"""Both trainers with models that need care: mixtures of experts, images and texts, padded vocabularies."""

import copy

import pytest
import torch
from datasets import Dataset
from reference import log_probs, primed_loss, promptkd_step
from tiny import (
    EXPERTS,
    WORDS,
    answered_dataset,
    difference,
    tiny_model,
    tiny_multimodal_model,
    tiny_tokenizer,
    weights,
)
from trainers import SGD, logged, lora, trained_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


@torch.no_grad()
def padded_samples(model):
    """What the model itself generates for a padded batch, greedily."""
    ids = torch.tensor([[7, 8, 9, 10], [0, 0, 11, 12]])
    return model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=4, do_sample=False)


class TestExperts:
    @pytest.mark.parametrize("family", EXPERTS)
    def test_students_train_on_their_samples_and_are_saved_as_they_were_loaded(self, make, family, tmp_path):
        student = tiny_model(family, seed=1, bos_token_id=None)  # as its tokenizer has none, which some versions copy
        student.save_pretrained(tmp_path / "start")
        samples = {} if make.method == "promptkd" else {"response_source": "student"}
        trainer = make(student, max_steps=2, **samples)
        before = weights(student)
        trainer.train()
        assert difference(weights(trainer.model), before) > 0
        trainer.save_model(tmp_path / "end")
        start, end = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("start", "end"))
        assert {name for name in start if start[name] != end.get(name)} <= {"_name_or_path"}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end").eval()
        assert padded_samples(loaded).shape == (2, 8)
        assert not loaded.config.output_router_logits

    def test_a_student_by_name_is_saved_as_it_was_loaded(self, promptkd, tmp_path):
        tiny_model("mixtral", router_aux_loss_coef=0.02).save_pretrained(tmp_path / "start")
        trainer = promptkd(str(tmp_path / "start"), router_aux_loss_coef=0.0)
        trainer.train()
        assert trainer.model.config.router_aux_loss_coef == 0.02
        assert trainer.model.config.output_router_logits is False

    def test_a_configuration_that_asks_for_router_logits_stays_and_changes_nothing(self, promptkd):
        student = tiny_model("mixtral", output_router_logits=True)
        trainer = promptkd(student, tiny_model("qwen2_moe", seed=2, output_router_logits=True))
        trainer.train()
        trainer.evaluate(answered_dataset(3))
        assert student.config.output_router_logits is True
        assert torch.isfinite(torch.tensor(logged(trainer, "loss")[0]))

    def test_a_step_equals_rows_alone(self, promptkd):
        """No load-balancing loss is in it."""
        student, teacher = tiny_model("qwen2_moe", seed=1), tiny_model("mixtral", seed=2)
        reference, teacher_copy = copy.deepcopy(student), copy.deepcopy(teacher)
        parts = {"train_dataset": answered_dataset(2), "prompt": {"prompt_learning_rate": 0.01}}
        trainer = promptkd(student, teacher, **parts, **SGD)
        start = trainer.prompt_embeddings().clone()
        rows = trained_rows(trainer)
        loss, *_ = promptkd_step(reference, teacher_copy, start, [rows], 0.05, 0.01)
        assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=1e-4)
        assert difference(weights(trainer.model), weights(reference)) < 1e-4


class TestMultimodal:
    """Models of images and texts, on rows of text."""

    @pytest.mark.parametrize("role", ["student", "teacher", "both"])
    @pytest.mark.parametrize("family", ["gemma3", "llava"])
    def test_loss_and_gradient_equal_their_own_forward(self, make, family, role):
        text = "gemma3" if family == "gemma3" else "qwen2"
        student = tiny_model(text, seed=1) if role == "teacher" else tiny_multimodal_model(family, seed=1)
        teacher = tiny_model(text, seed=2) if role == "student" else tiny_multimodal_model(family, seed=2)
        reference = copy.deepcopy(student)
        settings = {"max_grad_norm": 0.0, "per_device_train_batch_size": 3, **SGD}
        settings |= {"alpha": 0.5} if make.method == "primed" else {"lmbda": 0.0, "prompt_update": "simultaneous"}
        trainer = make(student, teacher, train_dataset=answered_dataset(3), **settings)
        prompt = trainer.prompt_embeddings() if make.method == "promptkd" else None
        rows = trained_rows(trainer)
        if make.method == "primed":
            loss = primed_loss(reference, teacher, rows, 0.5, trainer.args.kd_temperature)["loss"]
        else:
            loss = 0
            for question, answer in rows:
                q = log_probs(reference, question + answer, len(question))
                with torch.no_grad():
                    p = log_probs(teacher, question + answer, len(question), prompt)
                loss = loss + (q.exp() * (q - p)).sum()
        loss = loss / sum(len(row[-1]) for row in rows)
        assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        assert difference(weights(trainer.model), weights(reference)) < 1e-5 * 0.05 * 100

    def test_on_policy_with_an_adapter_saved_and_loaded(self, promptkd, tmp_path):
        for name, seed in (("student", 1), ("teacher", 2)):
            tiny_multimodal_model(seed=seed).save_pretrained(tmp_path / name)
            tiny_tokenizer().save_pretrained(tmp_path / name)
        names = [str(tmp_path / name) for name in ("student", "teacher")]
        trainer = promptkd(*names, processing_class=None, max_steps=2, peft_config=lora(target_modules=["q_proj"]))
        trainer.train()
        trainer.evaluate(answered_dataset(2))
        trainer.save_model(tmp_path / "end")
        assert type(trainer.model.get_base_model()).__name__ == "Gemma3ForConditionalGeneration"
        assert type(trainer.teacher_model).__name__ == "Gemma3ForConditionalGeneration"

    def test_a_teacher_that_is_no_causal_model_by_name_is_loaded(self, primed, tmp_path):
        tiny_multimodal_model("llava", seed=2).save_pretrained(tmp_path)
        trainer = primed(tiny_model("qwen2", seed=1), str(tmp_path))
        expected = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert difference(weights(trainer.teacher_model), weights(expected)) == 0


class TestPaddedVocabularies:
    """The tokenizer knows 30 ids, of 48 entries in the student and 64 in the teacher (trap 8)."""

    @staticmethod
    def models():
        tokenizer = tiny_tokenizer(WORDS)
        padded = [tiny_model(seed=seed, vocab_size=size) for seed, size in ((1, 48), (2, 64))]
        cut = copy.deepcopy(padded)
        for model in cut:
            model.resize_token_embeddings(len(tokenizer))
        return tokenizer, padded, cut

    def test_no_sampled_id_is_without_a_token(self, promptkd):
        tokenizer, models, _ = self.models()
        settings = {
            "per_device_train_batch_size": 1000,
            "max_new_tokens": 10,
            "generation_kwargs": {"min_new_tokens": 10},
        }
        dataset = Dataset.from_list([{"prompt": "suppose you"}] * 1000)
        rows = trained_rows(promptkd(*models, train_dataset=dataset, processing_class=tokenizer, **settings))
        assert sum(len(completion) for _, completion in rows) == 10_000
        assert max(max(completion) for _, completion in rows) < 30
        settings = {"max_new_tokens": 10, "do_sample": True, "top_k": 0}
        unbounded = models[0].generate(input_ids=torch.tensor([[6, 7]] * 1000), **settings)
        assert unbounded.max() >= 30  # else the test could not fail

    @pytest.mark.parametrize("source", ["dataset", "student"])
    def test_losses_and_gradients_equal_those_of_cut_models(self, make, source):
        tokenizer, padded, cut = self.models()
        settings = {"lmbda": float(source == "student")} if make.method == "promptkd" else {"response_source": source}
        logs, grown = [], []
        for models in (padded, cut):
            trainer = make(*models, processing_class=tokenizer, max_steps=3, **settings, **SGD)
            assert trainer.shared_vocab_size == 30
            trainer.train()
            logs.append([logged(trainer, name) for name in ("loss", "ce", "kd", "entropy/teacher")])
            grown.append(models[0].model.layers[0].self_attn.q_proj.weight.detach())
        for of_padded, of_cut in zip(*logs, strict=True):
            assert of_padded == pytest.approx(of_cut, rel=1e-6)
        torch.testing.assert_close(*grown, atol=1e-6, rtol=1e-6)
