"""What the presets of a teacher cache cost and keep, how fast a cache is built, and what a training step from it
costs.

    python examples/smollm2.py --output_dir models --student_layers 11
    python benchmarks/teacher_cache.py --models models --data_files rows.jsonl --output_dir teacher_cache_benchmark

Rows are JSON lines with `instruction`, `input` and `output` (such as databricks-dolly-15k). Everything is measured in
one run; timings are interleaved, and medians are given. Ends with a table, a chart and `results.json`.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")

import matplotlib
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, build_teacher_cache
from trl_promptkd.data import pad_rows
from trl_promptkd.data.primed import tokenize_primed_dataset
from trl_promptkd.divergences import kl_divergence
from trl_promptkd.models.forward import completion_states
from trl_promptkd.teacher_cache import writer
from trl_promptkd.teacher_cache.codec import PRESETS


def conversation(row: dict) -> dict:
    question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


@torch.no_grad()
def top_k_fp16(teacher, rows, pad: int, ks: list[int]) -> dict[str, dict[str, float]]:
    """What a plain cache of the likeliest k tokens keeps: 16-bit ids and log-probabilities, the rest spread evenly."""
    totals, count = dict.fromkeys(ks, 0.0), 0
    for start in range(0, len(rows), 8):
        chunk = rows[start : start + 8]
        batch = pad_rows([r["teacher_prompt_ids"] for r in chunk], [r["completion_ids"] for r in chunk], pad)
        logits = completion_states(teacher, batch["input_ids"], batch["attention_mask"], batch["labels"]).logits()
        log_probs = logits.log_softmax(dim=-1)
        count += len(log_probs)
        for k in ks:
            top = log_probs.topk(k, dim=-1)
            rest = (1 - top.values.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-8) / (log_probs.size(-1) - k)
            kept = rest.log().expand_as(log_probs).scatter(-1, top.indices, top.values)
            totals[k] += float(kl_divergence(log_probs, kept).sum())
    return {
        f"top-{k}, fp16": {"bytes_per_token": 4.0 * k + 2, "kl_mean": total / count} for k, total in totals.items()
    }


def build_all(teacher, dataset, tokenizer, folder: Path, args) -> dict[str, dict[str, float]]:
    results = {}
    for preset in PRESETS:
        target = folder / preset
        shutil.rmtree(target, ignore_errors=True)
        cache = build_teacher_cache(
            teacher,
            dataset,
            str(target),
            tokenizer,
            preset=preset,
            max_length=args.max_length,
            batch_size=args.batch_size,
        )
        results[preset] = cache.manifest.receipt
        print(preset, json.dumps(cache.manifest.receipt), flush=True)
    return results


def throughput(teacher, dataset, tokenizer, folder: Path, args) -> dict[str, float]:
    """Tokens a second of the bare forward pass and of building, coordinates and receipts included; interleaved."""
    rows = tokenize_primed_dataset(dataset, "rows", tokenizer, None, args.max_length, answers_needed="")
    rows = sorted(rows, key=lambda row: -row["length"])
    tokens = sum(len(row["completion_ids"]) for row in rows)
    seconds: dict[str, list[float]] = {"forward": [], "build": []}
    for _ in range(args.repeats):
        start = time.perf_counter()
        with torch.no_grad():
            for i in range(0, len(rows), args.batch_size):
                chunk = rows[i : i + args.batch_size]
                batch = pad_rows(
                    [r["teacher_prompt_ids"] for r in chunk],
                    [r["completion_ids"] for r in chunk],
                    tokenizer.pad_token_id,
                )
                completion_states(teacher, batch["input_ids"], batch["attention_mask"], batch["labels"]).logits()
        seconds["forward"].append(time.perf_counter() - start)
        target = folder / "timed"
        keep = (target / "basis.safetensors").read_bytes() if target.exists() else None
        shutil.rmtree(target, ignore_errors=True)
        if keep is not None:  # coordinates are fitted once for a cache of any size
            target.mkdir()
            (target / "basis.safetensors").write_bytes(keep)
        start = time.perf_counter()
        build_teacher_cache(
            teacher,
            dataset,
            str(target),
            tokenizer,
            preset="standard",
            max_length=args.max_length,
            batch_size=args.batch_size,
        )
        seconds["build"].append(time.perf_counter() - start)
    medians = {name: tokens / statistics.median(values[1:] or values) for name, values in seconds.items()}
    return {f"{name}_tokens_per_second": value for name, value in medians.items()} | {
        "build_share_of_forward": medians["build"] / medians["forward"]
    }


def step_seconds(trainer) -> list[float]:
    """Seconds of each optimizer step."""
    times: list[float] = []
    step = trainer.training_step

    def timed(*args, **kwargs):
        start = time.perf_counter()
        result = step(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return result

    trainer.training_step = timed
    trainer.train()
    return times[1:]


def training(dataset, tokenizer, folder: Path, args) -> dict[str, float]:
    """Median forward and backward of TRL's SFT, and of primed distillation from caches and from the live teacher."""
    common = {
        "max_steps": args.steps + 1,
        "per_device_train_batch_size": args.batch_size,
        "max_length": args.max_length,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "seed": 0,
    }
    student = str(Path(args.models) / "student")
    kd = {"kd_temperature": 1.0, "output_dir": str(folder / "run"), **common}

    def make(name):
        if name == "SFT":
            return SFTTrainer(
                student,
                SFTConfig(output_dir=str(folder / "run"), **common),
                train_dataset=dataset,
                processing_class=tokenizer,
            )
        settings = PrimedDistillConfig(**kd, kd_beta=0.0 if name == "tiny" else 1.0)
        source = {"teacher_model": str(Path(args.models) / "teacher")}
        if name != "live teacher":
            source = {"teacher_cache": str(folder / name)}
        return PrimedDistillTrainer(student, settings, train_dataset=dataset, processing_class=tokenizer, **source)

    names = ["SFT", *PRESETS, "live teacher"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            times[name] += step_seconds(make(name))
    return {name: statistics.median(values) for name, values in times.items()}


def chart(kept: dict[str, dict[str, float]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4))
    for label, color, names in (
        ("plain top-k, fp16", "#7a9cc6", [name for name in kept if name.startswith("top-")]),
        (
            "presets",
            "#c0392b",
            [name for name in kept if kept[name].get("kl_mean") is not None and not name.startswith("top-")],
        ),
    ):
        points = sorted((kept[name]["bytes_per_token"], kept[name]["kl_mean"], name) for name in names)
        axis.plot([p[0] for p in points], [p[1] for p in points], "o-", color=color, label=label)
        for x, y, name in points:
            axis.annotate(name.split(",")[0], (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.set(xscale="log", xlabel="bytes per token on disk")
    axis.set(yscale="log", ylabel="KL(teacher || kept), nats per token")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--models", default="models", help="folder with `teacher` and `student`, as of examples/smollm2.py"
    )
    parser.add_argument("--data_files", required=True, help="JSON lines with instruction, input and output")
    parser.add_argument("--rows", type=int, default=100, help="rows to keep")
    parser.add_argument("--max_length", type=int, default=400, help="longest row in tokens; longer ones are left out")
    parser.add_argument("--batch_size", type=int, default=8, help="rows at once")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; medians are given")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a run, after one that is not timed")
    parser.add_argument(
        "--output_dir", default="teacher_cache_benchmark", help="for the table, results.json and the chart"
    )
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    writer._RECEIPT_EVERY = 1  # the receipt is of every token here

    tokenizer = AutoTokenizer.from_pretrained(Path(args.models) / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(Path(args.models) / "teacher", dtype=torch.float32).eval()
    dataset = load_dataset("json", data_files=args.data_files, split=f"train[:{args.rows}]")
    dataset = dataset.map(conversation, remove_columns=dataset.column_names)
    tokenized = tokenize_primed_dataset(dataset, "rows", tokenizer, None, answers_needed="")
    dataset = dataset.select([i for i, length in enumerate(tokenized["length"]) if length <= args.max_length])
    rows = list(tokenize_primed_dataset(dataset, "rows", tokenizer, None, answers_needed=""))  # the same for all

    kept = build_all(teacher, dataset, tokenizer, folder, args)
    kept |= top_k_fp16(teacher, rows, tokenizer.pad_token_id, [16, 32, 64, 128])
    writer._RECEIPT_EVERY = 8
    speed = throughput(teacher, dataset, tokenizer, folder, args)
    steps = training(dataset, tokenizer, folder, args)
    results = {"kept": kept, "throughput": speed, "step_seconds": steps, "settings": vars(args)}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    chart(kept, folder / "fidelity.png")

    print("\n| kept | bytes per token | KL, nats per token |\n| --- | --- | --- |")
    for name, values in sorted(kept.items(), key=lambda item: item[1]["bytes_per_token"]):
        divergence = f"{values['kl_mean']:.4f}" if values.get("kl_mean") is not None else "(forward KL unbiased)"
        print(f"| {name} | {values['bytes_per_token']:.1f} | {divergence} |")
    print(
        f"\nBuild: {speed['build_tokens_per_second']:.0f} tokens/s, {speed['build_share_of_forward']:.2f} of the "
        "bare forward pass."
    )
    print("\n| training step | seconds | of SFT |\n| --- | --- | --- |")
    for name, value in steps.items():
        print(f"| {name} | {value:.2f} | {value / steps['SFT']:.2f} |")


if __name__ == "__main__":
    main()
