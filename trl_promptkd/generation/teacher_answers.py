"""Answers that the primed teacher generates once, before training. They stay on disk as a data set.

Every answer is stored under a hash of what made it: the teacher's weights, the sampling settings, the seed and the
prompt. When one of them changes, so do the hashes, so an old answer is never used for a new one.
"""

import hashlib
from collections.abc import Container
from typing import Any

import pyarrow
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, List, Value
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..files import content_hash, remove_incomplete
from .rollouts import rollout_seed, sample_completions
from .store import compute_missing, part_paths, read_part, write_part


__all__ = ["sampling_source", "weights_fingerprint", "write_teacher_answers"]

_FINGERPRINT_PART = 1 << 24  # entries that are brought to the CPU at once
_TEXTS = dict.fromkeys(("key", "prompt", "completion"), pyarrow.string())
_ANSWERS = pyarrow.schema({**_TEXTS, "completion_ids": pyarrow.list_(pyarrow.int64())})


@torch.no_grad()
def weights_fingerprint(model: nn.Module, everything: bool = False) -> str:
    """A hash of all bytes of the frozen weights, with their names, shapes and types. Under a second per GB on a CPU.

    Buffers and the scales of quantized weights are included. Trained weights are omitted unless `everything` is set:
    they are the adapter of a teacher that is the student's own start. (Take the fingerprint while that adapter is on.
    PEFT freezes it when it is switched off.) If weights are not in memory, only their name, shape and type count.
    """
    digest = hashlib.sha256()  # processors have instructions for it: twice as fast as blake2b
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    frozen = {} if everything else {name: value for name, value in tensors.items() if name not in trained}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in (frozen or tensors).items():
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        if tensor.device.type == "meta":
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:  # tied weights are read once
            digest.update(seen[place].encode())
            continue
        seen[place] = name
        for part in tensor.detach().reshape(-1).split(_FINGERPRINT_PART):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def sampling_source(generation_config: GenerationConfig) -> dict[str, Any]:
    """The sampling settings that answers depend on."""
    return {key: value for key, value in generation_config.to_diff_dict().items() if key != "transformers_version"}


def write_teacher_answers(
    dataset: Dataset,
    folder: str,
    teacher: nn.Module,
    fingerprint: str,
    accelerator: Accelerator,
    processing_class: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    args: Any,
    vocab_size: int | None = None,
    name: str = "train_dataset",
) -> Dataset:
    """`dataset` with `completion_ids` that the teacher generates after `teacher_prompt_ids`.

    Rows are shared out among ranks. Parquet files in `folder` keep finished answers: `key`, `prompt` (as the teacher
    saw it) and `completion` as texts, and `completion_ids`. Answers that are already there are not generated again.

    Args:
        dataset: Has `teacher_prompt_ids`. Equal prompts get one answer. Its `length` then includes the answers.
        fingerprint: Fingerprint of the teacher's weights, see [`weights_fingerprint`].
        args: Has `seed`, `rollout_batch_size`, `disable_tqdm` and the batch sizes of training.

    Raises:
        ValueError: if a file is damaged. The message names it.
    """
    source = {"teacher": fingerprint, "sampling": sampling_source(generation_config), "seed": args.seed}
    keys = [content_hash([source, ids], ensure_ascii=True, default=str) for ids in dataset["teacher_prompt_ids"]]
    prompts = dict(zip(keys, dataset["teacher_prompt_ids"], strict=True))
    shared: list[Any] = [None]
    if accelerator.is_main_process:
        remove_incomplete(folder)
        num_ids = accelerator.unwrap_model(teacher).get_input_embeddings().num_embeddings
        shared = [_read_answers(folder, prompts, num_ids)]
    known: dict[str, list[int]] = broadcast_object_list(shared)[0]
    mine: dict[str, list[int]] = {}

    def answer(batch: list[str]) -> dict[str, dict[str, Any]]:
        prompt_ids = [prompts[key] for key in batch]
        completions = sample_completions(
            teacher,
            accelerator,
            prompt_ids,
            generation_config,
            rollout_seed(args.seed, f"answers/{batch[0] if batch else ''}", 0, 0),
            args,
            vocab_size=vocab_size,
            tokenizer=processing_class,
        )
        mine.update(zip(batch, completions, strict=True))
        texts = zip(*map(processing_class.batch_decode, (prompt_ids, completions)), strict=True)
        return {
            key: {"prompt": prompt, "completion": completion, "completion_ids": mine[key]}
            for key, (prompt, completion) in zip(batch, texts, strict=True)
        }

    compute_missing(
        {key: len(ids) for key, ids in prompts.items()},
        known,
        answer,
        lambda rows: write_part(folder, "answers", rows, _ANSWERS),
        args.rollout_batch_size or args.per_device_train_batch_size * args.gradient_accumulation_steps,
        f"Teacher answers for {name}",
        accelerator,
        args.disable_tqdm,
    )
    for part in gather_object([mine]):
        known.update(part)
    answers = [known[key] for key in keys]
    lengths = [len(ids) + len(answer) for ids, answer in zip(dataset["teacher_prompt_ids"], answers, strict=True)]
    dataset = dataset.remove_columns([column for column in ("completion_ids", "length") if column in dataset.features])
    ids = List(Value("int32"))  # as prepared rows and teacher caches have
    return dataset.add_column("completion_ids", answers, feature=ids).add_column("length", lengths)


def _read_answers(folder: str, wanted: Container[str], num_ids: int) -> dict[str, list[int]]:
    """The wanted answers in `folder`."""
    known: dict[str, list[int]] = {}
    for path in part_paths(folder, "answers"):
        part = read_part(path, _ANSWERS, num_ids, "start again: only its answers are written anew")
        rows = zip(part["key"].to_pylist(), part["completion_ids"].to_pylist(), strict=True)
        known.update({key: ids for key, ids in rows if key in wanted})
    return known
