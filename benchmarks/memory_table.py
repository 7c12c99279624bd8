"""What a run of PromptKD needs in memory, and what a served teacher sends, by model size: the tables of
docs/scaling.md.

    python benchmarks/memory_table.py                    # prints the tables
    python benchmarks/memory_table.py --write            # puts them into docs/scaling.md, between their markers
    python benchmarks/memory_table.py --measure          # one real run on SmolLM2 beside its estimate (its peak)

The figures are computed, not measured: models of the published shapes are made without weights (on the meta device),
and the doctor's estimate (`trl_promptkd/doctor/memory.py`) is asked about them. `--measure` says how far off it is on
the machine at hand.
"""

import argparse
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from trl_promptkd.doctor.memory import estimate_memory


PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
START, END = "<!-- table: {} -->", "<!-- end -->"
ROWS, ACCUMULATION, PROMPT, NEW, VIRTUAL = 4, 8, 256, 256, 7
BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit format


def qwen2(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, tied: bool) -> PretrainedConfig:
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


def llama(hidden: int, layers: int, heads: int, inner: int) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        intermediate_size=inner,
        vocab_size=128256,
    )


CONFIGS = {  # as in the models' published `config.json`
    "Qwen2.5-0.5B": qwen2(896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-7B": qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2.5-32B": qwen2(5120, 64, 40, 8, 27648, 152064, False),
    "Llama-3.1-8B": llama(4096, 32, 32, 14336),
    "Llama-3.1-70B": llama(8192, 80, 64, 28672),
    "Llama-3.1-405B": llama(16384, 126, 128, 53248),
}
# Student, how it is trained, teacher, how it is held
RUNS = [
    ("Qwen2.5-0.5B", "all weights", "Qwen2.5-1.5B", "bfloat16"),
    ("Qwen2.5-0.5B", "all weights", "Qwen2.5-7B", "bfloat16"),
    ("Qwen2.5-0.5B", "QLoRA", "Qwen2.5-7B", "4 bits"),
    ("Qwen2.5-1.5B", "all weights", "Qwen2.5-7B", "bfloat16"),
    ("Qwen2.5-1.5B", "LoRA", "Qwen2.5-7B", "4 bits"),
    ("Qwen2.5-7B", "LoRA", "Qwen2.5-32B", "bfloat16"),
    ("Qwen2.5-7B", "QLoRA", "Qwen2.5-32B", "4 bits"),
    ("Qwen2.5-7B", "all weights", "Qwen2.5-32B", "bfloat16"),
    ("Llama-3.1-8B", "LoRA", "itself", ""),
    ("Llama-3.1-8B", "QLoRA", "Llama-3.1-70B", "4 bits"),
    ("Llama-3.1-8B", "all weights", "Llama-3.1-70B", "bfloat16"),
]

SERVED = [  # Teacher, bytes a weight, GPUs
    ("Qwen2.5-7B", 2, 1),
    ("Qwen2.5-32B", 2, 1),
    ("Llama-3.1-70B", 2, 4),
    ("Llama-3.1-405B", 1, 8),
    ("Llama-3.1-405B", 2, 16),
]
GPU_FLOPS = 0.4 * 989e12  # two fifths of an H100's dense bfloat16 rate, as its data sheet states it
GIGABIT = 1e9 / 8  # bytes a second


def model_of(name: str, held: str) -> Any:
    """A model of the published shape without weights; `held` is "float32", "bfloat16" or "4 bits"."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            CONFIGS[name], dtype=torch.float32 if held == "float32" else torch.bfloat16
        )
    if held == "4 bits":
        for module in model.get_decoder().modules():
            if isinstance(module, nn.Linear):
                number = module.weight.numel()
                packed = torch.empty(number // 2, 1, dtype=torch.uint8, device="meta")
                module.weight = nn.Parameter(packed, requires_grad=False)
                module.register_buffer("absmax", torch.empty(number // BLOCK, device="meta"))
    return model


def estimate(student: Any, teacher: Any, lora: bool, checkpointing: bool = True, **sizes: int) -> dict[str, float]:
    """The doctor's estimate in GB, for rows of `prompt` and `new` tokens."""
    rows, accumulation, prompt, new = (sizes[name] for name in ("rows", "accumulation", "prompt", "new"))
    ids = {"prompt_ids": [0] * prompt, "teacher_prompt_ids": [0] * prompt, "completion_ids": []}
    case: Any = SimpleNamespace(
        student=student,
        teacher=teacher,
        views=[ids],
        soft_prompt=torch.empty(VIRTUAL, 1, device="meta"),
        is_sampled=True,
        args=SimpleNamespace(
            max_new_tokens=new,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            teacher_gradient_checkpointing=checkpointing,
            loss_chunk_size=256,
        ),
        lora=lora,
        is_self_distillation=teacher is student,
    )
    return estimate_memory(case)


def memory_table() -> Iterator[str]:
    columns = ("student", "teacher", "total, GB", "student's weights", "gradients, AdamW", "teacher's weights")
    yield f"| {' | '.join((*columns, 'sampling', 'training'))} |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, trained, teacher_name, held in RUNS:
        student = model_of(name, {"all weights": "float32", "LoRA": "bfloat16", "QLoRA": "4 bits"}[trained])
        teacher = student if teacher_name == "itself" else model_of(teacher_name, held)
        parts = estimate(
            student, teacher, trained != "all weights", rows=ROWS, accumulation=ACCUMULATION, prompt=PROMPT, new=NEW
        )
        figures = [
            parts["student"],
            parts["gradients"] + parts["AdamW"],
            parts["teacher"],
            parts["rollouts"],
            parts["activations"] + parts["logits"],
        ]
        shown = " | ".join(f"{figure:.1f}" for figure in figures)
        total = parts["total"] - parts["process"]
        yield f"| {name}, {trained} | {teacher_name}{held and ', ' + held} | **{total:.0f}** | {shown} |"


def wire_table() -> Iterator[str]:
    """What a served teacher takes and sends, and how long that takes at the least."""
    columns = ("teacher", "weights, GB", "GPUs", "KB per token", "10 M tokens, GB", "100 M tokens, GB")
    times = ("100 M tokens: computing, hours", "sending at 1 Gbit/s, hours", "at 10 Gbit/s, hours")
    yield f"| {' | '.join(columns + times)} |"
    yield f"| {' | '.join(['---'] * 9)} |"
    for name, weight_bytes, gpus in SERVED:
        weights = sum(parameter.numel() for parameter in model_of(name, "bfloat16").parameters())
        held = {1: "8 bits", 2: "bfloat16"}[weight_bytes]
        size = 2 * CONFIGS[name].hidden_size  # bfloat16 on the wire
        computing = 2 * weights * 100e6 / (gpus * GPU_FLOPS) / 3600  # a multiplication and an addition a weight
        sending = [100e6 * size / (speed * GIGABIT) / 3600 for speed in (1, 10)]
        hours = " | ".join(f"{figure:.1f}" for figure in (computing, *sending))
        yield (
            f"| {name}, {held} | {weights * weight_bytes / 1e9:.0f} | {gpus} | {size / 1e3:.0f} | {size / 100:.0f} | "
            f"{size / 10:.0f} | {hours} |"
        )


TABLES = {"memory": memory_table, "wire": wire_table}


def measure(teacher: str | None, student: str | None, rows: int, accumulation: int, new: int, lora: bool) -> None:
    """Two optimizer steps in this process; its peak beside the estimate."""
    from common import load_models
    from datasets import Dataset
    from peft import LoraConfig

    from trl_promptkd import PromptKDConfig, PromptKDTrainer

    models = load_models(teacher, student)
    prompt = 128
    ids = (torch.arange(rows * accumulation * 2 * prompt) % 20_000 + 100).view(-1, prompt).tolist()
    parts = estimate(
        models.student, models.teacher, lora, False, rows=rows, accumulation=accumulation, prompt=prompt, new=new
    )
    with tempfile.TemporaryDirectory() as folder:
        args = PromptKDConfig(
            output_dir=folder,
            max_steps=2,
            max_new_tokens=new,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=False,
            save_strategy="no",
            bf16=False,
            report_to="none",
        )
        PromptKDTrainer(
            model=models.student,
            teacher_model=models.teacher,
            args=args,
            train_dataset=Dataset.from_dict({"prompt_ids": ids}),
            processing_class=models.tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear") if lora else None,
        ).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print({name: round(size, 2) for name, size in parts.items()})
    print(f"estimate {parts['total']:.2f} GB, peak of the process {peak:.2f} GB, ratio {parts['total'] / peak:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument("--measure", action="store_true", help="one real run beside its estimate")
    parser.add_argument("--teacher", help="of the real run; by default SmolLM2-135M-Instruct")
    parser.add_argument("--student", help="of the real run; by default 11 of its layers")
    parser.add_argument("--rows", type=int, default=4, help="of the real run: rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="of the real run: micro-batches of a step")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of the real run")
    parser.add_argument("--lora", action="store_true", help="of the real run: train an adapter")
    args = parser.parse_args()
    if args.measure:
        measure(args.teacher, args.student, args.rows, args.accumulation, args.max_new_tokens, args.lora)
        return
    page = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        lines = "\n".join(table())
        print(f"{lines}\n")
        start = START.format(name)
        page, found = re.subn(f"{start}.*?{END}", f"{start}\n{lines}\n{END}", page, flags=re.DOTALL)
        if found != 1:
            sys.exit(f"{PAGE} does not hold the marker {start} once, with {END} after it.")
    if args.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
