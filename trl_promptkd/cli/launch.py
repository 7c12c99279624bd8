"""The processes of a training command: this one, or those of `accelerate launch`, as in TRL's own commands."""

import argparse
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .._trl import accelerate_launcher


_MODULE = "trl_promptkd.cli"  # what each process runs


def launched_or_here(
    command: str, parser: Any, train: Callable[..., int], words: Sequence[str], launch: bool
) -> argparse.Namespace:
    """What to run for the `words` after a training command.

    Flags that the training does not know go to `accelerate launch`. It starts the processes if there are such flags,
    several GPUs, or a file of `accelerate config`. Otherwise the training runs in this process.

    Args:
        train: Takes the result of `parser` on the words, and returns an exit code.
        launch: Whether processes may be started. Those of a launcher must not start others.
    """
    pairs = [("--config", word.partition("=")[2]) if word.startswith("--config=") else (word,) for word in words]
    words = [word for pair in pairs for word in pair]
    if launch and "LOCAL_RANK" not in os.environ:
        launcher = accelerate_launcher()
        others = _unknown(parser, words)
        if others or torch.accelerator.device_count() > 1 or os.path.isfile(launcher.default_config_file):
            known = launcher.subtract_subsequence(list(words), others)
            args = _launch_args(launcher, command, parser, known, others)
            return argparse.Namespace(run=lambda _: _launch(launcher, args))
    parsed = parser.parse_args_and_config(words)
    return argparse.Namespace(run=lambda _: train(*parsed))


def _unknown(parser: Any, words: Sequence[str]) -> list[str]:
    words = list(words)
    if "--config" in words:
        del words[words.index("--config") : words.index("--config") + 2]
    return parser.parse_known_args(words)[1]


def _launch_args(launcher: Any, command: str, parser: Any, words: list[str], flags: list[str]) -> argparse.Namespace:
    """The arguments of `accelerate launch`. Errors in them take one line here."""
    accelerate = launcher.launch_command_parser()
    accelerate.error = parser.error
    flags = ["--module", *launcher.resolve_accelerate_config_argument(flags)]
    args = accelerate.parse_args([*flags, _MODULE, command, *words])
    if (args.num_processes or 1) > 1 and not torch.accelerator.is_available():
        parser.error(
            f"`--num_processes` is {args.num_processes}, but there is no GPU, and `accelerate launch` starts one "
            f"process on a CPU. Use `torchrun --nproc_per_node {args.num_processes} -m {_MODULE} {command} ...`."
        )
    if args.training_script != _MODULE:
        parser.error(f"unrecognized arguments: {args.training_script}")
    return args


def _launch(launcher: Any, args: argparse.Namespace) -> int:
    try:
        launcher.launch_command(args)
    except (subprocess.CalledProcessError, ChildFailedError):  # the processes have said what is wrong
        return 1
    return 0
