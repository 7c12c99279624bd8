"""`trl-promptkd analyze prompt`."""

import argparse
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.exposure import sample_prefixes
from ..analysis.figures import check_matplotlib
from ..analysis.prompt import Drift, PromptEffect, nearest_tokens, prompt_drift, prompt_effect, similarity
from ..analysis.prompt_report import changes_page, plot_classes, plot_drift, plot_similarity
from ..analysis.saved_prompt import SavedPrompt, check_fits, find_prompts, initial_prompt
from ..files import write_text
from ..generation.rollouts import stop_ids
from .analyze_common import (
    add_analysis_arguments,
    at_least_one,
    check_room,
    compared_ids,
    number,
    sampling_of,
    tokenized_rows,
    tokenizer_of,
)
from .common import json_text, load_model, print_table


_ANSWERS_NEEDED = "`--responses` is 'dataset', so that the data's own answers are looked at. Set `--responses student` for the student's samples."


def add_prompt(commands: Any) -> None:
    prompt = commands.add_parser("prompt", help="what a soft prompt has become, and what it does to the teacher")
    prompt.add_argument(
        "--prompt", required=True, help="a soft prompt's folder (teacher_prompt), or a run's with its checkpoints"
    )
    prompt.add_argument("--student", help="Hub id or folder; without it the teacher is compared with itself alone")
    prompt.add_argument(
        "--dataset", help="Hub id, or a .json, .jsonl, .csv or .parquet file; without it the prompt alone is looked at"
    )
    prompt.add_argument(
        "--responses", default="dataset", choices=["dataset", "student"], help="whose answers (the data's)"
    )
    add_analysis_arguments(prompt, output_dir="prompt_analysis", rows=32, max_new_tokens=64)
    prompt.add_argument("--nearest", type=at_least_one, default=5, help="tokens to name for each virtual token (5)")
    prompt.add_argument("--examples", type=at_least_one, default=30, help="places on the page of examples (30)")
    prompt.set_defaults(run=run_prompt)


def run_prompt(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # standard output is for the results alone
        check_matplotlib()
        if args.responses == "student" and args.student is None:
            raise ValueError(
                "`--responses` is 'student', but there is no `--student`. Pass one, or set `--responses dataset`."
            )
        if args.responses == "student" and args.dataset is None:
            raise ValueError(
                "`--responses` is 'student', but there is no `--dataset`, whose prompts it answers. Pass one."
            )
        prompts = find_prompts(args.prompt)
        tokenizer = tokenizer_of(args, [] if args.student is None else [args.student])
        needed = _ANSWERS_NEEDED if args.responses == "dataset" else None
        rows = [] if args.dataset is None else tokenized_rows(args, tokenizer, needed)
        teacher = load_model(args.teacher, args.teacher_init_kwargs, args.trust_remote_code).eval()
        check_fits(prompts[-1], teacher)
        os.makedirs(args.output_dir, exist_ok=True)
        found = look_at(prompts, teacher, tokenizer, args)
        effect = None if args.dataset is None else compare(prompts[-1].embeddings, teacher, tokenizer, rows, args)
        if effect is not None:
            plot_classes(effect.by_class(), os.path.join(args.output_dir, "kl_by_class.png"))
            title = "Where the soft prompt changed the teacher's next token"
            write_text(
                os.path.join(args.output_dir, "changes.html"),
                changes_page(effect.changes, title, summary_of(effect, args)),
            )
            found["classes"] = effect.by_class()
            found["changed"] = {"tokens": effect.changed, "of": len(effect.classes)}
            found["changes"] = [asdict(change) for change in effect.changes]
    names = ("prompt", "teacher", "student", "dataset", "responses", "rows", "seed")
    text = json_text({**{name: getattr(args, name) for name in names}, **found})
    write_text(os.path.join(args.output_dir, "prompt.json"), text)
    if args.json:
        print(text)
    else:
        show(found, effect, args)
    return 0


def look_at(
    prompts: list[SavedPrompt], teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> dict[str, Any]:
    """What can be said of the prompt without any text, and its plots."""
    last = prompts[-1].embeddings
    nearest = nearest_tokens(last, teacher, compared_ids(tokenizer, teacher, None), args.nearest)
    cosines = similarity(last)
    plot_similarity(cosines, os.path.join(args.output_dir, "similarity.png"))
    initial, known_by = initial_prompt(prompts, teacher, tokenizer)
    drifts: list[tuple[str, int | None, Drift]] = []
    if initial is not None:
        drifts = [(prompt.name, prompt.step, prompt_drift(prompt.embeddings, initial)) for prompt in prompts]
    if len(drifts) > 1:
        start = drifts[0][1] or 0 if initial is prompts[0].embeddings else 0
        plot_drift(drifts, os.path.join(args.output_dir, "drift.png"), start)
    return {
        "looked_at": prompts[-1].folder,
        "nearest": [
            {
                by: [
                    {"token": tokenizer.decode([token]), "id": token, "cosine": cosine, "distance": distance}
                    for token, cosine, distance in tokens
                ]
                for by, tokens in of_token.items()
            }
            for of_token in nearest
        ],
        "similarity": cosines.tolist(),
        "drift_from": known_by,
        "drift": [{"name": name, "step": step, **asdict(drift)} for name, step, drift in drifts],
    }


def compare(
    soft_prompt: Tensor,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    args: argparse.Namespace,
) -> PromptEffect:
    student, sampled = None, 0
    if args.responses == "student":
        rows, sampled = [{**row, "completion_ids": []} for row in rows], args.max_new_tokens
    check_room("teacher", teacher, rows, sampled, len(soft_prompt))
    if args.student is not None:
        student = load_model(args.student, args.student_init_kwargs, args.trust_remote_code).eval()
        check_room("student", student, rows, sampled)
    vocab_size = compared_ids(tokenizer, teacher, student)
    sampling = sampling_of(args, teacher, tokenizer)
    prompt_ids, completions = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    if student is not None and sampled:
        completions = sample_prefixes(student, prompt_ids, sampling, args.seed, args.batch_size, vocab_size)
    return prompt_effect(
        teacher,
        soft_prompt,
        student,
        prompt_ids,
        completions,
        tokenizer,
        stop_ids(sampling),
        args.batch_size,
        vocab_size,
        args.examples,
    )


def summary_of(effect: PromptEffect, args: argparse.Namespace) -> str:
    whose = "the data's answers" if args.responses == "dataset" else "the student's samples"
    share = 100 * effect.changed / len(effect.classes)
    return (
        f"Behind the soft prompt, the teacher's likeliest next token is another one at {effect.changed:,} of {len(effect.classes):,} tokens "
        f"({share:.1f} %) of {whose}."
    )


def show(found: dict[str, Any], effect: PromptEffect | None, args: argparse.Namespace) -> None:
    lines = []
    for index, of_token in enumerate(found["nearest"], start=1):
        by_cosine = "  ".join(f"{token['token']!r} {token['cosine']:.2f}" for token in of_token["cosine"][:3])
        closest = of_token["distance"][0]
        line = [index, by_cosine, f"{closest['token']!r} {closest['distance']:.2f}"]
        if found["drift"]:
            last = found["drift"][-1]
            line += [number(last["relative"][index - 1], 4), number(last["cosine"][index - 1], 4)]
        lines.append(line)
    title = f"Virtual tokens of {found['looked_at']} and the tokens nearest to them (distance 1: the typical norm)"
    columns = ["", "by cosine", "by distance", "distance from the start", "cosine with it"]
    print_table(title, columns if found["drift"] else columns[:3], lines, left=3)
    lines = [
        [
            drift["name"],
            number(drift["overall"], 4),
            f"{min(drift['relative']):.4f} to {max(drift['relative']):.4f}",
            f"{min(drift['cosine']):.4f} to {max(drift['cosine']):.4f}",
        ]
        for drift in found["drift"]
    ]
    print(f"Start of the prompt: {found['drift_from']}.")
    if lines:
        columns = ["", "all together", "of each virtual token", "cosine with its start"]
        print_table("Distance from the start, as a share of its norm", columns, lines)
    if effect is not None:
        lines = [
            [
                name,
                f"{values['tokens']:,}",
                number(values["prompted_plain"], 4),
                number(values.get("prompted_student", float("nan")), 4),
                number(100 * values["share"], 1),
            ]
            for name, values in effect.by_class().items()
        ]
        columns = ["class", "tokens", "KL(prompted || plain)", "KL(prompted || student)", "share of the first, %"]
        print_table("By class of the token, mean in nats a token", columns, lines)
        print(summary_of(effect, args))
        print(f"Where, and to what: {os.path.join(args.output_dir, 'changes.html')}.")
    print(f"Plots and all figures: {args.output_dir}.")
