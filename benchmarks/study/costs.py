"""What a step of each kind costs, in seconds of one core, generation included: `costs.json`.

Methods are compared after an equal time. Each run's number of steps follows from this file, so that it does not depend
on what else the machine did, and a run can be made again. The kinds take turns, and medians are kept.

    python benchmarks/study/costs.py --folder study
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from candidates import anchor_answers
from measure import answers, prompt_ids
from methods import Clock, kept, make_trainer
from models import student, teacher, training_rows


COSTS = Path(__file__).with_name("costs.json")
KINDS = {
    "sft": {"method": "sft"},
    "kd": {"method": "kd"},
    "gkd": {"method": "gkd"},
    "promptkd": {"method": "promptkd"},
    "anchored": {"method": "promptkd", "anchor": "gold", "anchor_weight": 1.0},
}
STEPS, ROUNDS, SKIPPED = 12, 5, 2
NUM_ANSWERS, TUNED = 250, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("study"), help="models")
    parser.add_argument("--student", type=int, default=100, help="seed of the student")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    model = teacher(args.folder)
    prompts = prompt_ids([question for question, _ in training_rows(800)][:NUM_ANSWERS])

    def timed(name: str, part: int, function, *arguments) -> None:
        start = time.process_time()
        function(*arguments)
        found.setdefault(name, []).append((time.process_time() - start) / part)

    for _ in range(ROUNDS):
        for name, stage in KINDS.items():
            stage = stage | {"learning_rate": 1e-3, "steps": STEPS}
            pupil = student(args.folder, args.student, 1000, 800)
            trainer = make_trainer(stage, pupil, model, 0, 800, args.folder / "costs")
            trainer.add_callback(clock := Clock())
            trainer.train()
            found.setdefault(name, []).append(statistics.median(clock.seconds[SKIPPED:]))
        timed("tuned", TUNED, trainer.tune_prompt, TUNED, 1e-3, 16, 0)
        timed("greedy_answer", NUM_ANSWERS, answers, model, prompts, None)
        timed("sampled_answer", NUM_ANSWERS, answers, model, prompts, 1)
        timed("right_answer", 800, anchor_answers, model, "right", 800)
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    kept(COSTS, machine | {name: statistics.median(values) for name, values in found.items()})
    print(json.dumps(json.loads(COSTS.read_text()), indent=1))


if __name__ == "__main__":
    main()
