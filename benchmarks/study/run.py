"""All runs of the small world, each kept in a file: what is finished is not run again, and several processes share the
work.

    python benchmarks/study/costs.py --folder study               # once; the committed costs.json is this machine's
    python benchmarks/study/run.py --folder study                 # everything; start it once a core
    python benchmarks/study/run.py --folder study --groups tune   # a part
    python benchmarks/study/run.py --folder study --collect       # finished runs into results.jsonl

Runs of results.jsonl are not run again, on another machine either. The groups `tune` and `first` have the first
teacher. Its weights are not kept, so runs can be added to them only on a machine that trains the same ones. The other
groups have the teacher of teacher.safetensors. Training gives other weights on another kind of CPU, students' too: a
group that one machine has begun is finished there.

- `tune`: learning rates.
- `first`: the methods, on eight students of the first teacher.
- `explore`: ideas to improve PromptKD, on three students.
- `share`: `prompt_share`, on ten students.
- `main`: the methods, on three students of the kept teacher. The page's comparison is over both groups' students.
- `texts`: GKD with each other line of lines.json before the teacher's question, on the students of `main`.
- `modes`: the same seeds, after SFT on answers of one writer: all careful, or all a pupil's.
"""

import argparse
import hashlib
import json
import os
import statistics
import time
from pathlib import Path

from world import ALL_LINES


HERE = Path(__file__).parent
RESULTS, LINES = HERE / "results.jsonl", HERE / "lines.json"
COSTS = json.loads((HERE / "costs.json").read_text())
NUM_ROWS, WARM_STEPS = 800, 1000
TEACHER = "teacher_2000"  # its folder
BUDGET = 120 * COSTS["promptkd"]  # seconds of one core
FIRST_SEEDS = list(range(8))
TUNING_SEEDS = [100, 101, 102]
EXPLORED_SEEDS = [110, 111, 112]
SHARE_SEEDS = list(range(200, 210))
SEEDS = [210, 211, 212]
MODES = ["careful", "pupil"]  # beside the mixed students of `main`
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
FIRST_RATES = {"sft": [1e-3, 3e-3], "gkd": [3e-4, 1e-3], "promptkd": [3e-4, 1e-3]}
NUM_RANKED = 100  # training questions on which the lines are ranked
SCORE = "sampled_accuracy"
CAREFUL, PUPIL = "you are a careful teacher . ", "answer as a pupil who learns this . "


def stage(kind: str, seconds: float, **fields) -> dict:
    """A stage that takes so long. What is needed before its first step has been taken off."""
    method = "promptkd" if kind == "anchored" else kind
    return {"method": method, "steps": int(seconds / COSTS[kind]), **fields}


WRITING = NUM_ROWS * COSTS["greedy_answer"]
RANKING = 8 * NUM_RANKED * COSTS["sampled_answer"]
RIGHT = NUM_ROWS * COSTS["right_answer"]


def methods(seconds: float) -> dict[str, list[dict]]:
    """Name -> stages, without their learning rates."""
    half = seconds / 2
    seqkd = stage("sft", half - WRITING, answers="")
    return {
        "SFT": [stage("sft", seconds)],
        "SeqKD": [stage("sft", seconds - WRITING, answers="")],
        "SeqKD, fixed text": [stage("sft", seconds - (WRITING + RANKING), answers=CAREFUL)],
        "GKD": [stage("gkd", seconds)],
        "GKD, fixed text": with_text(seconds, CAREFUL),
        "PromptKD": [stage("promptkd", seconds)],
        "PromptKD, anchored": anchored(seconds, "gold", 1.0, 1e-2),
        "SeqKD then GKD": [seqkd, stage("gkd", half)],
        "SeqKD then PromptKD": [seqkd, stage("promptkd", half)],
        "SeqKD, fixed text, then GKD, fixed text": [
            stage("sft", half - (WRITING + RANKING), answers=CAREFUL),
            stage("gkd", half, line=CAREFUL),
        ],
    }


def anchored(seconds: float, source: str, weight: float, prompt_rate: float | None = None, **fields) -> list[dict]:
    prompt = {} if prompt_rate is None else {"prompt_learning_rate": prompt_rate}
    setup = RIGHT if source == "right" else 0.0
    return [stage("anchored", seconds - setup, anchor=source, anchor_weight=weight, prompt=prompt, **fields)]


def frozen(seconds: float, **fields) -> dict:
    """A prompt that never learns costs what a text costs: a step of GKD."""
    return stage("gkd", seconds) | {"method": "promptkd", "prompt": {"prompt_learning_rate": 0.0}, **fields}


def tuned_first(seconds: float, source: str, steps: int, rate: float) -> list[dict]:
    """A prompt that is tuned on answers, and then stays."""
    setup = steps * COSTS["tuned"] + (RIGHT if source == "right" else 0.0)
    return [frozen(seconds - setup, anchor=source, tune_steps=steps, tune_rate=rate)]


def candidates(seconds: float) -> dict[str, list[dict]]:
    """Tried on the tuning students: what may be better than the paper."""
    plain = stage("promptkd", seconds)
    return {
        "PromptKD, prompt lr 0.01": [plain | {"prompt": {"prompt_learning_rate": 1e-2}}],
        "anchored on right answers, 1, lr 0.01": anchored(seconds, "right", 1.0, 1e-2),
        "tuned on gold, frozen": tuned_first(seconds, "gold", 60, 1e-2),
        "tuned on right answers, frozen": tuned_first(seconds, "right", 60, 1e-2),
        "budget of 0.2 nats": [plain | {"budget": 0.2, "prompt": {"regularization_schedule": "constant"}}],
        "PromptKD, beta 0.5": [plain | {"beta": 0.5}],
        "GKD, beta 0.5": [stage("gkd", seconds, beta=0.5)],
        "GKD, fixed text, beta 0": [stage("gkd", seconds - RANKING, line=CAREFUL, beta=0.0)],
    }


def with_rate(stages: list[dict], rates: dict[str, float]) -> list[dict]:
    """Each stage with the learning rate of its kind."""
    return [one | {"learning_rate": rates[one["method"]]} for one in stages]


def settings_of(stages: list[dict], seed: int, split: str = "test", writer: str = "gold") -> dict:
    common = {"num_rows": NUM_ROWS, "warm_steps": WARM_STEPS, "writer": writer}
    return common | {"seed": seed, "split": split, "stages": stages}


def file_of(folder: Path, settings: dict) -> Path:
    text = json.dumps(settings, sort_keys=True)
    return folder / "runs" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def with_text(seconds: float, line: str) -> list[dict]:
    """GKD to a teacher that sees a line, which was one of those that were ranked."""
    return [stage("gkd", seconds - RANKING, line=line)]


GKD_CAREFUL, GKD_PUPIL, FROZEN = "GKD, careful text", "GKD, pupil's text", "PromptKD, prompt lr 0"


def of_modes(seconds: float) -> dict[str, list[dict]]:
    """What is tried on students of each mode."""
    return {
        "GKD": methods(seconds)["GKD"],
        GKD_CAREFUL: with_text(seconds, CAREFUL),
        GKD_PUPIL: with_text(seconds, PUPIL),
        "PromptKD": methods(seconds)["PromptKD"],
        FROZEN: [frozen(seconds)],
    }


COMPARED = (  # before the others
    "GKD",
    "GKD, fixed text",
    "PromptKD",
    "PromptKD, anchored",
    "SeqKD",
    "SeqKD then GKD",
    "SeqKD then PromptKD",
)
CONTROLS = ("GKD", "GKD, fixed text", "PromptKD")  # beside the candidates
SHARE = "PromptKD, share 0.25"
TUNED = {"sft": "SeqKD", "gkd": "GKD", "promptkd": "PromptKD"}


def tuning(kind: str, rate: float) -> list[dict]:
    """The settings of a kind's runs at one learning rate on the tuning students. SFT's rates differ after half of the
    time already, those of on-policy methods do not."""
    stages = methods(BUDGET / 2 if kind == "sft" else BUDGET)[TUNED[kind]]
    return [settings_of(with_rate(stages, {kind: rate}), seed, "val") for seed in TUNING_SEEDS]


def score(folder: Path, several: list[dict]) -> float | None:
    """The mean of several runs; None if one is not there."""
    files = [file_of(folder, settings) for settings in several]
    if not all(file.exists() for file in files):
        return None
    return statistics.fmean(json.loads(file.read_text())["end"][SCORE] for file in files)


def best_rate(folder: Path, kind: str) -> tuple[float | None, list[float]]:
    """(the best learning rate, those to try next): from the better of two on, until it gets no better."""
    scores = {rate: score(folder, tuning(kind, rate)) for rate in RATES}
    waiting = [rate for rate in FIRST_RATES[kind] if scores[rate] is None]
    if waiting:
        return None, waiting
    known = {rate: value for rate, value in scores.items() if value is not None}
    best = max(known, key=known.get)
    index = RATES.index(best)
    near = [RATES[other] for other in (index - 1, index + 1) if 0 <= other < len(RATES)]
    waiting = [rate for rate in near if rate not in known]
    return (None, waiting) if waiting else (best, [])


def plan(folder: Path, group: str) -> list[tuple[str, dict]] | None:
    """(name, settings) of a group's runs; None if others must be there first."""
    if group == "tune":
        found = {kind: best_rate(folder, kind) for kind in TUNED}
        return [
            (f"{TUNED[kind]}, {rate:g}", settings)
            for kind in TUNED
            for rate in RATES
            if rate in found[kind][1] or score(folder, tuning(kind, rate)) is not None
            for settings in tuning(kind, rate)
        ]
    rates = {kind: best_rate(folder, kind)[0] for kind in TUNED}
    if None in rates.values():
        return None
    if group == "explore":
        named = {name: stages for name, stages in methods(BUDGET).items() if name in CONTROLS} | candidates(BUDGET)
        return [
            (name, settings_of(with_rate(stages, rates), seed, "val"))
            for seed in EXPLORED_SEEDS
            for name, stages in named.items()
        ]
    named = methods(BUDGET)

    def runs(of: dict[str, list[dict]], seeds: list[int], writer: str = "gold") -> list[tuple[str, dict]]:
        return [
            (name, settings_of(with_rate(stages, rates), seed, writer=writer))
            for seed in seeds
            for name, stages in of.items()
        ]

    compared = {name: named[name] for name in COMPARED}
    if group == "share":
        part = {SHARE: [stage("promptkd", BUDGET, prompt={"prompt_share": 0.25})]}  # as many steps as PromptKD
        return runs({name: named[name] for name in ("GKD", "PromptKD")} | part, SHARE_SEEDS)
    if group == "main":
        return runs(compared, SEEDS)
    if group == "texts":
        others = [line for line in ALL_LINES if line and f"{line} " != CAREFUL]
        return runs({line: with_text(BUDGET, f"{line} ") for line in others}, SEEDS)
    if group == "modes":
        mixed = runs({FROZEN: [frozen(BUDGET)]}, SEEDS)  # the others are in `main` and `texts`
        return mixed + [one for writer in MODES for one in runs(of_modes(BUDGET), SEEDS, writer)]
    if group == "first":
        others = {name: stages for name, stages in named.items() if name not in COMPARED}
        return runs(compared, FIRST_SEEDS) + runs(others, FIRST_SEEDS[:2])
    raise ValueError(group)


GROUPS = ["tune", "first", "explore", "share", "main", "texts", "modes"]


def claim(path: Path) -> bool:
    """Whether this process is the one that does the run of `path`: no other one that lives has said so."""
    lock = path.with_suffix(".lock")
    try:
        with open(lock, "x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = int(lock.read_text() or 0)
        if owner and Path(f"/proc/{owner}").exists():
            return False
        lock.write_text(str(os.getpid()))
        return True


LOGGED = ("kl/", "entropy/", "prompt/", "regularization_weight", "loss", "step")


def rounded(value):
    """Five digits are kept."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def known_runs() -> dict[str, dict]:
    """The runs of results.jsonl, by the names of the files that they were in."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    runs = [json.loads(line) for line in lines]
    return {file_of(Path(), run["settings"]).name: run for run in runs}


def teacher_of(folder: Path) -> str:
    """Of the teacher's weights: another machine's arithmetic may give others."""
    weights = folder / TEACHER / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def collect(folder: Path) -> None:
    """Add the finished runs of the plan to results.jsonl, one a line; of every tenth step's log, what the study looks
    at."""
    runs = known_runs()
    for path in (folder / "runs").glob("*.json"):
        run = json.loads(path.read_text())
        run["log"] = [{k: v for k, v in entry.items() if k.startswith(LOGGED)} for entry in run["log"]]
        runs[path.name] = rounded({"teacher": teacher_of(folder), **run})
    found = [
        runs[file] | {"group": group, "name": name}
        for group in GROUPS
        for name, settings in plan(folder, group) or []
        if (file := file_of(folder, settings).name) in runs
    ]
    RESULTS.write_text("".join(json.dumps(run) + "\n" for run in found))
    print(f"{len(found)} runs in {RESULTS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("study"), help="models and finished runs")
    parser.add_argument("--groups", nargs="+", default=GROUPS, choices=GROUPS)
    parser.add_argument("--collect", action="store_true", help="write finished runs to results.jsonl, and train none")
    args = parser.parse_args()
    (args.folder / "runs").mkdir(parents=True, exist_ok=True)
    if args.collect:
        return collect(args.folder)

    from measure import Measures
    from methods import kept, run
    from models import teacher

    teacher(args.folder)
    for file, known in known_runs().items():
        if known["group"] in args.groups and known["teacher"] != teacher_of(args.folder):
            raise SystemExit(
                f"The group {known['group']} of {RESULTS} has runs of another teacher ({known['teacher']}; the one in "
                f"{args.folder} is {teacher_of(args.folder)}). Leave the group out of `--groups`."
            )
        if not (args.folder / "runs" / file).exists():
            kept(args.folder / "runs" / file, known)
    measures: dict[str, Measures] = {}
    lines = json.loads(LINES.read_text()) if LINES.exists() else {}
    if teacher_of(args.folder) not in lines:
        measures["test"] = Measures(args.folder, "test")
        kept(LINES, lines | {teacher_of(args.folder): measures["test"].of_lines()})
    for group in args.groups:
        while True:
            runs = plan(args.folder, group)
            if runs is None:
                time.sleep(5)
                continue
            open_runs = [entry for entry in runs if not file_of(args.folder, entry[1]).exists()]
            if not open_runs:
                break
            mine = next((entry for entry in open_runs if claim(file_of(args.folder, entry[1]))), None)
            if mine is None:  # other processes are at the rest
                if group != "tune":
                    break
                time.sleep(5)
                continue
            name, settings = mine
            path = file_of(args.folder, settings)
            if path.exists():
                continue
            split = settings["split"]
            if split not in measures:
                measures[split] = Measures(args.folder, split)
            start = time.time()
            found = run(args.folder, settings, measures[split])
            kept(path, {"group": group, "name": name, "settings": settings, **found})
            path.with_suffix(".lock").unlink()
            first, last = found["start"], found["end"]
            print(
                f"{group} {len(runs) - len(open_runs) + 1}/{len(runs)} {name}, seed {settings['seed']}: sampled "
                f"{first['sampled_accuracy']:.3f} -> {last['sampled_accuracy']:.3f}, greedy {first['accuracy']:.3f} "
                f"-> {last['accuracy']:.3f}, per answer KL(q||p) {last['reverse_kl_per_answer']:.2f}, KL(p||q) "
                f"{last['forward_kl_per_answer']:.2f}, brief {last['brief_share']:.2f}; {found['seconds']:.0f} s of "
                f"training, {time.time() - start:.0f} s in all",
                flush=True,
            )


if __name__ == "__main__":
    main()
