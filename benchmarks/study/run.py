"""All runs of the small world, each kept in a file: what is finished is not run again, and several processes share the
work.

python benchmarks/study/run.py --folder study                 # everything; start it once a core
python benchmarks/study/run.py --folder study --groups tune   # a part
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path


STUDENT_STEPS, NUM_ROWS = 1500, 800  # of the warm start by SFT
TUNING_STEPS = 300
STEPS = 200  # of optimizer steps where methods are compared at equal steps
HALF = STEPS // 2
PRIMING_STEPS = 1000  # after 200 nothing could be told apart
SECONDS = 30.0  # of one core, about what PromptKD takes for half of them, where they are compared at equal time
SEEDS = [0, 1, 2, 3, 4]
TUNING_SEED = 102
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
METHODS = {
    "SFT": {"method": "sft"},
    "KD, forward": {"method": "kd", "beta": 0.0},
    "KD, reverse": {"method": "kd", "beta": 1.0},
    "SeqKD": {"method": "seqkd"},
    "GKD": {"method": "gkd", "beta": 1.0},
    "PromptKD": {"method": "promptkd", "beta": 1.0, "prompt": {}},
}
ABLATIONS = {
    "1 virtual token": {"num_virtual_tokens": 1},
    "20 virtual tokens": {"num_virtual_tokens": 20},
    "init vocab": {"prompt_init": "vocab"},
    "init random": {"prompt_init": "random"},
    "init careful text": {"prompt_init_text": "you are a careful teacher ."},
    "forward prompt loss": {"prompt_divergence": "forward"},
    "no regulariser": {"regularization_coef": 0.0},
    "constant regulariser": {"regularization_schedule": "constant"},
    "simultaneous": {"prompt_update": "simultaneous"},
}
PROMPT_RATES = [0.1, 1.0, 10.0, 100.0]  # times the student's
REGULARIZERS = {
    "none": {"regularization_coef": 0.0},
    "linear": {"regularization_coef": 1.0},
    "constant": {"regularization_coef": 1.0, "regularization_schedule": "constant"},
}
GRID_SEEDS = [0, 1]
WARM_STARTS = {"short": 400, "full": STUDENT_STEPS}
BASE = {"data": "finite", "num_rows": NUM_ROWS, "warm_steps": STUDENT_STEPS, "steps": STEPS, "beta": 1.0}
TUNING = {"seed": TUNING_SEED, "split": "val", "steps": TUNING_STEPS}


def best_rates(folder: Path) -> dict[str, float]:
    """The learning rate of each method with the best accuracy on the validation split."""
    rates = {}
    for name, settings in METHODS.items():
        scores = {}
        for rate in RATES:
            path = file_of(folder, BASE | settings | TUNING | {"learning_rate": rate})
            scores[rate] = json.loads(path.read_text())["measures"][-1]["accuracy"]
        rates[name] = max(scores, key=scores.get)
    return rates


def plan(folder: Path, group: str) -> list[tuple[str, dict]]:
    """(name, settings) of a group's runs; all but `tune` need the learning rates that `tune` found."""
    if group == "tune":
        return [
            (name, BASE | settings | TUNING | {"learning_rate": rate})
            for name, settings in METHODS.items()
            for rate in RATES
        ]
    rates = best_rates(folder)
    rate = rates["PromptKD"]
    promptkd = BASE | METHODS["PromptKD"] | {"learning_rate": rate}
    if group in ("finite", "fresh"):
        # PromptKD takes STEPS steps, which its regulariser's schedule is over. The others run until they took as long
        # as half of them.
        as_long = {"steps": 100_000, "seconds": SECONDS, "snapshots": [HALF, STEPS]}
        return [
            (
                name,
                BASE
                | settings
                | ({"snapshots": [HALF]} if name == "PromptKD" else as_long)
                | {"data": group, "seed": seed, "learning_rate": rates[name]},
            )
            for seed in SEEDS
            for name, settings in METHODS.items()
        ]
    if group == "ablations":
        return [
            (name, promptkd | {"seed": seed, "prompt": prompt}) for seed in SEEDS for name, prompt in ABLATIONS.items()
        ]
    if group == "grid":
        settings = [(regularizer, "full") for regularizer in REGULARIZERS] + [("linear", "short")]
        return [
            (
                f"{prompt_rate:g}, {regularizer}, {warm}",
                promptkd
                | {"seed": seed, "warm_steps": WARM_STARTS[warm]}
                | {"prompt": {"prompt_learning_rate": prompt_rate * rate} | REGULARIZERS[regularizer]},
            )
            for seed in GRID_SEEDS
            for regularizer, warm in settings
            for prompt_rate in PROMPT_RATES
        ] + [
            (
                f"GKD, {warm}",
                BASE | METHODS["GKD"] | {"seed": seed, "warm_steps": steps, "learning_rate": rates["GKD"]},
            )
            for seed in GRID_SEEDS
            for warm, steps in WARM_STARTS.items()
        ]
    return [
        (
            f"{line or 'no line'}, {source}",
            BASE
            | {"method": "primed", "line": line, "response_source": source, "beta": 0.0, "seed": seed}
            | {"learning_rate": rates["KD, forward"], "steps": PRIMING_STEPS, "snapshots": [STEPS]},
        )
        for seed in SEEDS
        for source in ("dataset", "teacher")
        for line in (None, "careful", "pupil")
    ]


GROUPS = ["tune", "finite", "grid", "priming", "fresh", "ablations"]


def file_of(folder: Path, settings: dict) -> Path:
    text = json.dumps(settings, sort_keys=True)
    return folder / "runs" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("study"), help="models and finished runs")
    parser.add_argument("--groups", nargs="+", default=GROUPS, choices=GROUPS)
    parser.add_argument("--max_runs", type=int, help="stop after so many")
    args = parser.parse_args()
    (args.folder / "runs").mkdir(parents=True, exist_ok=True)

    from measure import Measures
    from methods import run

    measures: dict[str, Measures] = {}
    done = 0
    if not (args.folder / "runs" / "teacher_0.json").exists() and "priming" in args.groups:
        measures["test"] = Measures(args.folder, "test")
        for number, (name, values) in enumerate(measures["test"].of_teacher().items()):
            whole = {"group": "teacher", "name": name, **values}
            (args.folder / "runs" / f"teacher_{number}.json").write_text(json.dumps(whole))
    for group in args.groups:
        if group != "tune":  # another process may still be at it
            while any(not file_of(args.folder, settings).exists() for _, settings in plan(args.folder, "tune")):
                time.sleep(5)
        runs = plan(args.folder, group)
        for number, (name, settings) in enumerate(runs, 1):
            path = file_of(args.folder, settings)
            if path.exists() or not claim(path):
                continue
            split = settings.get("split", "test")
            if split not in measures:
                measures[split] = Measures(args.folder, split)
            start = time.time()
            found = run(args.folder, settings, measures[split])
            whole = {"group": group, "name": name, "settings": settings, **found}
            path.with_suffix(".incomplete").write_text(json.dumps(whole))
            path.with_suffix(".incomplete").replace(path)
            path.with_suffix(".lock").unlink()
            last = found["measures"][-1]
            print(
                f"{group} {number}/{len(runs)} {name}, seed {settings['seed']}: accuracy "
                f"{found['measures'][0]['accuracy']:.3f} -> {last['accuracy']:.3f}, reverse KL "
                f"{last['reverse_kl']:.3f}, forward KL {last['forward_kl']:.3f}, {last['step']} steps in "
                f"{last['seconds']:.0f} s; {time.time() - start:.0f} s in all",
                flush=True,
            )
            done += 1
            if args.max_runs and done >= args.max_runs:
                return


if __name__ == "__main__":
    main()
