"""What a cache says about itself, and whether it fits a run."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from ..data.priming import PrimingTemplate
from ..files import content_hash, write_text
from .codec import PRESETS


__all__ = [
    "MANIFEST_FILE",
    "Manifest",
    "describe_priming",
    "describe_tokenizer",
    "differing",
    "part_numbers",
    "row_key",
]

MANIFEST_FILE = "manifest.json"
MAX_VOCAB_SIZE = 2**22  # 16 times the largest one there is
_TEACHER = {"name", "revision", "dtype", "quantization", "weights"}
_PRIMING = {"text", "placement", "hash"}
_SHARD = {"file": str, "rows": int, "tokens": int, "bytes": int, "sha256": str}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_PART = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")
_OF_THE_ROWS = ("part", "max_length", "teacher_max_length", "data", "shards", "files", "receipt")


def row_key(teacher_prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """The hash that identifies a row, of the prompt that the teacher saw and of the answer."""
    return content_hash([list(map(int, teacher_prompt_ids)), list(map(int, completion_ids))])


def part_numbers(part: str) -> tuple[int, int]:
    """The two numbers of `"2/3"`, which means the second of three parts.

    Raises:
        ValueError: for any other text.
    """
    match = _PART.fullmatch(part) if isinstance(part, str) else None
    number, count = map(int, match.groups()) if match else (1, 0)
    if number > count:
        raise ValueError(f"`part` is {part!r}; it must be a number and how many there are, such as '2/3'.")
    return number, count


def describe_tokenizer(processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The properties that must be the same when a cache is made and when it is used."""
    vocab = processing_class.get_vocab()
    return {
        "tokenizer": content_hash(vocab),
        "real_vocab_size": max(vocab.values()) + 1,
        "chat_template": content_hash(processing_class.chat_template),
    }


def describe_priming(priming: PrimingTemplate | None) -> dict[str, str] | None:
    """The text that the teacher saw besides the prompt, its placement and its hash."""
    return None if priming is None else {**asdict(priming), "hash": content_hash(priming.text)}


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Names the first entry in which two manifests' settings differ, with both values. `None` if none does."""
    for name in here:
        if there[name] != here[name]:
            return f"`{name}` is {there[name]!r} there and {here[name]!r} here"
    return None


@strict
@dataclass
class Manifest:
    """
    The contents of `manifest.json`.

    Args:
        teacher (`dict`): `name`, `revision`, `dtype`, `quantization` and `weights`, a fingerprint. If it ran in vLLM,
            there is also `backend`, and the fingerprint is that of the output head.
        tokenizer (`str`), chat_template (`str`): Hashes of the vocabulary and of the template.
        real_vocab_size (`int`): Number of ids that stand for tokens.
        vocab_size (`int`): Width of the kept distributions: the number of real ids in the teacher's vocabulary.
        priming (`dict`, *optional*): `text`, `placement` and the text's `hash`.
        response_source (`str`), sampling (`dict`, *optional*): Source of the answers, `"dataset"` or `"teacher"`, and
            the teacher's sampling settings.
        preset (`str`), temperature (`float`), codec_version (`int`): What is kept of a distribution, and the version
            of the format.
        max_length (`int`, *optional*), teacher_max_length (`int`, *optional*): Limits of the last build, which omitted
            longer rows.
        part (`str`, *optional*): Which part this is, such as `"2/3"`, if several hosts build the cache.
        data (`str`): Hash of the rows.
        shards (`list`): `file`, `rows`, `tokens`, `bytes` and `sha256` of each. Empty while the cache is being built.
        files (`dict`): SHA-256 sums of the other files.
        receipt (`dict`): How close the kept distributions are, see [`build_teacher_cache`].
    """

    teacher: dict[str, str | None]
    tokenizer: str
    real_vocab_size: int
    vocab_size: int
    chat_template: str
    priming: dict[str, str] | None
    response_source: str
    preset: str
    temperature: float = 1.0
    codec_version: Literal[1] = 1
    sampling: dict[str, Any] | None = None
    max_length: int | None = None
    teacher_max_length: int | None = None
    part: str | None = None
    data: str = ""
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    receipt: dict[str, int | float] = field(default_factory=dict)

    def validate_entries(self) -> None:
        """Check what the annotations do not say. Both are checked whenever a manifest is made."""
        if self.preset not in PRESETS or self.response_source not in ("dataset", "teacher"):
            raise ValueError(
                f"`preset` is {self.preset!r} and `response_source` {self.response_source!r}; they must be among "
                f"{[*PRESETS]} and ['dataset', 'teacher']"
            )
        if self.part is not None:
            part_numbers(self.part)
        for name in ("vocab_size", "real_vocab_size"):
            if not 1 <= getattr(self, name) <= MAX_VOCAB_SIZE:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be from 1 to {MAX_VOCAB_SIZE}")
        if not all(abs(number) < 1e300 for number in (self.temperature, *self.receipt.values())):
            raise ValueError(f"`temperature` is {self.temperature} and `receipt` {self.receipt}; they must be finite")
        backend = {"backend"} & set(self.teacher)
        for entry, names in ((self.teacher, _TEACHER | backend), (self.priming, _PRIMING)):
            if entry is not None and set(entry) != names:
                raise ValueError(f"`teacher` or `priming` has {sorted(entry)}; it must have {sorted(names)}")
        for shard in self.shards:
            if {name: type(value) for name, value in shard.items()} != _SHARD:
                raise ValueError(f"`shards` has the entry {shard}; it must be of {_SHARD}")
        files = [*(shard["file"] for shard in self.shards), *self.files]
        if not all(map(_PLAIN_NAME.fullmatch, files)) or len(set(files)) < len(files):
            raise ValueError(f"it names a file outside its folder, or one twice: {sorted(files)}")

    def settings(self) -> dict[str, Any]:
        """The entries that all rows of one cache have in common."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_THE_ROWS}

    def save(self, path: str) -> None:
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: str) -> "Manifest":
        """Read a manifest.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a manifest, or of another version.
        """
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            json.dumps(values, ensure_ascii=False).encode()  # lone surrogates cannot be written again
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}. The cache is damaged; build it again.") from error
        try:
            return cls(**values)
        except (TypeError, StrictDataclassError) as error:
            raise ValueError(
                f"{path} is not the manifest of a teacher cache, or damaged, or of another version: {error}. Build "
                "the cache again."
            ) from error

    def check_fits(self, processing_class: PreTrainedTokenizerBase, priming: PrimingTemplate | None) -> None:
        """Reject a part of a cache, and a run with another tokenizer, chat template or priming text.

        Raises:
            ValueError: naming both values.
        """
        if self.part is not None:
            raise ValueError(
                f"The teacher cache is part {self.part} of one that several hosts build. Merge its parts: "
                "`trl-promptkd cache merge OUT PART...`."
            )
        here = {**describe_tokenizer(processing_class), "priming": describe_priming(priming)}
        named = {
            "real_vocab_size": ("number of tokens", "processing_class"),
            "tokenizer": ("vocabulary (its hash)", "processing_class"),
            "chat_template": ("chat template (its hash)", "processing_class"),
            "priming": ("priming", "priming"),
        }
        for name, (what, argument) in named.items():
            there = getattr(self, name)
            if there != here[name]:
                raise ValueError(
                    f"The teacher cache was made with another {what}: {there!r} there, {here[name]!r} here. Pass the "
                    f"`{argument}` it was made with, or build the cache again."
                )
