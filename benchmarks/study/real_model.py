"""The real model: from a student that SFT has warmed up on Dolly, further by SFT, SeqKD, GKD and PromptKD, as many
steps each.

    python examples/smollm2.py --output_dir models --student_layers 15
    python benchmarks/study/real_model.py --teacher models/teacher --student models/student \\
        --train dolly_train.jsonl --output_dir study_real

Each method's student is saved in a folder of its own, with what the trainer logged beside it; finished ones are not
trained again. `real_measure.py` measures them.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd.generation.rollouts import generate_completions


METHODS = {
    "sft": {},
    "seqkd": {},
    "gkd": {},
    "promptkd": {},
    "promptkd_lr1e-3": {"prompt_learning_rate": 1e-3},
    "promptkd_lr1e-2": {"prompt_learning_rate": 1e-2},
}
WARM_ROWS, TRAINED_ROWS, EVAL_ROWS = 384, 192, 24


def read_rows(path: str, tokenizer, longest_prompt: int = 96, longest_answer: int = 96) -> list[dict]:
    """Conversations of one question and its gold answer, without those that are long."""
    rows = []
    for row in load_dataset("json", data_files=path, split="train"):
        question = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        prompt = [{"role": "user", "content": question}]
        length = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        if length <= longest_prompt and len(tokenizer.encode(row["output"])) <= longest_answer:
            rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": row["output"]}]})
    return rows


def teacher_answers(rows: list[dict], teacher, tokenizer, path: Path, max_new_tokens: int) -> list[dict]:
    """The same questions with the teacher's greedy answers."""
    if not path.exists():
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows
        ]
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        found = generate_completions(teacher, prompts, config, batch_size=16)
        path.write_text(json.dumps(tokenizer.batch_decode(found, skip_special_tokens=True)))
    texts = json.loads(path.read_text())
    return [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}]}
        for row, text in zip(rows, texts, strict=True)
    ]


def make_trainer(name: str, student, teacher, tokenizer, rows: list[dict], teachers: list[dict], args, folder: Path):
    """The trainer of one method; all see the same questions in the same order."""
    settings = {
        "output_dir": str(folder),
        "learning_rate": args.learning_rate,
        "num_train_epochs": 1,
        "per_device_train_batch_size": args.batch_size,
        "warmup_steps": 2,
        "lr_scheduler_type": "constant_with_warmup",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": args.seed,
        "max_length": 256,
    }
    if name in ("warm", "sft", "seqkd"):
        data = Dataset.from_list(teachers if name == "seqkd" else rows)
        return SFTTrainer(student, SFTConfig(**settings), train_dataset=data, processing_class=tokenizer)
    data = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in rows])
    settings |= {"lmbda": 1.0, "beta": 1.0, "temperature": 1.0, "max_new_tokens": args.max_new_tokens}
    if name == "gkd":
        config = GKDConfig(**settings)
        return GKDTrainer(student, teacher, config, train_dataset=data, processing_class=tokenizer)
    evaluated = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in args.eval_rows])
    return PromptKDTrainer(
        student,
        teacher,
        PromptKDConfig(**settings, eval_strategy="no", per_device_eval_batch_size=8),
        train_dataset=data,
        eval_dataset=evaluated,
        prompt_encoder_config=PromptEncoderConfig(**METHODS[name]),
        processing_class=tokenizer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--student", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="JSON lines with instruction, input, output")
    parser.add_argument("--output_dir", type=Path, default=Path("study_real"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=10)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    rows = read_rows(args.train, tokenizer)
    args.eval_rows = rows[-EVAL_ROWS:]
    warm_rows, rows = rows[:WARM_ROWS], rows[WARM_ROWS : WARM_ROWS + TRAINED_ROWS]
    written = args.output_dir / "teacher_answers.json"
    teachers = teacher_answers(rows, teacher, tokenizer, written, 96) if "seqkd" in args.methods else []
    for name in ["warm", *args.methods]:
        folder = args.output_dir / name
        if folder.exists():
            continue
        start = args.student if name == "warm" else args.output_dir / "warm"
        student = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        work = args.output_dir / f"{name}.unfinished"
        shutil.rmtree(work, ignore_errors=True)
        used = warm_rows if name == "warm" else rows
        trainer = make_trainer(name, student, teacher, tokenizer, used, teachers, args, work)
        clock, cpu = time.time(), time.process_time()
        trainer.train()
        seconds = {"seconds": time.time() - clock, "cpu_seconds": time.process_time() - cpu}
        trainer.save_model(work)
        (work / "run.json").write_text(json.dumps({"name": name, **seconds, "log": trainer.state.log_history}))
        work.rename(folder)
        print(f"{name}: {seconds['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
