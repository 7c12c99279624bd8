"""`trl-promptkd eval instruct | gsm8k`."""

import argparse
import importlib.util
from typing import Any

import torch

from ..evaluation import PAPER_SEEDS, TEMPLATES, check_evaluation_settings, evaluate_model, evaluation_rows
from .common import FILE_SPLIT, add_flags, load_model, load_rows, needed_tokenizer, print_table, reporting, short_names


# Flags that are settings of `evaluate_model` under the same names
_SETTINGS = ("temperature", "top_p", "top_k", "max_new_tokens", "batch_size", "max_prompt_length")
_TASKS = {
    "instruct": "ROUGE-L and exact match of sampled answers, mean and deviation over seeds, as in the PromptKD paper",
    "gsm8k": "accuracy of final numbers, by the rules of lm-evaluation-harness and of the priming paper",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, told in _TASKS.items():
        command = tasks.add_parser(task, help=told)
        add = command.add_argument
        add("--model", required=True, help="Hub id or folder, also of a PEFT adapter")
        told = "Hub id, file or folder of rows. Give the flag several times for a table of sets"
        add_flags(command, "dataset", required=True, action="append", help=told)
        add_flags(command, "dataset_split", default=None, help="split, such as test[:100]. Required for a Hub id")
        add_flags(command, "dataset_config", "prompt_column", "completion_column")
        told = "question template. By default the tokenizer's chat template, or `paper` (instruct) or `plain` (gsm8k)"
        add("--template", choices=TEMPLATES, help=told)
        add("--rows", type=int, help="use only the first rows of each set")
        add("--max_prompt_length", type=int, help="omit and count rows with longer prompts")
        add("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
        add("--temperature", type=float, default=1.0, help="temperature of samples")
        add("--top_p", type=float, default=1.0, help="nucleus (top-p) of samples")
        add("--top_k", type=int, default=0, help="top-k of samples, 0 for all tokens")
        add("--batch_size", type=int, default=8, help="rows per batch. Answers do not depend on it")
        add_flags(command, "output_dir", "json", "model_init_kwargs", "trust_remote_code")
        add("--seeds", type=int, nargs="+", help="sample once with each seed. Without them, gsm8k is greedy")
        if task == "instruct":
            add("--greedy", action="store_true", help=f"decode greedily instead of sampling with seeds {PAPER_SEEDS}")
        command.set_defaults(run=reporting(run_eval))


def run_eval(args: argparse.Namespace) -> Any:
    names = short_names(args.dataset, "`--dataset`")
    datasets = {name: _load_set(args, path) for path, name in names.items()}
    tokenizer = needed_tokenizer("--model", args.model, args.model_init_kwargs, args.trust_remote_code)
    settings = {name: getattr(args, name) for name in _SETTINGS} | {"seeds": _seeds(args), "num_rows": args.rows}
    template = check_evaluation_settings(args.task, args.template, tokenizer, **settings)
    rows = {
        name: evaluation_rows(dataset, name, args.task, tokenizer, template, args.rows, args.max_prompt_length)
        for name, dataset in datasets.items()
    }
    dtype = "auto" if torch.cuda.is_available() else "float32"
    model = load_model(args.model, {"dtype": dtype, **args.model_init_kwargs}, args.trust_remote_code)
    result = evaluate_model(model, tokenizer, rows, args.task, template, **settings, output_dir=args.output_dir)
    for path, name in names.items():
        about = {"source": path, "config": args.dataset_config, "split": args.dataset_split or FILE_SPLIT}
        result["sets"][name] = {**about, **result["sets"][name]}
    if args.task == "gsm8k" and importlib.util.find_spec("lm_eval") is not None:
        print(
            "For the figure of the standard harness beside it: "
            f"lm_eval --model hf --model_args pretrained={args.model} --tasks gsm8k"
        )
    result = {"model": args.model, **result}
    return result, lambda: _print_tables(result), 0


def _seeds(args: argparse.Namespace) -> list[int] | None:
    if args.task == "gsm8k":
        return args.seeds
    if args.greedy and args.seeds is not None:
        raise ValueError(
            f"`--greedy` and `--seeds` {args.seeds} are both given, but greedy answers have no seeds. Omit one of "
            "them."
        )
    return None if args.greedy else args.seeds or list(PAPER_SEEDS)


def _load_set(args: argparse.Namespace, dataset: str) -> Any:
    """The rows of one `--dataset`. Columns that flags name replace all others with the same meaning."""
    rows = load_rows(dataset, args.dataset_config, args.dataset_split)
    given = (
        ("completion_column", args.completion_column, "references", ()),
        ("prompt_column", args.prompt_column, "prompt", ("instruction", "question", "messages")),
    )
    for flag, column, name, others in given:
        if column is None:
            continue
        if column not in rows.column_names:
            raise ValueError(
                f"`--{flag}` is {column!r}; the columns are {sorted(rows.column_names)}. Name one of them."
            )
        rows = rows.remove_columns(
            [other for other in (name, *others) if other in rows.column_names and other != column]
        )
        rows = rows if column == name else rows.rename_column(column, name)
    return rows


def _print_tables(result: dict[str, Any]) -> None:
    settings = result["settings"]
    how = "greedy" if settings["seeds"] is None else f"sampled, seeds {' '.join(map(str, settings['seeds']))}"
    title = f"{result['model']}: {result['task']}, template {result['template']}, {how}"
    title += f", at most {settings['max_new_tokens']} tokens"
    sets = result["sets"]
    metrics = list(next(iter(sets.values()))["mean"])
    lines: list[list[Any]] = []
    for name, values in sets.items():
        scores = [_score(values["mean"][metric], values["std"][metric]) for metric in metrics]
        lines.append([name, values["rows"], values["left_out"], *scores, f"{100 * values['terminated_share']:.1f}"])
    if len(sets) > 1:
        means = [sum(values["mean"][metric] for values in sets.values()) / len(sets) for metric in metrics]
        lines.append(["mean of sets", "", "", *(_score(mean, None) for mean in means), ""])
    print_table(title, ["set", "rows", "left out", *(f"{metric}, %" for metric in metrics), "ended, %"], lines)
    if settings["seeds"] is not None and len(settings["seeds"]) > 1:
        print("Mean and standard deviation over seeds.")
    print("ended: answers that ended by themselves; the others were cut.")
    for name, values in sets.items():
        part = "" if values["config"] is None else f", configuration {values['config']}"
        print(f"{name}: {values['source']}{part}, split {values['split']}, data {values['data_hash']}")
    if result["task"] == "gsm8k":
        print(
            "strict, flexible: the number as lm-evaluation-harness's task gsm8k reads it. "
            "paper: as the response priming paper does."
        )


def _score(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"
