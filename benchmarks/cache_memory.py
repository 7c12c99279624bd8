"""Memory for training from a large teacher cache, and the seconds to open it and to make a step.

The rows are synthetic, in random order, and the student is tiny, so that the cache's share is visible. Each cache is
measured in a process of its own. A cache of 20 MB shows how much of the memory does not belong to the cache.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, TeacherCache
from trl_promptkd.files import sha256_of
from trl_promptkd.generation.store import BYTES_A_PART, part_paths, write_part
from trl_promptkd.teacher_cache.codec import PRESETS, Basis, encode
from trl_promptkd.teacher_cache.manifest import MANIFEST_FILE, Manifest, describe_tokenizer, row_key
from trl_promptkd.teacher_cache.reader import BASIS_FILE
from trl_promptkd.teacher_cache.shards import shard_schema

from .common import MemoryPeak, bench_settings, in_a_process, measured_with, random_models
from .study.page_text import table


PAGE = "teacher_cache.md"
VOCAB_SIZE = 4096
PROMPT_TOKENS = 100
SMALL = 0.02  # gigabytes


def make_cache(folder: Path, gigabytes: float, preset_name: str) -> None:
    """A synthetic cache of about this size on disk."""
    folder.mkdir(parents=True)
    models, preset = random_models(VOCAB_SIZE), PRESETS[preset_name]
    head = models.teacher.get_output_embeddings().weight.detach() * 20  # far from uniform
    generator = np.random.default_rng(0)
    spread = torch.logspace(0.5, -1.5, head.size(1))  # a few large directions, as real states have
    basis = None
    if not preset.draws:
        basis = Basis.fit(torch.randn(4096, head.size(1)) * spread, head, rank=preset.rank)
        basis.save(str(folder / BASIS_FILE))
    pool = []
    for _ in range(512):
        hidden = torch.randn(int(generator.integers(60, 300)), head.size(1)) * spread
        pool.append((len(hidden), encode(hidden, hidden @ head.T, basis, preset)))
    schema = shard_schema(preset)
    while sum(path.stat().st_size for path in folder.glob("*.parquet")) < gigabytes * 2**30:
        rows, size = {}, 0
        while size < min(BYTES_A_PART, gigabytes * 2**30):
            number, payload = pool[generator.integers(len(pool))]
            prompt, completion = (generator.integers(4, VOCAB_SIZE, n).tolist() for n in (PROMPT_TOKENS, number))
            ids = {"prompt_ids": None, "teacher_prompt_ids": prompt, "completion_ids": completion}
            rows[row_key(prompt, completion)] = ids | payload
            size += sum(map(len, payload.values()))
        write_part(str(folder), "shard", rows, schema)
    shards = []
    for path in part_paths(str(folder), "shard"):
        known = {"file": os.path.basename(path), "bytes": os.path.getsize(path), "sha256": sha256_of(path)}
        shards.append(known | {"rows": 0, "tokens": 0})
    Manifest(
        teacher=dict.fromkeys(("name", "revision", "dtype", "quantization", "weights"), ""),
        **describe_tokenizer(models.tokenizer),
        vocab_size=VOCAB_SIZE,
        priming=None,
        response_source="dataset",
        preset=preset_name,
        shards=shards,
        files={} if basis is None else {BASIS_FILE: sha256_of(str(folder / BASIS_FILE))},
    ).save(str(folder / MANIFEST_FILE))


def measure_cache(folder: str, steps: int, batch_size: int, preset: str) -> dict[str, Any]:
    """Seconds, and memory in MB above a process that has loaded the student."""
    torch.manual_seed(0)
    models = random_models(VOCAB_SIZE, hidden_size=64, student_layers=1)
    peak, began = MemoryPeak(), time.perf_counter()
    cache = TeacherCache(folder)
    found = {"rows": len(cache), "open_seconds": round(time.perf_counter() - began, 2), "open_MB": peak.since()}
    settings = bench_settings(f"{folder}/run", per_device_train_batch_size=batch_size, max_steps=steps)
    args = PrimedDistillConfig(**settings, kd_temperature=1.0, kd_beta=0.0 if preset == "tiny" else 1.0)
    data = {"train_dataset": cache.dataset(), "teacher_cache": cache}
    trainer = PrimedDistillTrainer(models.student, args, processing_class=models.tokenizer, **data)
    found["trainer_MB"], began = peak.since(), time.perf_counter()
    trainer.train()
    return found | {"training_MB": peak.since(), "step_seconds": round((time.perf_counter() - began) / steps, 4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the large cache on the disk")
    parser.add_argument("--preset", default="standard", choices=list(PRESETS), help="what is stored")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step")
    parser.add_argument("--caches", help="folder to keep the caches in, for later runs")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    caches = {}
    with tempfile.TemporaryDirectory() as temporary:
        for gigabytes in (SMALL, args.gigabytes):
            folder = Path(args.caches or temporary) / f"{args.preset}-{gigabytes}"
            if not (folder / MANIFEST_FILE).exists():
                make_cache(folder, gigabytes, args.preset)
            found = in_a_process(measure_cache, str(folder), args.steps, args.batch_size, args.preset)
            caches[f"{gigabytes:g} GB"] = found
            print(gigabytes, found, flush=True)
    return {"caches": caches}


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows, peaks = [], (("open_MB", "RSS"), ("training_MB", "RSS"), ("training_MB", "RssAnon"))
    for name, found in result["caches"].items():
        memory = [f"{found[when][kind]:.0f} MB" for when, kind in peaks]
        rows.append([f"{name}, {found['rows']:,} rows", f"{found['open_seconds']:.1f} s", *memory])
        rows[-1].append(f"{found['step_seconds']:.3f} s")
    header = ["cache", "opened in", "after opening", "training: RSS", "RssAnon", "step"]
    return {"memory": f"{table(header, rows)}\n\n{measured_with(result)}"}
