"""Pushing checkpoints to the Hub during training: whole ones, with the teacher's prompt beside the student."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..models.soft_prompt import ADAPTER_FOLDER


__all__ = ["make_branch", "push_checkpoint", "wait_for_push"]

logger = logging.get_logger(__name__)


def make_branch(trainer: Trainer, token: str | None) -> None:
    """Make the branch `hub_revision` of the run's repository where there is none: pushing to it would fail."""
    args = trainer.args
    if args.hub_revision is not None and trainer.is_world_process_zero():
        api = HfApi(token=token or args.hub_token)
        api.create_branch(trainer.hub_model_id, branch=args.hub_revision, exist_ok=True)


def wait_for_push(trainer: Trainer) -> None:
    """Where `hub_always_push` says so, wait for an upload that runs: its files must neither change nor go."""
    if trainer.args.hub_always_push and _is_pushing(trainer):
        trainer.push_in_progress.wait_until_done()


def _is_pushing(trainer: Trainer) -> bool:
    running = getattr(trainer, "push_in_progress", None)  # of those that push
    return running is not None and not running.is_done()


def push_checkpoint(trainer: Trainer, folder: str, push: Callable[[str], None]) -> None:
    """Push what `hub_strategy` says, in the background, while training goes on.

    `push` is the base class's: it copies the student's files by their names from the checkpoint to `output_dir`, which it uploads, and the
    checkpoint as it is. What else belongs to the student is copied here, and an upload that failed, of which the base class says nothing,
    is told of.

    Args:
        trainer: Whose checkpoint.
        folder: The checkpoint.
        push: Starts the uploads.
    """
    args = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    wait_for_push(trainer)
    if _is_pushing(trainer):
        return
    prompt = os.path.join(folder, ADAPTER_FOLDER)
    if os.path.isdir(prompt):
        shutil.copytree(prompt, os.path.join(args.output_dir, ADAPTER_FOLDER), dirs_exist_ok=True)
    push(folder)
    step = trainer.state.global_step

    def tell(job: Future) -> None:
        if not job.cancelled() and job.exception() is not None:
            logger.warning(
                f"The push of step {step} to {trainer.hub_model_id} failed ({job.exception()}). Nothing of it is there. The next save "
                "pushes again; after training, so does `trainer.push_to_hub()`."
            )

    for job in trainer.push_in_progress.jobs:
        job.add_done_callback(tell)
