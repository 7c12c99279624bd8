"""`trl-promptkd analyze attention`."""

import argparse
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..analysis.attention import MEASURES, QUERIES, AttentionReport, head_matrices, measure_attention
from ..analysis.attention_plots import plot_heads, plot_measures
from ..analysis.figures import check_matplotlib
from ..analysis.saved_prompt import check_fits, find_prompts
from ..files import write_text
from ..models.limits import check_positions
from ..models.tokenizer import check_same_tokenizer, shared_vocab_size
from .analyze_common import at_least_one, number, tokenized_rows
from .common import (
    add_row_arguments,
    json_dict,
    json_text,
    load_model,
    load_tokenizer,
    needed_tokenizer,
    print_table,
    short_names,
)


_ANSWERS_NEEDED = "The attention of answers is measured; for that of prompts too pass `--queries all`."


def add_attention(commands: Any) -> None:
    attention = commands.add_parser(
        "attention", help="where several models look, layer by layer, and the heads in which they differ most"
    )
    attention.add_argument(
        "--models", required=True, nargs="+", help="the students: Hub ids or folders, also of adapters"
    )
    attention.add_argument("--teacher", help="Hub id or folder")
    attention.add_argument(
        "--prompt",
        help="folder of the teacher's soft prompt (teacher_prompt/), or of its run: adds the prompted teacher",
    )
    attention.add_argument("--dataset", required=True, help="Hub id, or a .json, .jsonl, .csv or .parquet file")
    add_row_arguments(attention)
    attention.add_argument("--output_dir", required=True, help="folder for attention.json and the plots")
    attention.add_argument("--rows", type=at_least_one, default=16, help="how many rows to look at")
    attention.add_argument(
        "--queries",
        default="completion",
        choices=QUERIES,
        help="whose attention counts: of the answer's tokens or of all",
    )
    attention.add_argument(
        "--max_length", type=at_least_one, default=512, help="longest row; memory grows with its square"
    )
    attention.add_argument("--batch_size", type=at_least_one, default=4, help="rows at once")
    attention.add_argument("--heads", type=at_least_one, default=4, help="how many heads to draw, on the first row")
    attention.add_argument(
        "--model_init_kwargs", type=json_dict, default={}, help="JSON for from_pretrained, of all models"
    )
    attention.add_argument("--trust_remote_code", action="store_true")
    attention.add_argument("--json", action="store_true", help="print JSON instead of a table")
    attention.set_defaults(run=run_attention)


def run_attention(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # standard output is for the result alone
        _check_arguments(args)
        check_matplotlib()
        tokenizer = _shared_tokenizer(args)
        rows = tokenized_rows(args, tokenizer, _ANSWERS_NEEDED if args.queries == "completion" else None)
        models, prompts = _load(args, tokenizer, max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows))
        report = measure_attention(models, rows, prompts, args.queries, args.batch_size)
        result = {"dataset": args.dataset, "queries": args.queries, **asdict(report)}
        os.makedirs(args.output_dir, exist_ok=True)
        write_text(os.path.join(args.output_dir, "attention.json"), json_text(result))
        plot_measures(report, os.path.join(args.output_dir, "attention_measures.png"))
        shown = report.heads[: args.heads]
        if shown:
            matrices = head_matrices(models, rows[0], shown, prompts, args.queries)
            ids = rows[0]["prompt_ids"] + rows[0]["completion_ids"]
            tokens = [repr(tokenizer.decode([token]))[1:-1] for token in ids]
            plot_heads(matrices, shown, tokens, os.path.join(args.output_dir, "attention_heads.png"))
    if args.json:
        print(json_text(result))
    else:
        _print_tables(report, args)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.teacher is None:
        raise ValueError(f"`--prompt` is {args.prompt!r}, but whose prompt it is is not said. Pass `--teacher`, too.")
    _labels(args)


def _folders(args: argparse.Namespace) -> list[str]:
    return [*args.models, *([] if args.teacher is None else [args.teacher])]


def _labels(args: argparse.Namespace) -> dict[str, str]:
    return short_names(_folders(args), "`--models` and `--teacher`")


def _shared_tokenizer(args: argparse.Namespace) -> Any:
    """The first model's, after a look at the others': their attention is compared token by token."""
    tokenizer = needed_tokenizer("--models", args.models[0], args.model_init_kwargs, args.trust_remote_code)
    for name in _folders(args)[1:]:
        other = load_tokenizer(name, args.model_init_kwargs, args.trust_remote_code)
        if other is None:
            print(f"There is no tokenizer beside {name}; it is asked with that of {args.models[0]}.")
            continue
        try:
            check_same_tokenizer(tokenizer, other)
        except ValueError as error:
            raise ValueError(f"{args.models[0]!r} and {name!r} cannot be compared. {error}") from error
    return tokenizer


def _load(args: argparse.Namespace, tokenizer: Any, longest_row: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The models by their labels, and the soft prompt by the prompted teacher's."""
    labels = _labels(args)
    prompt = None if args.prompt is None else find_prompts(args.prompt)[-1]
    models: dict[str, Any] = {}
    for name, label in labels.items():
        models[label] = load_model(name, args.model_init_kwargs, args.trust_remote_code)
        shared_vocab_size(next(iter(models.values())), models[label], tokenizer)
        virtual = 0 if prompt is None or name != args.teacher else len(prompt.embeddings)
        check_positions(f"model {name!r}", models[label], virtual + longest_row, "Lower `--max_length`.")
    if prompt is None:
        return models, {}
    label = labels[args.teacher]
    teacher, prompted = models[label], f"{label}, prompted"
    check_fits(prompt, teacher)
    return {**models, prompted: teacher}, {prompted: prompt.embeddings.to(teacher.device)}


def _print_tables(report: AttentionReport, args: argparse.Namespace) -> None:
    lines = []
    for name, measures in report.measures.items():
        means = [_mean(measures[measure]) for measure in MEASURES]
        share = report.soft_prompt_share.get(name)
        lines.append([name, len(measures["entropy"]), *means, "" if share is None else _mean(share)])
    print_table(
        f"Attention of {report.num_queries} tokens in {report.num_rows} rows of {args.dataset}, means over layers",
        [
            "model",
            "layers",
            "entropy (nats)",
            "self focus",
            "sparsity (share > 0.1)",
            "likeness to layer before",
            "to soft prompt",
        ],
        lines,
    )
    if report.heads:
        print_table(
            "Heads in which the models differ most",
            ["layer", "head", "variance of a weight"],
            [
                [" / ".join(map(str, sorted(set(head.layers.values())))), head.head, f"{head.variance:.2e}"]
                for head in report.heads[: args.heads]
            ],
        )
    print(f"Numbers and plots: {args.output_dir}")


def _mean(values: Any) -> str:
    known = [value for value in values if value is not None]
    return number(sum(known) / len(known), 3) if known else ""
