"""Answers that a teacher behind an API generates once, before training. They stay on disk as a data set.

Every answer is stored under a hash of what made it: the model's name, the sampling settings, the seed and the request.
The server's address does not count. Nor does the student's tokenizer, as texts are kept.
"""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..files import content_hash, remove_incomplete
from .openai_server import ENDS, OpenAIServer
from .rollouts import rollout_seed
from .store import compute_missing, part_paths, read_part, write_part


__all__ = ["write_server_answers"]

_KIND = "api"  # the local teacher's files in the same folder have another
_COLUMNS = ("key", "prompt", "completion", "finish_reason", "settings")
_ANSWERS = pyarrow.schema(dict.fromkeys(_COLUMNS, pyarrow.string()))
# Rows that are handed out together, for each one that is asked for at once: few threads wait for the last
_BATCHES = 4


def write_server_answers(
    requests: Sequence[Mapping[str, Any]],
    folder: str,
    server: OpenAIServer,
    sampling: Mapping[str, Any],
    seed: int,
    num_at_once: int,
    title: str,
    disable_tqdm: bool = False,
) -> list[tuple[str, bool]]:
    """The server's answers, in the order of the requests.

    Requests are shared out among ranks. Parquet files in `folder` keep finished answers, with these columns: `key`,
    `prompt` (a text, or the messages as JSON), `completion`, `finish_reason` and `settings` (the rest of the request,
    as JSON). Answers that are already there are reused, and equal requests get one answer.

    Args:
        requests: Each has `messages` or a `prompt`, and other settings of its row.
        sampling: `max_tokens`, `temperature` and the like. Each request adds a `seed` that follows from its content.
        num_at_once: How many requests a rank has in flight.
        title: What the rows are, for the progress bar.

    Returns:
        Each answer's text, and whether it was cut.

    Raises:
        ConnectionError: if the server cannot be reached. Its answers so far are kept.
        ValueError: if it rejects a request or answers with anything else, or if a file is damaged. The message names
            the file.
    """
    state = PartialState()
    keys = [
        content_hash([server.model, dict(sampling), seed, dict(request)], ensure_ascii=True) for request in requests
    ]
    wanted = dict(zip(keys, requests, strict=True))
    shared: list[Any] = [None]
    if state.is_main_process:
        remove_incomplete(folder)
        shared = [_read_answers(folder, wanted)]
    known: dict[str, tuple[str, str]] = broadcast_object_list(shared)[0]
    mine: dict[str, tuple[str, str]] = {}
    on_disk: set[str] = set()

    def body(key: str) -> dict[str, Any]:
        # 31 bits are a seed to every server
        return {**wanted[key], **sampling, "seed": rollout_seed(seed, f"answers/{key}", 0, 0) % 2**31}

    def rows(keys: Iterable[str]) -> dict[str, dict[str, str]]:
        return {key: _row({"model": server.model, **body(key)}, *mine[key]) for key in keys}

    def write(rows: Mapping[str, dict[str, Any]]) -> None:
        write_part(folder, _KIND, rows, _ANSWERS)
        on_disk.update(rows)

    def answer(batch: list[str]) -> dict[str, dict[str, str]]:
        found, failure = _answers(server, {key: body(key) for key in batch}, num_at_once)
        mine.update(found)
        if failure is not None:
            if unwritten := mine.keys() - on_disk:
                write(rows(sorted(unwritten)))
            raise failure
        return rows(batch)

    compute_missing(
        {key: len(_json(request)) for key, request in wanted.items()},
        known,
        answer,
        write,
        _BATCHES * num_at_once,
        title,
        state,
        disable_tqdm,
    )
    for part in gather_object([mine]):
        known.update(part)
    return [(text, reason == "length") for text, reason in map(known.__getitem__, keys)]


def _answers(
    server: OpenAIServer, bodies: Mapping[str, dict[str, Any]], num_at_once: int
) -> tuple[dict[str, tuple[str, str]], BaseException | None]:
    """The server's answers by key. If a request fails, the answers that have come by then, and the error."""
    with ThreadPoolExecutor(num_at_once) as pool:
        futures = {key: pool.submit(server.complete, body) for key, body in bodies.items()}
        try:
            return {key: future.result() for key, future in futures.items()}, None
        except BaseException as error:
            failure = error
            pool.shutdown(cancel_futures=True)  # requests that are under way come to their end
    came = {key: future for key, future in futures.items() if not future.cancelled() and not future.exception()}
    return {key: future.result() for key, future in came.items()}, failure


def _row(sent: dict[str, Any], text: str, finish_reason: str) -> dict[str, str]:
    """The stored row of a request and its answer."""
    prompt = sent["prompt"] if "prompt" in sent else _json(sent["messages"])
    settings = {name: value for name, value in sent.items() if name not in ("prompt", "messages")}
    return {"prompt": prompt, "completion": text, "finish_reason": finish_reason, "settings": _json(settings)}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _read_answers(folder: str, wanted: Container[str]) -> dict[str, tuple[str, str]]:
    """The wanted answers in `folder`: their texts, and how they ended."""
    known: dict[str, tuple[str, str]] = {}
    remedy = "start again: only its answers are written anew"
    for path in part_paths(folder, _KIND):
        part = read_part(path, _ANSWERS, 0, remedy)
        keys, texts, reasons = (part[name].to_pylist() for name in ("key", "completion", "finish_reason"))
        strange = sorted(set(reasons) - set(ENDS))
        if strange:
            raise ValueError(
                f"{path} is damaged, or from elsewhere: `finish_reason` is {strange[0]!r}. Delete it and {remedy}."
            )
        rows = zip(keys, zip(texts, reasons, strict=True), strict=True)
        known.update({key: answer for key, answer in rows if key in wanted})
    return known
