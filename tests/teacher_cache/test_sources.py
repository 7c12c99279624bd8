"""Caches whose teacher runs in vLLM, in this process or on a server, with stand-ins for both."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pooling_server import PoolingServer
from tiny import CONFIGS, HEADS, answered_dataset, prompt_dataset, save_models, tiny_model, tiny_tokenizer
from trainers import PRIMING

from trl_promptkd import TeacherCache, build_teacher_cache, merge_teacher_caches, verify_teacher_cache
from trl_promptkd.cli import main
from trl_promptkd.generation import store, teacher_server, vllm_states
from trl_promptkd.teacher_cache import builder, sources


class Engine:
    """vLLM's, with transformers."""

    made: dict = {}

    def __init__(self, name, dtype, max_length, revision, trust_remote_code, engine_kwargs):
        type(self).made = {
            "max_length": max_length,
            "dtype": dtype,
            "revision": revision,
            "engine_kwargs": engine_kwargs,
        }
        self.model = type(self).teacher

    @torch.no_grad()
    def states(self, rows):
        return [self.model.get_decoder()(torch.tensor([row])).last_hidden_state[0] for row in rows]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a cache of a saved teacher by some backend."""
    monkeypatch.setattr(sources, "VLLMStates", Engine)
    monkeypatch.setattr(vllm_states, "is_vllm_available", lambda: True)

    def build(backend, teacher=None, folder=None, **settings):
        Engine.teacher = teacher or tiny_model(seed=2)
        save_models(tmp_path, teacher=Engine.teacher)
        settings = {"preset": "exact", "priming": PRIMING, "batch_size": 3, **settings}
        return build_teacher_cache(
            settings.pop("name", str(tmp_path / "teacher")),
            settings.pop("dataset", answered_dataset(12)),
            str(tmp_path / (folder or backend)),
            processing_class=settings.pop("processing_class", tiny_tokenizer()),
            backend=backend,
            **settings,
        )

    return build


@pytest.fixture
def serve(tmp_path):
    """Starts a stand-in server for a teacher."""
    servers = []

    def serve(teacher=None, **settings):
        server = PoolingServer(teacher or tiny_model(seed=2), name=str(tmp_path / "teacher"), **settings)
        servers.append(server)
        return server.__enter__()

    yield serve
    for server in servers:
        server.__exit__()


def assert_same(ours, theirs):
    """Both hold the same rows, and say the same of them."""
    assert sorted(ours.rows["key"]) == sorted(theirs.rows["key"])
    for row in theirs.rows:
        pair = [c.log_probs([c.find(row["teacher_prompt_ids"], row["completion_ids"])]) for c in (ours, theirs)]
        torch.testing.assert_close(*pair, atol=2e-3, rtol=0)
    for name in ("kl_mean", "tail_mass_p50", "rows", "tokens"):
        if name in theirs.manifest.receipt:
            assert ours.manifest.receipt[name] == pytest.approx(theirs.manifest.receipt[name], rel=0.05, abs=1e-7)


class TestStates:
    @pytest.mark.parametrize(
        "family", ["llama", "gpt2", "phi", "scaled (Cohere)", "divided (Granite)", "capped (Gemma 2)"]
    )
    def test_each_backend_builds_the_same_cache(self, build, serve, family):
        """With the models' own biases, scales and soft-capping; tied heads and others."""
        known = (CONFIGS | HEADS)[family][1]
        teacher = tiny_model(family, seed=2, tie_word_embeddings="num_key_value_heads" in known)
        theirs = build("transformers", teacher)
        engine = build("vllm", teacher, vllm_kwargs={"enforce_eager": True})
        served = build("server", teacher, teacher_server=serve(teacher).url)
        for backend, ours in (("vllm", engine), ("server", served)):
            assert_same(ours, theirs)
            made, there = ours.manifest.teacher, theirs.manifest.teacher
            assert made == {**there, "weights": made["weights"], "backend": backend}
            assert verify_teacher_cache(ours, teacher)["same_weights"]
            other = tiny_model(family, seed=3)
            assert not verify_teacher_cache(ours, other)["same_weights"]
        assert Engine.made["engine_kwargs"] == {"enforce_eager": True}
        assert Engine.made["max_length"] == max(
            len(row["teacher_prompt_ids"]) + len(row["completion_ids"]) for row in theirs.rows
        )

    @pytest.mark.parametrize("preset", ["tiny", "standard", "faithful"])
    def test_every_preset(self, build, serve, preset):
        theirs = build("transformers", preset=preset)
        for ours in (build("vllm", preset=preset), build("server", preset=preset, teacher_server=serve().url)):
            assert sorted(ours.rows["key"]) == sorted(theirs.rows["key"])
            assert ours.manifest.receipt.keys() == theirs.manifest.receipt.keys()
            if preset != "tiny":
                found = [verify_teacher_cache(cache, tiny_model(seed=2), 99)["kl_mean"] for cache in (ours, theirs)]
                assert found[0] == pytest.approx(found[1], rel=0.05)

    def test_a_teacher_in_half_precision_is_kept_as_it_says(self, build, serve):
        teacher = tiny_model(seed=2).bfloat16()
        server = serve(teacher)
        cache = build("server", teacher, teacher_server=server.url)
        assert cache.manifest.teacher["dtype"] == "bfloat16"
        assert {body["embed_dtype"] for body in server.bodies} == {"bfloat16"}
        assert verify_teacher_cache(cache, teacher, 99)["kl_mean"] < 5e-3
        cache = build("vllm", teacher)
        assert Engine.made["dtype"] is torch.bfloat16
        assert verify_teacher_cache(cache, teacher, 99)["kl_mean"] < 5e-3

    def test_a_padded_vocabulary_is_cut(self, build):
        """Ids that stand for no token are not in the distributions."""
        teacher = tiny_model(seed=2, vocab_size=48)
        cache = build("vllm", teacher)
        assert cache.manifest.vocab_size == 40
        assert verify_teacher_cache(cache, _cut(teacher), 99)["kl_mean"] < 1e-3

    def test_parts_by_a_server_are_merged(self, build, serve, tmp_path, monkeypatch):
        monkeypatch.setattr(store, "BYTES_A_PART", 0)
        url = serve().url
        first = build("server", folder="1", part="1/2", teacher_server=url)
        basis = str(tmp_path / "1" / "basis.safetensors")
        second = build("server", folder="2", part="2/2", basis=basis, teacher_server=url)
        merged = merge_teacher_caches([first.path, second.path], str(tmp_path / "merged"))
        assert_same(merged, build("transformers"))
        by_engine = build("vllm", folder="3", part="2/2", basis=basis)
        with pytest.raises(ValueError, match=r"`teacher` is .*'backend': 'server'.* there and .*'vllm'"):
            merge_teacher_caches([first.path, by_engine.path], str(tmp_path / "mixed"))

    def test_a_server_that_stops_loses_nothing(self, build, serve, monkeypatch):
        monkeypatch.setattr(store, "BYTES_A_PART", 0)  # a shard for each batch
        monkeypatch.setattr(teacher_server, "_PAUSES", (0.0,))
        server = serve()
        broken = partial(replace, ends_after=10)
        server.faults = [replace] * 4 + [broken] * 2  # two requests are the check's
        with pytest.raises(ConnectionError, match="did not answer /pooling"):
            build("server", preset="tiny", teacher_server=server.url)
        asked = [body["input"] for body in server.bodies][2:]
        server.bodies.clear()
        cache = build("server", preset="tiny", teacher_server=server.url)
        rows = [[*row["teacher_prompt_ids"], *row["completion_ids"]] for row in cache.rows]
        assert len(cache) == 12
        done, again = [*asked[0], *asked[1]], [row for body in server.bodies[2:] for row in body["input"]]
        assert sorted([*done, *again]) == sorted(rows)


def _cut(teacher):
    teacher.resize_token_embeddings(40)
    return teacher


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            (
                {"backend": "sglang"},
                ValueError,
                "`backend` is 'sglang'; it must be 'transformers' or 'vllm' or 'server'",
            ),
            ({"backend": "server"}, ValueError, "`teacher_server` is missing. Pass its address"),
            ({"backend": "server", "teacher_server": "host"}, ValueError, "`teacher_server` is 'host'; it must be an"),
            (
                {"backend": "vllm", "teacher_server": "http://a"},
                ValueError,
                "`backend` is 'vllm'. Set `backend='server'",
            ),
            ({"backend": "transformers", "vllm_kwargs": {"x": 1}}, ValueError, "Set `backend='vllm'`, or omit it"),
            ({"backend": "vllm", "name": tiny_model()}, TypeError, "`teacher` is a LlamaForCausalLM.* Pass its name"),
            (
                {"backend": "vllm", "response_source": "teacher", "dataset": prompt_dataset(2)},
                ValueError,
                "`response_source` is 'teacher', but .* only reads answers.*response_source='dataset'",
            ),
            ({"backend": "vllm", "vllm_kwargs": {"runner": "generate"}}, ValueError, "`vllm_kwargs` holds 'runner'"),
            (
                {"backend": "vllm", "teacher_model_init_kwargs": {"subfolder": "x"}},
                ValueError,
                "`teacher_model_init_kwargs` holds 'subfolder', which vLLM does not take",
            ),
        ],
    )
    def test_what_cannot_work_is_refused_before_anything_is_loaded(self, build, monkeypatch, settings, error, message):
        monkeypatch.setattr(sources, "load_output_head", None)
        with pytest.raises(error, match=message):
            build(**settings)

    def test_vllm_that_is_not_installed(self, build, monkeypatch):
        monkeypatch.setattr(vllm_states, "is_vllm_available", lambda: False)
        with pytest.raises(ImportError, match=r"`backend` is 'vllm', but vLLM is not installed.*trl-promptkd\[vllm\]"):
            build("vllm")

    def test_several_processes_with_one_engine(self, build, monkeypatch):
        monkeypatch.setattr(builder, "Accelerator", lambda: SimpleNamespace(num_processes=2))
        with pytest.raises(ValueError, match=r"2 processes were launched.*start one process.*tensor_parallel_size"):
            build("vllm")

    def test_a_server_of_another_model_is_refused(self, build, serve):
        other = serve(tiny_model(seed=3), completes=True)
        with pytest.raises(ValueError, match="It serves another model"):
            build("server", teacher_server=other.url)

    def test_a_cache_of_another_backend_is_not_resumed(self, build, serve):
        build("transformers", folder="cache")
        with pytest.raises(ValueError, match=r"`teacher` is .* there and .*'backend': 'vllm'.* here"):
            build("vllm", folder="cache")


def test_the_command_builds_by_a_server(build, serve, tmp_path, capsys):
    build("transformers", folder="other")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat", "completion": " sat on"}\n')
    flags = ["--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "cache"), "--preset", "exact"]
    flags += ["--dataset", str(tmp_path / "rows.jsonl"), "--backend", "server", "--teacher_server", serve().url]
    assert main(["cache", "build", *flags]) == 0
    assert "server" in capsys.readouterr().out
    assert len(TeacherCache(str(tmp_path / "cache"))) == 1
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0
