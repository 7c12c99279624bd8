"""Memory that a training step takes beyond the models: PromptKD beside TRL's GKDTrainer and DistillationTrainer's
loss.

    python benchmarks/divergence_memory.py --output_dir divergence_memory_benchmark

Models of one small layer with Qwen's vocabulary (151,936) train on answers of the data, so that only the
divergence counts. Each run is a process of its own, and its peak is what the operating system (or CUDA) saw. A run
that the machine has no memory for is said to be so. Ends with a table, a chart and `results.json`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")

METHODS = ("GKD", "Distillation's loss", "PromptKD", "PromptKD, simultaneous")
ANSWER = 256  # tokens a row


def peak_of_a_step(method: str, num_tokens: int, vocab_size: int, hidden_size: int, chunk: int | None) -> float:
    """Megabytes at the peak of one optimizer step, beyond what was there before it."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
    from trl_promptkd._trl import GKDConfig, GKDTrainer
    from trl_promptkd.data import pad_rows

    torch.set_num_threads(os.cpu_count() or 1)
    vocabulary = {f"t{index}": index for index in range(vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")))
    tokenizer.pad_token = tokenizer.eos_token = "t0"
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "t1", "completion": "t2"}] * (num_tokens // ANSWER))
    settings = {
        "output_dir": "unused",
        "max_steps": 1,
        "per_device_train_batch_size": len(rows),
        "gradient_checkpointing": False,
        "bf16": False,
        "optim": "sgd",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "lmbda": 0.0,
        "beta": 1.0,
    }

    def collate(examples):
        ids = torch.randint(1, vocab_size, (len(examples), ANSWER + 1), generator=torch.manual_seed(0)).tolist()
        return pad_rows([row[:1] for row in ids], [row[1:] for row in ids], 0)

    common = {"train_dataset": rows, "processing_class": tokenizer, "data_collator": collate}
    if method == "GKD":
        trainer = GKDTrainer(student, teacher, GKDConfig(**settings), **common)
    elif method == "Distillation's loss":
        trainer = _with_the_loss_of_distillation(GKDTrainer)(student, teacher, GKDConfig(**settings), **common)
    else:
        if chunk is not None:
            settings["loss_chunk_size"] = chunk
        update = "simultaneous" if "simultaneous" in method else "sequential"
        prompt = PromptEncoderConfig(prompt_init="random")
        args = PromptKDConfig(**settings, prompt_update=update)
        trainer = PromptKDTrainer(student, teacher, args, **common, prompt_encoder_config=prompt)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.train()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident("VmRSS")
    trainer.train()
    return (_resident("VmHWM") - before) / 1e3


def _resident(name: str) -> float:
    """Kilobytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return float(line.split()[1])


def _with_the_loss_of_distillation(base):
    """GKDTrainer with the chunked loss of TRL's DistillationTrainer, which itself would have to sample answers."""
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    class Trainer(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            states = model.model(**text).last_hidden_state[:, :-1]
            with torch.no_grad():
                teacher_states = self.teacher_model.model(**text).last_hidden_state[:, :-1]
            heads = model.lm_head.weight, self.teacher_model.lm_head.weight
            mask = inputs["labels"][:, 1:] != -100
            loss, *_ = _chunked_divergence_loss(states, teacher_states, *heads, mask, self.beta, num_items_in_batch)
            return (loss, None) if return_outputs else loss

    return Trainer


def in_a_process(*arguments: str) -> float | None:
    """The peak, or `None` where there was not enough memory."""
    command = [sys.executable, __file__, "--run", *arguments]

    def first_to_go() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")

    linux = sys.platform == "linux"
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=first_to_go if linux else None, check=False
    )
    if done.returncode in (-9, 137) or "CUDA out of memory" in done.stderr or "can't allocate memory" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.splitlines()[-1])


def chart(results: dict[str, dict[int, float | None]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4))
    for method, values in results.items():
        known = [(tokens, peak / 1e3) for tokens, peak in values.items() if peak is not None]
        ours, square = "PromptKD" in method, "simultaneous" in method or "loss" in method
        marker, style = "s" if square else "o", "-" if ours else "--"
        axis.plot(*zip(*known, strict=True), marker + style, color="#c0392b" if ours else "#7f8c8d", label=method)
    axis.set(xlabel="trained tokens in a micro-batch", ylabel="peak beyond the models, GB", xscale="log", yscale="log")
    axis.set_xticks(list(next(iter(results.values()))), [str(t) for t in next(iter(results.values()))])
    axis.xaxis.minorticks_off()
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="numbers of tokens to measure at"
    )
    parser.add_argument(
        "--vocab_size", type=int, default=151_936, help="ids a distribution is over (the default: Qwen2.5's)"
    )
    parser.add_argument("--hidden_size", type=int, default=64, help="of the states that logits are made from")
    parser.add_argument("--loss_chunk_size", type=int, help="PromptKD's; by default its own default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="what to measure")
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--output_dir", default="divergence_memory_benchmark", help="for the table, results.json and the chart"
    )
    args = parser.parse_args()
    if args.run:
        method, tokens = args.run
        print(peak_of_a_step(method, int(tokens), args.vocab_size, args.hidden_size, args.loss_chunk_size))
        return
    if any(tokens % ANSWER or tokens <= 0 for tokens in args.tokens):
        parser.error(f"`tokens` must be multiples of {ANSWER}, the length of a row.")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = ["--vocab_size", str(args.vocab_size), "--hidden_size", str(args.hidden_size)]
    if args.loss_chunk_size:
        sizes += ["--loss_chunk_size", str(args.loss_chunk_size)]
    results: dict[str, dict[int, float | None]] = {}
    for method in args.methods:
        results[method] = {}
        for tokens in args.tokens:
            peak = results[method][tokens] = in_a_process(method, str(tokens), *sizes)
            print(
                f"{method}, {tokens} tokens: {'not enough memory' if peak is None else f'{peak:.0f} MB'}", flush=True
            )
    (folder / "results.json").write_text(json.dumps({"settings": vars(args), "megabytes": results}, indent=1))
    chart(results, folder / "divergence_memory.png")
    print(
        f"\n| peak, MB | {' | '.join(f'{tokens} tokens' for tokens in args.tokens)} |\n| --- "
        f"|{' --- |' * len(args.tokens)}"
    )
    for method, values in results.items():
        shown = ["not enough memory" if peak is None else f"{peak:.0f}" for peak in values.values()]
        print(f"| {method} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
