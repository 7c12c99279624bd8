"""Teacher and students of the small world: trained once, kept in a folder."""

import os
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from world import Problem, gold_answer, make_problem, make_tokenizer, teacher_text, write_answer


TEACHER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
STUDENT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


def new_model(shape: dict, seed: int) -> LlamaForCausalLM:
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def learn(model, next_rows, steps: int, peak_rate: float, batch_size: int, name: str) -> None:
    """Cross-entropy on answers, one cycle of the learning rate."""
    tokenizer = make_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps, pct_start=0.05)
    model.train()
    for _ in (bar := tqdm(range(steps), desc=name, mininterval=5)):
        texts = next_rows(batch_size)
        prompts, answers = (tokenizer(list(part)).input_ids for part in zip(*texts, strict=True))
        rows = [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.tensor([p + a + [tokenizer.pad_token_id] * (width - len(p) - len(a)) for p, a in rows])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows])
        loss = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def save(model, path: Path) -> None:
    """Whole or not at all: other processes look for it."""
    unfinished = path.with_name(f"{path.name}_{os.getpid()}")
    model.save_pretrained(unfinished)
    if path.exists():  # another process was faster, with the same weights
        shutil.rmtree(unfinished)
    else:
        unfinished.rename(path)


KEPT_TEACHER = Path(__file__).parent / "teacher.safetensors"


def teacher(folder: Path, steps: int = 2000) -> LlamaForCausalLM:
    """About a million parameters, trained on an endless stream of answers by all three writers.

    Training gives other weights on another kind of CPU, so one teacher is kept in half precision, and taken if it is
    there. Delete the file to train one.
    """
    path = folder / f"teacher_{steps}"
    if not path.exists():
        model = new_model(TEACHER, seed=0)
        if KEPT_TEACHER.exists():
            load_model(model, KEPT_TEACHER)
        else:
            rng = random.Random(0)
            learn(model, lambda size: [teacher_text(rng) for _ in range(size)], steps, 2e-3, 48, "teacher")
            save_model(model.half(), str(KEPT_TEACHER))
        save(model.float(), path)
    return LlamaForCausalLM.from_pretrained(path).eval().requires_grad_(False)


def training_rows(num_rows: int) -> list[tuple[str, str]]:
    """(question, gold answer): the finite training set, the same for all seeds."""
    rng = random.Random("train")
    problems = training_problems(num_rows)
    return [(problem.question, gold_answer(problem, rng)) for problem in problems]


def training_problems(num_rows: int) -> list[Problem]:
    rng = random.Random("train problems")
    return [make_problem(rng) for _ in range(num_rows)]


def student(folder: Path, seed: int, steps: int, num_rows: int, writer: str = "gold") -> LlamaForCausalLM:
    """About 170,000 parameters, after `steps` of SFT with 32 rows each on the training set's questions, answered as
    the data does, or by one writer."""
    path = folder / f"student_{seed}_{steps}_{num_rows}_{writer}"
    if not path.exists():
        rows, rng = training_rows(num_rows), random.Random(seed)
        if writer != "gold":
            by_writer = random.Random(writer)
            problems = training_problems(num_rows)
            rows = [(problem.question, write_answer(problem, writer, by_writer)) for problem in problems]
        model = new_model(STUDENT, seed=1000 + seed)

        def next_rows(size: int):
            return [(f"{question} answer :", answer) for question, answer in rng.choices(rows, k=size)]

        learn(model, next_rows, steps, 3e-3, 32, f"student {seed}, {writer}")
        save(model, path)
    return LlamaForCausalLM.from_pretrained(path)
