"""Memory of the divergence: PromptKD beside TRL's GKDTrainer and the loss of DistillationTrainer.

Models of one small layer with Qwen's vocabulary train on given answers, so that the divergence dominates. Each step is
made in a process of its own. The figure is the peak of the process (or of the GPU) above its start.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import trl.trainer.distillation_trainer
from datasets import Dataset

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd._trl import GKDConfig, GKDTrainer
from trl_promptkd.analysis.plot_style import LIGHT, LOWER, new_figure, plot_style, save_figure, written_out
from trl_promptkd.data import pad_rows

from .common import MemoryPeak, bench_settings, in_a_process, measured_with, random_models
from .study.page_text import table


PAGE = "benchmarks.md"
METHODS = ("GKDTrainer", "the loss of DistillationTrainer", "PromptKD", "PromptKD, simultaneous")
ANSWER = 256  # tokens of a row


class DistillationLossTrainer(GKDTrainer):
    """Uses the chunked loss of TRL's DistillationTrainer, which itself would have to sample answers."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        states = model.model(**text).last_hidden_state[:, :-1]
        with torch.no_grad():
            teacher_states = self.teacher_model.model(**text).last_hidden_state[:, :-1]
        heads = model.lm_head.weight, self.teacher_model.lm_head.weight
        mask = inputs["labels"][:, 1:] != -100
        chunked = trl.trainer.distillation_trainer._chunked_divergence_loss
        loss, *_ = chunked(states, teacher_states, *heads, mask, self.beta, num_items_in_batch)
        return (loss, None) if return_outputs else loss


def peak_of_a_step(method: str, num_tokens: int, vocab_size: int, hidden_size: int) -> float:
    """Peak memory of one optimizer step above that before it, in MB."""
    models = random_models(vocab_size, hidden_size, 1, 1, inner_size=hidden_size)
    rows = Dataset.from_list([{"prompt": "t1", "completion": "t2"}] * (num_tokens // ANSWER))
    settings = bench_settings("unused", max_steps=1, per_device_train_batch_size=len(rows), optim="sgd")
    settings |= {"lmbda": 0.0, "beta": 1.0}

    def collate(examples):
        ids = torch.randint(1, vocab_size, (len(examples), ANSWER + 1), generator=torch.manual_seed(0)).tolist()
        return pad_rows([row[:1] for row in ids], [row[1:] for row in ids], 0)

    common = {"train_dataset": rows, "processing_class": models.tokenizer, "data_collator": collate}
    if method.startswith("PromptKD"):
        args = PromptKDConfig(**settings, prompt_update=method.partition(", ")[2] or "sequential")
        common["prompt_encoder_config"] = PromptEncoderConfig(prompt_init="random")
        trainer = PromptKDTrainer(models.student, models.teacher, args, **common)
    else:
        trainer_class = GKDTrainer if method == "GKDTrainer" else DistillationLossTrainer
        trainer = trainer_class(models.student, models.teacher, GKDConfig(**settings), **common)
    peak = MemoryPeak()
    trainer.train()
    return next(iter(peak.since().values()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help=f"multiples of {ANSWER}"
    )
    parser.add_argument("--vocab_size", type=int, default=151_936, help="entries of a distribution")
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the hidden states")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="what to measure")
    parser.add_argument("--most_gb", type=float, help="limit of a process's memory in GB (CPU)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    peaks: dict[str, dict[str, float | None]] = {method: {} for method in args.methods}
    for method in args.methods:
        for tokens in args.tokens:
            sizes = (method, tokens, args.vocab_size, args.hidden_size)
            peak = peaks[method][str(tokens)] = in_a_process(peak_of_a_step, *sizes, most_gb=args.most_gb)
            print(
                f"{method}, {tokens} tokens: {'not enough memory' if peak is None else f'{peak:.0f} MB'}", flush=True
            )
    return {"megabytes": peaks}


def compared(result: dict[str, Any]) -> tuple[int, float, float] | None:
    """The largest number of tokens at which both were measured, and the MB of GKDTrainer and of PromptKD there."""
    peaks = [result["megabytes"].get(method, {}) for method in ("GKDTrainer", "PromptKD")]
    both = [int(tokens) for tokens in peaks[0] if all(found.get(tokens) is not None for found in peaks)]
    return (max(both), *(found[str(max(both))] for found in peaks)) if both else None


def tables(result: dict[str, Any]) -> dict[str, str]:
    tokens, most = result["settings"]["tokens"], result["settings"]["most_gb"]
    no_room = "not enough memory" if most is None else f"more than {1000 * most:,.0f}"
    rows = [
        [method, *(no_room if peak is None else f"{peak:,.0f}" for peak in peaks.values())]
        for method, peaks in result["megabytes"].items()
    ]
    text = table(["peak, MB", *(f"{number:,} tokens" for number in tokens)], rows)
    if (found := compared(result)) is not None:
        number, gkd, ours = found
        text += f"\n\nAt {number:,} tokens, PromptKD takes 1/{gkd / ours:.0f} of the memory of `GKDTrainer`."
    return {"peak": f"{text} {measured_with(result)}"}


def sentences(result: dict[str, Any]) -> dict[str, list[str]]:
    if (found := compared(result)) is None:
        return {}
    number, gkd, ours = found
    said = f"{ours:,.0f} MB, and {gkd:,.0f} MB for `GKDTrainer` ({number:,} tokens, Qwen's vocabulary)"
    return {"docs/scaling.md": [said]}


@plot_style()
def draw(result: dict[str, Any], path: Path) -> None:
    figure, tokens = new_figure(9, 4.4), result["settings"]["tokens"]
    panel = figure.subplots()
    styles = ("o--", "s--", "o-", "s-")
    for (method, peaks), style in zip(result["megabytes"].items(), styles, strict=False):
        known = [(int(number), peak / 1e3) for number, peak in peaks.items() if peak is not None]
        color = LIGHT.lines[1] if "PromptKD" in method else LIGHT.muted
        panel.plot(*zip(*known, strict=True), style, color=color, label=method)
    panel.set(xlabel="trained tokens in a micro-batch", xscale="log", yscale="log")
    panel.set_ylabel(f"peak above the start, GB\n({LOWER})")
    written_out(panel.yaxis)
    panel.set_xticks(tokens, [f"{number:,}" for number in tokens])
    panel.minorticks_off()
    panel.grid()
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path)
