"""PromptKD's evaluation: how far the student is from the plain teacher, on its own samples and on the answers."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import without_repeats
from ..losses.chunked import chunked_sums
from ..losses.promptkd import promptkd_loss_sums
from ..models.forward import inside_forward
from ..models.teacher import run_teacher
from .checks import check_finite
from .window import padded, prompts_and_completions


__all__ = ["evaluate_batch"]


def evaluate_batch(trainer: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Adds KL(student || plain teacher) on the student's samples, and KL(plain teacher || student) on the answers.

    Also adds the training loss: on the samples if the student samples in training (`lmbda` above 0), else on the
    answers.

    Returns:
        Scalar: the training loss, in nats per token of this batch.
    """
    prompts, answers = prompts_and_completions(inputs)
    trainer._eval_batches += 1
    # The same random numbers at every evaluation, so that values differ only by what was learned
    samples = trainer.rollouts.sample(trainer.model_wrapped, prompts, -trainer._eval_batches)
    answers = _with_teacher_answers(trainer, prompts, answers)
    losses = {}
    for source, completions in (("student", samples), ("answers", answers)):
        batch = padded(trainer, prompts, completions)
        batch["labels"] = without_repeats(batch["labels"], trainer.accelerator)
        losses[source] = inside_forward(model, _evaluate_completions, trainer, batch, source)
    return losses["student" if trainer.lmbda > 0 else "answers"]


def _with_teacher_answers(trainer: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """The data's answers. The plain teacher writes missing ones, once in a run."""
    known = trainer._teacher_answers
    new = [p for p, answer in zip(prompts, answers, strict=True) if not answer and tuple(p) not in known]
    with trainer._run_teacher() as teacher:
        written = trainer._teacher_rollouts.sample(teacher, new, -trainer._eval_batches)
    known.update(zip(map(tuple, new), written, strict=True))
    return [answer or known[tuple(prompt)] for prompt, answer in zip(prompts, answers, strict=True)]


def _evaluate_completions(student: nn.Module, trainer: Any, batch: dict[str, Tensor], source: str) -> Tensor:
    """Adds what is reported about one kind of completions. Returns the mean loss, or 0 if it is taken on the other."""
    args, means, count = trainer.args, trainer._eval_means, (batch["labels"][:, 1:] != -100).sum()
    settings = {"losses": "student", "temperature": args.loss_temperature}
    loss = torch.zeros((), device=count.device)
    student_states = trainer._states(student, batch)
    with run_teacher(trainer.teacher_model, student) as teacher:
        plain = trainer._teacher_states(teacher, batch)
        if source == ("student" if trainer.lmbda > 0 else "answers"):
            prompted = trainer._teacher_states(teacher, batch, trainer.soft_prompt())
            sums, _ = chunked_sums(
                promptkd_loss_sums, args.loss_chunk_size, student_states, prompted, beta=trainer.beta, **settings
            )
            means.add("loss", sums.student_loss, count)
            loss = sums.student_loss / count.clamp(min=1)
    direction, beta = ("reverse_kl", 1.0) if source == "student" else ("forward_kl", 0.0)
    sums, _ = chunked_sums(promptkd_loss_sums, args.loss_chunk_size, student_states, plain, beta=beta, **settings)
    when = f"in the evaluation after step {trainer.state.global_step}"
    check_finite(sums.student_loss + loss, when, student=student_states, teacher=plain)
    means.add(direction, sums.student_loss, count)
    return loss
