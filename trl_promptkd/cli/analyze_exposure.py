"""`trl-promptkd analyze exposure`."""

import argparse
import csv
import io
import os
import sys
from contextlib import redirect_stdout
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..analysis.exposure import READ_AT, ExposureBias, exposure_bias, plot_exposure, prefix_kl, sample_prefixes
from ..analysis.figures import check_matplotlib
from ..analysis.saved_prompt import check_fits, find_prompts
from ..files import write_text
from .analyze_common import (
    add_analysis_arguments,
    check_room,
    compared_ids,
    number,
    sampling_of,
    tokenized_rows,
    tokenizer_of,
)
from .common import json_text, load_model, print_table, short_names, without_nan


_COLUMNS = 5  # that fit on a screen beside each other


def add_exposure(commands: Any) -> None:
    exposure = commands.add_parser(
        "exposure",
        help="how much faster a student's errors add up on its own prefixes than on its teacher's (ExAccErr)",
    )
    exposure.add_argument("--student", required=True, nargs="+", help="Hub ids or folders, such as checkpoints")
    exposure.add_argument("--dataset", required=True, help="Hub id, or a .json, .jsonl, .csv or .parquet file")
    exposure.add_argument("--prompt", help="a soft prompt's folder (teacher_prompt): the prompted teacher as well")
    add_analysis_arguments(exposure, output_dir="exposure", rows=64, max_new_tokens=50)
    exposure.set_defaults(run=run_exposure)


def run_exposure(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # standard output is for the results alone
        check_matplotlib()
        names = short_names(args.student, "`--student`")
        results = measure(args)
        os.makedirs(args.output_dir, exist_ok=True)
        shown = {(names[student], teacher): result for (student, teacher), result in results.items()}
        plot_exposure(shown, os.path.join(args.output_dir, "exposure.png"))
    about = {key: getattr(args, key) for key in ("teacher", "prompt", "dataset", "rows", "max_new_tokens", "seed")}
    curves = [
        {
            "student": student,
            "teacher": teacher,
            "positions": [result.at(position) for position in range(1, len(result) + 1)],
        }
        for (student, teacher), result in results.items()
    ]
    text = json_text({**about, "curves": curves})
    write_text(os.path.join(args.output_dir, "exposure.json"), text)
    write_text(os.path.join(args.output_dir, "exposure.csv"), table_of(results))
    if args.json:
        print(text)
    else:
        show(shown)
        print(
            f"All positions: {os.path.join(args.output_dir, 'exposure.csv')} and .json; plot: exposure.png beside them."
        )
    return 0


def measure(args: argparse.Namespace) -> dict[tuple[str, str], ExposureBias]:
    """By student and teacher (plain, prompted)."""
    names = short_names(args.student, "`--student`")
    prompt = None if args.prompt is None else find_prompts(args.prompt)[-1]
    tokenizer = tokenizer_of(args, args.student)
    rows = tokenized_rows(args, tokenizer)
    rows = sorted(rows, key=lambda row: -len(row["prompt_ids"]))  # rows are padded to their likes
    rows = [{"prompt_ids": row["prompt_ids"], "completion_ids": []} for row in rows]
    prompt_ids = [row["prompt_ids"] for row in rows]

    teacher = load_model(args.teacher, args.teacher_init_kwargs, args.trust_remote_code).eval()
    soft_prompts: dict[str, Tensor | None] = {"plain": None}
    if prompt is not None:
        check_fits(prompt, teacher)
        soft_prompts["prompted"] = prompt.embeddings
    check_room("teacher", teacher, rows, args.max_new_tokens, 0 if prompt is None else len(prompt.embeddings))
    sampling = sampling_of(args, teacher, tokenizer)
    settings: dict[str, Any] = {"seed": args.seed, "batch_size": args.batch_size}
    asked: dict[str, Any] = {"pad_token_id": sampling.pad_token_id, "batch_size": args.batch_size}
    passes = len(soft_prompts) + len(args.student) * (1 + 2 * len(soft_prompts))
    results: dict[tuple[str, str], ExposureBias] = {}
    with tqdm(total=passes * len(rows), unit="row") as bar:
        of_teacher = {}
        for name, soft_prompt in soft_prompts.items():
            bar.set_description(f"{name} teacher: samples")
            ids = compared_ids(tokenizer, teacher, None)
            of_teacher[name] = sample_prefixes(
                teacher, prompt_ids, sampling, **settings, vocab_size=ids, soft_prompt=soft_prompt, bar=bar
            )
        for path in args.student:
            student = load_model(path, args.student_init_kwargs, args.trust_remote_code).eval()
            check_room("student", student, rows, args.max_new_tokens)
            ids = compared_ids(tokenizer, teacher, student)
            bar.set_description(f"{names[path]}: samples")
            of_student = sample_prefixes(student, prompt_ids, sampling, **settings, vocab_size=ids, bar=bar)
            for name, soft_prompt in soft_prompts.items():
                bar.set_description(f"{names[path]}: {name} teacher")
                asked["soft_prompt"] = soft_prompt
                on_student, on_teacher = (
                    prefix_kl(student, teacher, prompt_ids, texts, vocab_size=ids, bar=bar, **asked)
                    for texts in (of_student, of_teacher[name])
                )
                results[path, name] = exposure_bias(on_student, on_teacher, seed=args.seed)
            del student  # before the next one is loaded
    return results


def table_of(results: dict[tuple[str, str], ExposureBias]) -> str:
    """A CSV file of all positions; what is not defined is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = list(vars(next(iter(results.values()))))
    writer.writerow(["student", "teacher", "position", *columns])
    for (student, teacher), result in results.items():
        for position in range(1, len(result) + 1):
            values = without_nan(result.at(position)).values()
            writer.writerow([student, teacher, position, *("" if value is None else value for value in values)])
    return out.getvalue()


def show(results: dict[tuple[str, str], ExposureBias]) -> None:
    pairs = {f"{student}, {teacher} teacher": result for (student, teacher), result in results.items()}
    if len(pairs) <= _COLUMNS:
        longest = max(map(len, pairs.values()))
        lines = [
            [position, *(_cell(result, position) for result in pairs.values())]
            for position in (1, *range(5, longest + 1, 5))
        ]
        print_table("ExAccErr(l) in percent, with its 95 % interval over rows", ["l", *pairs], lines)
    lines = []
    for name, result in pairs.items():
        position = min(READ_AT, len(result))
        at = result.at(position)
        rows = f"{at['rows_on_student']}, {at['rows_on_teacher']}"
        lines.append(
            [name, position, number(at["regret"], 3), number(at["expected"], 3), _cell(result, position), rows]
        )
    columns = ["", "l", "R(l), nats", "eps(l), nats", "ExAccErr(l), %", "rows with l: student's, teacher's"]
    print_table(f"Read at l = {READ_AT}, or the last position before it", columns, lines)


def _cell(result: ExposureBias, position: int) -> str:
    if position > len(result):
        return ""
    at = result.at(position)
    error, low, high = (number(at[name], 1) for name in ("ex_acc_err", "low", "high"))
    return f"{error} ({low} to {high})" if at["low"] == at["low"] else error
