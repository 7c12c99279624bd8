"""How a PromptKD step and a GKD step grow with answers, vocabulary, virtual tokens and accumulation.

    python benchmarks/scaling.py --output_dir scaling_benchmark

Models with random weights (hidden size 256, 8 layers teach 4); one quantity is varied at a time, the others stay at 64
new tokens, a vocabulary of 32,768, 7 virtual tokens and 4 micro-batches of 4 rows. Runs are interleaved, and medians
are given. Ends with a table, a chart and `results.json`.
"""

import argparse
import json
import os
import statistics
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")

import matplotlib
import torch
from common import random_models
from datasets import Dataset
from step_time import timed_run


METHODS = ("GKD", "PromptKD", "PromptKD, simultaneous")
BASE = {"max_new_tokens": 64, "vocab_size": 32_768, "num_virtual_tokens": 7, "accumulation": 4}
SWEEPS = {
    "max_new_tokens": [32, 64, 128, 256],
    "vocab_size": [8_192, 32_768, 131_072],
    "num_virtual_tokens": [1, 7, 50],
    "accumulation": [1, 2, 4, 8],
}


def measure(point: dict[str, int], args) -> dict[str, float]:
    models = random_models(point["vocab_size"])
    words = [" ".join(f"t{4 + (7 * row + i) % 900}" for i in range(32)) for row in range(64)]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in words])
    run = argparse.Namespace(**vars(args), **{key: value for key, value in point.items() if key != "accumulation"})
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(args.repeats):
        for method in METHODS:
            seconds[method] += timed_run(method, models, rows, run, point["accumulation"], Path(args.output_dir))[0]
    return {method: statistics.median(values) for method, values in seconds.items()}


def chart(results: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3.6 * len(results), 3.4))
    for axis, (name, values) in zip(axes, results.items(), strict=True):
        for method, style in zip(METHODS, ("--", "-", ":"), strict=True):
            color = "#c0392b" if "PromptKD" in method else "#7f8c8d"
            axis.plot(
                list(values), [value[method] for value in values.values()], f"o{style}", color=color, label=method
            )
        axis.set(xlabel=name, xscale="log", ylim=(0, None))
        axis.set_xticks(list(values), [str(value) for value in values])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds an optimizer step")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=4, help="rows at once")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a run, after one that is not timed")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind; medians are given")
    parser.add_argument("--output_dir", default="scaling_benchmark", help="for the table, results.json and the chart")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name, values in SWEEPS.items():
        results[name] = {}
        for value in values:
            measured = results[name][value] = measure({**BASE, name: value}, args)
            print(name, value, {method: round(seconds, 2) for method, seconds in measured.items()}, flush=True)
    (folder / "results.json").write_text(json.dumps({"settings": vars(args), "seconds": results}, indent=1))
    chart(results, folder / "scaling.png")
    for name, values in results.items():
        print(f"\n| {name} | {' | '.join(METHODS)} | PromptKD of GKD |\n| --- |{' --- |' * (len(METHODS) + 1)}")
        for value, measured in values.items():
            shown = " | ".join(f"{seconds:.2f} s" for seconds in measured.values())
            print(f"| {value} | {shown} | {measured['PromptKD'] / measured['GKD']:.2f} |")


if __name__ == "__main__":
    main()
