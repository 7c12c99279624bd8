"""Filling a cache: the teacher's forward passes, written as they come. A build can be killed at any moment."""

import json
import os
import time
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data import pad_rows
from ..divergences import kl_divergence
from ..files import content_hash, sha256_of
from ..generation.store import compute_missing, part_paths, write_part
from ..models.forward import completion_states, inside_forward
from .codec import PRESETS, Basis, Preset, decode, encode, tail_masses
from .manifest import MANIFEST_FILE, Manifest, row_key
from .reader import BASIS_FILE, TeacherCache
from .shards import ID_COLUMNS, read_shard, shard_schema


__all__ = ["CacheWriter"]

logger = logging.get_logger(__name__)

_CALIBRATION_TOKENS = 8192
_RECEIPT_EVERY = 8  # batches
_LABEL = b"trl_promptkd"


class CacheWriter:
    """One build: which rows are missing, and the passes over them."""

    def __init__(self, model, teacher, dataset, folder, manifest, batch_size, pad_token_id, accelerator):
        self.model, self.teacher, self.folder, self.manifest = model, teacher, folder, manifest
        self.batch_size, self.pad_token_id, self.accelerator = batch_size, pad_token_id, accelerator
        self.preset: Preset = PRESETS[manifest.preset]
        self.rows: dict[str, dict[str, Any]] = {}
        for row in dataset:
            self.rows.setdefault(row_key(row["teacher_prompt_ids"], row["completion_ids"]), row)
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
            self._finish()
        self.accelerator.wait_for_everyone()

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    # -------------------------------------------------------------------------------------------- the teacher

    def _states(self, keys: list[str]) -> list[tuple[Tensor, Tensor]]:
        """Hidden states and logits of some rows, row by row."""
        rows = [self.rows[key] for key in keys]
        completions = [row["completion_ids"] for row in rows]
        batch = pad_rows([row["teacher_prompt_ids"] for row in rows], completions, self.pad_token_id)
        ids, mask, labels = (
            batch[name].to(self.accelerator.device) for name in ("input_ids", "attention_mask", "labels")
        )

        def ask(teacher: torch.nn.Module) -> tuple[Tensor, Tensor]:
            known = completion_states(teacher, ids, mask, labels, vocab_size=self.manifest.vocab_size)
            return known.hidden_states, known.logits()

        with torch.no_grad(), self.accelerator.autocast():
            states, logits = inside_forward(self.model, ask)
        lengths = list(map(len, completions))
        return list(zip(states.split(lengths), logits.split(lengths), strict=True))

    def _basis(self) -> Basis:
        """The cache's coordinates: those in the folder, or new ones."""
        path = self._path(BASIS_FILE)
        if self.accelerator.is_main_process:
            checksum = Manifest.load(self._path(MANIFEST_FILE)).files.get(BASIS_FILE)
            if os.path.isfile(path) and checksum not in (None, sha256_of(path)):
                logger.warning(f"{path} is damaged; the coordinates are fitted and all rows made anew.")
                os.remove(path)
            if not os.path.isfile(path):
                self._fit_basis().save(path)
        self.accelerator.wait_for_everyone()
        return Basis.load(path).to(self.accelerator.device)

    def _fit_basis(self) -> Basis:
        """Coordinates for some rows: the first ones by their keys, whatever the order of the data."""
        head, settings = self.teacher.get_output_embeddings(), self.teacher.config.get_text_config()
        if not head.weight.is_floating_point() or head.weight.device.type == "meta":
            raise ValueError(
                "The teacher's output head is quantized or not in memory, and the coordinates of this preset come "
                "from it. Leave the head out of the quantization (`llm_int8_skip_modules=['lm_head']`), or use "
                "`preset='tiny'`."
            )
        keys: list[str] = []
        tokens = 0
        for key in sorted(self.rows):
            if tokens < _CALIBRATION_TOKENS:
                keys.append(key)
                tokens += len(self.rows[key]["completion_ids"])
        keys.sort(key=lambda key: self.rows[key]["length"])
        states: list[Tensor] = []
        starts = range(0, len(keys), self.batch_size)
        for start in tqdm(starts, desc="Teacher cache: fitting coordinates", unit="batch"):
            part = self._states(keys[start : start + self.batch_size])
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
        """Refuse a teacher whose logits are not its output head applied to its last hidden state."""
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
        """The keys of all rows that are there. Shards that cannot be used are removed, and their rows made anew."""
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
        """The keys in a shard; `None` if it is damaged or in other coordinates."""
        try:
            label = _label_of(path)
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
        """What is kept of some rows; every few batches are decoded again for the receipt."""
        rows: dict[str, dict[str, Any]] = {}
        is_measured = self.num_batches % _RECEIPT_EVERY == 0 and not self.preset.draws
        self.num_batches += 1
        for key, (hidden, logits) in zip(keys, self._states(keys) if keys else (), strict=True):
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
        about = self.label | {name: _summary(values) for name, values in self.measured.items()}
        self.measured = {"kl": [], "tail": []}
        write_part(self.folder, "shard", rows, shard_schema(self.preset).with_metadata({_LABEL: json.dumps(about)}))

    def _finish(self) -> None:
        """Checksums and the receipt, into the manifest."""
        paths = part_paths(self.folder, "shard")
        tables = [pyarrow.parquet.read_table(path, columns=["key", "completion_ids"]) for path in paths]
        manifest = self.manifest
        manifest.shards = [
            {
                "file": os.path.basename(path),
                "rows": len(table),
                "tokens": sum(map(len, table["completion_ids"].to_pylist())),
                "bytes": os.path.getsize(path),
                "sha256": sha256_of(path),
            }
            for path, table in zip(paths, tables, strict=True)
        ]
        manifest.data = content_hash(sorted(key for table in tables for key in table["key"].to_pylist()))
        manifest.files = {} if self.basis is None else {BASIS_FILE: self.label["basis"]}
        manifest.receipt = receipt = {}
        labels = [_label_of(path) for path in paths]
        samples = {name: [x for label in labels for x in label[name]["sample"]] for name in ("kl", "tail")}
        if samples["kl"]:
            receipt["kl_tokens"] = sum(label["kl"]["count"] for label in labels)
            receipt["kl_mean"] = sum(label["kl"]["sum"] for label in labels) / receipt["kl_tokens"]
            receipt["kl_p95"] = float(np.quantile(samples["kl"], 0.95))
        if samples["tail"]:
            for percent in (50, 95):
                receipt[f"tail_mass_p{percent}"] = float(np.quantile(samples["tail"], percent / 100))
        for name in ("rows", "tokens"):
            receipt[name] = sum(shard[name] for shard in manifest.shards)
        receipt["bytes_per_token"] = sum(shard["bytes"] for shard in manifest.shards) / max(receipt["tokens"], 1)
        receipt["basis_bytes"] = 0 if self.basis is None else os.path.getsize(self._path(BASIS_FILE))
        manifest.save(self._path(MANIFEST_FILE))
        cache = TeacherCache(self.folder, verify_checksums=False).to(self.accelerator.device)
        start = time.perf_counter()
        decoded = len(cache.log_probs(range(min(16, len(cache)))))
        receipt["decode_microseconds_per_token"] = 1e6 * (time.perf_counter() - start) / max(decoded, 1)
        manifest.save(self._path(MANIFEST_FILE))


def _summary(values: list[Tensor]) -> dict[str, Any]:
    """Sum, number, and at most 256 of some values, evenly spread: a shard's part of the receipt."""
    joined = torch.cat([torch.zeros(0), *values]).double()
    some = joined[:: max(-(-len(joined) // 256), 1)]
    return {"sum": float(joined.sum()), "count": len(joined), "sample": [round(float(value), 4) for value in some]}


def _label_of(path: str) -> dict[str, Any]:
    """What a shard says about itself."""
    return json.loads((pyarrow.parquet.read_schema(path).metadata or {}).get(_LABEL, b"{}"))


def _logit_scale(settings: Any) -> float:
    if getattr(settings, "logits_scaling", None):  # Granite divides
        return 1 / settings.logits_scaling
    return getattr(settings, "logit_scale", None) or 1.0  # Cohere multiplies
