"""Checkpoints: which of them are whole after a crash, and a last one when the run is told to stop.

A process may be killed while it writes a checkpoint or deletes an old one. What is left looks like a checkpoint, and
transformers takes the one with the highest number. Here each checkpoint gets a list of its files and their lengths,
which is written last. A checkpoint is whole if it holds this list and all files on it have their lengths. While a
checkpoint is written, it holds a file that says so.
"""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from transformers.utils import logging
from trl import SFTTrainer

from ..files import write_text
from .hub import push_checkpoint, wait_for_push


__all__ = ["checkpoint_folders", "checkpoint_to_resume", "push_later", "save_checkpoint", "saved_on_interrupt"]

logger = logging.get_logger(__name__)

_LIST_FILE = "whole_checkpoint.json"
_BEGUN_FILE = "checkpoint_is_being_written"
_UNFINISHED = "it was being written when its run ended"
_NO_LIST = f"it has no {_LIST_FILE}, which is written last"


def save_checkpoint(self, model: nn.Module, trial: Any) -> None:
    """Save as the base class does. Then list the checkpoint's files, remove old checkpoints, and push this one.

    A method of both trainers.
    """
    args, run_dir = self.args, self._get_output_dir(trial=trial)
    folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
    path, begun = os.path.join(folder, _LIST_FILE), os.path.join(folder, _BEGUN_FILE)
    if args.should_save:
        os.makedirs(folder, exist_ok=True)
        Path(begun).touch()
        Path(path).unlink(missing_ok=True)  # an earlier run's list of files that are now overwritten
    self.accelerator.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None  # old checkpoints stay until this one is whole
    try:
        SFTTrainer._save_checkpoint(self, model, trial)
    finally:
        args.save_total_limit = limit
    self.accelerator.wait_for_everyone()  # every rank writes its random state
    if args.should_save:
        card = os.path.join(args.output_dir, "README.md")
        if os.path.isfile(card):
            shutil.copy(card, folder)  # instead of PEFT's card, which names the base model's folder on this machine
        sizes = {name: size for name, size in _sizes(folder).items() if name != _BEGUN_FILE}
        write_text(path, json.dumps({"files": sizes}, indent=1))
        os.remove(begun)
    if args.should_save and limit:
        wait_for_push(self)
        for old in checkpoint_folders(run_dir):
            if os.path.exists(os.path.join(old, _BEGUN_FILE)):  # left by a killed run, and must not outlive whole ones
                shutil.rmtree(old, ignore_errors=True)
        rotate_checkpoints(
            output_dir=run_dir,
            save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )
    # Last, because an upload of `output_dir` fails if a folder is deleted while its files are listed
    push_checkpoint(self, folder)


def push_later(self, checkpoint_folder: str) -> None:
    """Do nothing. The base class would push a checkpoint before it is whole. [`save_checkpoint`] pushes it afterwards.

    A method of both trainers.
    """


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint that a run resumes from, or `None` for a fresh start.

    Args:
        resume_from_checkpoint: As for `Trainer.train`: a folder, or `True` for the newest whole checkpoint in
            `output_dir`. Checkpoints that are not whole are skipped with a warning. If all there were being written
            when their runs ended, the run starts afresh. A named folder in `output_dir` that was being written when
            its run ended is skipped in the same way, for an older one. A named folder without a list of its files
            (another trainer's, or one that was copied in part) is accepted with a warning.

    Raises:
        FileNotFoundError: for a folder that does not exist.
        ValueError: for a folder that is not a whole checkpoint, for one that holds the weights alone, and if
            `output_dir` holds no checkpoint to resume from.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is not True:
        folder = os.fspath(resume_from_checkpoint)
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"`resume_from_checkpoint` is {folder!r}, which is not a folder. Check the path, or set it to True "
                "for the newest whole checkpoint in `output_dir`."
            )
        problem = _problem(folder)
        if problem == _NO_LIST:
            logger.warning(f"The checkpoint {folder} cannot be checked: {problem}.")
        if problem in (None, _NO_LIST):
            _check_resumable(folder)
            return folder
        of_this_run = os.path.realpath(folder) in map(os.path.realpath, checkpoint_folders(output_dir))
        if problem != _UNFINISHED or not of_this_run:
            raise ValueError(
                f"`resume_from_checkpoint` is {folder!r}, which is not a whole checkpoint: {problem}. Resume from an "
                "older one, or set `resume_from_checkpoint=True` for the newest whole one."
            )
    there, problems = checkpoint_folders(output_dir), []
    if resume_from_checkpoint is not True:
        there = [path for path in there if _step(path) <= _step(folder)]
    for folder in there:
        problem = _problem(folder)
        if problem is None:
            _check_resumable(folder)
            return folder
        logger.warning(f"The checkpoint {folder} is not whole and is skipped: {problem}.")
        problems.append(problem)
    if problems and set(problems) == {_UNFINISHED}:
        logger.warning(f"{output_dir} holds no whole checkpoint: no run got that far. Training starts afresh.")
        return None
    raise ValueError(
        f"`resume_from_checkpoint` is True, but {output_dir} holds no whole checkpoint"
        + (f" ({len(problems)} that are not)" if problems else "")
        + ". Start without it, or name a checkpoint's folder."
    )


def _check_resumable(folder: str) -> None:
    """Reject a checkpoint that was saved with `save_only_model=True`. transformers would start a new optimizer
    silently."""
    names = os.listdir(folder)
    if "trainer_state.json" in names and not any(name.startswith("rng_state") for name in names):
        raise ValueError(
            f"{folder} was saved with `save_only_model=True`, which leaves out the optimizer, the schedule and the "
            "random states: a run cannot go on from it. Set `save_only_model=False` in runs that are to be resumed. "
            "Or start a new run from these weights: pass the folder as `model`."
        )


def checkpoint_folders(run_dir: str) -> list[str]:
    """The checkpoints in a folder, whole or not, the newest first."""
    return [
        path for path in reversed(sort_checkpoints(run_dir)) if re.fullmatch(r"checkpoint-\d+", os.path.basename(path))
    ]


def _step(folder: str) -> int:
    return int(folder.rstrip(os.sep).rsplit("-", 1)[1])


def _sizes(folder: str) -> dict[str, int]:
    """The files in a folder and its subfolders, with their lengths in bytes."""
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(path, folder): os.path.getsize(path) for path in sorted(paths)}


def _problem(folder: str) -> str | None:
    """Why a checkpoint is not whole, or `None` if it is."""
    if os.path.exists(os.path.join(folder, _BEGUN_FILE)) or not os.listdir(folder):
        return _UNFINISHED
    try:
        with open(os.path.join(folder, _LIST_FILE), encoding="utf-8") as file:
            listed = json.load(file)["files"]
        wanted = {str(name): int(size) for name, size in listed.items()}
    except FileNotFoundError:
        return _NO_LIST
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {_LIST_FILE} cannot be read ({error})"
    found = _sizes(folder)
    for name, size in wanted.items():
        if found.get(name) != size:
            return f"{name} " + (f"has {found[name]} bytes instead of {size}" if name in found else "is missing")
    return None


@contextmanager
def saved_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """Put this around training, and SIGTERM saves a checkpoint. Does nothing unless `save_on_interrupt` is set.

    Clusters send SIGTERM before they take a machine away. The step is then finished, a checkpoint is saved, and
    training ends. A signal that comes too late for that ends the process when training is over.

    transformers' own `enable_jit_checkpoint` saves in the middle of a step, when the soft prompt may have been stepped
    and the student not. Each rank also saves when its own signal comes. Here all ranks stop after the same step.

    Raises:
        ValueError: if this is not the main thread, which alone gets signals.
    """
    if not trainer.args.save_on_interrupt:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            "`save_on_interrupt` is True, but `train()` was not called in the main thread, which alone gets signals. "
            "Set it to False."
        )
    callback = _SaveOnInterrupt(trainer.accelerator)
    before = signal.signal(signal.SIGTERM, callback.on_signal)
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    if callback.signalled and not callback.saved:
        os.kill(os.getpid(), signal.SIGTERM)


class _SaveOnInterrupt(TrainerCallback):
    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signalled = self.saved = False

    def on_signal(self, signum: int, frame: Any) -> None:
        self.signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        signals = torch.tensor(float(self.signalled), device=self.accelerator.device)
        if self.accelerator.reduce(signals, reduction="sum") > 0:
            logger.warning(f"SIGTERM: a checkpoint is saved after step {state.global_step}, and training ends.")
            self.saved = control.should_save = control.should_training_stop = True
