"""Pushing checkpoints to the Hub during training: whole ones, with the teacher's prompt beside the student."""

import os
import shutil
from concurrent.futures import Future
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from trl import SFTTrainer

from ..models.soft_prompt import ADAPTER_FOLDER


__all__ = ["init_hf_repo", "push_checkpoint", "wait_for_push"]

logger = logging.get_logger(__name__)


def init_hf_repo(self, token: str | None = None, **kwargs: Any) -> None:
    """Create the repository as the base class does, then the branch `hub_revision` if it does not exist. Pushing to a
    missing branch would fail. `kwargs` are the base class's, in newer versions of transformers `private`.

    A method of both trainers.
    """
    SFTTrainer.init_hf_repo(self, token, **kwargs)
    if self.args.hub_revision is not None and self.is_world_process_zero():
        api = HfApi(token=token or self.args.hub_token)
        api.create_branch(self.hub_model_id, branch=self.args.hub_revision, exist_ok=True)


def wait_for_push(trainer: Trainer) -> None:
    """If `hub_always_push` is set, wait for a running upload. Its files must not change or be deleted meanwhile."""
    if trainer.args.hub_always_push and _is_pushing(trainer):
        trainer.push_in_progress.wait_until_done()


def _is_pushing(trainer: Trainer) -> bool:
    running = getattr(trainer, "push_in_progress", None)  # trainers that do not push have none
    return running is not None and not running.is_done()


def push_checkpoint(trainer: Trainer, folder: str) -> None:
    """Push what `hub_strategy` says, in the background, while training continues.

    The base class copies the student's files, by their names, from the checkpoint to `output_dir`. It uploads that
    folder, and the checkpoint if `hub_strategy` says so. The soft prompt is copied here. The base class is silent
    about a failed upload. Here it is a warning.
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
    SFTTrainer._push_from_checkpoint(trainer, folder)
    step = trainer.state.global_step

    def tell(job: Future) -> None:
        if not job.cancelled() and job.exception() is not None:
            logger.warning(
                f"The push of step {step} to {trainer.hub_model_id} failed ({job.exception()}). Nothing of it is "
                "there. The next save pushes again; after training, so does `trainer.push_to_hub()`."
            )

    for job in trainer.push_in_progress.jobs:
        job.add_done_callback(tell)
