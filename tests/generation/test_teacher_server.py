"""Hidden states from a server: a stand-in that speaks vLLM's protocol, and what vLLM 0.31.0 itself once answered."""

import base64
import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
import torch
from pooling_server import Answer, PoolingServer
from tiny import tiny_model, tiny_tokenizer

from trl_promptkd.generation import teacher_server
from trl_promptkd.generation.teacher_server import TeacherServer, decoded_states
from trl_promptkd.models.output_head import load_output_head


ROWS = [[3, 9, 14, 22], [7, 8], [3, 9, 14]]
RECORDED = json.loads((Path(__file__).parent / "data" / "vllm_pooling.json").read_text())


@pytest.fixture
def model():
    return tiny_model(seed=2, num_hidden_layers=3)


@pytest.fixture
def head(model, tmp_path):
    model.save_pretrained(tmp_path / "teacher")
    return load_output_head(str(tmp_path / "teacher"))


@pytest.fixture
def server(model):
    with PoolingServer(model) as running:
        yield running


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(teacher_server, "_PAUSES", (0.0, 0.01, 0.01))


def states_of(model, row):
    with torch.no_grad():
        return model.model(torch.tensor([row])).last_hidden_state[0]


class TestStates:
    def test_are_the_models_own_row_by_row(self, server, model):
        found = TeacherServer(server.url, dtype="float32").states(ROWS)
        for row, states in zip(ROWS, found, strict=True):
            assert torch.equal(states, states_of(model, row))

    def test_are_rounded_to_the_wires_dtype(self, server, model):
        for row, states in zip(ROWS, TeacherServer(server.url).states(ROWS), strict=True):
            assert torch.equal(states, states_of(model, row).bfloat16())

    def test_of_many_rows_are_asked_for_in_several_requests_and_keep_their_order(self, server, model, monkeypatch):
        monkeypatch.setattr(teacher_server, "_MOST_ROWS", 2)
        monkeypatch.setattr(teacher_server, "_MOST_TOKENS", 5)
        rows = [[3, 9, 14, 22], [7, 8], [3], [4], [5], [9] * 7]
        found = TeacherServer(server.url, dtype="float32").states(rows)
        assert sorted(map(len, (body["input"] for body in server.bodies))) == [1, 1, 2, 2]
        for row, states in zip(rows, found, strict=True):
            assert torch.equal(states, states_of(model, row))

    def test_of_no_rows_are_not_asked_for(self, server):
        assert TeacherServer(server.url).states([]) == []
        assert server.bodies == []

    def test_come_while_something_else_is_done(self, server):
        server.faults = [lambda answer: dataclasses.replace(answer, delay=0.2)] * 3
        client = TeacherServer(server.url)
        start = time.perf_counter()
        pending = [client.submit(ROWS) for _ in range(3)]
        assert time.perf_counter() - start < 0.1
        assert all(len(states.result()) == len(ROWS) for states in pending)
        assert time.perf_counter() - start < 0.5  # one after the other they take 0.6


class TestRecordedAnswer:
    """What vLLM sent for `RECORDED["rows"]`, and what transformers' forward pass gives for them."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_is_understood(self, dtype):
        answer = RECORDED["answers"][dtype]
        body = bytearray(base64.b64decode(answer["body"]))
        states = decoded_states(body, answer["metadata"], list(map(len, RECORDED["rows"])), dtype)
        overrides = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
        model = tiny_model(seed=2, num_hidden_layers=3, **overrides)
        for row, found in zip(RECORDED["rows"], states, strict=True):
            assert torch.allclose(found.float(), states_of(model, row), atol=1e-4 if dtype == "float32" else 0.03)

    def test_has_the_keys_that_the_stand_in_sends(self, server):
        TeacherServer(server.url).states(ROWS)
        theirs, ours = json.loads(RECORDED["answers"]["bfloat16"]["metadata"]), {}
        server.faults = [lambda answer: ours.update(answer.metadata) or answer]
        TeacherServer(server.url).states(ROWS)
        assert ours.keys() == theirs.keys()
        assert ours["data"][0].keys() == theirs["data"][0].keys()


def change(**fields):
    return lambda answer: dataclasses.replace(answer, **fields)


def item(row, **fields):
    """A fault: one row's place is said to be another."""

    def changed(answer):
        answer.metadata["data"][row] |= fields
        return answer

    return changed


def number(position, value):
    """A fault: one number of the body is another."""

    def changed(answer):
        body = torch.frombuffer(bytearray(answer.body), dtype=torch.float32)
        body[position] = value
        return dataclasses.replace(answer, body=body.numpy().tobytes())

    return changed


def swapped(answer):
    items = answer.metadata["data"]
    items[0], items[1] = items[1], items[0]
    return answer


FEWER_ROWS = {"data": [], "model": "teacher"}
PAGE = Answer(200, b"<html><body>Welcome to nginx!</body></html>", type="text/html")
PASSES = {
    "429": lambda _: Answer.error(429, "slow down"),
    "500": lambda _: Answer(500, b"Internal Server Error"),
    "503": lambda _: Answer(503, b""),
    "closed at once": change(status=0),
    "closed within the body": change(ends_after=40),
    "body cut": lambda answer: dataclasses.replace(answer, body=answer.body[:-8]),
}
REFUSED = {
    "a page": (lambda _: PAGE, "no header `metadata`.*Welcome to nginx"),
    "no metadata": (change(metadata=None), "no header `metadata`"),
    "other metadata": (change(metadata="none"), "`metadata` is not vLLM's: 'none'"),
    "metadata without places": (change(metadata={"data": [{"index": 0}]}), "`metadata` is not vLLM's"),
    "too few rows": (change(metadata=FEWER_ROWS), "holds 0 rows, and 3 were asked for"),
    "rows swapped": (swapped, "row 0 has the number 1: rows are not in order"),
    "another dtype": (item(1, embed_dtype="float16"), r"row 1 is float16 .* float32 .* was asked for"),
    "another endianness": (item(0, endianness="big"), "row 0 is float32 .big endian"),
    "another number of tokens": (item(2, shape=[4, 32]), r"row 2 has states of shape \[4, 32\], and it has 3 tokens"),
    "no shape": (item(2, shape=["3", 32]), "row 2 has states of shape"),
    "another width": (item(1, shape=[2, 16]), "row 1 has states of 16 numbers, and .* takes 32"),
    "places that do not add up": (item(1, start=0), "row 1 .* is said to be at bytes 0 to"),
    "a longer body": (lambda answer: dataclasses.replace(answer, body=answer.body + bytes(4)), "more than 1152 bytes"),
    "NaN": (number(5, float("nan")), "row 0 holds states that are not finite"),
    "infinity": (number(-1, float("inf")), "row 2 holds states that are not finite"),
    "a redirect": (lambda _: Answer(307, b"", headers=(("Location", "http://other/pooling"),)), "sends to another"),
    "a JSON error": (lambda _: Answer.error(400, "prompt is too long"), "status 400: .*prompt is too long"),
    "a pickle": (lambda _: Answer(200, b"\x80\x04cos\nsystem\n."), "no header `metadata`"),
    "no route": (lambda _: Answer(404, b"Not Found"), "status 404: Not Found.*Start the server as: vllm serve"),
}


class TestBadAnswers:
    @pytest.mark.parametrize("fault", PASSES)
    def test_that_pass_are_tried_again(self, fault, server, model):
        server.faults = [PASSES[fault]] * 3
        found = TeacherServer(server.url, dtype="float32").states(ROWS)
        assert torch.equal(found[1], states_of(model, ROWS[1]))
        assert len(server.bodies) == 4

    @pytest.mark.parametrize("fault", PASSES)
    def test_that_do_not_pass_end_in_an_error_that_names_the_server(self, fault, server):
        server.faults = [PASSES[fault]] * 4
        told = re.escape(server.url) + " did not answer /pooling in 4 tries"
        with pytest.raises(ConnectionError, match=told):
            TeacherServer(server.url, dtype="float32").states(ROWS)
        assert len(server.bodies) == 4

    @pytest.mark.parametrize("fault", REFUSED)
    def test_of_another_kind_are_refused_at_once(self, fault, server):
        change_answer, message = REFUSED[fault]
        client = TeacherServer(server.url, dtype="float32")
        client.hidden_size = 32
        server.faults = [change_answer]
        with pytest.raises(ValueError, match=f"(?s)gave an answer to /pooling that cannot be used: .*{message}"):
            client.states(ROWS)
        assert len(server.bodies) == 1

    def test_an_error_may_be_longer_than_the_states_would_be(self, server):
        client = TeacherServer(server.url)
        client.hidden_size = 32
        server.faults = [lambda _: Answer(503, b"busy " * 100), lambda _: Answer.error(400, "long " * 100 + "end")]
        with pytest.raises(ValueError, match=r"status 400: .*long long"):
            client.states([[3]])

    def test_that_are_slow_are_given_up(self, server):
        server.faults = [change(delay=5.0)]
        start = time.perf_counter()
        with pytest.raises(TimeoutError, match=r"within 0.2 seconds .*raise `teacher_server_timeout`"):
            TeacherServer(server.url, timeout=0.2).states(ROWS)
        assert time.perf_counter() - start < 2

    def test_no_server(self, server):
        client = TeacherServer("http://127.0.0.1:1")
        with pytest.raises(ConnectionError, match=r"127.0.0.1:1 did not answer /v1/models in 4 tries .ConnectError"):
            client.states(ROWS)

    def test_a_row_that_is_too_long(self, server):
        with pytest.raises(ValueError, match=r"status 400: .*maximum context length is 128"):
            TeacherServer(server.url).states([[3] * 129])


class TestKey:
    def test_comes_from_the_environment(self, model, monkeypatch):
        monkeypatch.setenv("VLLM_API_KEY", "secret-key")
        with PoolingServer(model, key="secret-key") as server:
            client = TeacherServer(server.url)
            assert len(client.states(ROWS)) == 3
            assert server.keys == ["Bearer secret-key"]
        assert "secret-key" not in repr(vars(client)) + repr(vars(client._client))

    @pytest.mark.parametrize(("key", "told"), [(None, "it is not set"), ("wrong-key", "it is set to another")])
    def test_that_is_refused_is_not_shown(self, model, key, told, monkeypatch):
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        if key:
            monkeypatch.setenv("VLLM_API_KEY", key)
        with (
            PoolingServer(model, key="secret-key") as server,
            pytest.raises(ValueError, match=f"status 401. Set .* VLLM_API_KEY .*{told}") as error,
        ):
            TeacherServer(server.url).states(ROWS)
        assert "wrong-key" not in str(error.value)

    @pytest.mark.parametrize("status", [200, 400])
    def test_that_a_server_repeats_is_not_shown(self, server, monkeypatch, status):
        monkeypatch.setenv("VLLM_API_KEY", "secret-key")
        server.faults = [lambda _: Answer(status, b"you sent Bearer secret-key")]
        with pytest.raises(ValueError, match=r"you sent Bearer \*\*\*"):
            TeacherServer(server.url).states(ROWS)

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("http://me:secret@host:8000", "A key goes into the environment variable VLLM_API_KEY"),
            ("host:8000", "must be an address that starts with http"),
        ],
    )
    def test_addresses_that_are_none(self, url, message):
        with pytest.raises(ValueError, match=message) as error:
            TeacherServer(url)
        assert "secret" not in str(error.value)


class TestCheck:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("completes", [False, True])
    def test_finds_nothing_wrong_with_the_teacher(self, model, head, dtype, completes):
        with PoolingServer(model, completes=completes) as server:
            client = TeacherServer(server.url, "teacher", dtype)
            client.check(head, tiny_tokenizer(), longest=127)
        assert (client.hidden_size, client.max_length) == (32, 127)

    @pytest.mark.parametrize("name", [None, "teacher", "/models/teacher"])
    def test_knows_the_model_by_its_name_or_its_folder(self, server, head, name):
        TeacherServer(server.url, name).check(head, tiny_tokenizer())

    def test_another_model_by_its_name(self, server, head):
        with pytest.raises(ValueError, match=r"serves 'teacher', but `teacher_model` is 'other'. Start it with that"):
            TeacherServer(server.url, "other").check(head, tiny_tokenizer())

    def test_rows_that_are_too_long(self, server, head):
        with pytest.raises(
            ValueError, match=r"at most 127 tokens, but the longest row needs 129 .*--max-model-len 130"
        ):
            TeacherServer(server.url).check(head, tiny_tokenizer(), longest=129)

    def test_another_hidden_size(self, head):
        told = "states of 16 numbers, and the teacher's output head takes 32"
        with PoolingServer(tiny_model(hidden_size=16)) as server, pytest.raises(ValueError, match=told):
            TeacherServer(server.url).check(head, tiny_tokenizer())

    def test_normalized_states(self, server, head):
        def normalized(answer):
            body = torch.frombuffer(bytearray(answer.body), dtype=torch.float32).view(-1, 32)
            return dataclasses.replace(answer, body=torch.nn.functional.normalize(body, dim=-1).numpy().tobytes())

        server.faults = [normalized] * 2
        with pytest.raises(ValueError, match=r"gives normalized states.*Start it with `use_activation` false"):
            TeacherServer(server.url, dtype="float32").check(head, tiny_tokenizer())

    def test_rows_that_are_mixed_up(self, server, head):
        def mixed(answer):
            half = len(answer.body) // 2
            return dataclasses.replace(answer, body=answer.body[half:] + answer.body[:half])

        server.faults = [lambda answer: answer, mixed]
        with pytest.raises(ValueError, match="other states than the same tokens alone"):
            TeacherServer(server.url).check(head, tiny_tokenizer())

    def test_other_weights_if_the_server_completes(self, model, head):
        with PoolingServer(model, completes=True) as server:
            server.model = tiny_model(seed=9, num_hidden_layers=3)  # the head's is another
            with pytest.raises(ValueError, match=r"completes a sentence with token .* It serves another model"):
                TeacherServer(server.url).check(head, tiny_tokenizer())

    def test_what_is_no_vllm(self, server, head):
        server.answer = lambda *_: PAGE
        with pytest.raises(ValueError, match="gave an answer to /v1/models that cannot be used: it is no JSON object"):
            TeacherServer(server.url).check(head, tiny_tokenizer())
