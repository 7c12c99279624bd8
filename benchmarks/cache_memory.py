"""The memory that training from a large teacher cache takes, and how long opening the cache and a step take.

    python benchmarks/cache_memory.py --gigabytes 2 --output_dir cache_memory_benchmark

The rows are synthetic, in random order, and the student is tiny. Every measurement is a process of its own. The same
training from a cache of 20 MB says how much of the memory is not the cache's: activations, gradients, the optimizer.
Resident memory (RSS) counts pages of memory maps that were touched and that the system takes back when it needs them,
such as those of the training set; RssAnon does not.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")

import numpy as np
import torch
from common import random_models

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, TeacherCache
from trl_promptkd.files import sha256_of
from trl_promptkd.generation.store import BYTES_A_PART, part_paths, write_part
from trl_promptkd.teacher_cache.codec import PRESETS, Basis, encode
from trl_promptkd.teacher_cache.manifest import MANIFEST_FILE, Manifest, describe_tokenizer, row_key
from trl_promptkd.teacher_cache.reader import BASIS_FILE
from trl_promptkd.teacher_cache.shards import shard_schema


VOCAB_SIZE = 4096
PROMPT_TOKENS = 100
SMALL = 0.02  # gigabytes


def make_cache(folder: Path, gigabytes: float, preset_name: str) -> None:
    """A cache that no teacher made, of about this size on the disk."""
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
    shards = [
        {
            "file": os.path.basename(path),
            "rows": 0,
            "tokens": 0,
            "bytes": os.path.getsize(path),
            "sha256": sha256_of(path),
        }
        for path in part_paths(str(folder), "shard")
    ]
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


def resident() -> dict[str, float]:
    """Resident memory of this process in MB: all of it, and what is not backed by a file."""
    with open("/proc/self/status", encoding="utf-8") as file:
        values = dict(line.split(":") for line in file)
    return {"RSS": int(values["VmRSS"].split()[0]) / 1024, "RssAnon": int(values["RssAnon"].split()[0]) / 1024}


class Peak(threading.Thread):
    """Looks at the memory every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_value, self.most = resident(), resident()
        self.start()

    def run(self) -> None:
        while True:
            now = resident()
            self.most = {name: max(value, self.most[name]) for name, value in now.items()}
            time.sleep(0.02)

    def since(self) -> dict[str, int]:
        """The most since the last call, in MB above the start."""
        most, self.most = self.most, resident()
        return {name: round(value - self.start_value[name]) for name, value in most.items()}


def measure(folder: str, steps: int, batch_size: int, preset: str) -> dict:
    """Seconds, and MB above a process that has loaded the student."""
    torch.manual_seed(0)
    # A tiny student, so that the cache's share shows
    models = random_models(VOCAB_SIZE, hidden_size=64, student_layers=1)
    peak = Peak()

    began = time.perf_counter()
    cache = TeacherCache(folder)
    found = {"rows": len(cache), "open_seconds": round(time.perf_counter() - began, 2), "open_MB": peak.since()}
    began = time.perf_counter()
    cache.dataset()
    found |= {"dataset_seconds": round(time.perf_counter() - began, 2), "dataset_MB": peak.since()}
    args = PrimedDistillConfig(
        output_dir=os.path.join(folder, "run"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        kd_temperature=1.0,
        kd_beta=0.0 if preset == "tiny" else 1.0,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = PrimedDistillTrainer(
        models.student, args, train_dataset=cache.dataset(), processing_class=models.tokenizer, teacher_cache=cache
    )
    found["trainer_MB"] = peak.since()
    times, step = [], trainer.training_step

    def timed(*args, **kwargs):
        began = time.perf_counter()
        result = step(*args, **kwargs)
        times.append(time.perf_counter() - began)
        return result

    trainer.training_step = timed
    trainer.train()
    return found | {"training_MB": peak.since(), "step_seconds": [round(value, 4) for value in times[1:]]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the large cache on the disk")
    parser.add_argument("--preset", default="standard", choices=list(PRESETS), help="what is kept")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--batch_size", type=int, default=4, help="rows a step")
    parser.add_argument("--output_dir", default="cache_memory_benchmark", help="for the caches and results.json")
    parser.add_argument("--measure", help="measure this cache and print JSON")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if args.measure:
        print(json.dumps(measure(args.measure, args.steps, args.batch_size, args.preset)))
        return
    results = {}
    for gigabytes in (SMALL, args.gigabytes):
        folder = Path(args.output_dir) / f"{args.preset}-{gigabytes}"
        if not (folder / MANIFEST_FILE).exists():
            make_cache(folder, gigabytes, args.preset)
        settings = ["--preset", args.preset, "--steps", str(args.steps), "--batch_size", str(args.batch_size)]
        command = [sys.executable, __file__, "--measure", str(folder), *settings]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[f"{gigabytes} GB"] = found = json.loads(output.splitlines()[-1])
        found["step_seconds"] = float(np.median(found["step_seconds"]))
    (Path(args.output_dir) / "results.json").write_text(json.dumps(results, indent=1))
    print("\n| cache | opened in | training: RSS | RssAnon | step |\n| --- | --- | --- | --- | --- |")
    for name, found in results.items():
        memory = found["training_MB"]
        print(
            f"| {name}, {found['rows']} rows | {found['open_seconds']} s | {memory['RSS']} MB | "
            f"{memory['RssAnon']} MB | {found['step_seconds']:.3f} s |"
        )


if __name__ == "__main__":
    main()
