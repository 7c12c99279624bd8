import os


os.environ.setdefault("CI", "1")  # no telemetry from tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from chat_server import ChatServer
from runs import short_run
from tiny import tiny_tokenizer
from trainers import METHODS, Maker

from trl_promptkd import PrimedDistillConfig, PromptKDConfig
from trl_promptkd.generation import openai_server


torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def make_args(tmp_path):
    """PromptKD settings for a short run on tiny models."""
    return lambda **overrides: short_run(PromptKDConfig, tmp_path, overrides)


@pytest.fixture
def make_primed_args(tmp_path):
    """Response priming's settings for a short run on tiny models."""
    return lambda **overrides: short_run(PrimedDistillConfig, tmp_path, overrides)


@pytest.fixture
def promptkd(tmp_path):
    """Makes a `PromptKDTrainer` of tiny parts."""
    return Maker("promptkd", tmp_path)


@pytest.fixture
def primed(tmp_path):
    """Makes a `PrimedDistillTrainer` of tiny parts."""
    return Maker("primed", tmp_path)


@pytest.fixture(params=METHODS)
def make(request, tmp_path):
    """Makes either trainer: the test runs for both."""
    return Maker(request.param, tmp_path)


@pytest.fixture
def server(monkeypatch):
    """An API that speaks OpenAI's protocol. (Tests of vLLM's pooling mode have a `server` of their own.)"""
    monkeypatch.setattr(openai_server, "_PAUSES", (0.01,) * 6)
    monkeypatch.delenv(openai_server.KEY_VARIABLE, raising=False)
    with ChatServer() as server:
        yield server


@pytest.fixture
def propagate(monkeypatch):
    """Lets `caplog` see what transformers' loggers say."""
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_promptkd"), "propagate", True)
