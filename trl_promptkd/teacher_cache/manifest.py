"""What a cache says about itself, and whether it fits a run."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.priming import PrimingTemplate
from ..files import content_hash, write_text
from .codec import PRESETS


__all__ = [
    "MANIFEST_FILE",
    "Manifest",
    "describe_priming",
    "describe_tokenizer",
    "row_key",
]

MANIFEST_FILE = "manifest.json"
CODEC_VERSION = 1
MAX_VOCAB_SIZE = 2**22  # 16 times the largest one there is
_OF_THE_ROWS = ("max_length", "teacher_max_length", "data", "shards", "files", "receipt")


def row_key(teacher_prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """The hash by which a row is found: of what the teacher saw, and of what it judged."""
    return content_hash([list(teacher_prompt_ids), list(completion_ids)])


def describe_tokenizer(processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What must be the same when a cache is made and when it is used."""
    vocab = processing_class.get_vocab()
    return {
        "tokenizer": content_hash(vocab),
        "real_vocab_size": max(vocab.values()) + 1,
        "chat_template": content_hash(processing_class.chat_template),
    }


def describe_priming(priming: PrimingTemplate | None) -> dict[str, str] | None:
    """What the teacher saw besides the prompt: text, placement, and the text's hash."""
    return None if priming is None else {**asdict(priming), "hash": content_hash(priming.text)}


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_int(value: Any, least: int = 0, most: float = 2**63) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _object(**kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            return False
        return all(fits(value[name]) for name, fits in kinds.items())

    return fits


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_text, _hash, _sha256 = _matches("(?s).*"), _matches("[0-9a-f]{32}"), _matches("[0-9a-f]{64}")
_shard = _object(file=_text, rows=_is_int, tokens=_is_int, bytes=_is_int, sha256=_sha256)
_about = _object(name=_text, revision=_or_null(_text), dtype=_text, quantization=_text, weights=_hash)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_HASH = (_hash, "a hash of 32 hexadecimal digits")
_VOCAB_SIZE = (lambda x: _is_int(x, 1, MAX_VOCAB_SIZE), f"an integer from 1 to {MAX_VOCAB_SIZE}")
_LIMIT = (_or_null(lambda x: _is_int(x, 1)), "null or a positive integer")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "teacher": (_about, "an object of the texts `name`, `revision` (or null), `dtype`, `quantization` and `weights`"),
    "tokenizer": _HASH,
    "real_vocab_size": _VOCAB_SIZE,
    "vocab_size": _VOCAB_SIZE,
    "chat_template": _HASH,
    "priming": (
        _or_null(_object(text=_text, placement=_text, hash=_hash)),
        "null, or an object of the texts `text`, `placement` and `hash`",
    ),
    "response_source": (lambda x: x in ("dataset", "teacher"), "'dataset' or 'teacher'"),
    "preset": (lambda x: x in list(PRESETS), f"one of {', '.join(map(repr, PRESETS))}"),
    "temperature": (lambda x: _is_number(x) and x > 0, "a positive number"),
    "codec_version": (lambda x: _is_int(x, 1, 1), f"{CODEC_VERSION}, the version of this format"),
    "sampling": (_or_null(lambda x: isinstance(x, dict)), "null or an object"),
    "max_length": _LIMIT,
    "teacher_max_length": _LIMIT,
    "data": (_matches("([0-9a-f]{32})?"), "empty or a hash of 32 hexadecimal digits"),
    "shards": (
        lambda x: isinstance(x, list) and all(map(_shard, x)),
        "a list of objects of `file`, `rows`, `tokens`, `bytes` and `sha256`",
    ),
    "files": (
        lambda x: isinstance(x, dict) and all(map(_sha256, x.values())),
        "an object of SHA-256 sums by file name",
    ),
    "receipt": (lambda x: isinstance(x, dict) and all(map(_is_number, x.values())), "an object of numbers"),
}


@dataclass
class Manifest:
    """
    The contents of `manifest.json`.

    Args:
        teacher (`dict`): `name`, `revision`, `dtype`, `quantization` and `weights`, a fingerprint.
        tokenizer (`str`), chat_template (`str`): Hashes of the vocabulary and of the template.
        real_vocab_size (`int`): Number of ids that stand for tokens.
        vocab_size (`int`): How wide the kept distributions are: the real ids that the teacher's vocabulary has.
        priming (`dict`, *optional*): `text`, `placement` and the text's `hash`.
        response_source (`str`): Who wrote the answers, `"dataset"` or `"teacher"`, and how the teacher did (`sampling`).
        preset (`str`), temperature (`float`), codec_version (`int`): What is kept of a distribution, and the version of the format.
        max_length (`int`, *optional*), teacher_max_length (`int`, *optional*): Limits of the last build, which omitted longer rows.
        data (`str`): Hash of the rows.
        shards (`list`): `file`, `rows`, `tokens`, `bytes` and `sha256` of each; empty while the cache is being built.
        files (`dict`): SHA-256 sums of the other files.
        receipt (`dict`): How close the kept distributions are; see [`build_teacher_cache`].
    """

    teacher: dict[str, Any]
    tokenizer: str
    real_vocab_size: int
    vocab_size: int
    chat_template: str
    priming: dict[str, str] | None
    response_source: str
    preset: str
    temperature: float = 1.0
    codec_version: int = CODEC_VERSION
    sampling: dict[str, Any] | None = None
    max_length: int | None = None
    teacher_max_length: int | None = None
    data: str = ""
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What rows of one cache have in common."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_THE_ROWS}

    def save(self, path: str) -> None:
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: str) -> "Manifest":
        """
        Raises:
            FileNotFoundError: where there is none.
            ValueError: where it is not a manifest, or of another version.
        """
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            json.dumps(values, ensure_ascii=False).encode()  # lone surrogates cannot be written again
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}. The cache is damaged; build it again.") from error
        if not isinstance(values, dict) or values.keys() != _FIELDS.keys():
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"{path} is not the manifest of a teacher cache: it holds {found}, not {sorted(_FIELDS)}."
            )
        for name, (fits, allowed) in _FIELDS.items():
            if not fits(values[name]):
                raise ValueError(
                    f"{path} holds `{name}` {str(values[name])[:200]!r}; it must be {allowed}. The manifest is damaged, or "
                    "from another version: build the cache again."
                )
        files = [*(shard["file"] for shard in values["shards"]), *values["files"]]
        if not all(map(_PLAIN_NAME.fullmatch, files)) or len(set(files)) < len(files):
            raise ValueError(
                f"{path} names a file outside its folder, or one twice: {sorted(files)}. The manifest is from elsewhere: build "
                "the cache again."
            )
        return cls(**values)

    def check_fits(self, processing_class: PreTrainedTokenizerBase, priming: PrimingTemplate | None) -> None:
        """Refuse a run whose tokenizer, chat template or priming text is another one.

        Raises:
            ValueError: naming both values.
        """
        here = {**describe_tokenizer(processing_class), "priming": describe_priming(priming)}
        named = {
            "real_vocab_size": "number of tokens",
            "tokenizer": "vocabulary (its hash)",
            "chat_template": "chat template (its hash)",
            "priming": "priming",
        }
        for name, what in named.items():
            there = getattr(self, name)
            if there != here[name]:
                raise ValueError(
                    f"The teacher cache was made with another {what}: {there!r} there, {here[name]!r} here. Use the one it was "
                    "made with, or build the cache again."
                )
