"""Soft prompts on disk: one adapter, or those of all checkpoints of a run."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import read_safetensors, read_text
from ..models.forward import input_embeddings
from ..models.soft_prompt import ADAPTER_FOLDER, PARAMETERS_FILE
from ..trainer.checkpoints import checkpoint_folders


__all__ = ["SavedPrompt", "check_fits", "find_prompts", "initial_prompt", "read_prompt"]

_ADAPTER, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class SavedPrompt:
    """
    A soft prompt from a folder.

    Args:
        name: The checkpoint's or the folder's name, for tables.
        folder: Where it was read from.
        embeddings, initial (`Tensor` of shape `(num_virtual_tokens, hidden)`): The prompt in float32, and its start,
            if that was saved.
        config: The adapter's configuration.
        step: Step of the checkpoint. `None` for a prompt that was saved when its run was over.
    """

    name: str
    folder: str
    embeddings: Tensor
    initial: Tensor | None
    config: dict[str, Any]
    step: int | None = None


def read_prompt(folder: str, name: str | None = None, step: int | None = None) -> SavedPrompt:
    """Read the soft prompt in a PEFT adapter's folder, as [`~trl_promptkd.SoftPrompt.save_adapter`] or PEFT writes it.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if there is one of another kind, or one that cannot be read.
    """
    advice = "Pass the folder of a soft prompt (`.../teacher_prompt`), or a run's folder that holds it."
    config = json.loads(read_text(os.path.join(folder, _CONFIG), "an adapter's configuration"))
    embeddings = read_safetensors(os.path.join(folder, _ADAPTER), advice)[0].get("prompt_embeddings")
    kind = config.get("peft_type")
    if kind not in ("PROMPT_TUNING", "P_TUNING") or embeddings is None:
        raise ValueError(f"{folder} holds a {kind} adapter, which is no soft prompt before a model's input. {advice}")
    if not embeddings.isfinite().all():
        raise ValueError(f"The soft prompt in {folder} is not finite. Take that of an earlier checkpoint.")
    beside = os.path.join(folder, PARAMETERS_FILE)
    initial = read_safetensors(beside, advice)[0].get("initial") if os.path.isfile(beside) else None
    name = name or os.path.basename(os.path.normpath(folder))
    return SavedPrompt(name, folder, embeddings.float(), initial, config, step)


def find_prompts(path: str) -> list[SavedPrompt]:
    """Read the soft prompts at `path`, the oldest first.

    `path` is an adapter's own folder, or a run's, with the prompts of its checkpoints and the last one. Checkpoints
    without a prompt, as a killed run may leave them, are skipped. So is the run's last prompt if it equals the last
    checkpoint's.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: as for [`read_prompt`], and if their shapes differ.
    """
    own = os.path.join(path, ADAPTER_FOLDER)
    if os.path.isfile(os.path.join(path, _CONFIG)) and not os.path.isdir(own):
        return [read_prompt(path)]
    prompts = []
    for checkpoint in reversed(checkpoint_folders(path)):
        folder, name = os.path.join(checkpoint, ADAPTER_FOLDER), os.path.basename(checkpoint)
        if all(os.path.isfile(os.path.join(folder, file)) for file in (_ADAPTER, _CONFIG)):
            prompts.append(read_prompt(folder, name, int(name.rsplit("-", 1)[1])))
    if os.path.isdir(own):
        last = read_prompt(own)
        if not prompts or not last.embeddings.equal(prompts[-1].embeddings):
            prompts.append(last)
    if not prompts:
        raise FileNotFoundError(
            f"{path} holds no soft prompt: neither {_CONFIG} nor {ADAPTER_FOLDER}/ nor "
            f"checkpoint-*/{ADAPTER_FOLDER}/. Pass the "
            "folder that PromptKDTrainer wrote to, or the one of the adapter itself."
        )
    first = prompts[0]
    for prompt in prompts:
        if prompt.embeddings.shape != first.embeddings.shape:
            raise ValueError(
                f"The soft prompts in {prompt.folder} and {first.folder} have the shapes "
                f"{tuple(prompt.embeddings.shape)} and "
                f"{tuple(first.embeddings.shape)}: they are not of one run. Pass the folder of one run, or of one "
                "prompt."
            )
    return prompts


def check_fits(prompt: SavedPrompt, teacher: PreTrainedModel) -> None:
    """Reject a soft prompt whose width is not the teacher's."""
    width, expected = prompt.embeddings.size(1), teacher.get_input_embeddings().weight.size(1)
    if width != expected:
        raise ValueError(
            f"The soft prompt in {prompt.folder} has {width} numbers a token, but the teacher's embeddings have "
            f"{expected}. Pass "
            "the teacher that it was trained with "
            f"({prompt.config.get('base_model_name_or_path') or 'its name is not recorded'})."
        )


@torch.no_grad()
def initial_prompt(
    prompts: list[SavedPrompt], teacher: PreTrainedModel, processing_class: PreTrainedTokenizerBase
) -> tuple[Tensor | None, str]:
    """What the last of some soft prompts of one run started from, and how that is known.

    PromptKDTrainer saves the start beside the prompt. PEFT does not. If its prompt started from a text, the text is
    embedded again by the teacher's embeddings, which never change. If it started at random, the first of several
    checkpoints is taken. With a single one, the start is `None`.
    """
    last = prompts[-1]
    if last.initial is not None:
        return last.initial, "the start that was saved with the prompt"
    text = last.config.get("prompt_tuning_init_text")
    if last.config.get("prompt_tuning_init") == "TEXT" and text:
        embeddings: Any = input_embeddings(teacher)
        ids = processing_class(text)["input_ids"]  # PEFT, other than PromptKDTrainer, counts special tokens in
        number = len(last.embeddings)
        ids = torch.tensor((ids * number)[:number], device=embeddings.weight.device)
        return embeddings(ids).float().cpu(), f"the initial text {text!r}, embedded again"
    if len(prompts) > 1:
        return prompts[0].embeddings, f"{prompts[0].name}, as the start was random and is not recorded"
    return None, "not known: it was random and is not recorded"
