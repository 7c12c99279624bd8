"""A teacher on another machine: hidden states of whole rows from a stock vLLM server, over HTTP.

vLLM's pooling runner returns the last hidden states of all tokens of a row. The output head is applied here
([`~trl_promptkd.models.output_head.load_output_head`]), which gives full distributions. The body of a reply is the
rows' states one after the other. Only numbers are read from it, and no code in it is ever run.
"""

import json
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.forward import TokenStates
from ..models.output_head import hidden_size
from .servers import ServerKey, check_url


__all__ = ["KEY_VARIABLE", "PendingStates", "TeacherServer", "decoded_states"]

KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable from which vLLM's own server reads its key."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between the tries of a request
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses after which another try may succeed
# Of one request: its answer's header names every row, and its body is held in memory
_MOST_ROWS, _MOST_TOKENS = 32, 16_384
_MOST_THREADS = 8
_WIDEST = 65_536  # hidden size, of a model that is not known yet
_MOST_JSON = 2**24  # bytes
_SENTENCE = (
    "The sun rises in the east, and in the evening it goes down in the west. Water boils at one hundred degrees."
)
_COMMAND = (
    "vllm serve MODEL --runner pooling --convert embed --pooler-config "
    """'{"task": "token_embed", "use_activation": false}'"""
)


class _TryAgainError(Exception):
    """A temporary failure."""


class PendingStates:
    """Hidden states that have been requested."""

    def __init__(self, parts: Sequence[Future[list[Tensor]]]):
        self._parts = parts

    def result(self) -> list[Tensor]:
        """Wait for the states of each row, `(tokens, hidden)`. Raises the errors of the requests."""
        return [states for part in self._parts for states in part.result()]

    def cancel(self) -> None:
        """Drop requests that have not been sent yet."""
        for part in self._parts:
            part.cancel()


class TeacherServer:
    """
    A vLLM server in pooling mode.

    If the server needs a key, it is read from the environment variable `VLLM_API_KEY`. It is neither saved nor shown.

    Args:
        url (`str`): URL of the server, such as `"http://host:8000"`.
        model (`str`, *optional*): The name under which the server has the teacher, or the folder or Hub id that it was
            started with. `None` if it serves only one model.
        dtype (`str`): Dtype of the states on the wire, `"bfloat16"` or `"float32"`.
        timeout (`float`): Seconds after which a request fails, including all its tries.

    Raises:
        TypeError, ValueError: if the address or the dtype is not valid.
    """

    def __init__(self, url: str, model: str | None = None, dtype: str = "bfloat16", timeout: float = 120.0):
        check_url("teacher_server", url, KEY_VARIABLE, "http://host:8000")
        if dtype not in _DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}; it must be {' or '.join(map(repr, _DTYPES))}.")
        self.url, self.model, self.dtype, self.timeout = url.rstrip("/"), model, dtype, timeout
        self.hidden_size: int | None = None
        """Width of the states, once [`~TeacherServer.check`] knows it."""
        self.max_length: int | None = None
        """Longest row in tokens, once the server has been queried. `None` before that, or if it does not say."""
        self._served_name: str | None = None
        self._key = ServerKey(KEY_VARIABLE)
        limits = httpx2.Limits(max_connections=_MOST_THREADS, max_keepalive_connections=_MOST_THREADS)
        self._client = httpx2.Client(limits=limits, headers={"Accept-Encoding": "identity", **self._key.headers})
        self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="teacher-server")
        weakref.finalize(self, self._client.close)  # connections end with the last reference to this

    def states(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The hidden states of whole rows of token ids, after the final norm.

        Returns:
            `(tokens, hidden)` for each row, on the CPU, in the wire's dtype.

        Raises:
            ConnectionError: if the server cannot be reached, breaks off or fails, after several tries.
            TimeoutError: if it takes longer than `timeout`.
            ValueError: if it rejects the rows, or if its reply does not fit the request.
        """
        return self.submit(rows).result()

    def submit(self, rows: Sequence[Sequence[int]]) -> PendingStates:
        """Request the states of rows now, and wait for them later. See [`~TeacherServer.states`]."""
        return PendingStates([self._pool.submit(self._ask, part) for part in _parts(rows)])

    def check(
        self, head: PreTrainedModel, processing_class: PreTrainedTokenizerBase, longest: int | None = None
    ) -> None:
        """Check that the server has the teacher of `head`, as far as that can be seen.

        It checks the served name, the longest row, and the width and dtype of the states. The states must suit the
        head: not normalized, each from the tokens up to its own only, in the order of the rows. If the server also
        completes texts, the likeliest next token of a sentence must be the same.

        Args:
            head: Result of [`~trl_promptkd.models.output_head.load_output_head`], on its device.
            processing_class: The tokenizer.
            longest: Tokens of the longest row that will be requested.

        Raises:
            ConnectionError, TimeoutError: see [`~TeacherServer.states`].
            ValueError: naming what the server has and what is needed, with advice.
        """
        name = self.find_model()
        self.check_length(longest or 0)
        self.hidden_size = hidden_size(head)
        size = head.get_output_embeddings().weight.size(0)
        ids = [index for index in processing_class.encode(_SENTENCE, add_special_tokens=False) if index < size]
        sentence = ids[: self.max_length]
        prefix, other = sentence[: len(sentence) // 2 + 1], [ids[-1]] * len(sentence)
        alone, (_, states) = self.states([prefix])[0].float(), self.states([other, sentence])
        norms = states.float().norm(dim=-1)
        if bool(((norms - 1).abs() < 0.02).all()):
            raise ValueError(
                f"The teacher server at {self.url} gives normalized states, of which no logits can be made. Start it "
                f"with `use_activation` false: {_COMMAND}"
            )
        off = (states[: len(alone)].float() - alone).norm(dim=-1) / norms[: len(alone)].clamp(min=1e-9)
        if bool((off > 0.1).any()):
            raise ValueError(
                f"The teacher server at {self.url} gives the first tokens of a row other states than the same tokens "
                f"alone (off by {float(off.max()):.2g} of their length). It mixes rows up, or its model sees the "
                "tokens that come after. Serve a causal language model with stock vLLM."
            )
        weight = head.get_output_embeddings().weight
        last = TokenStates(states[-1:].to(weight), head).logits()[0].log_softmax(dim=-1)
        token = self._completed(name, sentence)
        if token is not None and not (token < len(last) and float(last[token]) > float(last.max()) - 0.5):
            raise ValueError(
                f"The teacher server at {self.url} completes a sentence with token {token}, but its states and the "
                f"output head of the teacher {head.config._name_or_path!r} give {int(last.argmax())}. It serves "
                "another model. Pass the served model as `teacher_model`."
            )

    def check_length(self, longest: int) -> None:
        """Reject rows of up to `longest` tokens if the server does not take them."""
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"The teacher server at {self.url} takes rows of at most {self.max_length} tokens, but the longest "
                f"row needs {longest} as the teacher sees it. Start the server with `--max-model-len {longest + 1}` "
                "or more, or lower `teacher_max_length`."
            )

    def find_model(self) -> str:
        """The server's name for the teacher, requested once.

        Raises:
            ConnectionError, TimeoutError: see [`~TeacherServer.states`].
            ValueError: if it serves another model.
        """
        if self._served_name is not None:
            return self._served_name
        listed = self._json("GET", "/v1/models", None).get("data")
        if not isinstance(listed, list) or not all(
            isinstance(x, dict) and isinstance(x.get("id"), str) for x in listed
        ):
            raise ValueError(f"{self.url}/v1/models does not list models. Is it a vLLM server? Start one: {_COMMAND}")
        names = [entry["id"] for entry in listed]
        found = [entry for entry in listed if self.model in (entry["id"], entry.get("root"))]
        found = listed if self.model is None else found
        if not found or (self.model is None and len(found) > 1):
            wanted = "`model` must name one" if self.model is None else f"`teacher_model` is {self.model!r}"
            raise ValueError(
                f"The teacher server at {self.url} serves {', '.join(map(repr, names))}, but {wanted}. Start it with "
                f"that model (`--served-model-name` gives it another name), or pass the model that it serves."
            )
        limit = found[0].get("max_model_len")
        # vLLM 0.31 never answers a row of its whole length that it computes in chunks: the last token is left out
        self.max_length = limit - 1 if isinstance(limit, int) and limit > 1 else None
        self._served_name = found[0]["id"]
        return self._served_name

    def _completed(self, name: str, ids: list[int]) -> int | None:
        """The token with which the server completes a row. `None` if it does not complete, as in pooling mode."""
        body = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
        try:
            token = self._json("POST", "/v1/completions", body)["choices"][0]["token_ids"][0]
        except (ConnectionError, ValueError, LookupError, TypeError):
            return None
        return token if isinstance(token, int) else None

    def _ask(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        body = {
            "model": self.find_model(),
            "input": [list(row) for row in rows],
            "task": "token_embed",
            "encoding_format": "bytes",
            "embed_dtype": self.dtype,
            "endianness": sys.byteorder,
            "use_activation": False,
            "add_special_tokens": False,
        }
        width = self.hidden_size or _WIDEST
        most = sum(map(len, rows)) * width * _DTYPES[self.dtype].itemsize
        lengths = [len(row) for row in rows]

        def parsed(answer: bytearray, metadata: str | None) -> list[Tensor]:
            return decoded_states(answer, metadata, lengths, self.dtype, self.hidden_size, self._shown)

        return self._tried("POST", "/pooling", body, most, parsed)

    def _json(self, method: str, path: str, body: Any) -> dict[str, Any]:
        def parsed(answer: bytearray, metadata: str | None) -> dict[str, Any]:
            try:
                value = json.loads(answer)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise ValueError(f"it is no JSON object: {self._shown(answer)!r}")
            return value

        return self._tried(method, path, body, _MOST_JSON, parsed)

    def _tried(self, method: str, path: str, body: Any, most: int, parse: Callable[..., Any]) -> Any:
        """The result of `parse` on a reply's body and its header `metadata`, at the first try that succeeds.

        Args:
            most: Largest allowed size of the body, in bytes.
        """
        deadline, where = time.monotonic() + self.timeout, f"The teacher server at {self.url}"
        for pause in (*_PAUSES, None):
            try:
                return parse(*self._once(method, path, body, most, deadline))
            except _TryAgainError as error:
                failure = str(error)
            except ValueError as error:
                raise ValueError(f"{where} gave an answer to {path} that cannot be used: {error}") from error
            if time.monotonic() + (pause or 0) >= deadline:
                raise TimeoutError(
                    f"{where} did not answer {path} within {self.timeout:g} seconds ({failure}). Look at its log, "
                    "raise `teacher_server_timeout`, or make batches smaller."
                )
            if pause is not None:
                time.sleep(pause)
        raise ConnectionError(
            f"{where} did not answer {path} in {len(_PAUSES) + 1} tries ({failure}). Check the address and that the "
            "server runs. A training that was stopped by this resumes with `train(resume_from_checkpoint=True)`."
        )

    def _shown(self, said: bytes | bytearray | str) -> str:
        """The beginning of a reply, for messages."""
        text = said if isinstance(said, str) else said[:10_000].decode("utf-8", "replace")
        return self._key.hidden(" ".join(text.split()), 200)

    def _once(self, method: str, path: str, body: Any, most: int, deadline: float) -> tuple[bytearray, str | None]:
        left = max(deadline - time.monotonic(), 0.001)
        timeout = httpx2.Timeout(left, connect=min(left, 10.0))
        received = bytearray()
        try:
            with self._client.stream(method, self.url + path, json=body, timeout=timeout) as response:
                status = response.status_code
                most = most if status == 200 else _MOST_JSON
                for chunk in response.iter_bytes():
                    received += chunk
                    if time.monotonic() > deadline:
                        raise _TryAgainError("its answer was still coming")
                    if len(received) > most:
                        raise ValueError(f"it has more than {most} bytes")
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return received, response.headers.get("metadata")
        said = self._shown(received)
        if status in _PASSING:
            raise _TryAgainError(f"status {status}: {said}")
        if status in (401, 403):
            raise ValueError(
                f"status {status}. Set the environment variable {KEY_VARIABLE} to the server's key "
                f"(it is {'set to another' if self._key else 'not set'})."
            )
        if 300 <= status < 400:
            raise ValueError(f"status {status}, which sends to another address. Pass that one, if you trust it.")
        hint = f" Start the server as: {_COMMAND}" if status in (404, 405) else ""
        raise ValueError(f"status {status}: {said}.{hint}")


def decoded_states(
    body: bytearray,
    metadata: str | None,
    lengths: Sequence[int],
    dtype: str,
    width: int | None = None,
    shown: Any = repr,
) -> list[Tensor]:
    """The rows' states in a body of vLLM's `encoding_format="bytes"`.

    Args:
        body: The states one after the other. The tensors share its memory.
        metadata: JSON of the header of this name, with each row's place, shape and dtype.
        lengths: Tokens of each row.
        dtype: The requested dtype.
        width (`int`, *optional*): The hidden size, if it is known.
        shown: Formats bytes or a text from the server for messages.

    Returns:
        For each row `(tokens, hidden)`.

    Raises:
        ValueError: naming what is wrong with the body or the header.
    """
    if metadata is None:
        raise ValueError(
            f"it has no header `metadata`. Is it stock vLLM ({_COMMAND}), without a proxy that drops headers? It "
            f"begins with {shown(body)!r}"
        )
    try:
        items = json.loads(metadata)["data"]
        places = [
            (x["index"], x["start"], x["end"], list(x["shape"]), x["embed_dtype"], x["endianness"]) for x in items
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"its header `metadata` is not vLLM's: {shown(metadata)!r}") from error
    if len(places) != len(lengths):
        raise ValueError(f"it holds {len(places)} rows, and {len(lengths)} were asked for")
    found, offset, size = [], 0, _DTYPES[dtype].itemsize
    for row, ((index, start, end, shape, wire, endianness), length) in enumerate(zip(places, lengths, strict=True)):
        if index != row:
            raise ValueError(f"its row {row} has the number {index}: rows are not in order")
        if wire != dtype or endianness not in ("native", sys.byteorder):
            raise ValueError(f"row {row} is {wire} ({endianness} endian), and {dtype} ({sys.byteorder}) was asked for")
        if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape) or shape[0] != length:
            raise ValueError(f"row {row} has states of shape {shape}, and it has {length} tokens")
        width = shape[1] if width is None else width
        if shape[1] != width:
            raise ValueError(
                f"row {row} has states of {shape[1]} numbers, and the teacher's output head takes {width}"
            )
        if start != offset or end != offset + math.prod(shape) * size:
            raise ValueError(
                f"row {row} of shape {shape} is said to be at bytes {start} to {end}, not from {offset} on"
            )
        offset = end
    if len(body) < offset:
        raise _TryAgainError(f"the answer was cut after {len(body)} of {offset} bytes")
    if len(body) > offset:
        raise ValueError(f"it has {len(body)} bytes, and its header says {offset}")
    for row, (_, start, _, shape, *_) in enumerate(places):
        states = torch.frombuffer(body, dtype=_DTYPES[dtype], count=math.prod(shape), offset=start).view(*shape)
        if not bool(torch.isfinite(states).all()):
            raise ValueError(f"row {row} holds states that are not finite (NaN or infinity)")
        found.append(states)
    return found


def _parts(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Rows in their order, in parts that fit into one request."""
    part: list[Sequence[int]] = []
    for row in rows:
        if part and (len(part) == _MOST_ROWS or sum(map(len, part)) + len(row) > _MOST_TOKENS):
            yield part
            part = []
        part.append(row)
    if part:
        yield part
