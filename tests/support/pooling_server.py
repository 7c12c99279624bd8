"""vLLM's HTTP protocol in pooling mode, as far as a served teacher needs it, from a tiny model.

Routes and wire format were read from vLLM 0.31.0; `tests/generation/data/vllm_pooling.json` holds an answer of it.
`PoolingServer.faults` are changes to the next answers to `/pooling`, one for each.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from loopback import LoopbackServer, QuietHandler


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Answer:
    status: int
    body: bytes
    metadata: dict | str | None = None  # of the header
    type: str = "application/octet-stream"
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    ends_after: int | None = None  # bytes of the body after which the connection breaks

    @classmethod
    def json(cls, status: int, value) -> "Answer":
        return cls(status, json.dumps(value).encode(), type="application/json")

    @classmethod
    def error(cls, status: int, message: str) -> "Answer":
        return cls.json(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})


class PoolingServer(LoopbackServer):
    """The server; a context, in which it runs.

    Args:
        model: The teacher.
        name: What it is served as.
        completes: Whether it also completes, as a server in pooling mode does not.
    """

    def __init__(self, model, name="teacher", max_model_len=128, key=None, completes=False, port=0):
        self.model, self.name, self.max_model_len = model, name, max_model_len
        self.key, self.completes = key, completes
        self.faults: list[Callable[[Answer], Answer]] = []
        self.before_pooling: Callable[[], None] = lambda: None
        self.bodies: list[dict] = []  # of the requests to /pooling
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        super().__init__(_Handler, "pooling", port)
        self.url = self.host

    @property
    def rows(self) -> list[list[int]]:
        """All rows that were asked for."""
        return [row for body in self.bodies for row in body["input"]]

    def answer(self, path: str, body: dict | None, key: str | None) -> Answer:
        if self.key is not None and key != f"Bearer {self.key}":
            return Answer.json(401, {"error": "Unauthorized"})
        if path == "/v1/models":
            entry = {"id": self.name, "object": "model", "root": f"/models/{self.name}"}
            return Answer.json(200, {"object": "list", "data": [{**entry, "max_model_len": self.max_model_len}]})
        if path == "/v1/completions" and self.completes:
            with torch.no_grad(), self.lock:
                token = int(self.model(torch.tensor([body["prompt"]])).logits[0, -1].argmax())
            return Answer.json(200, {"choices": [{"index": 0, "text": "?", "token_ids": [token]}]})
        if path != "/pooling":
            return Answer.json(404, {"detail": "Not Found"})
        self.before_pooling()
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            answer = self._pooled(body)
            return self.faults.pop(0)(answer) if self.faults else answer

    @torch.no_grad()
    def _pooled(self, body: dict) -> Answer:
        if body["model"] != self.name:
            return Answer.error(404, f"The model `{body['model']}` does not exist.")
        if (body["task"], body["encoding_format"]) != ("token_embed", "bytes"):
            return Answer.error(400, "Try switching the model's pooling_task via --pooler-config.task")
        states, items, offset = [], [], 0
        for index, row in enumerate(body["input"]):
            if len(row) > self.max_model_len:
                return Answer.error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
            row_states = self.model.get_decoder()(torch.tensor([row])).last_hidden_state[0]
            if body.get("use_activation", True):
                row_states = torch.nn.functional.normalize(row_states, dim=-1)
            row_states = row_states.to(_DTYPES[body["embed_dtype"]])
            states.append(bytes(row_states.contiguous().view(torch.uint8).numpy().tobytes()))
            place = {"start": offset, "end": offset + len(states[-1]), "shape": list(row_states.shape)}
            items.append({"index": index, "embed_dtype": body["embed_dtype"], "endianness": sys.byteorder, **place})
            offset = place["end"]
        tokens = sum(map(len, body["input"]))
        metadata = {"id": "pooling-0", "created": 0, "model": self.name, "data": items}
        metadata["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Answer(200, b"".join(states), metadata)


class _Handler(QuietHandler):
    pooling: PoolingServer

    def do_GET(self) -> None:
        self._send(self.pooling.answer(self.path, None, self.headers.get("Authorization")))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(self.pooling.answer(self.path, body, self.headers.get("Authorization")))

    def _send(self, answer: Answer) -> None:
        """In chunks, as vLLM does: what a client gets has no length of its own."""
        time.sleep(answer.delay)
        if answer.status == 0:  # not a word
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.type)
        for name, value in answer.headers:
            self.send_header(name, value)
        if answer.metadata is not None:
            text = answer.metadata if isinstance(answer.metadata, str) else json.dumps(answer.metadata)
            self.send_header("metadata", text)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = answer.body if answer.ends_after is None else answer.body[: answer.ends_after]
        for start in range(0, len(body), 4096):
            part = body[start : start + 4096]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        if answer.ends_after is not None:
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")
