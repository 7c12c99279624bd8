# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-promptkd", "optuna"]
# ///
"""Search for settings with Optuna. Each trial trains a trainer of its own, and an evaluation scores it.

    python examples/search.py promptkd --trials 20 --storage sqlite:///search.db \\
        --search learning_rate=1e-6:1e-4 prompt_learning_rate=1e-6:1e-3 beta=0,0.5,1 \\
        --config examples/configs/promptkd_qlora_single_gpu.yaml --eval_strategy epoch --output_dir search

`name=low:high` draws from a range, uniformly in the logarithm unless it starts at 0. `name=a,b,c` chooses. All other
flags are those of `trl-promptkd promptkd` or `trl-promptkd primed`. A stopped search resumes if it is started again
with the same storage.
"""

import argparse
import importlib
import json
import os
from collections.abc import Callable
from typing import Any

import optuna


# KL(plain teacher || student) and the cross-entropy of answers mean the same whatever the loss is
METRICS = {"promptkd": "eval_forward_kl", "primed": "eval_ce"}


def draw(trial: optuna.Trial, space: dict[str, str]) -> dict[str, Any]:
    """Draw a trial's settings. `"low:high"` is a range, `"a,b,c"` are choices."""
    settings = {}
    for name, values in space.items():
        low, is_range, high = values.partition(":")
        if is_range:
            settings[name] = trial.suggest_float(name, float(low), float(high), log=float(low) > 0)
        else:
            settings[name] = trial.suggest_categorical(name, values.split(","))
    return settings


def search(
    make_trainer: Callable, space: dict[str, str], metric: str, num_trials: int, storage: str | None = None
) -> optuna.Study:
    """Run Optuna's study until it has `num_trials` complete trials, including those of an earlier start.

    Args:
        make_trainer: Gets a trial's settings and its number, and returns a new trainer with evaluation data.
        space: Maps each setting's name to its values, see [`draw`].
        metric: Name of a metric of `trainer.evaluate()`. Less is better.
        storage: URL of Optuna's database. `None` keeps the trials in memory.
    """

    def objective(trial: optuna.Trial) -> float:
        trainer = make_trainer(draw(trial, space), trial.number)
        trainer.train()
        metrics = trainer.evaluate()
        if metric not in metrics:
            raise ValueError(
                f"`--metric` is {metric!r}, which the evaluation does not have; it has {sorted(metrics)}."
            )
        return metrics[metric]

    study = optuna.create_study(storage=storage, study_name="search", direction="minimize", load_if_exists=True)
    done = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
    study.optimize(objective, n_trials=max(num_trials - done, 0))
    return study


def read_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, Any, list[str]]:
    """The search's own flags, the method's command, and the other flags, which go to the command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    parser.add_argument("method", choices=sorted(METRICS))
    parser.add_argument("--search", nargs="+", required=True, metavar="NAME=VALUES", help="settings to search")
    parser.add_argument("--trials", type=int, default=20, help="number of trials, with those of an earlier start")
    parser.add_argument("--storage", help="database of the trials, such as sqlite:///search.db")
    parser.add_argument("--metric", help="metric of the evaluation. Less is better")
    args, rest = parser.parse_known_args(argv)
    if any("=" not in part for part in args.search):
        parser.error(f"`--search` holds {args.search}; each must be NAME=LOW:HIGH or NAME=A,B,C.")
    return args, importlib.import_module(f"trl_promptkd.cli.{args.method}"), rest


def main() -> None:
    args, command, rest = read_flags()
    flags = command.make_parser()

    def make_trainer(settings: dict[str, Any], number: int) -> Any:
        drawn = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        parsed = flags.parse_args_and_config([*rest, *drawn])
        if parsed[1].eval_strategy == "no":
            flags.error("`--eval_strategy` is no, but trials are judged by an evaluation. Set it to `epoch`.")
        parsed[1].output_dir = os.path.join(parsed[1].output_dir, f"trial-{number}")
        return command.make_trainer(*parsed)

    space = dict(part.split("=", 1) for part in args.search)
    study = search(make_trainer, space, args.metric or METRICS[args.method], args.trials, args.storage)
    print(json.dumps({"value": study.best_value, "trial": study.best_trial.number, **study.best_params}, indent=1))


if __name__ == "__main__":
    main()
