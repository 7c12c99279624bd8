"""How the seconds of a step grow with answers, vocabulary, virtual tokens, rows and accumulation.

Models have random weights (hidden size 256, 8 layers teach 4). One quantity is varied at a time. The others stay at 64
new tokens, 32,768 entries, 7 virtual tokens, 4 rows and accumulation 1.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from .common import measured_with, median, random_models, slope, steps_in_turn
from .step_time import make_trainer
from .study.page_text import table


PAGE = "benchmarks.md"
METHODS = ("PromptKD", "GKDTrainer")
BASE = {"max_new_tokens": 64, "vocab_size": 32_768, "num_virtual_tokens": 7, "batch_size": 4, "accumulation": 1}
# Its values, and the slope that the method leads to; between two numbers if other parts of a step stay the same
SWEEPS = {
    "max_new_tokens": ([32, 64, 128], "about 1"),
    "vocab_size": ([8_192, 32_768, 131_072], "0 to 1"),
    "num_virtual_tokens": ([1, 7, 28], "0 to 1"),
    "batch_size": ([2, 4, 8], "up to 1"),
    "accumulation": ([1, 2, 4], "up to 1"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, help="steps of each, after one that is not counted")
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS, help="what to vary")
    parser.add_argument("--hidden_size", type=int, default=256, help="hidden size of both models")
    parser.add_argument("--divide", type=int, default=1, help="divide answers and vocabulary by this, for a trial")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    words = [" ".join(f"t{4 + (7 * row + i) % 90}" for i in range(32)) for row in range(64)]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in words])
    seconds: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in args.sweeps:
        with tempfile.TemporaryDirectory() as folder:
            points = [{**BASE, name: value} for value in SWEEPS[name][0]]
            for point in points:
                for key in ("max_new_tokens", "vocab_size"):
                    point[key] //= args.divide
            models = {point["vocab_size"]: random_models(point["vocab_size"], args.hidden_size) for point in points}
            trainers = {}
            for point in points:
                sizes = {key: value for key, value in point.items() if key != "vocab_size"}
                for method in METHODS:
                    parts = (method, models[point["vocab_size"]], rows, Path(folder))
                    trainers[name, str(point[name]), method] = partial(make_trainer, *parts, **sizes)
            _, found = steps_in_turn(trainers, args.repeats)
        seconds[name] = {method: {} for method in METHODS}
        for (_, value, method), steps in found.items():
            seconds[name][method][value] = [round(sum(step.values()), 4) for step in steps]
    return {"seconds": seconds}


def medians(values: dict[str, list[float]]) -> dict[float, float]:
    return {int(value): median(seconds) for value, seconds in values.items()}


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = []
    for name, methods in result["seconds"].items():
        row = [f"`{name}`", ", ".join(f"{int(value):,}" for value in methods["PromptKD"])]
        for values in map(medians, methods.values()):
            row += [", ".join(f"{seconds:.2f}" for seconds in values.values()), f"{slope(values):.2f}"]
        rows.append([*row, SWEEPS[name][1]])
    header = ["varied", "values", *(text for m in METHODS for text in (f"{m}: seconds", "slope")), "expected slope"]
    return {"slopes": f"{table(header, rows)}\n\n{measured_with(result)}"}
