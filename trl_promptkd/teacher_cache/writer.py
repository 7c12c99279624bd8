"""Filling a cache with the results of the teacher's forward passes. A build may be killed at any moment."""

import os
from collections.abc import Iterable
from typing import Any

import pyarrow
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..divergences import kl_divergence
from ..files import content_hash, sha256_of
from ..generation.store import compute_missing, part_paths, write_part
from .codec import PRESETS, Basis, Preset, decode, encode, tail_masses
from .manifest import MANIFEST_FILE, Manifest, part_numbers, row_key
from .reader import BASIS_FILE
from .receipt import finish_cache, label_of, label_text, summary
from .shards import ID_COLUMNS, read_shard, shard_schema


__all__ = ["CacheWriter"]

logger = logging.get_logger(__name__)

_CALIBRATION_TOKENS = 8192
_RECEIPT_EVERY = 8  # batches


class CacheWriter:
    """One build: finds missing rows and runs the teacher on them. For a part, `whole` has the rows of all parts."""

    def __init__(self, source, dataset, whole, folder, manifest, batch_size, accelerator, given_basis=None):
        self.source, self.teacher, self.folder, self.manifest = source, source.teacher, folder, manifest
        self.batch_size, self.accelerator = batch_size, accelerator
        self.preset: Preset = PRESETS[manifest.preset]
        self.rows = _by_key(dataset)
        self.whole, self.given_basis = whole, given_basis
        self.label = {"settings": content_hash(manifest.settings()), "basis": ""}  # in every shard
        self.basis: Basis | None = None
        self.num_batches = 0
        self.measured: dict[str, list[Tensor]] = {"kl": [], "tail": []}  # since the last shard

    def run(self) -> None:
        if not self.preset.draws:
            self.basis = self._basis()
            self.label["basis"] = sha256_of(self._path(BASIS_FILE))
        lengths = {key: row["length"] for key, row in self.rows.items()}
        (done,) = broadcast_object_list([self._finished_keys() if self.accelerator.is_main_process else None])
        compute_missing(lengths, done, self._compute, self._write, self.batch_size, "Teacher cache", self.accelerator)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            finish_cache(self.folder, self.manifest, self.accelerator.device)
        self.accelerator.wait_for_everyone()

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    # -------------------------------------------------------------------------------------------- the teacher

    def _basis(self) -> Basis:
        """The cache's coordinates, from the folder or another cache, or newly fitted."""
        path, vocab_size = self._path(BASIS_FILE), self.manifest.vocab_size
        if self.accelerator.is_main_process:
            checksum = Manifest.load(self._path(MANIFEST_FILE)).files.get(BASIS_FILE)
            if os.path.isfile(path) and checksum not in (None, sha256_of(path)):
                logger.warning(f"{path} is damaged; it and all rows are made anew.")
                os.remove(path)
        (is_there,) = broadcast_object_list([os.path.isfile(path)])
        given = None if self.given_basis is None else Basis.load(self.given_basis, vocab_size)
        if given is not None and is_there and sha256_of(self.given_basis) != sha256_of(path):
            raise ValueError(
                f"{path} has other coordinates than {self.given_basis}, and the rows there were made with them. Omit "
                "`basis` to resume that cache, or choose another `output_dir`."
            )
        if given is not None:
            self._check_given(given)
        elif not is_there and self.manifest.part is not None and part_numbers(self.manifest.part)[0] > 1:
            raise ValueError(f"{path} was damaged. Pass the file of part 1 as `basis`.")
        elif not is_there:
            given = self._fit_basis()  # on all ranks: a sharded teacher needs them
        if given is not None and not is_there and self.accelerator.is_main_process:
            given.save(path)
        self.accelerator.wait_for_everyone()
        return Basis.load(path, vocab_size).to(self.accelerator.device)

    def _check_given(self, basis: Basis) -> None:
        """Reject coordinates of a teacher with another output head, and too few coordinates."""
        head, (row, *_) = self._head(), self.rows.values()
        hidden, kept = basis.analysis.shape
        needed = min(self.preset.rank or hidden, hidden)
        if hidden != head.weight.size(-1) or kept < needed:
            raise ValueError(
                f"The coordinates in {self.given_basis} are {kept} of hidden states of {hidden} numbers, but the "
                f"preset {self.manifest.preset!r} needs {needed} for this teacher, whose hidden states have "
                f"{head.weight.size(-1)}. Pass `{BASIS_FILE}` of a cache of the same teacher and preset."
            )
        bias = 0.0 if getattr(head, "bias", None) is None else head.bias.float()
        expected = head.weight.float() @ basis.mean.to(head.weight.device) + bias
        expected = (expected * _logit_scale(self.teacher.config.get_text_config()))[: len(basis.offset)].cpu()
        if not (expected - basis.offset).abs().max() <= 1e-3 * expected.abs().max():
            raise ValueError(
                f"The coordinates in {self.given_basis} were made with another output head than that of this teacher "
                f"({self.teacher.config._name_or_path}). Pass `{BASIS_FILE}` of a cache of the same teacher."
            )
        for hidden, logits in self.source.states([row]):
            self._check_head(basis.to(hidden.device), hidden, logits)

    def _head(self) -> Any:
        """The teacher's output head, which the coordinates are derived from."""
        head = self.teacher.get_output_embeddings()
        if not head.weight.is_floating_point() or head.weight.device.type == "meta":
            raise ValueError(
                "The teacher's output head is quantized or not in memory, and the coordinates of this preset come "
                "from it. Leave the head out of the quantization (`llm_int8_skip_modules=['lm_head']`), or use "
                "`preset='tiny'`."
            )
        return head

    def _fit_basis(self) -> Basis:
        """Fit coordinates to the first rows by their keys, in any order of the data."""
        head, settings = self._head(), self.teacher.config.get_text_config()
        rows: list[dict[str, Any]] = []
        tokens = 0
        for _, row in sorted(_by_key(self.whole).items()):
            if tokens < _CALIBRATION_TOKENS:
                rows.append(row)
                tokens += len(row["completion_ids"])
        rows.sort(key=lambda row: row["length"])
        states: list[Tensor] = []
        starts, title = range(0, len(rows), self.batch_size), "Teacher cache: fitting coordinates"
        for start in tqdm(starts, title, unit="batch", disable=not self.accelerator.is_local_main_process):
            part = list(self.source.states(rows[start : start + self.batch_size]))
            states += [hidden for hidden, _ in part]
        rank = self.preset.rank
        if rank is not None and tokens < 4 * head.weight.size(1):
            logger.warning(
                f"The coordinates are fitted to {tokens} tokens only, too few to leave any of them out: rows take "
                "more bytes. Build with more rows first."
            )
            rank = None
        vocab = self.manifest.vocab_size
        basis = Basis.fit(
            torch.cat(states),
            head.weight[:vocab],
            None if getattr(head, "bias", None) is None else head.bias[:vocab],
            logit_scale=_logit_scale(settings),
            softcap=getattr(settings, "final_logit_softcapping", None) or 0.0,
            rank=rank,
        )
        self._check_head(basis, *part[-1])
        return basis

    def _check_head(self, basis: Basis, hidden: Tensor, logits: Tensor) -> None:
        """Reject a teacher whose logits are not its output head applied to its last hidden state."""
        head, basis, exact = self.teacher.get_output_embeddings(), basis.to(hidden.device), Preset(step=1e-3)
        expected = head(hidden.to(head.weight.device)).to(logits.device)[:, : logits.size(-1)].float()
        expected = expected * _logit_scale(self.teacher.config.get_text_config())
        if basis.softcap:
            expected = basis.softcap * torch.tanh(expected / basis.softcap)
        ways = [expected.log_softmax(dim=-1)]
        if basis.analysis.size(1) == hidden.size(1):  # nothing is left out
            ways.append(decode(encode(hidden, logits, basis, exact), basis, exact, logits.size(-1)))
        off = torch.stack([kl_divergence(logits.log_softmax(dim=-1), way).mean() for way in ways]).max()
        if not off <= 1e-3:
            raise ValueError(
                f"The logits of {type(self.teacher).__name__} are not its output head applied to its last hidden "
                f"state (they differ by {off:.2e} nats): something comes after it that this version does not know. "
                "Distil from the live teacher instead."
            )

    # -------------------------------------------------------------------------------------------- the shards

    def _finished_keys(self) -> set[str]:
        """The keys of all finished rows. Unusable shards are removed, and their rows computed again."""
        done: set[str] = set()
        checksums = {shard["file"]: shard["sha256"] for shard in Manifest.load(self._path(MANIFEST_FILE)).shards}
        for path in part_paths(self.folder, "shard"):
            keys = self._keys_in(path, checksums.get(os.path.basename(path)))
            if keys is None:
                logger.warning(f"{path} is damaged, or was made with other coordinates; its rows are made anew.")
                os.remove(path)
            done.update(keys or ())
        return done

    def _keys_in(self, path: str, checksum: str | None) -> list[str] | None:
        """The keys in a shard. `None` if it is damaged or in other coordinates."""
        try:
            label = label_of(path)
            if checksum not in (None, sha256_of(path)):
                return None
        except (OSError, ValueError, pyarrow.ArrowException):
            return None
        if label.get("settings") != self.label["settings"]:
            raise ValueError(
                f"{path} belongs to a cache that was made differently (another teacher, priming, preset, ...). Choose "
                "another `output_dir`, or delete the file."
            )
        if label["basis"] != self.label["basis"]:
            return None
        try:
            return read_shard(path, self.manifest)["key"].to_pylist()
        except ValueError:
            return None

    def _compute(self, keys: list[str]) -> dict[str, dict[str, Any]]:
        """Encode some rows. Every eighth batch is also decoded for the receipt, unless the preset keeps draws."""
        rows: dict[str, dict[str, Any]] = {}
        is_measured = self.num_batches % _RECEIPT_EVERY == 0 and not self.preset.draws
        self.num_batches += 1
        for key, (hidden, logits) in zip(keys, self.source.states([self.rows[key] for key in keys]), strict=True):
            payload = encode(hidden, logits, self.basis, self.preset, seed=int(key[:15], 16))
            if is_measured:
                kept = decode(payload, self.basis, self.preset, logits.size(-1))
                self.measured["kl"].append(kl_divergence(logits.log_softmax(dim=-1), kept).cpu())
            if is_measured and self.preset.top_k:
                self.measured["tail"].append(tail_masses(payload))
            rows[key] = {name: self.rows[key][name] for name in ID_COLUMNS} | payload
            if rows[key]["prompt_ids"] == rows[key]["teacher_prompt_ids"]:
                rows[key]["prompt_ids"] = None  # not said twice
        return rows

    def _write(self, rows: dict[str, dict[str, Any]]) -> None:
        about = self.label | {name: summary(values) for name, values in self.measured.items()}
        self.measured = {"kl": [], "tail": []}
        write_part(self.folder, "shard", rows, shard_schema(self.preset).with_metadata(label_text(about)))


def _by_key(dataset: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by their keys. Equal rows are kept once."""
    rows: dict[str, dict[str, Any]] = {}
    for row in dataset:
        rows.setdefault(row_key(row["teacher_prompt_ids"], row["completion_ids"]), row)
    return rows


def _logit_scale(settings: Any) -> float:
    if getattr(settings, "logits_scaling", None):  # Granite divides
        return 1 / settings.logits_scaling
    return getattr(settings, "logit_scale", None) or 1.0  # Cohere multiplies
