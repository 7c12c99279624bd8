import os


os.environ.setdefault("CI", "1")  # no telemetry from tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny import tiny_tokenizer

from trl_promptkd import PrimedDistillConfig, PromptKDConfig


torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def short_run(config_class, folder, overrides):
    settings = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return config_class(**{**settings, **overrides})


@pytest.fixture
def make_args(tmp_path):
    """PromptKD settings for a short run on tiny models."""
    return lambda **overrides: short_run(PromptKDConfig, tmp_path, overrides)


@pytest.fixture
def make_primed_args(tmp_path):
    """Response priming's settings for a short run on tiny models."""
    return lambda **overrides: short_run(PrimedDistillConfig, tmp_path, overrides)


@pytest.fixture
def propagate(monkeypatch):
    """Lets `caplog` see what transformers' loggers say."""
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_promptkd"), "propagate", True)
