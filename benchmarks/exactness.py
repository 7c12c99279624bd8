"""Whether both methods on a device agree with a row-by-row reference in float64 on the CPU.

The reference is that of the tests. It has no padding, cache or chunks, and uses no code of the package. All models are
tiny. Run as a script, this module compares steps under FSDP2: `python -m benchmarks.exactness differences.json cuda`.
"""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig


sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
os.environ.setdefault("CI", "1")  # nobody is asked anything

import reference
from padding import ROWS, pad
from tiny import answered_dataset, dequantized, tiny_model, tiny_tokenizer
from trainers import GREEDY, PRIMING, SGD, Maker, keep_windows

from trl_promptkd import build_teacher_cache
from trl_promptkd.losses.chunked import chunked_sums
from trl_promptkd.losses.promptkd import promptkd_loss_sums
from trl_promptkd.models.forward import completion_states, forward_logits
from trl_promptkd.models.teacher import freeze
from trl_promptkd.trainer.prompt_optimizer import PromptOptimizer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What a value may be off by, relative to it, and why
LIMITS = {
    "float32": (1e-4, "sums of some hundred terms in another order are off by 1e-6 to 1e-5, TF32 by 1e-3"),
    "bfloat16": (1e-1, "bfloat16 rounds by 4e-3, in some ten operations one after the other"),
}
CACHE = (5e-3, "what the preset `exact` of a teacher cache promises")


@dataclass
class Difference:
    what: str
    dtype: str
    off: float
    """The norm of the difference, divided by the norm of the value in float64."""
    limit: float
    why: str

    @property
    def is_small(self) -> bool:
        return self.off <= self.limit  # NaN is not


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    square = sum(
        float((found[name].detach().double().cpu() - value).square().sum()) for name, value in expected.items()
    )
    return (square / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def exactness(device: str) -> Iterator[Difference]:
    """Steps, padding and chunked losses in both dtypes."""
    for dtype, limit in LIMITS.items():
        torch.set_float32_matmul_precision("highest")  # no TF32
        for part in (steps, padding, chunks):
            for what, value in part(device, dtype):
                yield Difference(what, dtype, value, *(max(CACHE, limit) if "cache" in what else limit))


def in_float64(*models: nn.Module) -> list[Any]:
    return [copy.deepcopy(model).double() for model in models]


def update(model: nn.Module, start: nn.Module) -> dict[str, Tensor]:
    """The change of each weight by training. Sharded weights are gathered."""
    before = dict(start.named_parameters())
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name: value.detach().double().cpu() - before[name].detach() for name, value in whole.items()}


def steps(device: str, dtype: str) -> Iterator[tuple[str, float]]:
    """An optimizer step of each trainer, on a window of two batches."""
    for prompt_update in ("sequential", "simultaneous"):
        for share in (1.0, 0.5):
            name = f"PromptKD, {prompt_update}, share {share}"
            yield from step(name, device, dtype, prompt_update=prompt_update, prompt_share=share)
    yield from step("PrimedDistill", device, dtype)
    if device != "sharded":
        yield from step("PrimedDistill, from a cache", device, dtype)


def step(name: str, device: str, dtype: str, **settings: Any) -> Iterator[tuple[str, float]]:
    of_promptkd = name.startswith("PromptKD")
    student, teacher = tiny_model(seed=1), tiny_model(seed=2).to(DTYPES[dtype])
    start, student64, teacher64 = in_float64(student, student, teacher)
    settings |= SGD | {"gradient_accumulation_steps": 2, "use_cpu": device == "cpu", "bf16": dtype == "bfloat16"}
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # of the run before
    gradients, prompt_step = [], PromptOptimizer.step

    def recording(self):
        gradients.extend(parameter.grad.clone() for parameter in self.soft_prompt.parameters())
        return prompt_step(self)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(PromptOptimizer, "step", recording):
        if of_promptkd:
            settings |= {"prompt": {"prompt_learning_rate": 0.01}, "generation_kwargs": GREEDY}
        source: dict[str, Any] = {"teacher_model": teacher}
        if "cache" in name:
            parts = (answered_dataset(), f"{folder}/cache", tiny_tokenizer(), PRIMING, "exact")
            source = {"teacher_model": None, "teacher_cache": build_teacher_cache(teacher, *parts)}
        trainer = Maker("promptkd" if of_promptkd else "primed", Path(folder))(student, **source, **settings)
        prompt = trainer.prompt_embeddings().double().cpu() if of_promptkd else None
        windows = keep_windows(trainer)
        trainer.train()
    log, args = trainer.state.log_history[0], trainer.args
    if of_promptkd:
        how = {"prompt_update": args.prompt_update, "share": args.prompt_share}
        both = (student64, teacher64, prompt)
        loss, prompt_norm, norm = reference.promptkd_step(*both, windows[0], args.learning_rate, 0.01, **how)
        expected = prompt.grad * max(1.0, prompt_norm)  # the reference leaves the clipped one
        yield f"{name}: prompt's gradient", off({"": gradients[0]}, {"": expected})
    else:
        rows = [row for batch in windows[0] for row in batch]
        total = reference.primed_loss(student64, teacher64, rows, args.alpha, args.kd_temperature)["loss"]
        mean = total / sum(len(completion) for *_, completion in rows)
        loss, norm = float(mean.detach()), reference.sgd_step(student64, mean, args.learning_rate)
    yield f"{name}: loss", abs(log["loss"] / loss - 1)
    yield f"{name}: gradient's norm", abs(log["grad_norm"] / norm - 1)
    yield f"{name}: student's update", off(update(trainer.model, start), update(student64, start))


@torch.no_grad()
def padding(device: str, dtype: str) -> Iterator[tuple[str, float]]:
    """Probabilities after a soft prompt, of rows padded on each side, and of each row alone."""
    teacher = tiny_model(seed=2).to(DTYPES[dtype])
    (teacher64,) = in_float64(teacher)
    teacher.to(device)
    prompt = 0.3 * torch.randn(5, 32, generator=torch.manual_seed(0)).to(DTYPES[dtype]).float()
    alone = {str(i): reference.log_probs(teacher64, [*row, 0], 1, prompt.double()).exp() for i, row in enumerate(ROWS)}
    for side in ("left", "right", "both"):
        ids, mask, starts = pad(ROWS, side)
        found = forward_logits(teacher, ids.to(device), mask.to(device), prompt.to(device)).float().softmax(-1)
        rows = {str(i): found[i, at : at + len(ROWS[i])] for i, at in enumerate(starts)}
        yield f"padding: {side}", off(rows, alone)


def batch(device: str) -> list[Tensor]:
    """Ids, mask and labels of rows, trained from their second token on."""
    ids, mask, starts = pad(ROWS, "left")
    labels = torch.where(torch.arange(ids.size(1)) > torch.tensor(starts).unsqueeze(1), ids, -100)
    return [part.to(device) for part in (ids, mask, labels)]


def chunks(device: str, dtype: str) -> Iterator[tuple[str, float]]:
    """The losses of a few tokens at a time and their gradients by the hidden states, and those of dense logits."""
    student, teacher = (tiny_model(seed=seed).to(device, DTYPES[dtype]) for seed in (1, 2))
    prompt = torch.randn(5, 32, generator=torch.manual_seed(0)).to(device).requires_grad_()
    rows = batch(device)
    known, plain = completion_states(student, *rows), completion_states(teacher, *rows).detach()
    prompted = completion_states(teacher, *rows, prompt)
    states, log_probs = [], []
    for one in (known, prompted, plain):
        states.append(one.hidden_states.detach().cpu().double().requires_grad_())
        log_probs.append((states[-1] @ one.model.lm_head.weight.detach().cpu().double().T).log_softmax(-1))
    q, with_prompt, p = log_probs
    of_prompt = reference.kl(with_prompt, q.detach()) + 0.5 * reference.kl(with_prompt, p.detach())
    loss = of_prompt + reference.kl(q, with_prompt.detach())
    expected = torch.autograd.grad(loss, states[:2])
    for size in (1, 4, None):
        sums, found = chunked_sums(promptkd_loss_sums, size, known, prompted, plain, weight=0.5)
        yield f"loss in chunks of {size}: value", off({"": sums.loss}, {"": loss.detach()})
        for role, one, gradient in zip(("student", "prompted teacher"), found, expected, strict=True):
            yield f"loss in chunks of {size}: gradient of {role}", off({"": one.gradients[0]}, {"": gradient})


def quantized(model: Any) -> Any:
    """The same weights in 4 bits (NF4) on the same device, quantized as by `from_pretrained`."""
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model.dtype)
    settings = {"dtype": model.dtype, "quantization_config": bits, "device_map": {"": model.device}}
    config, weights = copy.deepcopy(model.config), model.state_dict()
    return type(model).from_pretrained(None, config=config, state_dict=weights, **settings)


def four_bit(device: str) -> Iterator[Difference]:
    """The gradient of a soft prompt through a 4-bit teacher, and through its weights without quantization."""
    torch.set_float32_matmul_precision("highest")
    for dtype, kind in DTYPES.items():
        teacher = freeze(quantized(tiny_model(seed=2, hidden_size=64, intermediate_size=128).to(device, kind)))
        (teacher64,) = in_float64(dequantized(teacher).cpu())
        prompt = torch.randn(5, 64, generator=torch.manual_seed(0))
        trained, expected = (prompt.to(*how).clone().requires_grad_() for how in ((device,), ("cpu", torch.float64)))
        with torch.no_grad():  # as in training, a pass without gradients comes first
            plain = completion_states(teacher, *batch(device)).logits().log_softmax(-1)
        prompted = completion_states(teacher, *batch(device), trained).logits().log_softmax(-1)
        reference.kl(prompted, plain).backward()
        for row in ROWS:
            p = reference.log_probs(teacher64, row, 1).detach()
            reference.kl(reference.log_probs(teacher64, row, 1, expected), p).backward()
        value = off({"": trained.grad}, {"": expected.grad})
        yield Difference("4-bit teacher: prompt's gradient", dtype, value, *LIMITS[dtype])


def under_fsdp2(device: str) -> Iterator[Difference]:
    """The steps with both models sharded over one rank. For a process of its own."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    if device == "cpu":  # accelerate shards on GPUs only; see tests/scripts/distributed_run.py
        import accelerate.state
        import transformers.training_args

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        backend = ("gloo", accelerate.state.DistributedType.MULTI_GPU)
        accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: backend
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    torch.set_float32_matmul_precision("highest")
    for what, value in steps("sharded", "float32"):
        yield Difference(f"FSDP2, {what}", "float32", value, *LIMITS["float32"])


if __name__ == "__main__":
    found = [asdict(one) for one in under_fsdp2(sys.argv[2])]
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
