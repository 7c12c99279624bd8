"""How many tokens a second a teacher gives through its server, beside the same teacher's own forward pass.

    python examples/smollm2.py --output_dir models
    python benchmarks/teacher_server.py --teacher models/teacher --output_dir teacher_server_benchmark

Without `--server`, a vLLM server is started on this machine; it chooses its own number of threads. Ways are
interleaved, and medians are given.
All of them end with the logits of all tokens, and do nothing else. Ends with a table and `results.json`.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CI", "1")

import httpx2
import torch
from transformers import AutoModelForCausalLM

from trl_promptkd.divergences import kl_divergence
from trl_promptkd.generation.teacher_server import TeacherServer
from trl_promptkd.models.forward import TokenStates, completion_states
from trl_promptkd.models.output_head import load_output_head


@contextmanager
def vllm_server(folder: str, dtype: str, log: Path) -> Iterator[str]:
    """The address of a server in pooling mode."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pooling = json.dumps({"task": "token_embed", "use_activation": False})
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", dtype, "--enforce-eager", "--max-model-len", "1024"]
    command += ["--runner", "pooling", "--convert", "embed", "--pooler-config", pooling]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 600
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        while True:
            try:
                httpx2.get(f"{url}/health").raise_for_status()
                break
            except httpx2.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"The server did not start; see {log}.") from None
                time.sleep(1)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--server", help="address of a server that runs already")
    parser.add_argument("--dtype", default="float32", help="what both compute in")
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each row")
    parser.add_argument("--repeats", type=int, default=7, help="timed micro-batches of each way")
    parser.add_argument("--output_dir", default="teacher_server_benchmark", help="for results.json")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=args.dtype).eval()
    head = load_output_head(args.teacher, {"dtype": args.dtype})
    draw = torch.Generator().manual_seed(0)

    def new_rows() -> torch.Tensor:
        """Others each time: vLLM keeps what it knows of the beginnings of rows."""
        return torch.randint(100, head.config.vocab_size - 100, (args.rows, args.tokens), generator=draw)

    def beside(rows: torch.Tensor) -> TokenStates:
        labels = torch.cat([rows, rows[:, :1]], dim=1)  # a state of every token, as the server gives
        return completion_states(model, labels, torch.ones_like(labels), labels)

    def served(client: TeacherServer) -> Callable[[torch.Tensor], TokenStates]:
        weight = head.get_output_embeddings().weight
        return lambda rows: TokenStates(torch.cat(client.states(rows.tolist())).to(weight), head)

    def logits(states: TokenStates) -> list[torch.Tensor]:
        return [states.logits(start, start + 256) for start in range(0, len(states), 256)]

    runs = nullcontext(args.server) if args.server else vllm_server(args.teacher, args.dtype, folder / "server.log")
    with runs as url:
        ways = {"beside the student": beside}
        for dtype in ("bfloat16", "float32"):
            ways[f"served, {dtype} on the wire"] = served(TeacherServer(url, dtype=dtype))
        rows = new_rows()
        expected = torch.cat(logits(beside(rows))).log_softmax(dim=-1)
        kl = {}
        for name, way in ways.items():
            kl[name] = float(kl_divergence(expected, torch.cat(logits(way(rows))).log_softmax(dim=-1)).mean())
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(args.repeats + 1):
            for name, way in ways.items():
                rows = new_rows()
                start = time.perf_counter()
                for _ in logits(way(rows)):
                    pass
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
                    print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    number = args.rows * args.tokens
    medians = {name: number / statistics.median(values) for name, values in seconds.items()}
    results = {"settings": vars(args), "tokens_per_second": medians, "kl": kl, "seconds": seconds}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(
        f"\n{args.rows} rows of {args.tokens} tokens, {args.dtype}\n\n| teacher | tokens a second | share | KL, nats |"
    )
    print("| --- | --- | --- | --- |")
    for name, value in medians.items():
        print(f"| {name} | {value:.0f} | {value / medians['beside the student']:.2f} | {kl[name]:.1e} |")


if __name__ == "__main__":
    main()
