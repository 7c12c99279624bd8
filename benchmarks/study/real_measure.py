"""What is measured of the real model's students, on rows that no training has seen.

Per set: ROUGE-L of sampled answers against gold ones, lengths, the gold answers' NLL, and divergences. Each is given
per row, from which means per token and per answer follow.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trl_promptkd.data import pad_rows
from trl_promptkd.divergences import entropy, kl_divergence
from trl_promptkd.evaluation import evaluation_config, evaluation_seeds, judged_texts, row_scores
from trl_promptkd.generation.progress import rows_bar
from trl_promptkd.generation.rollouts import generate_completions, stop_ids
from trl_promptkd.models.forward import completion_states


SEEDS = (10, 20)
MAX_NEW_TOKENS = 64
TOKENS_AT_ONCE = 256


def ids_of(rows: Sequence[dict], name: str) -> list[list[int]]:
    return [row[name] for row in rows]


def write_samples(model, tokenizer, prompts: Sequence[list[int]], seed: int, title: str) -> list[list[int]]:
    """Sampled answers, the same as `evaluate_model` samples with this seed."""
    config = evaluation_config(model, tokenizer, MAX_NEW_TOKENS, greedy=False)
    with rows_bar(len(prompts), title):
        return generate_completions(model, prompts, config, 64, row_seeds=evaluation_seeds(seed, prompts))


def rouge(tokenizer, rows: Sequence[dict], answers: Sequence[list[int]]) -> list[float]:
    """ROUGE-L of each row's answer in percent."""
    texts = judged_texts(
        tokenizer, ids_of(rows, "prompt_ids"), tokenizer.batch_decode(answers, skip_special_tokens=True)
    )
    return row_scores("instruct", texts, [[row["reference"]] for row in rows])["rougeL"]


@torch.no_grad()
def sums_by_row(
    views: Sequence[tuple],
    completions: Sequence[list[int]],
    pad_token_id: int,
    values: Callable[..., dict[str, Tensor]],
    batch_size: int = 16,
) -> dict[str, list[float]]:
    """Sums over each completion's tokens.

    Args:
        views: (model, soft prompt or None, prompts) of each view. All are compared at the same completion tokens.
        values: From the tokens and each view's log-probabilities `(num_tokens, vocab)` to named values per token.
    """
    found: dict[str, dict[int, float]] = {}
    order = sorted(range(len(completions)), key=lambda row: len(views[0][2][row]) + len(completions[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        some = [completions[row] for row in rows]
        states = []
        for model, soft_prompt, prompts in views:
            batch = pad_rows([prompts[row] for row in rows], some, pad_token_id)
            inputs = (batch["input_ids"], batch["attention_mask"], batch["labels"])
            states.append(completion_states(model, *inputs, soft_prompt))
        tokens = torch.tensor([token for ids in some for token in ids])
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(tokens), TOKENS_AT_ONCE):
            last = first + TOKENS_AT_ONCE
            log_probs = [known.logits(first, last).log_softmax(dim=-1) for known in states]
            parts.append(values(tokens[first:last], *log_probs))
        for name in parts[0]:
            by_row = torch.cat([part[name] for part in parts]).double().split(list(map(len, some)))
            found.setdefault(name, {}).update({row: one.sum().item() for row, one in zip(rows, by_row, strict=True)})
    return {name: [of[row] for row in range(len(completions))] for name, of in found.items()}


def on_own_samples(tokens: Tensor, q: Tensor, p: Tensor, prompted: Tensor | None = None) -> dict[str, Tensor]:
    found = {"reverse_kl": kl_divergence(q, p), "entropy": entropy(q), "teacher_entropy": entropy(p)}
    if prompted is not None:
        found["reverse_kl_prompted"] = kl_divergence(q, prompted)
        found["prompted_plain"] = kl_divergence(prompted, p)
        found["prompted_entropy"] = entropy(prompted)
    return found


def gold_nll(tokens: Tensor, q: Tensor) -> dict[str, Tensor]:
    return {"gold_nll": -q.gather(1, tokens.unsqueeze(1)).squeeze(1)}


def forward_kl(tokens: Tensor, q: Tensor, p: Tensor) -> dict[str, Tensor]:
    return {"forward_kl": kl_divergence(p, q)}


def with_means(sums: dict[str, list[float]], completions: Sequence[list[int]]) -> dict[str, dict]:
    """Nats per token and per answer, and of each row."""
    number = sum(map(len, completions))
    return {
        name: {
            "per_token": sum(rows) / number,
            "per_answer": statistics.fmean(rows),
            "rows": [round(row, 2) for row in rows],
        }
        for name, rows in sums.items()
    }


def both_samples(model, tokenizer, sets: dict[str, list[dict]]) -> dict[str, list[list[list[int]]]]:
    """Set -> a model's samples with each seed."""
    model.eval()
    return {
        name: [write_samples(model, tokenizer, ids_of(rows, "prompt_ids"), seed, f"{name}, {seed}") for seed in SEEDS]
        for name, rows in sets.items()
    }


def measure(
    model, samples: dict, tokenizer, sets: dict[str, list[dict]], teacher=None, teacher_samples=None, prompted=None
) -> dict[str, dict]:
    """All measures by set. Without `teacher` there are no divergences.

    Args:
        samples, teacher_samples: Of [`both_samples`]. Divergences are measured on those of the first seed.
        prompted: A function from rows to the prompted teacher's view, if there is one.
    """
    pad, ends = tokenizer.pad_token_id, stop_ids(evaluation_config(model, tokenizer, MAX_NEW_TOKENS, greedy=False))
    found = {}
    for name, rows in sets.items():
        prompts, gold, own = ids_of(rows, "prompt_ids"), ids_of(rows, "completion_ids"), samples[name][0]
        scores = [rouge(tokenizer, rows, some) for some in samples[name]]
        whole = [ids for some in samples[name] for ids in some]
        found[name] = {
            "num_rows": len(rows),
            "rougeL": {
                "mean": statistics.fmean(map(statistics.fmean, scores)),
                "by_seed": list(map(statistics.fmean, scores)),
                "rows": [round(statistics.fmean(row), 2) for row in zip(*scores, strict=True)],
            },
            "mean_length": statistics.fmean(map(len, whole)),
            "ended": statistics.fmean(bool(ends.intersection(ids[-1:])) for ids in whole),
            **with_means(sums_by_row([(model, None, prompts)], gold, pad, gold_nll), gold),
        }
        if teacher is not None:
            views, theirs = [(model, None, prompts), (teacher, None, prompts)], teacher_samples[name][0]
            on_own = sums_by_row([*views, *([prompted(rows)] if prompted else [])], own, pad, on_own_samples)
            found[name] |= with_means(on_own, own)
            found[name] |= with_means(sums_by_row(views, theirs, pad, forward_kl), theirs)
    return found
