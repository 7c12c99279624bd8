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
    An offline teacher: what a teacher said once at the tokens of a data set.

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
                    f"{path!r} is neither a folder nor a data set on the Hub that can be reached. Check it, or build "
                    f"a cache with `build_teacher_cache`. ({str(error).splitlines()[0]})"
                ) from error
        if not os.path.isfile(os.path.join(path, MANIFEST_FILE)):
            raise FileNotFoundError(
                f"{path} has no {MANIFEST_FILE}: it is no teacher cache. Build one with `build_teacher_cache`."
            )
        self.path = path
        self.manifest = Manifest.load(os.path.join(path, MANIFEST_FILE))
        if not self.manifest.shards:
            remedy = "Build it again with the same arguments: what is there is kept."
            raise ValueError(f"The teacher cache at {path} is not finished. {remedy}")
        self.preset = PRESETS[self.manifest.preset]
        shards = [shard["file"] for shard in self.manifest.shards]
        if list(self.manifest.files) != ([] if self.preset.draws else [BASIS_FILE]):
            raise ValueError(
                f"{path} has checksums of {sorted(self.manifest.files)} in its manifest, but the preset "
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
        self.device: torch.device | str = "cpu"
        self.basis = (
            None if self.preset.draws else Basis.load(os.path.join(path, BASIS_FILE), self.manifest.vocab_size)
        )
        # In memory: a copy on the disk could be an older one's
        tables = [read_shard(os.path.join(path, name), self.manifest, remedy) for name in shards]
        self.rows = Dataset(InMemoryTable(pyarrow.concat_tables(tables)))
        self._index = {key: index for index, key in enumerate(self.rows["key"])}
        self._payload = sorted(payload_columns(self.preset))

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, teacher_prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> int | None:
        """The number of a row, by what the teacher saw and what it judged; `None` where there is none."""
        return self._index.get(row_key(teacher_prompt_ids, completion_ids))

    def dataset(self) -> Dataset:
        """The rows as a training set: `prompt_ids`, `teacher_prompt_ids`, `completion_ids`."""
        rows = self.rows.select_columns(list(ID_COLUMNS))
        return rows.map(_with_prompt)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> None:
        """Upload the cache as a data set with a card, which `TeacherCache(repo_id)` and `load_dataset(repo_id)` read
        again.

        Everything appears in one commit: an upload that was killed has changed nothing and can be repeated. Older
            shards are removed.
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
            name, limits: Its name and the run's length limits, for messages.
            takes_answers: Take the cache's answer to each prompt instead of the data's.

        Raises:
            ValueError: for rows that are not in the cache, with their number and the first one's two sides.
        """
        answers: dict[str, list[int]] = {}  # the first one to each prompt
        for prompt, completion in zip(self.rows["teacher_prompt_ids"], self.rows["completion_ids"], strict=True):
            answers.setdefault(content_hash(prompt), completion)
        prompts, completions = dataset["teacher_prompt_ids"], dataset["completion_ids"]
        if takes_answers:
            pairs = list(zip(prompts, completions, strict=True))
            completions = [answers.get(content_hash(prompt), completion) for prompt, completion in pairs]
            lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
            dataset = dataset.remove_columns(["completion_ids", "length"])
            dataset = dataset.add_column("completion_ids", completions).add_column("length", lengths)
        found = [self.find(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        if None not in found:
            return dataset.add_column("cache_row", found)
        first = found.index(None)
        there = answers.get(content_hash(prompts[first]))
        if there is None:
            side = f"the teacher's prompt {processing_class.decode(prompts[first])[-200:]!r} is not in the cache"
        else:
            sides = [processing_class.decode(ids)[:200] for ids in (there, completions[first])]
            side = f"the answer is {sides[0]!r} there and {sides[1]!r} here"
        made = f"max_length={self.manifest.max_length}, teacher_max_length={self.manifest.teacher_max_length}"
        if limits not in ("", made):
            side += f" (the cache was built with {made}, this run has {limits})"
        raise ValueError(
            f"{found.count(None)} of {len(dataset)} rows in `{name}` are not in the teacher cache at {self.path}. Row "
            f"{first}: {side}. Build the cache with these rows (those that are there are kept), or train on "
            "`TeacherCache(...).dataset()`."
        )

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
        made = f"the preset {self.manifest.preset!r} of the teacher cache at {self.path}"
        if self.preset.draws and self.manifest.vocab_size > self.manifest.real_vocab_size:
            raise ValueError(
                f"The teacher cache at {self.path} holds draws from {self.manifest.vocab_size} entries of the "
                f"teacher's vocabulary, of which only {self.manifest.real_vocab_size} stand for tokens: an earlier "
                "version built it. Build the cache again."
            )
        if self.preset.draws and (kd_beta != 0 or skew):
            raise ValueError(
                f"`kd_beta` is {kd_beta} and `skew` {skew}, but {made} keeps draws, which only serve the forward KL. "
                "Set `kd_beta=0` and `skew=0`, or build the cache with `preset='standard'`."
            )
        if kd_temperature != self.manifest.temperature and self.manifest.preset != "exact":
            raise ValueError(
                f"`kd_temperature` is {kd_temperature}, but {made} keeps distributions at temperature "
                f"{self.manifest.temperature}: its tail is too coarse for another one. Set "
                f"`kd_temperature={self.manifest.temperature}`, or build the cache with `preset='exact'`."
            )

    def log_probs(self, indices: Sequence[int]) -> Tensor:
        """Log-probabilities `(num_tokens, vocab)` in float32 at the completion tokens of some rows."""
        answers = self.answers(indices)
        return answers.logits(0, len(answers))

    def answers(self, indices: Sequence[int], vocab_size: int | None = None) -> "CachedAnswers":
        """What the teacher said about some rows, cut to `vocab_size` entries, to be decoded row by row."""
        return CachedAnswers(self, list(indices), vocab_size)


class CachedAnswers:
    """What the cache says at the completion tokens of some rows, one after the other, decoded row by row."""

    def __init__(self, cache: TeacherCache, indices: Sequence[int], vocab_size: int | None = None):
        self.cache, self.vocab_size, self._indices = cache, vocab_size, list(indices)
        rows = cache.rows[self._indices]
        self._columns = [{name: rows[name][row] for name in cache._payload} for row in range(len(self._indices))]
        for row, (prompt, completion) in enumerate(
            zip(rows["teacher_prompt_ids"], rows["completion_ids"], strict=True)
        ):
            with self._naming(row):
                if rows["key"][row] != row_key(prompt, completion):
                    raise ValueError("its key is not the hash of its token ids")
                kept = num_tokens(self._columns[row], cache.basis)
                if kept != len(completion):
                    raise ValueError(f"it has {len(completion)} answer tokens, and distributions for {kept}")
        self._ends = list(accumulate(map(len, rows["completion_ids"]), initial=0))
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
        true = [torch.empty(0)]
        for row, columns in enumerate(self._columns):
            with self._naming(row):
                true.append(entropies(columns))
        return torch.cat(true).to(self.cache.device)

    def _row(self, row: int) -> Tensor:
        cache = self.cache
        if self._last[0] != row:  # a row that goes on in the next chunk is not decoded again
            with self._naming(row):
                kept = decode(self._columns[row], cache.basis, cache.preset, cache.manifest.vocab_size, cache.device)
            self._last = (row, kept)
        return self._last[1]

    @contextmanager
    def _naming(self, row: int) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"Row {self._indices[row]} of the teacher cache at {self.cache.path} is damaged: {error}. Delete its "
                "shard and build the cache again."
            ) from error


def _with_prompt(row: dict) -> dict:
    return {"prompt_ids": row["teacher_prompt_ids"] if row["prompt_ids"] is None else row["prompt_ids"]}
