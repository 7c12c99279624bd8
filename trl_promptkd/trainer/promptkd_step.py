"""One micro-batch of PromptKD: the soft prompt's gradient from its teaching rows, the prompt's step, and the student's
loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..losses.chunked import StateGradient, chunked_sums
from ..losses.promptkd import PromptKDLossSums, promptkd_loss_sums, regularization_weight
from ..models.forward import TokenStates
from ..models.teacher import recomputed_activations, run_teacher
from .checks import check_finite
from .completions import keep_row_kls
from .logged_metrics import is_logged_step


__all__ = ["distill"]


class _Part(NamedTuple):
    """Rows of a micro-batch, and what the student learns from them."""

    rows: Mapping[str, Tensor]
    student: TokenStates
    prompted: TokenStates
    plain: TokenStates | None
    sums: PromptKDLossSums
    gradient: StateGradient


def distill(self: Any, student: nn.Module, inputs: dict[str, Any], num_tokens: Tensor) -> Tensor:
    """Both losses of a micro-batch. The prompt's gradient is taken on the way, and the student's loss is returned.

    Args:
        inputs: The micro-batch, with its [`Teaching`] as `teaching`.
        num_tokens: Number of completion tokens in the whole window, on all ranks.
    """
    args, means, optimizer, teaching = self.args, self._train_means, self.prompt_optimizer, inputs["teaching"]
    weight = regularization_weight(
        args.regularization_coef, args.regularization_schedule, self.state.global_step, self.state.max_steps
    )
    settings = {
        "prompt_divergence": args.prompt_divergence,
        "weight": weight,
        "beta": self.beta,
        "temperature": args.loss_temperature,
    }
    learns = optimizer.learns
    steps = learns and teaching.steps
    prompt_leads = steps and args.prompt_update == "sequential"  # the student learns from the stepped prompt
    teaching_rows, other_rows = _rows(inputs, 0, teaching.rows), _rows(inputs, teaching.rows, None)

    student_states = self._states(student, inputs)
    parts: list[_Part] = []
    with run_teacher(self.teacher_model, student) as teacher:
        if teaching.any_others and not prompt_leads:
            # First: under FSDP2, a student that is its own teacher cannot run between the backward passes of a step
            with torch.no_grad():
                prompted = _run(self, teacher, other_rows, inputs, self.soft_prompt()).detach()
            own = student_states[len(student_states) - len(prompted) :]
            parts.append(_learned(self, other_rows, own, prompted, None, settings))

        num_teaching, plain, of_prompt = 0, None, None
        if teaching.any_rows:
            if (learns and weight > 0) or is_logged_step(self):
                with torch.no_grad():
                    plain = _run(self, teacher, teaching_rows, inputs).detach()
            with recomputed_activations(teacher, args.teacher_gradient_checkpointing):
                with torch.set_grad_enabled(learns):
                    prompted = _run(self, teacher, teaching_rows, inputs, self.soft_prompt())
                num_teaching = len(prompted)
                own = student_states[:num_teaching]
                known = own.detach() if prompt_leads else own
                losses = "prompt" if prompt_leads else "both"
                of_prompt, gradients = chunked_sums(
                    promptkd_loss_sums, args.loss_chunk_size, known, prompted, plain, losses=losses, **settings
                )
                if learns:
                    optimizer.accumulate(gradients[-1], teaching.num_tokens)
            if not prompt_leads:
                parts.append(_Part(teaching_rows, own, prompted, plain, of_prompt, gradients[0]))

        if steps:
            means.add("prompt/learning_rate", optimizer.learning_rate)
            means.add("prompt/grad_norm", optimizer.step())
        if prompt_leads:
            with torch.no_grad():
                prompted = _run(self, teacher, inputs, inputs, self.soft_prompt()).detach()
            own, said = student_states[:num_teaching], prompted[:num_teaching]
            parts.append(_learned(self, teaching_rows, own, said, plain, settings))
            if teaching.any_others:
                own, said = student_states[num_teaching:], prompted[num_teaching:]
                parts.append(_learned(self, other_rows, own, said, None, settings))

    for part in parts:
        _check_and_log(self, part)
    if of_prompt is not None:
        means.add("kl/prompted_student", of_prompt.prompted_student, num_teaching)
        if plain is not None:
            (student_prompted,) = (part.sums.student_prompted for part in parts if part.rows is teaching_rows)
            means.add("kl/student_plain", of_prompt.student_plain, num_teaching)
            means.add("kl/prompt_gain", of_prompt.student_plain - student_prompted, num_teaching)
            means.add("kl/prompted_plain", of_prompt.prompted_plain, num_teaching)
    means.add("regularization_weight", weight)
    return sum(part.gradient.attach(part.sums.student_loss) for part in parts) / num_tokens


def _rows(inputs: Mapping[str, Tensor], start: int, end: int | None) -> dict[str, Tensor]:
    return {name: inputs[name][start:end] for name in ("input_ids", "attention_mask", "labels")}


def _run(
    trainer: Any,
    teacher: nn.Module,
    rows: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    soft_prompt: Tensor | None = None,
) -> TokenStates:
    """The teacher's output at the completion tokens of some rows of `inputs`."""
    if not len(rows["labels"]):  # none on this rank, but if the teacher is sharded, all ranks run it together
        idle = _rows(inputs, 0, 1)
        rows = idle | {"labels": torch.full_like(idle["labels"], -100)}
    return trainer._teacher_states(teacher, rows, soft_prompt)


def _learned(
    trainer: Any,
    rows: Mapping[str, Tensor],
    student: TokenStates,
    prompted: TokenStates,
    plain: TokenStates | None,
    settings: Mapping[str, Any],
) -> _Part:
    """What the student learns from rows whose prompted pass has no gradient."""
    chunk_size = trainer.args.loss_chunk_size
    sums, gradients = chunked_sums(promptkd_loss_sums, chunk_size, student, prompted, losses="student", **settings)
    return _Part(rows, student, prompted, plain, sums, gradients[0])


def _check_and_log(trainer: Any, part: _Part) -> None:
    sums, count, means = part.sums, len(part.student), trainer._train_means
    models = {"student": part.student, "prompted_teacher": part.prompted, "plain_teacher": part.plain}
    check_finite(sums.student_loss, f"at step {trainer.state.global_step + 1}", **models)
    means.add("kl/student_prompted", sums.student_prompted, count)
    means.add("entropy/student", sums.student_entropy, count)
    means.add("entropy/teacher", sums.teacher_entropy, count)
    teachers = {"kl/student_prompted": part.prompted}
    teachers |= {} if part.plain is None else {"kl/student_plain": part.plain}
    keep_row_kls(trainer, part.rows, part.student, teachers, trainer.args.loss_temperature)
