"""Checks that ask the models, on a few rows.

Each function is one check: it takes a [`Case`] and says what it found. What raises is a failed check, see `diagnosis.py`.
"""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..divergences import kl_divergence, on_shared_support
from ..generation.rollouts import stop_ids
from ..losses.chunked import chunked_sums
from ..losses.promptkd import prompt_loss_sums, promptkd_loss_sums, student_loss_sums
from ..models.compare import distance, distances_from_own_forward, is_exact, is_same
from .case import Case, Finding


__all__ = [
    "finite_logits",
    "padding_soft_prompt",
    "padding_student",
    "padding_teacher",
    "quality",
    "quantization",
    "repeatability",
    "sampling",
    "soft_prompt_gradient",
    "window_split",
]

_GRADIENT_ERROR, _GRADIENT_FACTOR = 0.05, 2.0  # of a slope: relatively (float32); up or down (16 bits, quantized)
_STEPS, _COARSE_STEPS = (1e-2, 3e-3, 3e-2), (3e-2, 1e-1, 1e-2, 3e-1)  # shares of the soft prompt's norm
_QUALITY_TOKENS = 1024  # that both models' answers are measured on, prompts included
_FAR, _SAME = 3.0, 1e-4  # nats a token


@torch.no_grad()
def finite_logits(case: Case) -> Finding:
    """NaN or infinite logits make every loss NaN; float16 overflows are a common cause. Tokens that a model rules out are left out."""
    minus: dict[str, int] = {}
    for role, model in (("student", case.student), ("teacher", case.teacher)):
        logits = case.states(model, case.batch(role)).logits()
        lowest = logits <= torch.finfo(model.dtype).min
        wrong = int((~torch.isfinite(logits) & ~lowest).sum())
        wrong += int((lowest & ~lowest.all(dim=0)).sum())
        if wrong:
            return Finding(
                "finite_logits",
                "fail",
                f"{wrong} of {logits.numel()} logits of the {role} are NaN or infinite",
                f"Load the {role} in bfloat16 or float32 if it is in float16, and check its weights.",
            )
        minus[role] = int(lowest.all(dim=0).sum())
    values = {f"{role}_ruled_out": number for role, number in minus.items()}
    if any(minus.values()):
        found = " and ".join(f"{number} by the {role}" for role, number in minus.items() if number)
        return Finding(
            "finite_logits",
            "pass",
            f"entries of the vocabulary are ruled out, {found}; compared on the others",
            "",
            values,
        )
    return Finding("finite_logits", "pass", f"all finite, {len(case.probes)} rows of both models", "", values)


@torch.no_grad()
def repeatability(case: Case) -> Finding:
    """A teacher that still drops out says something else in every pass."""
    batch = case.batch("teacher")
    first, second = (case.states(case.teacher, batch, case.soft_prompt).logits() for _ in range(2))
    off = distance(first, second)
    if not is_same(off, is_exact(case.teacher), slack=0.1):
        return Finding(
            "repeatability",
            "fail",
            f"two passes of the teacher over one batch differ by {off.log_probs:.2g} in log-probabilities",
            "Something in it is random in evaluation mode, such as a dropout with `training=True`. Switch it off.",
            {"difference": off.log_probs},
        )
    return Finding(
        "repeatability", "pass", "two passes of the teacher over one batch agree", "", {"difference": off.log_probs}
    )


def padding_student(case: Case) -> Finding:
    """Absolute positions counted through padding, or rows that see each other: rows then get other logits than alone."""
    return _padding(case, "student", case.student, None, "padding_student")


def padding_teacher(case: Case) -> Finding | None:
    """The same for the teacher."""
    return None if case.distils_itself else _padding(case, "teacher", case.teacher, None, "padding_teacher")


def padding_soft_prompt(case: Case) -> Finding | None:
    """A soft prompt that stands before the padding instead of the text is far away from it."""
    if case.soft_prompt is None:
        return None
    return _padding(case, "teacher", case.teacher, case.soft_prompt, "padding_soft_prompt")


@torch.no_grad()
def _padding(case: Case, view: str, model: Any, soft_prompt: Tensor | None, name: str) -> Finding:
    """Compare the passes of the trainers with the model's own call on every row alone."""
    prompts = "prompt_ids" if view == "student" else "teacher_prompt_ids"
    rows = [{"prompt_ids": row[prompts], "completion_ids": row["completion_ids"]} for row in case.probes]
    pad = case.tokenizer.pad_token_id
    distances = distances_from_own_forward(model, rows, pad, soft_prompt, case.vocab_size)
    worst = max(distances, key=lambda way: distances[way].log_probs)
    difference, kl = distances[worst]
    values = {"difference": difference, "kl": kl}
    about = f"{difference:.1e} in log-probabilities, {max(kl, 0.0):.1e} nats a token"
    if view == "student":
        naive = _without_positions(case, model)
        values["difference_without_position_ids"] = naive
        about += f" (without position ids, as GKDTrainer asks, {naive:.1e})"
    if not all(is_same(off, is_exact(model)) for off in distances.values()):
        return Finding(
            name,
            "fail",
            f"the pass {worst}, is off the model's own call on the row alone by {about}",
            "The forward pass must take `position_ids` and the attention mask, and rows must not see each other. Use transformers' "
            "own class for this model, or one that does.",
            values,
        )
    return Finding(name, "pass", f"padded rows are as alone, to {about}", "", values)


def _without_positions(case: Case, model: Any) -> float:
    """How far the logits of a padded batch are from the trainers' own without position ids, in log-probabilities."""
    batch = case.batch("student", padding=(7, 3))
    trained = batch["labels"][:, 1:] != -100
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    exact = case.states(model, batch).logits()
    return distance(logits[:, :-1][trained][:, : case.vocab_size], exact).log_probs


def soft_prompt_gradient(case: Case) -> Finding | None:
    """The gradient through a quantized or unusual teacher can be silently wrong; a difference of two losses cannot."""
    if case.soft_prompt is None:
        return None
    batch, teacher = case.batch("teacher"), case.teacher
    with torch.no_grad():
        student, plain = (case.states(model, batch).detach() for model in (case.student, teacher))
    sums = partial(promptkd_loss_sums, prompt_loss=prompt_loss_sums, student_loss=None)

    def loss(soft_prompt: Tensor):
        return chunked_sums(sums, case.loss_chunk_size, student, case.states(teacher, batch, soft_prompt), plain)

    start = case.soft_prompt.clone().requires_grad_(True)
    _, found = loss(start)
    if not found:
        raise ValueError("The teacher's states have no gradient path back to the soft prompt.")
    states, outer = found[0].tensors[0], found[0].gradients[0]
    (gradient,) = torch.autograd.grad(states, start, outer.to(states.dtype), allow_unused=True)
    norm = 0.0 if gradient is None else float(gradient.norm())
    advice = "Load the teacher without quantization or in another one, or use transformers' own class for it."
    if gradient is None or not norm or not torch.isfinite(gradient).all():
        return Finding("soft_prompt_gradient", "fail", f"the gradient's norm is {norm}", advice, {"norm": norm})
    direction = gradient / norm
    exact = is_exact(teacher)
    low, high = (1 - _GRADIENT_ERROR, 1 + _GRADIENT_ERROR) if exact else (1 / _GRADIENT_FACTOR, _GRADIENT_FACTOR)
    slope = 0.0
    for share in _STEPS if exact else _COARSE_STEPS:  # a small one drowns in rounding, a large one goes round the bend
        step = share * float(start.detach().norm())
        with torch.no_grad():
            (up, *_), _ = loss(start + step * direction)
            (down, *_), _ = loss(start - step * direction)
        found_slope = float(up - down) / (2 * step)
        if abs(found_slope / norm - 1) < abs(slope / norm - 1):
            slope = found_slope
        if low <= slope / norm <= high:
            break
    ratio = slope / norm
    values = {"norm": norm, "slope": slope}
    if not low <= ratio <= high:
        return Finding(
            "soft_prompt_gradient",
            "fail",
            f"a step along the gradient changes the loss by {ratio:.2g} times what the gradient says (norm {norm:.2g}, slope {slope:.2g})",
            advice,
            values,
        )
    return Finding(
        "soft_prompt_gradient",
        "pass",
        f"norm {norm:.2g}; a step along it changes the loss as it says ({ratio:.3f})",
        "",
        values,
    )


def window_split(case: Case) -> Finding:
    """How a window is split into micro-batches must not change the loss or the student's gradient."""
    trainable = [parameter for parameter in case.student.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in trainable if parameter.ndim == 1]  # small, and in every layer
    watched = vectors or sorted(trainable, key=lambda parameter: parameter.numel())[:1]
    whole, gradients = _window(case, [list(range(len(case.probes)))], watched)
    parts, part_gradients = _window(case, [[index] for index in range(len(case.probes))], watched)
    off = abs(parts / whole - 1) if whole else 0.0
    norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
    difference = float(sum((g - h).square().sum() for g, h in zip(gradients, part_gradients, strict=True))) ** 0.5
    gradient_off = difference / norm if norm else 0.0
    limit = 1e-3 if is_exact(case.student) and is_exact(case.teacher) else 0.1
    values = {"loss": whole, "loss_off": off, "gradient_off": gradient_off}
    if not (off <= limit and gradient_off <= limit):  # NaN is wrong, too
        return Finding(
            "window_split",
            "fail",
            f"{len(case.probes)} micro-batches of one row give a loss of {parts:.4g} nats a token, one of all rows {whole:.4g}; the gradients "
            f"differ by {gradient_off:.1%}",
            "Rows see each other, or their padding (a batch norm, a mixture of experts with a capacity), or the loss is not finite. Use "
            "another model, or micro-batches of one row.",
            values,
        )
    gradient = f", the gradients to {gradient_off:.1e}" if watched else " (the student has nothing to train)"
    return Finding(
        "window_split",
        "pass",
        f"one micro-batch and {len(case.probes)} give the same loss ({whole:.3g} nats a token) to {off:.1e}{gradient}",
        "",
        values,
    )


def _window(case: Case, batches: list[list[int]], watched: list[Tensor]) -> tuple[float, list[Tensor]]:
    """The student's loss over all probes, in nats a token, and its gradient with respect to `watched`."""
    sums = partial(promptkd_loss_sums, prompt_loss=None, student_loss=partial(student_loss_sums, beta=1.0))
    num_tokens = sum(len(row["completion_ids"]) for row in case.probes)
    total, gradients = 0.0, [torch.zeros_like(parameter, dtype=torch.float32) for parameter in watched]
    for indices in batches:
        rows = [case.probes[index] for index in indices]
        with torch.no_grad():
            teacher = case.states(case.teacher, case.batch("teacher", rows), case.soft_prompt).detach()
        student = case.states(case.student, case.batch("student", rows))
        (loss, *_), found = chunked_sums(sums, case.loss_chunk_size, student, teacher, None)
        total += float(loss) / num_tokens
        if watched:
            states, outer = found[0].tensors[0], found[0].gradients[0] / num_tokens
            parts = torch.autograd.grad(states, watched, outer.to(states.dtype), allow_unused=True)
            for known, part in zip(gradients, parts, strict=True):
                if part is not None:
                    known += part
    return total, gradients


def sampling(case: Case) -> Finding:
    """A student that stops at once is trained on nothing but end-of-text tokens."""
    start = time.perf_counter()
    samples = case.samples
    seconds = time.perf_counter() - start
    ends = stop_ids(case.generation_config())
    empty = sum(len(ids) <= 1 and ids[-1] in ends for ids in samples)
    ended = sum(ids[-1] in ends for ids in samples)
    mean = sum(map(len, samples)) / len(samples)
    values = {"mean_length": mean, "empty": empty, "ended": ended}
    if empty >= 0.75 * len(samples):
        return Finding(
            "sampling",
            "warn",
            f"{empty} of {len(samples)} of the student's samples end at once",
            "Warm the student up by supervised fine-tuning, and check that the prompts end where an answer begins.",
            values,
        )
    speed = f", {sum(map(len, samples)) / seconds:.0f} tokens a second" if seconds > 0.1 else ""
    first = case.tokenizer.decode(max(samples, key=len), skip_special_tokens=True).strip().replace("\n", " ")
    return Finding(
        "sampling",
        "pass",
        f"{len(samples)} samples of {mean:.0f} tokens on average, {ended} of them ended{speed}, such as {first[:40]!r}",
        "",
        values,
    )


@torch.no_grad()
def quality(case: Case) -> Finding | None:
    """A teacher that knows no better has nothing to teach, and a student that knows nothing collapses on its own samples."""
    rows: list[dict[str, list[int]]] = []
    tokens = 0
    for row in case.views:
        size = len(row["teacher_prompt_ids"]) + len(row["completion_ids"])
        if row["completion_ids"] and (not rows or tokens + size <= _QUALITY_TOKENS):
            rows.append(row)
            tokens += size
    if not rows:
        return None
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for row in rows:
        labels = torch.tensor(row["completion_ids"], device=case.student.device)
        student = case.states(case.student, case.batch("student", [row]))
        plain = case.states(case.teacher, case.batch("student", [row]))
        primed = plain if case.priming is None else case.states(case.teacher, case.batch("teacher", [row]))
        costs, _ = chunked_sums(_quality_sums, case.loss_chunk_size, student, plain, primed, labels)
        sums += torch.stack(costs).double().cpu()
        count += len(labels)
    nll_student, nll_teacher, nll_primed, kl = (sums / count).tolist()
    values = {"nll_student": nll_student, "nll_teacher": nll_teacher, "reverse_kl": kl, "rows": len(rows)}
    found = f"answers cost {nll_student:.2f} nats a token under the student, {nll_teacher:.2f} under the teacher"
    nll_best = nll_teacher
    if case.priming is not None:
        values["nll_primed_teacher"] = nll_best = nll_primed
        found += f", {nll_primed:.2f} behind the priming text"
    found += f"; KL(student || teacher) {kl:.2f}"
    if not kl <= _FAR:
        advice = "Warm the student up by supervised fine-tuning on answers first: on-policy distillation of a student that is far off collapses."
        return Finding("quality", "warn", found, advice, values)
    if kl < _SAME and not case.distils_itself:
        return Finding(
            "quality", "warn", found, "The student already is the teacher: there is nothing to learn.", values
        )
    if nll_best >= nll_student and not (case.distils_itself and case.priming is None):
        advice = "The teacher has nothing to teach on these answers. Take another teacher, priming text or data, or let the teacher write the answers."
        return Finding("quality", "warn", found, advice, values)
    return Finding("quality", "pass", found, "", values)


def _quality_sums(student: Tensor, plain: Tensor, primed: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Negative log-likelihoods of the tokens under all three, and KL(student || what it learns from), summed."""
    nll = [-logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).sum() for logits in (student, plain, primed)]
    log_q, log_p = (logits.log_softmax(dim=-1) for logits in on_shared_support(student, primed))
    return (*nll, kl_divergence(log_q, log_p).sum())


def quantization(case: Case) -> Finding | None:
    """4-bit weights are repacked for a kernel without a backward pass on some CPUs; freezing a teacher undoes it."""
    method = getattr(case.teacher, "quantization_method", None)
    if method is None:
        return None
    size = sum(parameter.numel() * parameter.element_size() for parameter in case.teacher.parameters()) / 1e9
    checked = (
        "the gradient through it was compared with a difference of losses"
        if case.priming is None
        else "it gets no gradient"
    )
    return Finding(
        "quantization",
        "pass",
        f"the teacher is quantized ({getattr(method, 'value', method)}, {size:.2f} GB); {checked}",
        "`PrimedDistillTrainer.quantization_receipt()` says what it costs in nats a token.",
    )
