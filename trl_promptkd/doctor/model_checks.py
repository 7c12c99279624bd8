"""Checks that run the models, on a few rows.

Each function is one check. It takes a [`Case`] and returns what it found. If it raises, the check has failed, see
`diagnosis.py`.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..divergences import kl_divergence, on_shared_support
from ..generation.rollouts import stop_ids
from ..losses.promptkd import prompt_loss_sums, student_loss_sums
from ..models.compare import distance, distances_from_own_forward, is_exact, is_same
from .case import Case, Finding, cut, failing, passing, warning


_GRADIENT_ERROR, _GRADIENT_FACTOR = 0.05, 2.0  # of a slope: relatively (float32); up or down (16 bits, quantized)
_STEPS, _COARSE_STEPS = (1e-2, 3e-3, 3e-2), (3e-2, 1e-1, 1e-2, 3e-1)  # shares of the soft prompt's norm
_FAR, _SAME = 3.0, 1e-4  # nats per token


@torch.no_grad()
def finite_logits(case: Case) -> Finding:
    """NaN or infinite logits make every loss NaN. A common cause is overflow in float16.

    Tokens that a model always rules out do not count.
    """
    ruled_out: dict[str, int] = {}
    for role, model in (("student", case.student), ("teacher", case.teacher)):
        logits = case.logits(model, role)
        lowest = logits <= torch.finfo(model.dtype).min
        never = lowest.all(dim=0)
        wrong = int(((~torch.isfinite(logits) | lowest) & ~never).sum())
        if wrong:
            return failing(
                f"{wrong} of {logits.numel()} logits of the {role} are NaN or infinite",
                f"Load the {role} in bfloat16 or float32 if it is in float16, and check its weights.",
            )
        ruled_out[role] = int(never.sum())
    by = " and ".join(f"{number} by the {role}" for role, number in ruled_out.items())
    return passing(f"all finite; entries that a model always rules out, and that are not compared: {by}", **ruled_out)


@torch.no_grad()
def repeatability(case: Case) -> Finding:
    """A teacher with active dropout gives other logits in every pass."""
    off = distance(*(case.logits(case.teacher, "teacher", soft_prompt=case.soft_prompt) for _ in range(2)))
    if is_same(off, is_exact(case.teacher), slack=0.1):
        return passing("two passes of the teacher over one batch agree", difference=off.log_probs)
    return failing(
        f"two passes of the teacher over one batch differ by {off.log_probs:.2g} in log-probabilities",
        "Something in it is random in evaluation mode, such as a dropout with `training=True`. Switch it off.",
        difference=off.log_probs,
    )


@torch.no_grad()
def padding_student(case: Case) -> Finding:
    """If positions are counted through padding, or rows see each other, rows get other logits than alone."""
    batch = case.batch("student")
    logits = case.student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    without = logits[batch["labels"][:, 1:] != -100][:, : case.vocab_size]
    naive = distance(without, case.logits(case.student, "student")).log_probs
    told = f" (without position ids, as GKDTrainer runs it, {naive:.1e})"
    return _padding(case, "student", None, told, difference_without_position_ids=naive)


def padding_teacher(case: Case) -> Finding | None:
    """The check of `padding_student` for the teacher."""
    return None if case.is_self_distillation else _padding(case, "teacher", None)


def padding_soft_prompt(case: Case) -> Finding | None:
    """A soft prompt that stands before the padding, instead of directly before the text, is far away from the text."""
    return None if case.soft_prompt is None else _padding(case, "teacher", case.soft_prompt)


@torch.no_grad()
def _padding(case: Case, view: str, soft_prompt: Tensor | None, told: str = "", **values: float) -> Finding:
    """Compare the trainers' passes with the model's own call on every single row."""
    model, prompts = (case.student, "prompt_ids") if view == "student" else (case.teacher, "teacher_prompt_ids")
    rows = [{"prompt_ids": row[prompts], "completion_ids": row["completion_ids"]} for row in case.probes]
    settings = (case.tokenizer.pad_token_id, soft_prompt, case.vocab_size)
    distances = distances_from_own_forward(model, rows, *settings, padding_free=case.args.padding_free)
    worst = max(distances, key=lambda way: distances[way].log_probs)
    difference, kl = distances[worst]
    values |= {"difference": difference, "kl": kl}
    about = f"{difference:.1e} in log-probabilities, {max(kl, 0.0):.1e} nats per token{told}"
    if all(is_same(off, is_exact(model)) for off in distances.values()):
        return passing(f"padded rows are as alone, to {about}", **values)
    return failing(
        f"the pass {worst}, is off the model's own call on the row alone by {about}",
        "The forward pass must take `position_ids` and the attention mask, and rows must not see each other. Use "
        "transformers' own class for this model, or one that does.",
        **values,
    )


def soft_prompt_gradient(case: Case) -> Finding | None:
    """The gradient through a quantized or unusual teacher can be silently wrong. A difference of two losses cannot."""
    if case.soft_prompt is None:
        return None
    with torch.no_grad():
        student, plain = (case.logits(model, "teacher") for model in (case.student, case.teacher))

    def loss(soft_prompt: Tensor) -> Tensor:
        p_prompted, q, p = _log_probs(case.logits(case.teacher, "teacher", soft_prompt=soft_prompt), student, plain)
        return prompt_loss_sums(p_prompted, q, p)[0]

    start = case.soft_prompt.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(start), start, allow_unused=True, materialize_grads=True)
    norm = float(gradient.norm())
    advice = "Load the teacher without quantization or in another one, or use transformers' own class for it."
    if not norm or not gradient.isfinite().all():
        return failing(f"the gradient's norm is {norm}", advice, norm=norm)
    direction, exact = gradient / norm, is_exact(case.teacher)
    low, high = (1 - _GRADIENT_ERROR, 1 + _GRADIENT_ERROR) if exact else (1 / _GRADIENT_FACTOR, _GRADIENT_FACTOR)
    ratio = 0.0  # of the slope to the gradient's norm
    for share in _STEPS if exact else _COARSE_STEPS:  # a small one drowns in rounding, a large one goes round the bend
        step = share * float(start.detach().norm())
        with torch.no_grad():
            up, down = (float(loss(start + way * step * direction)) for way in (1, -1))
        ratio = min(ratio, (up - down) / (2 * step * norm), key=lambda value: abs(value - 1))
        if low <= ratio <= high:
            told = f"norm {norm:.2g}; a step along it changes the loss as it says ({ratio:.3f})"
            return passing(told, norm=norm, slope=ratio * norm)
    told = f"a step along the gradient changes the loss by {ratio:.2g} times what the gradient says (norm {norm:.2g})"
    return failing(told, advice, norm=norm, slope=ratio * norm)


def window_split(case: Case) -> Finding:
    """How a window is split into micro-batches must not change the loss or the student's gradient."""
    trainable = [parameter for parameter in case.student.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in trainable if parameter.ndim == 1]  # small, and in every layer
    watched = vectors or sorted(trainable, key=lambda parameter: parameter.numel())[:1]
    number = len(case.probes)
    whole, gradient = _window(case, [case.probes], watched)
    parts, of_parts = _window(case, [[row] for row in case.probes], watched)
    off = abs(parts / whole - 1) if whole else 0.0
    norm = float(gradient.norm())
    gradient_off = float((gradient - of_parts).norm()) / norm if norm else 0.0
    limit = 1e-3 if is_exact(case.student) and is_exact(case.teacher) else 0.1
    values = {"loss": whole, "loss_off": off, "gradient_off": gradient_off}
    if off <= limit and gradient_off <= limit:  # NaN is wrong, too
        also = f", the gradients to {gradient_off:.1e}" if watched else " (the student has nothing to train)"
        told = f"one micro-batch and {number} give the same loss ({whole:.3g} nats per token) to {off:.1e}{also}"
        return passing(told, **values)
    return failing(
        f"{number} micro-batches of one row give a loss of {parts:.4g} nats per token, one of all rows {whole:.4g}; "
        f"the gradients differ by {gradient_off:.1%}",
        "Rows see each other, or their padding (a batch norm, a mixture of experts with a capacity), or the loss is "
        "not finite. Use another model, or micro-batches of one row.",
        **values,
    )


def _window(
    case: Case, batches: list[list[dict[str, list[int]]]], watched: list[torch.nn.Parameter]
) -> tuple[float, Tensor]:
    """The student's loss over all probes, in nats per token, and its gradient by `watched`, in one vector."""
    num_tokens = sum(len(row["completion_ids"]) for row in case.probes)
    total, gradient = 0.0, torch.zeros(sum(parameter.numel() for parameter in watched), device=case.student.device)
    for rows in batches:
        with torch.no_grad():
            teacher = case.logits(case.teacher, "teacher", rows, case.soft_prompt)
        q, p = _log_probs(case.logits(case.student, "student", rows), teacher)
        loss = student_loss_sums(q, p)[0] / num_tokens
        total += float(loss.detach())
        if watched:
            parts = torch.autograd.grad(loss, watched, allow_unused=True, materialize_grads=True)
            gradient += torch.cat([part.float().flatten() for part in parts])
    return total, gradient


def _log_probs(*logits: Tensor) -> list[Tensor]:
    return [part.log_softmax(dim=-1) for part in on_shared_support(*logits)]


def sampling(case: Case) -> Finding:
    """A student that stops at once trains on end-of-text tokens only."""
    ends, samples = stop_ids(case.generation_config), case.samples
    total, empty = len(samples), sum(len(ids) <= 1 and ids[-1] in ends for ids in samples)
    ended, mean = sum(ids[-1] in ends for ids in samples), sum(map(len, samples)) / len(samples)
    values = {"mean_length": mean, "empty": empty, "ended": ended}
    if empty >= 0.75 * total:
        return warning(
            f"{empty} of {total} of the student's samples end at once",
            "Warm the student up by supervised fine-tuning, and check that the prompts end where an answer begins.",
            **values,
        )
    text = case.tokenizer.decode(max(samples, key=len), skip_special_tokens=True).strip().replace("\n", " ")
    found = f"{total} samples of {mean:.0f} tokens on average, {ended} of them ended, such as {text[:40]!r}"
    return passing(found, **values)


@torch.no_grad()
def quality(case: Case) -> Finding | None:
    """A teacher that is no better has nothing to teach. A student far from its teacher collapses on its own
    samples."""
    rows = [cut(row) for row in case.views if row["completion_ids"]]
    if not rows:
        return None
    sums = torch.zeros(4, dtype=torch.float64)
    for row in rows:
        student, plain = (case.logits(model, "student", [row]) for model in (case.student, case.teacher))
        primed = case.logits(case.teacher, "teacher", [row])  # without a priming text, the plain teacher
        tokens = torch.tensor(row["completion_ids"], device=student.device)
        costs = [cross_entropy(part, tokens, reduction="sum") for part in (student, plain, primed)]
        sums += torch.stack([*costs, kl_divergence(*_log_probs(student, primed)).sum()]).cpu()
    nll_student, nll_teacher, nll_primed, kl = (sums / sum(len(row["completion_ids"]) for row in rows)).tolist()
    values = {"nll_student": nll_student, "nll_teacher": nll_teacher, "reverse_kl": kl, "rows": len(rows)}
    found = f"answers cost {nll_student:.2f} nats per token under the student, {nll_teacher:.2f} under the teacher"
    if case.priming is not None:
        values["nll_primed_teacher"] = nll_primed
        found += f", {nll_primed:.2f} after the priming text"
    found += f"; KL(student || teacher) {kl:.2f}"
    advice = ""
    if not kl <= _FAR:
        advice = (
            "Warm the student up by supervised fine-tuning on answers first: on-policy distillation of a student that "
            "is far off collapses."
        )
    elif kl < _SAME and not case.is_self_distillation:
        advice = "The student already is the teacher: there is nothing to learn."
    elif nll_primed >= nll_student and not (case.is_self_distillation and case.priming is None):
        advice = (
            "The teacher has nothing to teach on these answers. Take another teacher, priming text or data, or let "
            "the teacher write the answers."
        )
    return (warning if advice else passing)(found, advice, **values)
