"""vLLM's own server in a process of its own, on its CPU build."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx2


# Hidden states in place of texts
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config")
POOLING += (json.dumps({"task": "token_embed", "use_activation": False}), "--max-num-seqs", "16")


class VLLMServer:
    """
    Serves a folder's model on loopback; a context, in which it runs.

    Args:
        folder: With the model and its tokenizer.
        log: A file for what the server says.
        flags: More of `vllm serve`'s.
    """

    def __init__(self, folder, log, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.log, self.host, self.url = log, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/v1"
        # `vllm serve` asks for the metadata of a package named vllm, which the CPU build is not
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        self.command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager", *flags]

    def __enter__(self):
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.host}/health").status_code == 200:
                    return self
            except httpx2.TransportError:
                time.sleep(0.5)
        self.kill()
        raise RuntimeError(self.log.read_text()[-3000:])

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
