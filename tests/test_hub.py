"""Round trips with the real client, against `hub_server.py` on loopback."""

import contextlib
import json
import os
import re
import threading
import time

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from datasets import load_dataset
from hub_server import TOKEN, Hub
from peft import LoraConfig, PeftModel
from tiny import answered_dataset, chat_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_promptkd import (
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDTrainer,
    TeacherCache,
    build_teacher_cache,
)
from trl_promptkd.checkpoints import checkpoint_to_resume


PROMPT = ["teacher_prompt/adapter_config.json", "teacher_prompt/adapter_model.safetensors"]
WEIGHTS = {"adapter": "adapter_model.safetensors", "full": "model.safetensors"}
STUDENTS = sorted(WEIGHTS)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of its own for each test, to which the client in this process is turned.

    The client reads HF_ENDPOINT and its likes when it is imported, and keeps clients: what it has read is replaced.
    """
    with Hub() as hub:
        constants = huggingface_hub.constants
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
        yield hub


@pytest.fixture
def models(hub, tmp_path):
    """A student and a teacher with names on the Hub."""
    for name, seed in (("me/start", 1), ("me/teacher", 2)):
        tiny_model(seed=seed).push_to_hub(name)
        tiny_tokenizer().push_to_hub(name)
    return {"model": "me/start", "teacher_model": "me/teacher"}


@pytest.fixture
def promptkd(make_args):
    def make(models, student="full", eval_dataset=None, prompt=None, dataset=None, **settings):
        settings = {"dtype": "float32", **settings}
        kwargs = {"model_init_kwargs": {"dtype": "float32"}, "teacher_model_init_kwargs": {"dtype": "float32"}}
        settings.pop("dtype")
        return PromptKDTrainer(
            **models,
            args=make_args(**{**(kwargs if isinstance(models["model"], str) else {}), **settings}),
            train_dataset=dataset or prompt_dataset(),
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4) if student == "adapter" else None,
            prompt_encoder_config=prompt or PromptEncoderConfig(prompt_init="vocab", num_virtual_tokens=3),
        )

    return make


@pytest.fixture
def primed(make_primed_args):
    def make(models, student="full", dataset=None, teacher_cache=None, **settings):
        return PrimedDistillTrainer(
            **models,
            args=make_primed_args(**settings),
            train_dataset=dataset or answered_dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4) if student == "adapter" else None,
            priming=PrimingTemplate("red blue "),
            teacher_cache=teacher_cache,
        )

    return make


def local_models():
    return {"model": tiny_model(seed=1), "teacher_model": tiny_model(seed=2)}


def logits(model):
    ids = torch.arange(6, 16)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def code_of(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card.split("## How to load")[1], flags=re.DOTALL)[0]


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("method", ["promptkd", "primed"])
class TestRoundTrip:
    def test_what_is_loaded_is_what_was_trained(self, request, hub, models, method, student):
        trainer = request.getfixturevalue(method)(models, student, hub_model_id="me/student")
        trainer.train()
        trainer.push_to_hub()
        assert WEIGHTS[student] in hub.files("me/student")
        if student == "adapter":
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/start"), "me/student")
        else:
            loaded = AutoModelForCausalLM.from_pretrained("me/student")
        torch.testing.assert_close(logits(loaded), logits(trainer.model), atol=0, rtol=0)
        start = logits(AutoModelForCausalLM.from_pretrained("me/start"))
        assert not torch.equal(logits(loaded), start)
        assert AutoTokenizer.from_pretrained("me/student").get_vocab() == tiny_tokenizer().get_vocab()
        if method == "promptkd":
            teacher = AutoModelForCausalLM.from_pretrained("me/teacher")
            plain, ids = logits(teacher), torch.arange(6, 16)[None]
            prompted = logits(PeftModel.from_pretrained(teacher, "me/student", subfolder="teacher_prompt"))
            wanted = trainer.prompted_teacher_logits(ids, torch.ones_like(ids))
            torch.testing.assert_close(prompted[:, -ids.size(1) :], wanted, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(prompted[:, -ids.size(1) :], plain, atol=1e-2)

    def test_the_cards_code_runs(self, request, hub, models, method, student):
        trainer = request.getfixturevalue(method)(models, student, hub_model_id="me/student")
        trainer.train()
        trainer.push_to_hub()
        names = {}
        exec(code_of(hub.files("me/student")["README.md"].decode()), names)
        torch.testing.assert_close(logits(names["student"]), logits(trainer.model), atol=0, rtol=0)
        assert ("prompted_teacher" in names) == (method == "promptkd")
