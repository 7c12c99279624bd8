"""Reading a cache: rows by their content, distributions as log-probabilities."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import pyarrow
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..files import content_hash, sha256_of
from ..generation.store import read_part
from .codec import PRESETS, Basis, Preset, decode, entropies, num_tokens, payload_columns
from .hub import push_cache
from .manifest import MANIFEST_FILE, Manifest, row_key


__all__ = ["BASIS_FILE", "ID_COLUMNS", "CachedAnswers", "TeacherCache", "read_shard", "shard_schema"]

BASIS_FILE = "basis.safetensors"
ID_COLUMNS = ("prompt_ids", "teacher_prompt_ids", "completion_ids")


def shard_schema(preset: Preset) -> pyarrow.Schema:
    """A shard's columns."""
    types = {"key": pyarrow.string(), **dict.fromkeys(ID_COLUMNS, pyarrow.list_(pyarrow.int32()))}
    return pyarrow.schema(types | dict.fromkeys(sorted(payload_columns(preset)), pyarrow.binary()))


def read_shard(path: str, manifest: Manifest, remedy: str = "build the cache again") -> pyarrow.Table:
    """A shard's rows, of which everything is checked that costs little; the rest is checked when they are decoded."""
    num_ids = max(manifest.vocab_size, manifest.real_vocab_size)
    return read_part(path, shard_schema(PRESETS[manifest.preset]), num_ids, remedy, optional="prompt_ids")


class TeacherCache:
    """
    An offline teacher: distributions that a teacher was asked for once.

    Args:
        path (`str`): A folder that [`build_teacher_cache`] wrote, or the id of a data set on the Hub that holds one.
        verify_checksums (`bool`, *optional*, defaults to `True`): Read every file once and compare its SHA-256.

    Raises:
        FileNotFoundError: where there is no cache.
        ValueError: for a cache that is unfinished or damaged, naming the file.
    """

    def __init__(self, path: str, verify_checksums: bool = True):
        remedy = "build the cache again: only its rows are made anew"
        if not os.path.isdir(path):
            remedy = f"load {path} again, or push it there again from where it was built"
            try:
                path = snapshot_download(path, repo_type="dataset")
            except (OSError, HFValidationError) as error:
                raise FileNotFoundError(
                    f"{path!r} is neither a folder nor a data set on the Hub that can be reached. Check it, or build a cache with "
                    f"`build_teacher_cache`. ({str(error).splitlines()[0]})"
                ) from error
        if not os.path.isfile(os.path.join(path, MANIFEST_FILE)):
            raise FileNotFoundError(
                f"{path} has no {MANIFEST_FILE}: it is no teacher cache. Build one with `build_teacher_cache`."
            )
        self.path = path
        self.manifest = Manifest.load(os.path.join(path, MANIFEST_FILE))
        if not self.manifest.shards:
            raise ValueError(
                f"The teacher cache at {path} is not finished. Build it again with the same arguments: what is there is kept."
            )
        if self.manifest.preset not in PRESETS:
            raise ValueError(
                f"The cache's preset {self.manifest.preset!r} is unknown; it must be one of {sorted(PRESETS)}."
            )
        self.preset = PRESETS[self.manifest.preset]
        if set(self.manifest.files) != (set() if self.preset.draws else {BASIS_FILE}):
            raise ValueError(
                f"The manifest of the teacher cache at {path} has checksums of {sorted(self.manifest.files)}, but the preset "
                f"{self.manifest.preset!r} needs {'none' if self.preset.draws else BASIS_FILE}. Build the cache again."
            )
        expected = {shard["file"]: shard["sha256"] for shard in self.manifest.shards} | self.manifest.files
        for name, checksum in expected.items():
            file = os.path.join(path, name)
            if not os.path.isfile(file):
                raise FileNotFoundError(f"The cache's file {file} is missing. {remedy[0].upper()}{remedy[1:]}.")
            if verify_checksums and sha256_of(file) != checksum:
                raise ValueError(
                    f"The cache's file {file} is damaged: its SHA-256 is not the manifest's. Delete it and {remedy}."
                )
        self.basis = None if self.preset.draws else Basis.load(os.path.join(path, BASIS_FILE))
        if self.basis is not None and len(self.basis.offset) != self.manifest.vocab_size:
            raise ValueError(
                f"{os.path.join(path, BASIS_FILE)} is made for {len(self.basis.offset)} ids and the manifest says {self.manifest.vocab_size}: they "
                "do not belong together. Build the cache again."
            )
        self.device: torch.device | str = "cpu"
        # In memory: a copy on the disk could be an older one's
        files = [os.path.join(path, shard["file"]) for shard in self.manifest.shards]
        tables = [read_shard(file, self.manifest, remedy) for file in files]
        self.rows = Dataset(InMemoryTable(pyarrow.concat_tables(tables)))
        self._index = {key: index for index, key in enumerate(self.rows["key"])}
        self._payload = sorted(payload_columns(self.preset))

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, teacher_prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> int | None:
        """The number of a row, by what the teacher saw and what it judged; `None` where there is none."""
        return self._index.get(row_key(list(teacher_prompt_ids), list(completion_ids)))

    def dataset(self) -> Dataset:
        """The rows as a training set: `prompt_ids`, `teacher_prompt_ids`, `completion_ids`."""
        rows = self.rows.select_columns(list(ID_COLUMNS))
        return rows.map(_with_prompt)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> None:
        """Upload the cache as a data set with a card, from which `TeacherCache(repo_id)` and `load_dataset(repo_id)` read it again.

        Everything appears at once, in one commit: an upload that was killed has changed nothing, and can be repeated. Shards of an earlier
        state of the cache are removed.
        """
        push_cache(self.path, self.manifest, repo_id, private, token)

    def locate(
        self,
        dataset: Dataset,
        name: str,
        processing_class: PreTrainedTokenizerBase,
        takes_answers: bool = False,
        limits: str = "",
    ) -> Dataset:
        """`dataset` with a column `cache_row`, the number of each row here.

        Args:
            dataset: With `teacher_prompt_ids` and `completion_ids`.
            name: Its name, for messages.
            takes_answers: Take the cache's answer to each prompt instead of the data's.
            limits: The run's length limits, for the message.

        Raises:
            ValueError: where rows are not in the cache, with their number and the first one's two sides.
        """
        answers: dict[str, list[list[int]]] = {}
        for prompt, completion in zip(self.rows["teacher_prompt_ids"], self.rows["completion_ids"], strict=True):
            answers.setdefault(content_hash(prompt), []).append(completion)
        completions = dataset["completion_ids"][:]
        prompts = dataset["teacher_prompt_ids"]
        if takes_answers:
            completions = [
                answers.get(content_hash(prompt), [completion])[0]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
            dataset = dataset.remove_columns(["completion_ids", "length"])
            dataset = dataset.add_column("completion_ids", completions).add_column("length", lengths)
        found = [self.find(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        missing = [index for index, row in enumerate(found) if row is None]
        if missing:
            first = missing[0]
            there = answers.get(content_hash(prompts[first]))
            if there is None:
                side = f"the teacher's prompt {processing_class.decode(prompts[first])[-200:]!r} is not in the cache"
            else:
                side = (
                    f"the answer is {processing_class.decode(there[0])[:200]!r} there and {processing_class.decode(completions[first])[:200]!r} "
                    "here"
                )
            made = f"max_length={self.manifest.max_length}, teacher_max_length={self.manifest.teacher_max_length}"
            if limits not in ("", made):
                side += f" (the cache was built with {made}, this run has {limits})"
            raise ValueError(
                f"{len(missing)} of {len(dataset)} rows in `{name}` are not in the teacher cache at {self.path}. Row {first}: {side}. Build the "
                "cache with these rows (those that are there are kept), or train on `TeacherCache(...).dataset()`."
            )
        return dataset.add_column("cache_row", found)

    def to(self, device: torch.device | str) -> "TeacherCache":
        """Decode on `device`."""
        self.device = device
        self.basis = None if self.basis is None else self.basis.to(device)
        return self

    def check_serves(self, kd_temperature: float, kd_beta: float, skew: float) -> None:
        """Refuse a divergence or a temperature for which what is kept is not enough.

        Raises:
            ValueError: naming the preset that serves it.
        """
        if self.preset.draws and self.manifest.vocab_size > self.manifest.real_vocab_size:
            raise ValueError(
                f"The teacher cache at {self.path} holds draws from {self.manifest.vocab_size} entries of the teacher's vocabulary, of which only "
                f"{self.manifest.real_vocab_size} stand for tokens: an earlier version built it. Build the cache again."
            )
        if self.preset.draws and (kd_beta != 0 or skew):
            raise ValueError(
                f"`kd_beta` is {kd_beta} and `skew` {skew}, but the preset 'tiny' of the teacher cache at {self.path} keeps draws, which only "
                "serve the forward KL. Set `kd_beta=0` and `skew=0`, or build the cache with `preset='standard'`."
            )
        if kd_temperature != self.manifest.temperature and self.manifest.preset != "exact":
            raise ValueError(
                f"`kd_temperature` is {kd_temperature}, but the preset {self.manifest.preset!r} of the teacher cache at {self.path} keeps "
                f"distributions at temperature {self.manifest.temperature}: its tail is too coarse for another one. Set `kd_temperature="
                f"{self.manifest.temperature}`, or build the cache with `preset='exact'`."
            )

    def log_probs(self, indices: Sequence[int]) -> Tensor:
        """Log-probabilities `(num_tokens, vocab)` in float32 at the completion tokens of some rows, one after the other."""
        answers = self.answers(indices)
        return answers.logits(0, len(answers))

    def answers(self, indices: Sequence[int], vocab_size: int | None = None) -> "CachedAnswers":
        """What the teacher said about some rows, to be decoded row by row."""
        return CachedAnswers(self, list(indices), vocab_size)

    def _columns(self, indices: Sequence[int]) -> list[dict[str, bytes]]:
        rows = self.rows.select_columns(self._payload)[list(indices)]
        return [{name: rows[name][i] for name in self._payload} for i in range(len(indices))]


class CachedAnswers:
    """
    Log-probabilities at the completion tokens of some rows, one after the other, of which a few exist at a time.

    Args:
        cache ([`TeacherCache`]): Whose rows.
        indices (`Sequence[int]`): Which rows.
        vocab_size (`int`, *optional*): Only the first entries count.
    """

    def __init__(self, cache: TeacherCache, indices: Sequence[int], vocab_size: int | None = None):
        self.cache, self.vocab_size, self._indices = cache, vocab_size, list(indices)
        self._columns = cache._columns(indices) if indices else []
        ids = cache.rows.select_columns(["key", "teacher_prompt_ids", "completion_ids"])[list(indices)]
        for row, key in enumerate(ids["key"]):
            with self._naming(row):
                kept = num_tokens(self._columns[row], cache.basis)
                _check_row(key, ids["teacher_prompt_ids"][row], ids["completion_ids"][row], kept)
        self._ends = list(accumulate(map(len, ids["completion_ids"]), initial=0))
        self._last: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self._ends[-1]

    def logits(self, start: int, end: int) -> Tensor:
        """Log-probabilities `(end - start, vocab)` of some tokens, in float32."""
        parts = [
            self._row(row)[max(start - first, 0) : end - first]
            for row, (first, after) in enumerate(pairwise(self._ends))
            if first < end and start < after
        ]
        size = self.cache.manifest.vocab_size
        whole = torch.cat(parts) if parts else torch.zeros(0, size, device=self.cache.device)
        return whole[:, : self.vocab_size]

    def entropies(self) -> Tensor | None:
        """Of what was drawn from, `(num_tokens,)` in nats; `None` where the cache does not hold draws."""
        if not self.cache.preset.draws:
            return None
        true = []
        for row, columns in enumerate(self._columns):
            with self._naming(row):
                true.append(entropies(columns))
        return torch.cat([torch.empty(0), *true]).to(self.cache.device)

    def _row(self, row: int) -> Tensor:
        if self._last[0] != row:  # a row that goes on in the next chunk is not decoded again
            cache = self.cache
            args = (cache.basis, cache.preset, cache.manifest.vocab_size, cache.device)
            with self._naming(row):
                self._last = (row, decode(self._columns[row], *args))
        return self._last[1]

    @contextmanager
    def _naming(self, row: int) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"Row {self._indices[row]} of the teacher cache at {self.cache.path} is damaged: {error}. Delete its shard and build the cache "
                "again."
            ) from error


def _with_prompt(row: dict) -> dict:
    return {"prompt_ids": row["teacher_prompt_ids"] if row["prompt_ids"] is None else row["prompt_ids"]}


def _check_row(key: str, teacher_prompt_ids: list[int], completion_ids: list[int], kept: int) -> None:
    """Whether a row is what its key says, and has one distribution for each token of the answer."""
    if key != row_key(teacher_prompt_ids, completion_ids):
        raise ValueError("its key is not the hash of its token ids")
    if kept != len(completion_ids):
        raise ValueError(f"it has {len(completion_ids)} answer tokens, and distributions for {kept}")
