"""Makes the four runs of docs/gallery.md on tiny models, and writes the page's figures, tables and samples.

python benchmarks/gallery.py

It takes about a minute of one CPU core. Each run's folder in `gallery/` then has its `report.html`, the source of the
figures.
"""

import argparse
import copy
import html
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd.analysis.plot_style import Scheme, both_schemes
from trl_promptkd.analysis.report import Run, read_run, report_page
from trl_promptkd.data import pad_rows
from trl_promptkd.metrics.run_signs import Sign


PAGE = Path(__file__).parent.parent / "docs" / "gallery.md"

# What there is to know: animal -> food, two places to sleep, colour
ANIMALS = {
    "cat": ("fish", "mat", "sofa", "grey"),
    "dog": ("meat", "kennel", "rug", "brown"),
    "cow": ("grass", "barn", "field", "white"),
    "owl": ("mice", "tree", "tower", "brown"),
    "bee": ("honey", "hive", "flower", "yellow"),
    "fox": ("berries", "den", "forest", "red"),
    "hen": ("corn", "coop", "straw", "black"),
    "frog": ("flies", "pond", "mud", "green"),
}
QUESTIONS = ("what does the {} eat ?", "where does the {} sleep ?", "tell me about the {} .")
# A line before the question can change how the teacher answers, and so can a soft prompt
LINES = {"one word .": "short", "all you know .": "long", "a child answers .": "wrong"}
TEACHER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
STUDENT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

COMMON = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "max_steps": 80,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 48,
    "max_new_tokens": 24,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "log_completions": True,
    "num_completions_to_print": 0,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 10,
}
# Those of the report that the page shows, with the ends of their files' names
CHARTS = {
    "training": "Distance to the teacher, in training",
    "evaluation": "Distance to the teacher, in evaluation",
    "prompt": "Gain and distance of the prompted teacher",
    "cut": "Cut samples",
}


class Settings(NamedTuple):
    title: str
    """Of its section on the page."""
    trainer: dict[str, Any]
    """Settings that differ from the good run's."""
    prompt: dict[str, Any]
    """The same of the soft prompt."""


RUNS = {
    "good": Settings("Good", {}, {}),
    "collapsing": Settings("Collapsing", {"learning_rate": 1.5e-2}, {"prompt_learning_rate": 1e-3}),
    "colluding": Settings("Colluding", {"regularization_coef": 0.0}, {"prompt_learning_rate": 0.1}),
    "cut": Settings("Answers cut off", {"max_new_tokens": 5}, {}),
}


def answer(animal: str, question: int, manner: str, rng: random.Random) -> str:
    """A writer's answer. A wrong writer uses another animal half of the time."""
    known = ANIMALS[animal]
    if manner == "wrong" and rng.random() < 0.5:
        known = ANIMALS[rng.choice(list(ANIMALS))]
    food, colour, place = known[0], known[3], rng.choice(known[1:3])
    if manner == "short":
        return f"{(food, place, colour)[question]} ."
    told = [f"it eats {food} .", f"it sleeps in the {place} .", f"it is {colour} ."]
    if manner == "long":
        first = told.pop(question)
        return " ".join([first, *rng.sample(told, 2)])
    return f"the {animal} {told[question][3:]}"


def teacher_row(rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer in the teacher's data. Half of the prompts have a line that says who answers."""
    animal, question = rng.choice(list(ANIMALS)), rng.randrange(3)
    asked = QUESTIONS[question].format(animal)
    if rng.random() < 0.5:
        line, manner = rng.choice(list(LINES.items()))
        return f"{line} {asked}", answer(animal, question, manner, rng)
    return asked, answer(animal, question, rng.choices(("short", "usual", "long"), (2, 5, 3))[0], rng)


def student_row(rng: random.Random) -> tuple[str, str]:
    """A row of the student's data. It reads few of them, so it learns how answers look, and little about animals."""
    animal, question = rng.choice(list(ANIMALS)), rng.randrange(3)
    manner = rng.choices(("short", "usual", "long"), (2, 5, 3))[0]
    return QUESTIONS[question].format(animal), answer(animal, question, manner, rng)


def make_tokenizer() -> PreTrainedTokenizerFast:
    text = [*ANIMALS, *(word for known in ANIMALS.values() for word in known), *QUESTIONS, *LINES]
    text += ["it eats sleeps in the is . suppose you are a student"]
    words = dict.fromkeys(word for part in text for word in part.replace("{}", "").split())
    vocab = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


def new_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        **shape,
        **ids,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        initializer_range=0.1,  # so small a model learns fast from it
    )
    return LlamaForCausalLM(config)


def read_answers(model, tokenizer, next_row: Callable[[random.Random], tuple[str, str]], steps: int) -> None:
    """Train by cross-entropy on answers of an endless stream, 32 rows per step."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps + 1)
    for _ in range(steps):
        texts = zip(*(next_row(rng) for _ in range(32)), strict=True)
        prompts, answers = (tokenizer(list(part)).input_ids for part in texts)
        completions = [[*ids, tokenizer.eos_token_id] for ids in answers]
        model(**pad_rows(prompts, completions, tokenizer.pad_token_id)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def train(name: str, folder: Path, teacher, student, tokenizer, max_steps: int) -> None:
    """Make one of the runs, and save what its report reads."""
    prompts = [question.format(animal) for animal in ANIMALS for question in QUESTIONS]
    every = max(max_steps // 16, 1)
    settings = {
        **COMMON,
        **RUNS[name].trainer,
        "max_steps": max_steps,
        "logging_steps": every,
        "eval_steps": 2 * every,
    }
    trainer = PromptKDTrainer(
        model=student,
        teacher_model=teacher,
        args=PromptKDConfig(output_dir=str(folder / name), **settings),
        prompt_encoder_config=PromptEncoderConfig(
            **{"prompt_init_text": "suppose you are a student .", **RUNS[name].prompt}
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * 4}),
        eval_dataset=Dataset.from_dict({"prompt": prompts * 2}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_state()
    trainer.create_model_card()


def chart_file(title: str, unit: str, labels: list[str], width: int, height: int, drawn: str) -> str:
    """A chart of the report with its title and labels, as an SVG file for light and dark pages."""
    top = 48 + 19 * len(labels)

    def css(scheme: Scheme) -> str:
        colors = [f".s{index} {{ stroke: {scheme.lines[index]} }}" for index in range(len(labels))]
        rules = [f".paper {{ fill: {scheme.paper} }}", f"text {{ fill: {scheme.ink} }}"]
        return " ".join([*rules, f".grid {{ stroke: {scheme.rule} }}", *colors])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + top}" '
        f'viewBox="0 0 {width} {height + top}" role="img">',
        f"<title>{title}</title>",
        "<style>",
        "  text { font: 13px sans-serif } .title { font-weight: bold }",
        "  .line { fill: none; stroke-width: 2.2; stroke-linejoin: round }",
        "  .s1 { stroke-dasharray: 7 4 } .s2 { stroke-dasharray: 2 4 } .s3 { stroke-dasharray: 9 3 2 3 }",
        f"  {both_schemes(css)}",
        "</style>",
        f'<rect class="paper" width="{width}" height="{height + top}" rx="6"/>',
        f'<text class="title" x="12" y="22">{title}</text><text x="12" y="40">{unit}</text>',
    ]
    for index, label in enumerate(labels):
        y = 57 + 19 * index
        parts.append(f'<path class="line s{index}" d="M12 {y}h30"/><text x="50" y="{y + 5}">{label}</text>')
    return "\n".join([*parts, f'<g transform="translate(0 {top})">{drawn}</g>', "</svg>", ""])


def charts_of(page: str) -> dict[str, str]:
    """The charts of a report, as files, by their titles."""
    found = {}
    for figure in re.findall(r"<figure>(.*?)</figure>", page, flags=re.DOTALL):
        title, unit = (re.search(rf"<{tag}>(.*?)</", figure)[1] for tag in ("h3", 'span class="label"'))
        labels = re.findall(r'<li><span class="key s\d"></span>(.*?)</li>', figure)
        drawn = re.search(r'<svg viewBox="0 0 (\d+) (\d+)"[^>]*>(.*?)</svg>', figure, flags=re.DOTALL)
        size = int(drawn[1]), int(drawn[2])
        found[html.unescape(title)] = chart_file(title, unit, labels, *size, drawn[3].strip())
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def samples_of(run: Run, number: int = 3) -> str:
    """The first different prompts of the first and of the last table."""
    rows = []
    for samples in (run.samples[0], run.samples[-1]):
        for row in samples.drop_duplicates("prompt").head(number).to_dict("records"):
            said = row["completion"].replace("<eos>", "").strip()
            rows.append([str(row["step"]), row["prompt"], said or "(nothing)", "by itself" if row["ended"] else "cut"])
    return table(["step", "prompt", "what the student says", "ends"], rows)


def signs_of(signs: list[Sign]) -> str:
    verdicts = {"wrong": "**look at this**", "fine": "fine", "unknown": "cannot tell"}
    return table(
        ["rule", "verdict", "why"], [[sign.name.split(":")[0], verdicts[sign.verdict], sign.text] for sign in signs]
    )


def overview(runs: dict[str, Run]) -> str:
    """First and last values of all runs."""
    keys = ("loss", "eval_forward_kl", "eval_reverse_kl", "kl/prompt_gain", "kl/prompted_plain")
    keys += ("rollout/terminated_share",)
    rows = []
    for name, run in runs.items():
        cells = []
        for key in keys:
            values = [entry[key] for entry in run.state["log_history"] if key in entry]
            cells.append(f"{values[0]:.2f} → {values[-1]:.2f}")
        title = RUNS[name].title
        rows.append([f"[{title}](#{title.lower().replace(' ', '-')})", *cells])
    return table(["run", *(f"`{key}`" for key in keys)], rows)


def fill(page: Path, parts: dict[str, str]) -> None:
    """Put each part between its two comments."""
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise SystemExit(f"{page} has no place for {name!r}: write `{begin}` and `{end}` there.")
        text = f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


def write_page(folder: Path, page: Path) -> dict[str, list[Sign]]:
    """Write the reports of all runs, the figures and the page's parts. Returns the signs that each report finds."""
    runs = {name: read_run(str(folder / name)) for name in RUNS}
    parts, found = {"overview": overview(runs)}, {}
    for name, run in runs.items():
        report, found[name] = report_page(run)
        (folder / name / "report.html").write_text(report, encoding="utf-8")
        charts = charts_of(report)
        for end, title in CHARTS.items():
            (page.parent / "images" / f"gallery_{name}_{end}.svg").write_text(charts[title], encoding="utf-8")
        parts |= {f"{name}: report": signs_of(found[name]), f"{name}: samples": samples_of(run)}
    fill(page, parts)
    return found


def make_runs(folder: Path, steps: int = 80, teacher_steps: int = 300, student_steps: int = 100) -> None:
    """Train the teacher and the student that all runs start from, and make the runs."""
    disable_progress_bars()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    teacher = new_model(TEACHER, tokenizer, seed=0)
    read_answers(teacher, tokenizer, teacher_row, teacher_steps)
    student = new_model(STUDENT, tokenizer, seed=1)
    read_answers(student, tokenizer, student_row, student_steps)
    for name in RUNS:
        train(name, folder, teacher, copy.deepcopy(student), tokenizer, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("gallery"), help="folder of the runs")
    args = parser.parse_args()
    start = time.process_time()
    make_runs(args.output_dir)
    for name, signs in write_page(args.output_dir, PAGE).items():
        print(f"{name}: {', '.join(sign.name for sign in signs if sign.verdict == 'wrong') or 'nothing looks wrong'}")
    print(f"{time.process_time() - start:.0f} seconds of one core")


if __name__ == "__main__":
    main()
