"""Logged metrics: means over the tokens of all ranks, and the warning that a soft prompt follows its student."""

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..generation.rollouts import have_ended
from ..metrics.run_signs import COLLUSION_SHARE, collusion


__all__ = ["CollusionCallback", "Means", "add_rollouts", "is_logged_step"]

logger = logging.get_logger(__name__)


class Means:
    """Sums and counts since the last report. They stay on the device, so that adding to them never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float | None, count: Tensor | float = 1.0) -> None:
        """Add a sum over `count` tokens or rows. `None` is a value that is not known, and is not reported."""
        if total is None:
            return
        total, count = (torch.as_tensor(value).detach().float() for value in (total, count))
        self._sums[name] = self._sums.get(name, 0) + total
        self._counts[name] = self._counts.get(name, 0) + count

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks. They must have added the same names, in any order. All sums then start anew."""
        if not self._sums:
            return {}
        names = sorted(self._sums)  # ranks may have added them in different orders
        pairs = [torch.stack([self._sums[name].cpu(), self._counts[name].cpu()]) for name in names]
        totals = accelerator.reduce(torch.stack(pairs).to(accelerator.device), reduction="sum").cpu()
        means = {name: float(total / count) for name, (total, count) in zip(names, totals, strict=True) if count > 0}
        self._sums.clear()
        self._counts.clear()
        return means


def is_logged_step(trainer: Trainer) -> bool:
    """Whether the optimizer step that is being made will be logged."""
    args, state = trainer.args, trainer.state
    step = state.global_step + 1
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
    return args.logging_strategy == IntervalStrategy.EPOCH


def add_rollouts(
    means: Means,
    completions: list[list[int]],
    generation_config: GenerationConfig,
    seconds: float,
    processing_class: PreTrainedTokenizerBase,
) -> None:
    """Add what is logged about the samples of one window."""
    num_tokens = sum(map(len, completions))
    means.add("rollout/mean_length", num_tokens, len(completions))
    num_ended = sum(have_ended(completions, generation_config, processing_class))
    means.add("rollout/terminated_share", num_ended, len(completions))
    means.add("rollout/tokens_per_second", num_tokens, seconds)


class CollusionCallback(TrainerCallback):
    """
    Warns once if the soft prompt seems to follow the student instead of leading it.

    A prompt that learns too fast, or starts too far from any text, moves the teacher to where the student is. The loss
    KL(student || prompted teacher) then looks good, although the student gets no closer to the plain teacher, or even
    moves away from it. The callback warns if two quantities are both a large share of KL(student || plain):

    - The prompt gain, which is KL(student || plain) - KL(student || prompted). If it is large, much of what looks like
      progress is the prompt's.
    - KL(prompted || plain). If it is large, the teacher is no longer itself.

    One of them alone is harmless. Entropies are no sign, because they may fall or rise together. `eval_forward_kl` is
    KL(plain teacher || student) on neutral answers. If it has not risen since the run's first evaluation, there is no
    warning.

    Source of the threshold: docs/study_first.md, where it separates all runs that went wrong from all others.

    Args:
        share (`float`, *optional*, defaults to `0.3`):
            Share of KL(student || plain) that both quantities must have reached.
    """

    def __init__(self, share: float = COLLUSION_SHARE):
        self.share = share
        self.warned = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.warned = False

    def on_log(self, args, state, control, **kwargs):
        found = None if self.warned else collusion(state.log_history, self.share)
        if found is None:
            return
        gain, moved, plain, forward = found
        self.warned = True
        entropies = [entry["entropy/student"] for entry in state.log_history if "kl/prompt_gain" in entry]
        said = f"the student's entropy went from {entropies[0]:.2f} to {entropies[-1]:.2f} nats"
        if len(forward) > 1:
            said += f", KL(plain teacher || student) on neutral answers from {forward[0]:.2f} to {forward[-1]:.2f}"
        else:
            said += "; evaluate during training (`eval_strategy`) to see `eval_forward_kl`"
        logger.warning(
            f"Step {state.global_step}: the soft prompt may be following the student instead of leading it. "
            f"KL(student || plain teacher) is {plain:.2f} nats per token; the prompt gain makes up {gain:.2f} of it, "
            f"and the prompted teacher is {moved:.2f} away from the plain one. Since the start, {said}. A falling "
            "loss does not mean success here. Lower `prompt_learning_rate` (the paper uses the student's own), "
            "start the prompt from a text (`prompt_init='text'`), raise `regularization_coef`, or warm the student "
            "up with supervised fine-tuning first."
        )
