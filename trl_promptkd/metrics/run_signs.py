"""Signs that something is wrong with a run, as rules on logged numbers and kept samples.

The warning during training and the report after it share these rules. docs/report.md states them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pandas import DataFrame, concat


__all__ = ["Collusion", "Sign", "collusion", "run_signs"]

COLLUSION_SHARE = 0.3  # of KL(student || plain teacher); docs/study_first.md, where it parts the runs that went wrong
FORWARD_RISE = 1.1  # times what it was at the first evaluation
ALIKE_SHARE = 0.5  # of the samples after different prompts
CUT_SHARE = 0.5  # of the samples
SHORT_QUANTILE = 0.2  # of the first samples' lengths
SHORT_LEFT = 0.2  # of the share that short answers had
LEAST_ROWS = 30  # on either side of a comparison of lengths
LEAST_PROMPTS = 4

Entry = Mapping[str, Any]


class Collusion(NamedTuple):
    """The numbers by which a soft prompt seems to follow its student, in nats per token."""

    gain: float
    """KL(student || plain) minus KL(student || prompted)."""
    moved: float
    """KL(prompted || plain)."""
    plain: float
    """KL(student || plain)."""
    forward: list[float]
    """KL(plain || student) of all evaluations so far."""


class Sign(NamedTuple):
    """What a rule found."""

    name: str
    verdict: str
    """"wrong", "fine" or "unknown"."""
    text: str


def collusion(history: Sequence[Entry], share: float = COLLUSION_SHARE) -> Collusion | None:
    """The numbers that show the soft prompt following the student at the end of `history`, or `None`.

    It follows if the prompt gain and KL(prompted || plain) are both at least `share` of KL(student || plain), from the
    second logged step on. The prompt is cleared if evaluations show that the forward KL has risen on no set since the
    first of them.
    """
    training = [entry for entry in history if "kl/prompt_gain" in entry]
    if len(training) < 2:
        return None
    gain, moved, plain = (training[-1][f"kl/{name}"] for name in ("prompt_gain", "prompted_plain", "student_plain"))
    names = [f"{prefix}forward_kl" for prefix in _evaluated(history)]
    sets = [[entry[name] for entry in history if name in entry] for name in names]
    known = [values for values in sets if len(values) > 1]
    rising = [values for values in known if values[-1] > values[0]]
    if min(gain, moved) < share * plain or (known and not rising):
        return None
    return Collusion(gain, moved, plain, (rising or sets or [[]])[0])


def run_signs(history: Sequence[Entry], samples: Sequence[DataFrame] = ()) -> list[Sign]:
    """Apply all rules to a run.

    Args:
        history: `trainer.state.log_history`.
        samples: The tables in `output_dir/completions`, the oldest first.
    """
    signs = [_collapse(history, samples), _cut(history), _short_answers(samples)]
    is_promptkd = any("kl/prompt_gain" in entry for entry in history)
    return [_collusion_sign(history), *signs] if is_promptkd else signs


def _collusion_sign(history: Sequence[Entry]) -> Sign:
    name = "Collusion: the soft prompt follows the student"
    logged = [index for index, entry in enumerate(history) if "kl/prompt_gain" in entry]
    if len(logged) < 2:
        return Sign(name, "unknown", "Fewer than two steps were logged.")
    for index in logged:
        found = collusion(history[: index + 1])
        if found is not None:
            step = history[index].get("step", "?")
            return Sign(
                name,
                "wrong",
                f"At step {step}, KL(student || plain teacher) is {found.plain:.2f} nats per token. The prompt gain "
                f"makes up {found.gain:.2f} of it, and the prompted teacher is {found.moved:.2f} away from the plain "
                "one. The loss then falls because the teacher moves. Lower `prompt_learning_rate`, start the prompt "
                "from a text, keep the regularization constant, or fine-tune the student first.",
            )
    return Sign(name, "fine", "The prompt gain and the prompt's distance never were both a large share.")


def _evaluated(history: Sequence[Entry]) -> list[str]:
    """What the metrics of each evaluation set begin with."""
    names = {name for entry in history for name in entry}
    return sorted(name.removesuffix("forward_kl") for name in names if re.fullmatch(r"eval_(.+_)?forward_kl", name))


def _collapse(history: Sequence[Entry], samples: Sequence[DataFrame]) -> Sign:
    name = "Collapse: the student says fewer things"
    advice = (
        "Choose an earlier checkpoint by `eval_forward_kl` or a task metric, and train with a lower learning rate."
    )
    if samples:
        last = samples[-1].drop_duplicates("prompt")
        commonest = last["completion"].value_counts()
        if len(last) >= LEAST_PROMPTS and commonest.iloc[0] >= ALIKE_SHARE * len(last):
            text = f"{commonest.iloc[0]} of the last {len(last)} samples are the same answer to different prompts."
            return Sign(name, "wrong", f"{text} {advice}")
    told = []
    for prefix in _evaluated(history):
        forward, reverse = (
            [entry[f"{prefix}{side}_kl"] for entry in history if f"{prefix}{side}_kl" in entry]
            for side in ("forward", "reverse")
        )
        if min(len(forward), len(reverse)) < 2:
            continue
        of_set = f"On {prefix.removeprefix('eval_').removesuffix('_')!r}: " if prefix != "eval_" else ""
        told.append(
            f"{of_set}KL(teacher || student) on answers went from {forward[0]:.2f} to {forward[-1]:.2f}, and "
            f"KL(student || teacher) on the student's samples from {reverse[0]:.2f} to {reverse[-1]:.2f} nats per "
            "token."
        )
        if forward[-1] > FORWARD_RISE * forward[0] and reverse[-1] < reverse[0]:
            why = "The student forgets what its teacher would say, and only says what it is sure of."
            return Sign(name, "wrong", f"{told[-1]} {why} {advice}")
    if told:
        return Sign(name, "fine", " ".join(told))
    if samples:
        return Sign(name, "fine", "The last samples differ. Two evaluations with both KLs would tell more.")
    return Sign(name, "unknown", "There are neither two evaluations with both KLs nor samples (`log_completions`).")


def _cut(history: Sequence[Entry]) -> Sign:
    name = "Cut answers"
    shares = [1 - entry["rollout/terminated_share"] for entry in history if "rollout/terminated_share" in entry]
    if not shares:
        return Sign(name, "unknown", "The student sampled nothing in this run.")
    last = shares[-3:]
    cut = sum(last) / len(last)
    told = f"{cut:.0%} of the last samples were cut at `max_new_tokens` ({shares[0]:.0%} at the start)."
    if cut <= CUT_SHARE:
        return Sign(name, "fine", told)
    advice = "Raise `max_new_tokens`. If answers run on into nonsense, the student has not learned to stop."
    return Sign(name, "wrong", f"{told} {advice}")


def _short_answers(samples: Sequence[DataFrame]) -> Sign:
    name = "Short answers given up"
    third = len(samples) // 3
    known = [table for table in samples if "length" in table]
    if third < 1 or len(known) < len(samples):
        return Sign(name, "unknown", "Fewer than three tables of samples were kept (`log_completions`).")
    first, last = (concat(part)["length"] for part in (samples[:third], samples[-third:]))
    if min(len(first), len(last)) < LEAST_ROWS:
        return Sign(name, "unknown", f"Fewer than {LEAST_ROWS} samples were kept at the start or at the end.")
    limit = first.quantile(SHORT_QUANTILE)
    before, after = ((part <= limit).mean() for part in (first, last))
    told = (
        f"Answers of at most {limit:.0f} tokens were {before:.0%} of the first samples, and {after:.0%} of the last."
    )
    if after >= SHORT_LEFT * before:
        return Sign(name, "fine", told)
    advice = (
        "The student may have dropped a kind of answer. Means per token do not show that: compare the lengths with "
        "those of the teacher's answers."
    )
    return Sign(name, "wrong", f"{told} {advice}")
