"""The last part of a manifest, once all shards exist: their checksums, and how close the kept distributions are."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.parquet
import torch
from torch import Tensor

from ..files import content_hash, sha256_of
from ..generation.store import part_paths
from .codec import PRESETS
from .manifest import MANIFEST_FILE, Manifest
from .reader import BASIS_FILE, TeacherCache


__all__ = ["finish_cache", "label_of", "label_text", "summary"]

_LABEL = b"trl_promptkd"


def summary(values: list[Tensor]) -> dict[str, Any]:
    """Sum and number of some values, and at most 256 of them, evenly spread. A shard's part of the receipt."""
    joined = torch.cat([torch.zeros(0), *values]).double()
    some = joined[:: max(-(-len(joined) // 256), 1)]
    return {"sum": float(joined.sum()), "count": len(joined), "sample": [round(float(value), 4) for value in some]}


def label_text(label: Mapping[str, Any]) -> dict[bytes, str]:
    """The metadata of a shard's schema, from which [`label_of`] reads `label`."""
    return {_LABEL: json.dumps(label)}


def label_of(path: str) -> dict[str, Any]:
    """The label that a shard was written with."""
    return json.loads((pyarrow.parquet.read_schema(path).metadata or {}).get(_LABEL, b"{}"))


def finish_cache(folder: str, manifest: Manifest, device: torch.device | str = "cpu") -> None:
    """Describe the shards in `folder` in `manifest`, and save it there. The cache is then finished.

    Args:
        device: Device on which decoding is timed.
    """
    paths = part_paths(folder, "shard")
    seen: set[str] = set()
    manifest.shards = []
    for path in paths:
        table = pyarrow.parquet.read_table(path, columns=["key", "completion_ids"])
        own = table["key"].to_pylist()
        if not seen.isdisjoint(own) or len(set(own)) < len(own):
            raise ValueError(
                f"Rows of {path} are in {folder} twice: two builds wrote into it at the same time. Delete that file, "
                "see that no other build runs there, and build again: only rows that are then missing are made anew."
            )
        seen |= set(own)
        lengths = pyarrow.compute.list_value_length(table["completion_ids"])
        manifest.shards.append(
            {
                "file": os.path.basename(path),
                "rows": len(table),
                "tokens": pyarrow.compute.sum(lengths).as_py() or 0,
                "bytes": os.path.getsize(path),
                "sha256": sha256_of(path),
            }
        )
    basis = None if PRESETS[manifest.preset].draws else os.path.join(folder, BASIS_FILE)
    manifest.data = content_hash(sorted(seen))
    manifest.files = {} if basis is None else {BASIS_FILE: sha256_of(basis)}
    manifest.receipt = receipt = {}
    labels = [label_of(path) for path in paths]
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
    receipt["basis_bytes"] = 0 if basis is None else os.path.getsize(basis)
    path = os.path.join(folder, MANIFEST_FILE)
    manifest.save(path)
    cache = TeacherCache(folder, verify_checksums=False).to(device)
    start = time.perf_counter()
    decoded = len(cache.log_probs(range(min(16, len(cache)))))
    receipt["decode_microseconds_per_token"] = 1e6 * (time.perf_counter() - start) / max(decoded, 1)
    manifest.save(path)
