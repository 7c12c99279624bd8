"""Exposure bias: how much faster a student's errors add up on its own prefixes than on its teacher's.

A student that is trained on its teacher's or the data's texts has never seen its own mistakes. `p` is the teacher and
`q` the student. KL(p || q) at each position is measured twice: after prefixes that the student has sampled, and after
prefixes that the teacher has sampled.
"""

from collections.abc import Sequence

import torch
from pandas import DataFrame, RangeIndex
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from ..divergences import kl_divergence
from ..generation.progress import rows_bar
from ..generation.rollouts import generate_completions, rollout_seed
from .log_probs import log_probs_together


__all__ = ["exposure_bias", "prefix_kl", "sample_prefixes"]

READ_AT = 15  # the position at which the PromptKD paper reads ExAccErr
_ROUNDING = 1e-6  # nats per token; below, KL divergences of float32 models are rounding


def sample_prefixes(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    seed: int = 42,
    batch_size: int = 8,
    vocab_size: int | None = None,
    soft_prompt: Tensor | None = None,
) -> list[list[int]]:
    """Sample one completion for each prompt. Its beginnings are the prefixes.

    All models draw the same random numbers. Two models that are close then write much the same, and differ less by
    chance. A row's numbers depend only on `seed` and its place. The global random state does not change.

    Args:
        generation_config: Such as [`~trl_promptkd.generation.rollouts.rollout_config`] makes, at temperature 1.
        batch_size (`int`): Rows sampled at once. It does not change the samples.
        vocab_size (`int`, *optional*): Number of ids that stand for tokens, if the model has more.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Stands before each prompt.
    """
    completions: list[list[int]] = []
    with rows_bar(len(prompt_ids), "Sampling"):
        for start in range(0, len(prompt_ids), batch_size):
            part = prompt_ids[start : start + batch_size]
            seeds = [rollout_seed(seed, "exposure", start + row, 0) for row in range(len(part))]
            completions += generate_completions(
                model, part, generation_config, vocab_size=vocab_size, soft_prompt=soft_prompt, row_seeds=seeds
            )
    return completions


def prefix_kl(
    student: nn.Module,
    teacher: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    batch_size: int = 8,
    vocab_size: int | None = None,
    soft_prompt: Tensor | None = None,
) -> Tensor:
    """KL(p || q) after every prefix of some completions.

    Args:
        student, teacher: Models `q` and `p`, in evaluation mode.
        completion_ids: Completions, none of them empty.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Stands before the teacher's input.

    Returns:
        `Tensor` of shape `(rows, longest completion)` in float64, in nats. Column `l - 1` belongs to position `l`,
        whose prefix has `l - 1` tokens. NaN once a row has ended: after its end-of-text token there is no next
        position.
    """
    rows: list[Tensor] = []
    for start in tqdm(range(0, len(prompt_ids), batch_size), desc="Comparing", unit="batch", leave=False):
        completions = completion_ids[start : start + batch_size]
        models, prompts = [(teacher, soft_prompt), (student, None)], prompt_ids[start : start + batch_size]
        chunks = log_probs_together(models, prompts, completions, pad_token_id, vocab_size)
        values = torch.cat([kl_divergence(p, q).double().cpu() for p, q in chunks])
        rows += values.split([len(ids) for ids in completions])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def exposure_bias(on_student: Tensor, on_teacher: Tensor, resamples: int = 1000, seed: int = 42) -> DataFrame:
    """ExAccErr(l) = (R(l) - eps(l)) / eps(l) * 100, the excess accumulated error up to position l.

    R(l) and eps(l) are sums over positions up to l of the mean KL(p || q), on prefixes sampled from the student and
    from the teacher.

    The mean at a position is over the rows that still have it. Rows that have ended no longer count. At position 1
    there is no prefix, and ExAccErr is 0. It is NaN if eps(l) is 0 up to rounding, below 1e-6 nats per token: the
    student is then the teacher.

    The interval runs from the 2.5th to the 97.5th percentile over `resamples` draws of the rows, with replacement.
    Both sides of a row are drawn together, as they share the prompt. From the first position that none of its rows
    has, a draw is omitted. A position that fewer than two rows have has no interval.

    Args:
        on_student, on_teacher (`Tensor` of shape `(rows, positions)`): Results of [`prefix_kl`] on the student's and
            on the teacher's prefixes after the same prompts. Their widths may differ.
        resamples (`int`): Draws for the interval.
        seed (`int`): Seed of the draws.

    Returns:
        `DataFrame` with a row for each position, from 1 up to the last one that a row of the data has on both sides.
        Its columns:

        - `kl_on_student`, `kl_on_teacher`: mean KL(p || q) at the position, on the student's and the teacher's
            prefixes, in nats.
        - `regret`, `expected`: R(l) and eps(l), their sums up to the position.
        - `ex_acc_err`, `low`, `high`: ExAccErr(l) and the ends of its 95 % interval, in percent. NaN if undefined.
        - `rows_on_student`, `rows_on_teacher`: how many rows have the position.

    Source: Arora et al., Why Exposure Bias Matters (arXiv 2204.01171), as PromptKD (arXiv 2402.12842) takes it.
    """
    width = min(int(side.isfinite().any(dim=0).sum()) for side in (on_student, on_teacher))
    sides = [side[:, :width].double() for side in (on_student, on_teacher)]
    rows = len(on_student)
    counts = [side.isfinite().sum(dim=0) for side in sides]
    means = [side.nanmean(dim=0) for side in sides]
    regret, expected = (mean.cumsum(dim=0) for mean in means)
    drawn = torch.randint(rows, (resamples, rows), generator=torch.Generator().manual_seed(seed))
    weights = torch.nn.functional.one_hot(drawn, rows).sum(dim=1).double()  # (resamples, rows)
    # Means over the rows drawn, NaN where none has the position
    drawn_means = [(weights @ side.nan_to_num(0.0)) / (weights @ side.isfinite().double()) for side in sides]
    draws = _ex_acc_err(*(mean.cumsum(dim=1) for mean in drawn_means))
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = draws.nanquantile(tails, dim=0).where(torch.minimum(*counts) >= 2, float("nan"))
    columns = {
        "kl_on_student": means[0],
        "kl_on_teacher": means[1],
        "regret": regret,
        "expected": expected,
        "ex_acc_err": _ex_acc_err(regret, expected),
        "low": low,
        "high": high,
        "rows_on_student": counts[0],
        "rows_on_teacher": counts[1],
    }
    return DataFrame(columns, index=RangeIndex(1, width + 1, name="position"))


def _ex_acc_err(regret: Tensor, expected: Tensor) -> Tensor:
    positions = torch.arange(1, expected.size(-1) + 1)
    defined = expected > _ROUNDING * positions
    return torch.where(defined, (regret - expected) / expected * 100, float("nan"))
