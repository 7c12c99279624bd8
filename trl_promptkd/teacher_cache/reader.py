"""Reading a cache: rows by their content, distributions as log-probabilities."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..files import content_hash, sha256_of
from .codec import PRESETS, Basis, decode, entropies, num_tokens, payload_columns
from .hub import push_cache
from .manifest import MANIFEST_FILE, Manifest, row_key
from .shards import CacheRows


__all__ = ["BASIS_FILE", "CachedAnswers", "TeacherCache"]

BASIS_FILE = "basis.safetensors"


class TeacherCache:
    """
    An offline teacher: its stored distributions at the tokens of a data set.

    Args:
        path (`str`): A folder that [`build_teacher_cache`] wrote, or the id of a data set on the Hub that holds one.
        verify_checksums (`bool`, *optional*, defaults to `True`): Read every file once and compare its SHA-256.

    Raises:
        FileNotFoundError: if there is no cache.
        ValueError: if the cache is unfinished or damaged. The message names the file.
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
        self.rows = CacheRows(path, self.manifest, remedy)
        self._payload = sorted(payload_columns(self.preset))

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, teacher_prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> int | None:
        """The index of a row, by the prompt that the teacher saw and the answer. `None` if there is no such row."""
        return self.rows.numbers.get(row_key(teacher_prompt_ids, completion_ids))

    def dataset(self) -> Dataset:
        """The rows as a training set, with `prompt_ids`, `teacher_prompt_ids` and `completion_ids`."""
        return self.rows.id_columns()

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> None:
        """Upload the cache as a data set with a card. `TeacherCache(repo_id)` and `load_dataset(repo_id)` read it.

        Everything appears in one commit. A killed upload has changed nothing, and can be repeated. Older shards are
        removed.
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
        """`dataset` with a column `cache_row`, the index of each row in the cache.

        Args:
            dataset: Has `teacher_prompt_ids` and `completion_ids`.
            name, limits: Its name and the run's length limits, for messages.
            takes_answers: Use the cache's answer to each prompt instead of the data's.

        Raises:
            ValueError: if rows are not in the cache. The message has their number, and what differs in the first one.
        """
        prompts, completions = dataset["teacher_prompt_ids"], dataset["completion_ids"]
        found: list[Any]
        if takes_answers:
            answered: dict[str, int] = {}  # the first row of each prompt
            for number, prompt in enumerate(self.rows.values("teacher_prompt_ids")):
                answered.setdefault(content_hash(prompt), number)
            found = [answered.get(content_hash(prompt)) for prompt in prompts]
        else:
            found = [self.find(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        if None not in found:
            if takes_answers:
                dataset = self._with_answers(dataset, found)
            return dataset.add_column("cache_row", found)
        first = found.index(None)
        prompt, completion = prompts[first], completions[first]
        same_prompt = (n for n, ids in enumerate(self.rows.values("teacher_prompt_ids")) if ids == prompt)
        there = next(same_prompt, None)
        if there is None:
            side = f"the teacher's prompt {processing_class.decode(prompt)[-200:]!r} is not in the cache"
        else:
            answers = self.rows[there]["completion_ids"], completion
            sides = [processing_class.decode(ids)[:200] for ids in answers]
            side = f"the answer is {sides[0]!r} there and {sides[1]!r} here"
        made = f"max_length={self.manifest.max_length}, teacher_max_length={self.manifest.teacher_max_length}"
        if limits not in ("", made):
            side += f" (the cache was built with {made}, this run has {limits})"
        raise ValueError(
            f"{found.count(None)} of {len(dataset)} rows in `{name}` are not in the teacher cache at {self.path}. Row "
            f"{first}: {side}. Build the cache with these rows (those that are there are kept), or train on "
            "`TeacherCache(...).dataset()`."
        )

    def _with_answers(self, dataset: Dataset, numbers: list[int]) -> Dataset:
        """`dataset` with the completions of some rows, which stay on disk, and the resulting lengths."""
        answers = self.dataset().select(numbers).select_columns("completion_ids")
        dataset = concatenate_datasets([dataset.remove_columns(["completion_ids", "length"]), answers], axis=1)
        pairs = zip(dataset["teacher_prompt_ids"], dataset["completion_ids"], strict=True)
        return dataset.add_column("length", [len(prompt) + len(completion) for prompt, completion in pairs])

    def to(self, device: torch.device | str) -> "TeacherCache":
        """Decode on `device`."""
        self.device = device
        self.basis = None if self.basis is None else self.basis.to(device)
        return self

    def check_serves(self, kd_temperature: float, kd_beta: float, skew: float) -> None:
        """Reject a divergence or a temperature for which the preset keeps too little.

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
        """The teacher's distributions of some rows, cut to `vocab_size` entries. They are decoded row by row."""
        return CachedAnswers(self, list(indices), vocab_size)


class CachedAnswers:
    """The cached distributions at the completion tokens of some rows, one after the other, decoded row by row."""

    def __init__(self, cache: TeacherCache, indices: Sequence[int], vocab_size: int | None = None):
        self.cache, self.vocab_size, self._indices = cache, vocab_size, list(indices)
        self._rows = cache.rows.read(self._indices)
        for number, row in enumerate(self._rows):
            with self._naming(number):
                if row["key"] != row_key(row["teacher_prompt_ids"], row["completion_ids"]):
                    raise ValueError("its key is not the hash of its token ids")
                missing = [name for name in cache._payload if row[name] is None]
                if missing:
                    raise ValueError(f"it has no {missing}")
                kept = num_tokens(row, cache.basis)
                if kept != len(row["completion_ids"]):
                    raise ValueError(
                        f"it has {len(row['completion_ids'])} answer tokens, and distributions for {kept}"
                    )
        self._ends = list(accumulate((len(row["completion_ids"]) for row in self._rows), initial=0))
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
        """Entropies of the distributions that were drawn from, `(num_tokens,)` in nats. `None` without draws."""
        if not self.cache.preset.draws:
            return None
        true = [torch.empty(0)]
        for number, row in enumerate(self._rows):
            with self._naming(number):
                true.append(entropies(row))
        return torch.cat(true).to(self.cache.device)

    def _row(self, row: int) -> Tensor:
        cache = self.cache
        if self._last[0] != row:  # a row that goes on in the next chunk is not decoded again
            with self._naming(row):
                kept = decode(self._rows[row], cache.basis, cache.preset, cache.manifest.vocab_size, cache.device)
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
