"""`trl-promptkd rank-priming`."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
import yaml

from ..data.priming import PRIMING_TEMPLATES, PrimingTemplate, resolve_priming
from ..data.rows import shortened
from ..evaluation import SCORERS, TEMPLATES, Scorer, primed_rows, rank_priming
from ..files import read_text
from .common import add_flags, load_model, load_rows, needed_tokenizer, print_table, reporting, save


# Flags that are settings of `rank_priming` under the same names
_SETTINGS = ("samples", "seed", "temperature", "max_new_tokens", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="the teacher: Hub id or folder")
    add_flags(parser, "dataset", required=True)
    add_flags(parser, "dataset_config", "dataset_split", "prompt_column", "completion_column", "conversational")
    add("--texts", help="a file of texts: a YAML list (.yaml), JSON lines (.jsonl), or one text per line")
    add("--priming", action="append", default=[], help="name of a built-in text. May be given several times")
    add("--priming_placement", default="prefix", help="placement of the file's texts that have none (%(default)s)")
    told = f"{', '.join(SCORERS)}, or package.module:function of an answer and its row. By default gsm8k if all right "
    told += "answers end in the style of `#### 18`, else rougeL"
    add("--scorer", help=told)
    add("--template", choices=TEMPLATES, help="question template. By default the tokenizer's chat template, if any")
    add("--rows", type=int, default=100, help="use only the first rows (%(default)s)")
    add("--max_prompt_length", type=int, help="omit and count rows with longer prompts")
    add("--samples", type=int, default=1, help="answers to each row (%(default)s)")
    add("--seed", type=int, default=10, help="seed of the first sample. The others have the next ones (%(default)s)")
    add("--max_new_tokens", type=int, default=256, help="longest answer in tokens (%(default)s)")
    add("--temperature", type=float, default=1.0, help="temperature of samples (%(default)s)")
    add("--batch_size", type=int, default=8, help="rows per batch. Answers do not depend on it (%(default)s)")
    add_flags(parser, "json", "model_init_kwargs", "trust_remote_code")
    add_flags(parser, "output_dir", help="folder that keeps the answers. A run that starts again resumes")
    parser.set_defaults(run=reporting(run_rank_priming))


def run_rank_priming(args: argparse.Namespace) -> Any:
    texts: list[Any] = [resolve_priming(name) for name in args.priming]
    texts += [] if args.texts is None else read_texts(args.texts, args.priming_placement)
    scorer = args.scorer if args.scorer is None or args.scorer in SCORERS else imported(args.scorer)
    columns = (args.prompt_column, args.completion_column, args.conversational)
    dataset = load_rows(args.dataset, args.dataset_config, args.dataset_split, *columns)
    tokenizer = needed_tokenizer("--model", args.model, args.model_init_kwargs, args.trust_remote_code)
    settings = {name: getattr(args, name) for name in _SETTINGS}
    about = (texts or None, scorer, args.template, args.rows, args.max_prompt_length)
    rows = primed_rows(tokenizer, dataset, *about, **settings)
    if scorer is None:
        ours = {"gsm8k": "final numbers, as all", "rougeL": "ROUGE-L, as not all"}[str(rows.scorer)]
        print(f"The score is {ours} right answers end with `#### 18`. `--scorer` takes another one.")
    dtype = "auto" if torch.cuda.is_available() else "float32"
    model = load_model(args.model, {"dtype": dtype, **args.model_init_kwargs}, args.trust_remote_code)
    found = rank_priming(model, tokenizer, rows, output_dir=args.output_dir, **settings)
    result = {"model": args.model, "dataset": args.dataset, **found, "verdict": verdict(found)}
    if args.output_dir is not None:
        save(args, "ranking.json", result)
    return result, lambda: show(result), 0


def read_texts(path: str, placement: str) -> list[PrimingTemplate]:
    """The texts of a file. A bare text gets a line break between itself and the question.

    An entry with `text` and perhaps `placement` is used unchanged.
    """
    content = read_text(path, "the priming texts")
    try:
        if path.endswith((".yaml", ".yml")):
            entries = yaml.safe_load(content)
        else:
            lines = [line for line in content.split("\n") if line.strip()]
            entries = [json.loads(line) for line in lines] if path.endswith(".jsonl") else lines
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"`--texts` is {path!r}, which cannot be read: {error}. Correct it.") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"`--texts` is {path!r}, which holds no list of texts. Write a text a line, or a YAML list.")
    return [_template(entry, placement, path) for entry in entries]


def _template(entry: Any, placement: str, path: str) -> PrimingTemplate:
    if isinstance(entry, str):
        before, after = {"prefix": ("", "\n"), "suffix": ("\n", "")}.get(placement, ("", ""))
        return PrimingTemplate(f"{before}{entry.strip()}{after}", placement)
    if not isinstance(entry, Mapping) or not {"text"} <= set(entry) <= {"text", "placement"}:
        raise ValueError(
            f"`--texts` is {path!r}, which holds {shortened(entry)}; a text must be a string, or a mapping with "
            "`text` and perhaps `placement`. Correct it."
        )
    return PrimingTemplate(**{"placement": placement, **entry})


def imported(path: str) -> Scorer:
    """Import a function by its path, `package.module:function`. Modules in the current folder are found, too."""
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        scorer = getattr(import_module(module), name) if name else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`--scorer` is {path!r}, which cannot be imported: {error}. Check its name.") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(scorer):
        raise ValueError(
            f"`--scorer` is {path!r}; it must be {', '.join(map(repr, SCORERS))}, or a function's import path, "
            "package.module:function."
        )
    return scorer


def verdict(result: dict[str, Any]) -> str:
    """Which text to use, and which difference the rows could have shown."""
    rows, smallest = result["rows"], result["smallest_seen"]
    if smallest is None:
        return f"No text changed a score on these {rows} rows. Choose another scorer, or other rows."
    limit = f"With {rows} rows, a difference of {smallest:.3g} would have been seen four times in five."
    best = next((text for text in result["texts"] if text["name"] == result["best"]), None)
    if best is None:
        return f"No text is better than none here. {limit}"
    name = best["name"]
    if name in PRIMING_TEMPLATES:
        use = f"`priming: {name}` in a recipe, or `--priming {name}`."
    else:
        use = f"`priming_text: {json.dumps(best['text'], ensure_ascii=False)}`"
        use += "" if best["placement"] == "prefix" else f" and `priming_placement: {best['placement']}`"
        use += " in a recipe, or the flags of these names."
    if "reference_answer" in best.get("text", ""):
        use += " It shows the teacher the right answer, so its score is also that of an answer copied."
    gain = f"{best['difference'][0]:+.3g} against no text (p = {best['p']:.2g})"
    return f"{name} is best, {gain}. To use it: {use} {limit}"


def show(result: dict[str, Any]) -> None:
    of_ours = result["scorer"] in SCORERS
    settings, digits = result["settings"], 1 if of_ours else 3
    title = f"{result['model']}: {result['scorer']}, template {result['template']}, {result['rows']} rows"
    title += f" ({result['left_out']} left out)" if result["left_out"] else ""
    title += f", {settings['samples']} each at temperature {settings['temperature']}, seed {settings['seed']}"
    lines = []
    for text in result["texts"]:
        score, low, high = (f"{value:.{digits}f}" for value in text["score"])
        gain = "" if text["p"] is None else "{} ({} to {})".format(*(f"{v:+.{digits}f}" for v in text["difference"]))
        p = "" if text["p"] is None else f"{text['p']:.3f}"
        cells = (f"{score} ({low} to {high})", gain, p, f"{text['length']:.0f}", f"{100 * text['cut']:.0f}")
        lines.append([text["name"], *cells])
    columns = [
        "text",
        "score, % (95 %)" if of_ours else "score (95 %)",
        "against no text (95 %)",
        "p",
        "tokens",
        "cut, %",
    ]
    print_table(title, columns, lines)
    print("p: of no difference, after Holm's correction. tokens: mean length. cut: answers cut at --max_new_tokens.")
    print(result["verdict"])
