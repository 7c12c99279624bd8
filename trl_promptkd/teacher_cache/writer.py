"""Filling a cache: the teacher's forward passes, written down as they come, so that a build can be killed at any moment."""

import json
import os
import time
from collections.abc import Iterator
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
from ..files import sha256_of, text_hash, whole_file
from ..models.forward import completion_states, inside_forward
from .codec import PRESETS, Basis, Preset, decode, encode, tail_masses
from .manifest import MANIFEST_FILE, Manifest, digest, row_key
from .reader import BASIS_FILE, TeacherCache, read_shard


__all__ = ["CacheWriter"]

logger = logging.get_logger(__name__)

_CALIBRATION_TOKENS = 8192
_SECONDS_A_SHARD = 30.0  # at most so much work is lost when a build is killed
_BYTES_A_SHARD = 64 * 2**20
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
        self.label = {"settings": digest(manifest.settings()), "basis": ""}  # in every shard

    def run(self) -> None:
        self.basis = None if self.preset.draws else self._basis()
        if self.basis is not None:
            self.label["basis"] = sha256_of(self._path(BASIS_FILE))
        done = self._finished_keys()
        missing = sorted(self.rows.keys() - done, key=lambda key: (-self.rows[key]["length"], key))
        if done and missing:
            logger.warning(f"{len(self.rows) - len(missing)} of {len(self.rows)} rows are in {self.folder} already.")
        batches = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        self._write_share(batches[self.accelerator.process_index :: self.accelerator.num_processes])
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._finish()
        self.accelerator.wait_for_everyone()

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
            return known.states, known.logits()

        with torch.no_grad(), self.accelerator.autocast():
            states, logits = inside_forward(self.model, ask)
        lengths = list(map(len, completions))
        return list(zip(states.split(lengths), logits.split(lengths), strict=True))

    def _basis(self) -> Basis:
        """The cache's coordinates: what lies there, or fitted to some rows, the same ones whatever the order of the data."""
        path = self._path(BASIS_FILE)
        if self.accelerator.is_main_process and os.path.isfile(path):
            checksum = Manifest.load(self._path(MANIFEST_FILE)).files.get(BASIS_FILE)
            if checksum is not None and checksum != sha256_of(path):
                logger.warning(f"{path} is damaged; the coordinates are fitted and all rows made anew.")
                os.remove(path)
        if self.accelerator.is_main_process and not os.path.isfile(path):
            keys, tokens = [], 0
            for key in sorted(self.rows):
                if tokens >= _CALIBRATION_TOKENS:
                    break
                keys.append(key)
                tokens += len(self.rows[key]["completion_ids"])
            keys.sort(key=lambda key: self.rows[key]["length"])
            states = []
            with tqdm(total=len(keys), desc="Teacher cache: fitting coordinates", unit="row") as bar:
                for start in range(0, len(keys), self.batch_size):
                    part = self._states(keys[start : start + self.batch_size])
                    states += [hidden for hidden, _ in part]
                    bar.update(len(part))
            head, settings = self.teacher.get_output_embeddings(), self.teacher.config.get_text_config()
            vocab = self.manifest.vocab_size
            if not head.weight.is_floating_point() or head.weight.device.type == "meta":
                raise ValueError(
                    "The teacher's output head is quantized or not in memory, and the coordinates of this preset come from it. Leave the head "
                    "out of the quantization (`llm_int8_skip_modules=['lm_head']`), or use `preset='tiny'`."
                )
            rank = self.preset.rank
            if rank is not None and tokens < 4 * head.weight.size(1):
                logger.warning(
                    f"The coordinates are fitted to {tokens} tokens only, too few to leave any of them out: rows take more bytes. Build with "
                    "more rows first."
                )
                rank = None
            basis = Basis.fit(
                torch.cat(states),
                head.weight[:vocab],
                None if getattr(head, "bias", None) is None else head.bias[:vocab],
                logit_scale=_logit_scale(settings),
                softcap=getattr(settings, "final_logit_softcapping", None) or 0.0,
                rank=rank,
            )
            self._check_head(basis, *part[-1])
            basis.save(path)
        self.accelerator.wait_for_everyone()
        return Basis.load(path).to(self.accelerator.device)

    def _check_head(self, basis: Basis, hidden: Tensor, logits: Tensor) -> None:
        """Whether this teacher's logits are its output head applied to its last hidden state, as far as is known here."""
        head, settings = self.teacher.get_output_embeddings(), self.teacher.config.get_text_config()
        expected = head(hidden.to(head.weight.device)).to(logits.device)[:, : logits.size(-1)].float() * _logit_scale(
            settings
        )
        if basis.softcap:
            expected = basis.softcap * torch.tanh(expected / basis.softcap)
        off = kl_divergence(logits.log_softmax(dim=-1), expected.log_softmax(dim=-1)).mean()
        exact = Preset(step=1e-3)
        kept = decode(
            encode(hidden, logits, basis.to(hidden.device), exact),
            basis.to(hidden.device),
            exact,
            logits.size(-1),
            hidden.device,
        )
        if basis.analysis.size(1) == hidden.size(1):  # nothing is left out
            off = torch.maximum(off, kl_divergence(logits.log_softmax(dim=-1), kept).mean())
        if not off <= 1e-3:
            raise ValueError(
                f"The logits of {type(self.teacher).__name__} are not its output head applied to its last hidden state (they differ by "
                f"{off:.2e} nats): something comes after it that this version does not know. Distil from the live teacher instead."
            )

    # -------------------------------------------------------------------------------------------- the shards

    def _shards(self) -> Iterator[str]:
        for name in sorted(os.listdir(self.folder)):
            if name.startswith("shard-") and name.endswith(".parquet"):
                yield os.path.join(self.folder, name)

    def _finished_keys(self) -> set[str]:
        """The keys of all rows that are there; a shard that cannot be read is taken away and made anew."""
        done: set[str] = set()
        checksums = {shard["file"]: shard["sha256"] for shard in Manifest.load(self._path(MANIFEST_FILE)).shards}
        if self.accelerator.is_main_process:
            for path in list(self._shards()):
                name = os.path.basename(path)
                damaged = checksums.get(name, "") != "" and sha256_of(path) != checksums[name]
                try:
                    label = _label_of(path)
                except (OSError, ValueError, pyarrow.ArrowException):
                    damaged, label = True, {}
                if not damaged and label.get("settings") != self.label["settings"]:
                    raise ValueError(
                        f"{path} belongs to a cache that was made differently (another teacher, priming, preset, ...). Choose another `output_dir`, "
                        "or delete the file."
                    )
                try:
                    keys = [] if damaged else read_shard(path, self.manifest)["key"].to_pylist()
                except ValueError:
                    damaged = True
                if damaged or label.get("basis") != self.label["basis"]:
                    why = "is damaged" if damaged else "was made with other coordinates"
                    logger.warning(f"The shard {path} {why}; its rows are made anew.")
                    os.remove(path)
                    continue
                done.update(keys)
        if self.accelerator.num_processes > 1:
            done = broadcast_object_list([done])[0]
        return done

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _write_share(self, batches: list[list[str]]) -> None:
        shard: list[dict[str, Any]] = []
        divergences: list[Tensor] = []
        tails: list[Tensor] = []
        written, size = time.monotonic(), 0
        total = sum(len(self.rows[key]["completion_ids"]) for batch in batches for key in batch)
        bar = tqdm(
            total=total,
            desc="Teacher cache",
            unit="token",
            disable=not self.accelerator.is_local_main_process or not total,
        )
        with bar:
            for index, batch in enumerate(batches):
                for key, (hidden, logits) in zip(batch, self._states(batch), strict=True):
                    payload = encode(hidden, logits, self.basis, self.preset, seed=int(key[:15], 16))
                    if index % _RECEIPT_EVERY == 0 and not self.preset.draws:
                        kept = decode(payload, self.basis, self.preset, logits.size(-1), logits.device)
                        divergences.append(kl_divergence(logits.log_softmax(dim=-1), kept).cpu())
                        if self.preset.top_k:
                            tails.append(tail_masses(payload))
                    row = self.rows[key]
                    names = ("prompt_ids", "teacher_prompt_ids", "completion_ids")
                    ids = {name: row[name] for name in names}
                    if ids["prompt_ids"] == ids["teacher_prompt_ids"]:
                        ids["prompt_ids"] = None  # not said twice
                    shard.append({"key": key, **ids, **payload})
                    size += sum(map(len, payload.values()))
                    bar.update(len(row["completion_ids"]))
                late = time.monotonic() - written > _SECONDS_A_SHARD or size > _BYTES_A_SHARD
                if index == len(batches) - 1 or late:
                    self._write_shard(shard, {"kl": _summary(divergences), "tail": _summary(tails)})
                    shard, divergences, tails, written, size = [], [], [], time.monotonic(), 0

    def _write_shard(self, rows: list[dict[str, Any]], summaries: dict[str, dict]) -> None:
        types = {name: pyarrow.binary() for name in rows[0]} | {"key": pyarrow.string()}
        types |= {
            name: pyarrow.list_(pyarrow.int32()) for name in ("prompt_ids", "teacher_prompt_ids", "completion_ids")
        }
        table = pyarrow.table({name: pyarrow.array([row[name] for row in rows], type=types[name]) for name in rows[0]})
        table = table.replace_schema_metadata({_LABEL: json.dumps({**self.label, **summaries})})
        name = text_hash("".join(row["key"] for row in rows))
        try:
            with whole_file(self._path(f"shard-{name}.parquet")) as path:
                pyarrow.parquet.write_table(
                    table,
                    path,
                    compression="zstd",
                    compression_level=9,
                    use_dictionary=False,
                    write_page_checksum=True,
                )
        except OSError as error:
            raise OSError(
                f"The teacher cache in {self.folder} could not be written ({error}). What is there is kept: make room and start the build again."
            ) from error

    def _finish(self) -> None:
        """Checksums and the receipt, into the manifest."""
        self.manifest.shards = []
        summaries: dict[str, list[dict]] = {"kl": [], "tail": []}
        keys: list[str] = []
        for path in self._shards():
            table = pyarrow.parquet.read_table(path, columns=["key", "completion_ids"])
            keys += table["key"].to_pylist()
            for name, values in summaries.items():
                values.append(_label_of(path)[name])
            self.manifest.shards.append(
                {
                    "file": os.path.basename(path),
                    "rows": len(table),
                    "tokens": sum(map(len, table["completion_ids"].to_pylist())),
                    "bytes": os.path.getsize(path),
                    "sha256": sha256_of(path),
                }
            )
        self.manifest.files = {} if self.basis is None else {BASIS_FILE: sha256_of(self._path(BASIS_FILE))}
        tokens = sum(shard["tokens"] for shard in self.manifest.shards)
        self.manifest.data = digest(sorted(keys))
        self.manifest.receipt = {}
        samples = {name: [x for part in parts for x in part["sample"]] for name, parts in summaries.items()}
        if samples["kl"]:
            count = sum(part["count"] for part in summaries["kl"])
            self.manifest.receipt |= {
                "kl_mean": sum(part["sum"] for part in summaries["kl"]) / count,
                "kl_p95": float(np.quantile(samples["kl"], 0.95)),
                "kl_tokens": count,
            }
        if samples["tail"]:
            for percent in (50, 95):
                self.manifest.receipt[f"tail_mass_p{percent}"] = float(np.quantile(samples["tail"], percent / 100))
        self.manifest.receipt |= {
            "rows": sum(shard["rows"] for shard in self.manifest.shards),
            "tokens": tokens,
            "bytes_per_token": sum(shard["bytes"] for shard in self.manifest.shards) / max(tokens, 1),
            "basis_bytes": 0 if self.basis is None else os.path.getsize(self._path(BASIS_FILE)),
        }
        self.manifest.save(self._path(MANIFEST_FILE))
        cache = TeacherCache(self.folder, verify_checksums=False).to(self.accelerator.device)
        some = list(range(min(16, len(cache))))
        start = time.perf_counter()
        decoded = len(cache.log_probs(some))
        self.manifest.receipt["decode_microseconds_per_token"] = 1e6 * (time.perf_counter() - start) / max(decoded, 1)
        self.manifest.save(self._path(MANIFEST_FILE))


def _summary(values: list[Tensor]) -> dict[str, Any]:
    """Sum, number, and at most 256 of some values, evenly spread: a shard's part of the receipt."""
    joined = torch.cat(values).double() if values else torch.zeros(0)
    some = joined[:: max(-(-len(joined) // 256), 1)]
    return {"sum": float(joined.sum()), "count": len(joined), "sample": [round(float(value), 4) for value in some]}


def _label_of(path: str) -> dict[str, Any]:
    """What a shard says about itself."""
    return json.loads((pyarrow.parquet.read_schema(path).metadata or {}).get(_LABEL, b"{}"))


def _logit_scale(settings: Any) -> float:
    if getattr(settings, "logits_scaling", None):  # Granite divides
        return 1 / settings.logits_scaling
    return getattr(settings, "logit_scale", None) or 1.0  # Cohere multiplies
