"""Run by test_api_teacher.py, alone and under torchrun: a short training on answers from a server.

Arguments: the server's URL, a folder, and rows per rank.
"""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(__file__)), "support"))

from runs import short_run
from safetensors.torch import save_file
from tiny import prompt_dataset, tiny_model, tiny_tokenizer, weights
from trainers import SGD

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, PrimingTemplate


url, folder, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
settings = {"response_source": "teacher", "teacher_answers_url": url, "rollout_batch_size": 1, "max_steps": 3}
trainer = PrimedDistillTrainer(
    tiny_model(seed=1),
    short_run(PrimedDistillConfig, folder, {**SGD, **settings, "per_device_train_batch_size": rows}),
    train_dataset=prompt_dataset(13),
    processing_class=tiny_tokenizer(),
    priming=PrimingTemplate("red "),
)
trainer.train()
rank = trainer.accelerator.process_index
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
answers = trainer.train_dataset["completion_ids"][:]
(folder / f"rank{rank}.json").write_text(json.dumps({"losses": losses, "answers": answers}))
save_file(weights(trainer.model), folder / f"rank{rank}.safetensors")
