"""`trl-promptkd analyze prompt`."""

import argparse
import os
from typing import Any

from pandas import DataFrame
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.exposure import sample_prefixes
from ..analysis.plot_style import check_matplotlib
from ..analysis.plots import changes_page, plot_classes, plot_drift, plot_similarity
from ..analysis.prompt import by_class, nearest_tokens, prompt_drift, prompt_effect, similarity
from ..analysis.saved_prompt import SavedPrompt, check_fits, find_prompts, initial_prompt
from ..generation.rollouts import stop_ids
from ..models.tokenizer import shared_vocab_size
from . import common
from .common import at_least_one, load_model, number, print_table


_ANSWERS_NEEDED = (
    "`--responses` is 'dataset', so that the data's own answers are looked at. Set `--responses student` for the "
    "student's samples."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", required=True, help="folder of a soft prompt (teacher_prompt), or of a run with its checkpoints")
    add("--model", help="the student: Hub id or folder. Without it, the teacher is only compared with itself")
    add("--responses", default="dataset", choices=["dataset", "student"], help="source of the answers (%(default)s)")
    add("--nearest", type=at_least_one, default=5, help="tokens to name for each virtual token (5)")
    add("--examples", type=at_least_one, default=30, help="places on the page of examples (30)")
    common.add_flags(parser, "dataset")  # without it, the prompt alone is shown
    common.add_analysis_arguments(parser, rows=32)
    common.add_sampling_arguments(parser, output_dir="prompt_analysis", max_new_tokens=64)
    parser.set_defaults(run=common.reporting(run_prompt))


def run_prompt(args: argparse.Namespace) -> Any:
    check_matplotlib()
    wrong = "`--responses` is 'student', but there is no"
    if args.responses == "student" and args.model is None:
        raise ValueError(f"{wrong} `--model`. Pass one, or set `--responses dataset`.")
    if args.responses == "student" and args.dataset is None:
        raise ValueError(f"{wrong} `--dataset`, whose prompts it answers. Pass one.")
    prompts = find_prompts(args.prompt)
    loaded = {args.teacher: args.teacher_init_kwargs}
    loaded |= {} if args.model is None else {args.model: args.model_init_kwargs}
    tokenizer = common.shared_tokenizer("--teacher", loaded, args.trust_remote_code)
    needed = _ANSWERS_NEEDED if args.responses == "dataset" else None
    rows = [] if args.dataset is None else common.tokenized_rows(args, tokenizer, needed)
    longest = len(prompts[-1].embeddings) + longest_of(rows, args)
    teacher = load_model(args.teacher, args.teacher_init_kwargs, args.trust_remote_code, longest)
    check_fits(prompts[-1], teacher)
    names = ("prompt", "teacher", "dataset", "responses", "rows", "seed")
    result = {"student": args.model, **{name: getattr(args, name) for name in names}}
    result |= look_at(prompts, teacher, tokenizer, args)
    summary = None
    if rows:
        tokens, changes = compare(prompts[-1].embeddings, teacher, tokenizer, rows, args)
        classes, changed = by_class(tokens), int(tokens.changed.sum())
        whose = "the data's answers" if args.responses == "dataset" else "the student's samples"
        summary = (
            f"After the soft prompt, the teacher's likeliest next token is another one at {changed:,} of "
            f"{len(tokens):,} tokens ({100 * changed / len(tokens):.1f} %) of {whose}."
        )
        plot_classes(classes, common.plot_path(args, "kl_by_class"))
        title = "Where the soft prompt changed the teacher's next token"
        common.save(args, "changes.html", changes_page(changes, title, summary))
        result |= {"classes": classes.to_dict("index"), "changed": {"tokens": changed, "of": len(tokens)}}
        result["changes"] = changes.to_dict("records")
    common.save(args, "prompt.json", result)
    return result, lambda: show(result, summary, args.output_dir), 0


def look_at(
    prompts: list[SavedPrompt], teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> dict[str, Any]:
    """Results on the prompt that need no text, and their plots."""
    os.makedirs(args.output_dir, exist_ok=True)
    last = prompts[-1].embeddings
    plot_similarity(similarity(last), common.plot_path(args, "similarity"))
    initial, known_by = initial_prompt(prompts, teacher, tokenizer)
    drifts = []
    if initial is not None:
        drifts = [{"name": p.name, "step": p.step, **prompt_drift(p.embeddings, initial)} for p in prompts]
    if len(drifts) > 1:
        start = drifts[0]["step"] or 0 if initial is prompts[0].embeddings else 0
        plot_drift(drifts, common.plot_path(args, "drift"), start)
    nearest = nearest_tokens(last, teacher, shared_vocab_size(teacher, teacher, tokenizer), args.nearest)
    for token in (token for of_token in nearest for tokens in of_token.values() for token in tokens):
        token["token"] = tokenizer.decode([token["id"]])
    return {
        "looked_at": prompts[-1].folder,
        "nearest": nearest,
        "similarity": similarity(last).tolist(),
        "drift_from": known_by,
        "drift": drifts,
    }


def longest_of(rows: list[dict[str, list[int]]], args: argparse.Namespace) -> int:
    """Length of the longest row in tokens, without a soft prompt."""
    sampled = args.max_new_tokens if args.responses == "student" else None
    lengths = (len(row["prompt_ids"]) + (sampled or len(row["completion_ids"])) for row in rows)
    return max(lengths, default=0)


def compare(
    soft_prompt: Tensor,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    args: argparse.Namespace,
) -> tuple[DataFrame, DataFrame]:
    student, sampled = None, 0
    if args.responses == "student":
        rows, sampled = [{**row, "completion_ids": []} for row in rows], args.max_new_tokens
    if args.model is not None:
        kwargs = args.model_init_kwargs
        student = load_model(args.model, kwargs, args.trust_remote_code, longest_of(rows, args))
    size, texts = shared_vocab_size(student or teacher, teacher, tokenizer), [row["prompt_ids"] for row in rows]
    sampling = common.sampling_of(args, teacher, tokenizer)
    completions = [row["completion_ids"] for row in rows]
    if sampled:
        completions = sample_prefixes(student, texts, sampling, args.seed, args.batch_size, size)
    how = (tokenizer, stop_ids(sampling), args.batch_size, size, args.examples)
    return prompt_effect(teacher, soft_prompt, student, texts, completions, *how)


def show(found: dict[str, Any], summary: str | None, output_dir: str) -> None:
    lines = []
    for index, of_token in enumerate(found["nearest"]):
        by_cosine = "  ".join(f"{token['token']!r} {token['cosine']:.2f}" for token in of_token["cosine"][:3])
        closest = of_token["distance"][0]
        drift = [found["drift"][-1][by][index] for by in ("relative", "cosine")] if found["drift"] else []
        lines.append([index + 1, by_cosine, f"{closest['token']!r} {closest['distance']:.2f}", *drift])
    title = f"Virtual tokens of {found['looked_at']} and the tokens nearest to them (distance 1: the typical norm)"
    columns = ["", "by cosine", "by distance", "distance from the start", "cosine with it"]
    print_table(title, columns[: len(lines[0])], lines, left=3, digits=4)
    print(f"Start of the prompt: {found['drift_from']}.")
    if found["drift"]:
        lines = []
        for drift in found["drift"]:
            ranges = [f"{min(drift[by]):.4f} to {max(drift[by]):.4f}" for by in ("relative", "cosine")]
            lines.append([drift["name"], drift["overall"], *ranges])
        columns = ["", "all together", "of each virtual token", "cosine with its start"]
        print_table("Distance from the start, as a share of its norm", columns, lines, digits=4)
    if summary is not None:
        lines = []
        for name, values in found["classes"].items():
            kls = [values["prompted_plain"], values.get("prompted_student", float("nan"))]
            lines.append([name, f"{values['tokens']:,}", *kls, number(100 * values["share"], 1)])
        columns = ["class", "tokens", "KL(prompted || plain)", "KL(prompted || student)", "share of the first, %"]
        print_table("By class of the token, mean in nats per token", columns, lines, digits=4)
        print(f"{summary}\nWhere, and to what: {os.path.join(output_dir, 'changes.html')}.")
    print(f"Plots and all figures: {output_dir}.")
