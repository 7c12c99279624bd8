"""The fixture `hub`, for test modules that say `pytest_plugins = ["hub_client"]`."""

import time

import datasets
import huggingface_hub
import pytest
import transformers
from hub_server import TOKEN, Hub


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
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # which PEFT reads itself
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
        yield hub
