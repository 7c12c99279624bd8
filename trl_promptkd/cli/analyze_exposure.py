"""`trl-promptkd analyze exposure`."""

import argparse
import os
from typing import Any

import pandas
from torch import Tensor

from ..analysis.exposure import READ_AT, exposure_bias, prefix_kl, sample_prefixes
from ..analysis.plot_style import check_matplotlib
from ..analysis.plots import plot_exposure
from ..analysis.saved_prompt import check_fits, find_prompts
from ..models.tokenizer import shared_vocab_size
from . import common
from .common import number, print_table


_COLUMNS = 5  # that fit on a screen beside each other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    told = "the students: Hub ids or folders, such as checkpoints"
    parser.add_argument("--model", required=True, nargs="+", help=told)
    common.add_flags(parser, "dataset", required=True)
    parser.add_argument("--prompt", help="folder of a soft prompt (teacher_prompt). Adds the prompted teacher")
    common.add_analysis_arguments(parser, rows=64)
    common.add_sampling_arguments(parser, output_dir="exposure", max_new_tokens=50)
    parser.set_defaults(run=common.reporting(run_exposure))


def run_exposure(args: argparse.Namespace) -> Any:
    check_matplotlib()
    names = common.short_names(args.model, "`--model`")
    found = measure(args)
    about = {key: getattr(args, key) for key in ("teacher", "prompt", "dataset", "rows", "max_new_tokens", "seed")}
    curves = [
        {"student": student, "teacher": teacher, "positions": positions.reset_index(drop=True).to_dict("records")}
        for (student, teacher), positions in found.items()
    ]
    result = {**about, "curves": curves}
    common.save(args, "exposure.json", result)
    table = pandas.concat(found, names=["student", "teacher"])
    common.save(args, "exposure.csv", table.to_csv(lineterminator="\n"))
    shown = {(names[student], teacher): positions for (student, teacher), positions in found.items()}
    plot_exposure(shown, common.plot_path(args, "exposure"))
    return result, lambda: show(shown, args.output_dir), 0


def measure(args: argparse.Namespace) -> dict[tuple[str, str], pandas.DataFrame]:
    """Measure exposure bias by student and teacher (plain, prompted)."""
    prompt = None if args.prompt is None else find_prompts(args.prompt)[-1]
    loaded = {args.teacher: args.teacher_init_kwargs, **dict.fromkeys(args.model, args.model_init_kwargs)}
    tokenizer = common.shared_tokenizer("--teacher", loaded, args.trust_remote_code)
    # Rows of like length are padded together
    prompts = sorted((row["prompt_ids"] for row in common.tokenized_rows(args, tokenizer)), key=len, reverse=True)
    longest, virtual = len(prompts[0]) + args.max_new_tokens, 0 if prompt is None else len(prompt.embeddings)
    teacher = common.load_model(args.teacher, args.teacher_init_kwargs, args.trust_remote_code, virtual + longest)
    soft_prompts: dict[str, Tensor | None] = {"plain": None}
    if prompt is not None:
        check_fits(prompt, teacher)
        soft_prompts["prompted"] = prompt.embeddings
    sampling = common.sampling_of(args, teacher, tokenizer)
    pad, ids = sampling.pad_token_id, shared_vocab_size(teacher, teacher, tokenizer)
    of_teacher = {
        name: sample_prefixes(teacher, prompts, sampling, args.seed, args.batch_size, ids, soft_prompt)
        for name, soft_prompt in soft_prompts.items()
    }
    results: dict[tuple[str, str], pandas.DataFrame] = {}
    for path in args.model:
        student = common.load_model(path, args.model_init_kwargs, args.trust_remote_code, longest)
        ids = shared_vocab_size(student, teacher, tokenizer)
        of_student = sample_prefixes(student, prompts, sampling, args.seed, args.batch_size, ids)
        for name, soft_prompt in soft_prompts.items():
            how = (pad, args.batch_size, ids, soft_prompt)
            on_student = prefix_kl(student, teacher, prompts, of_student, *how)
            on_teacher = prefix_kl(student, teacher, prompts, of_teacher[name], *how)
            results[path, name] = exposure_bias(on_student, on_teacher, seed=args.seed)
        del student  # before the next one is loaded
    return results


def show(results: dict[tuple[str, str], pandas.DataFrame], output_dir: str) -> None:
    pairs = {f"{student}, {teacher} teacher": result for (student, teacher), result in results.items()}
    if len(pairs) <= _COLUMNS:
        positions = (1, *range(5, max(map(len, pairs.values())) + 1, 5))
        lines = [[position, *(_cell(result, position) for result in pairs.values())] for position in positions]
        print_table("ExAccErr(l) in percent, with its 95 % interval over rows", ["l", *pairs], lines)
    lines = []
    for name, result in pairs.items():
        position = min(READ_AT, len(result))
        at = result.loc[position]
        rows = f"{at.rows_on_student:.0f}, {at.rows_on_teacher:.0f}"
        lines.append([name, position, at.regret, at.expected, _cell(result, position), rows])
    columns = ["", "l", "R(l), nats", "eps(l), nats", "ExAccErr(l), %", "rows with l: student's, teacher's"]
    print_table(f"Read at l = {READ_AT}, or the last position before it", columns, lines)
    print(f"All positions: {os.path.join(output_dir, 'exposure.csv')} and .json; plot beside them.")


def _cell(result: pandas.DataFrame, position: int) -> str:
    if position not in result.index:
        return ""
    error, low, high = (number(value, 1) for value in result.loc[position, ["ex_acc_err", "low", "high"]])
    return f"{error} ({low} to {high})" if result.low[position] == result.low[position] else error
