"""The student's samples by vLLM itself, on its CPU build: `make test-vllm`, in an environment of its own."""

import os

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from tiny import answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from trainers import logged, lora
from transformers import AutoModelForCausalLM

from trl_promptkd._trl import is_vllm_available
from trl_promptkd.generation.rollouts import generate_completions, rollout_config
from trl_promptkd.generation.vllm import VLLMRollouts


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_vllm_available(), reason="vLLM is not installed")]
PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18, 19, 20, 21]]
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def folder(tmp_path):
    """A student whose heads vLLM can do, with a tied output head, in a folder."""
    model = tiny_model(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True
    )
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def disturb(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("adapter", [False, True])
def test_samples_are_those_of_the_weights_as_they_are(folder, make_args, adapter):
    student = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        student = get_peft_model(student, lora(r=8, target_modules="all-linear"))
    base = {name: p.detach().clone() for name, p in student.named_parameters() if not p.requires_grad}
    args = make_args(use_vllm=True, max_new_tokens=12, generation_kwargs=GREEDY, vllm_max_model_length=64)
    greedy = rollout_config(student, student, tiny_tokenizer(), args)
    ours = VLLMRollouts(student, Accelerator(cpu=True), tiny_tokenizer(), greedy, args, vocab_size=30)
    before = ours.sample(None, PROMPTS, step=0)
    assert before == generate_completions(student, PROMPTS, greedy, vocab_size=30)
    for seed in (1, 2):
        disturb(student, seed)
        expected = generate_completions(student, PROMPTS, greedy, vocab_size=30)
        assert expected != before
        ours.sync()
        assert ours.sample(None, PROMPTS, step=0) == expected
        before = expected
    assert not any(getattr(module, "merged", False) for module in student.modules())
    assert all(torch.equal(student.get_parameter(name), value) for name, value in base.items())


def test_a_run_is_the_run_with_transformers(folder, promptkd):
    """Greedy, so that both sample the same: losses and weights agree."""
    settings = {"generation_kwargs": GREEDY, "max_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    settings["vllm_max_model_length"] = 64
    runs = []
    for use_vllm in (False, True):
        trainer = promptkd(
            AutoModelForCausalLM.from_pretrained(folder),
            tiny_model(seed=1, hidden_size=64, num_attention_heads=2, num_key_value_heads=1),
            train_dataset=prompt_dataset(12),
            eval_dataset=answered_dataset(2),
            use_vllm=use_vllm,
            **settings,
        )
        trainer.train()
        metrics = trainer.evaluate()
        runs.append([*logged(trainer, "loss"), metrics["eval_reverse_kl"]])
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)
    assert len(set(runs[0])) == 4
