"""Tokens per second of a teacher on a vLLM server, compared with the same teacher's own forward pass.

The server runs in pooling mode, as in docs/primed_distill.md, and chooses its own number of threads. Every variant
computes the logits of all tokens, and nothing else. The variants take turns.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trl_promptkd.divergences import kl_divergence
from trl_promptkd.generation.teacher_server import TeacherServer
from trl_promptkd.models.forward import TokenStates, completion_states
from trl_promptkd.models.output_head import load_output_head

from .common import measured_with, median
from .study.page_text import table


PAGE = "benchmarks.md"
BESIDE = "beside the student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="folder of the teacher, such as examples/smollm2.py makes")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="URL of the server")
    parser.add_argument("--dtype", default="float32", help="dtype of both computations")
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each row")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed micro-batches of each variant, after one that is not counted"
    )


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=args.dtype).eval()
    head = load_output_head(args.teacher, {"dtype": args.dtype})
    draw = torch.Generator().manual_seed(0)

    def new_rows() -> torch.Tensor:
        """New rows each time, as vLLM caches the prefixes of rows."""
        return torch.randint(100, head.config.vocab_size - 100, (args.rows, args.tokens), generator=draw)

    def beside(rows: torch.Tensor) -> TokenStates:
        labels = torch.cat([rows, rows[:, :1]], dim=1)  # a state of every token, as the server gives
        return completion_states(model, labels, torch.ones_like(labels), labels)

    def served(client: TeacherServer) -> Callable[[torch.Tensor], TokenStates]:
        weight = head.get_output_embeddings().weight
        return lambda rows: TokenStates(torch.cat(client.states(rows.tolist())).to(weight), head)

    def logits(states: TokenStates) -> list[torch.Tensor]:
        return [states.logits(start, start + 256) for start in range(0, len(states), 256)]

    ways = {BESIDE: beside}
    for dtype in ("bfloat16", "float32"):
        ways[f"served, {dtype} on the wire"] = served(TeacherServer(args.server, dtype=dtype))
    rows, kl = new_rows(), {}
    expected = torch.cat(logits(beside(rows))).log_softmax(dim=-1)
    for name, way in ways.items():
        kl[name] = float(kl_divergence(expected, torch.cat(logits(way(rows))).log_softmax(dim=-1)).mean())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats + 1):
        for name, way in ways.items():
            rows, start = new_rows(), time.perf_counter()
            logits(way(rows))
            seconds[name].append(time.perf_counter() - start)
    return {"kl": kl, "seconds": {name: values[1:] for name, values in seconds.items()}}


def tables(result: dict[str, Any]) -> dict[str, str]:
    settings = result["settings"]
    tokens = settings["rows"] * settings["tokens"]
    speed = {name: tokens / median(values) for name, values in result["seconds"].items()}
    rows = [
        [name, f"{value:.0f}", f"{value / speed[BESIDE]:.2f}", f"{result['kl'][name]:.1e}"]
        for name, value in speed.items()
    ]
    of = f"{settings['rows']} rows of {settings['tokens']} tokens, {settings['dtype']}. {measured_with(result)}"
    return {"speed": f"{table(['teacher', 'tokens per second', 'share', 'KL, nats'], rows)}\n\n{of}"}
