"""Answers that the primed teacher writes once, before training, and that stay on the disk as a data set.

Every answer is stored under a hash of what made it: the teacher's weights, how it sampled, and the prompt it saw. A run that
starts again, or another one over the same data, finds what there is and writes only the rest; when the teacher, the priming
text or the sampling change, so do the hashes, and no old answer is taken for a new one.
"""

import glob
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import remove_incomplete, text_hash, whole_file
from .rollouts import rollout_seed, sample_completions


__all__ = ["answer_key", "weights_fingerprint", "write_teacher_answers"]

logger = logging.get_logger(__name__)

_FINGERPRINT_PART = 1 << 24  # entries that are brought to the CPU at once
_SECONDS_A_PART = 30.0  # at most so much work is lost when a run is killed


@torch.no_grad()
def weights_fingerprint(model: nn.Module, everything: bool = False) -> str:
    """A hash of all bytes of the frozen weights, with their names, shapes and types: less than a second per GB on a CPU.

    It covers what a saved model has: buffers and the scales of quantized weights too. What is trained is left out unless `everything` counts: it
    is the adapter above a teacher that is the student's own start. (Take the fingerprint while that adapter is on: PEFT freezes it when it is
    switched off.) Of weights that are not in memory, only name and shape count.
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


def answer_key(source: Mapping[str, Any], prompt_ids: Sequence[int]) -> str:
    """The hash under which the answer to one prompt is kept; `source` says who wrote it, and how."""
    text = json.dumps([source, list(prompt_ids)], sort_keys=True, separators=(",", ":"), default=str)
    return text_hash(text)


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
    """`dataset` with `completion_ids` that the teacher wrote behind `teacher_prompt_ids`.

    Rows are shared out among ranks. What is done is written to parquet files in `folder` every half a minute: `key`, `prompt` (as
    the teacher saw it) and `completion` as texts, `completion_ids`. Answers that lie there already are taken, not written again.

    Args:
        dataset: With `teacher_prompt_ids`; equal prompts get one answer.
        fingerprint: Of the teacher's weights, see [`weights_fingerprint`].
        generation_config: How the teacher samples.
        args: Has `seed`, `rollout_batch_size` and the batch sizes of training.

    Returns:
        The data set, with `length` counting the answers.
    """
    settings = {key: value for key, value in generation_config.to_diff_dict().items() if key != "transformers_version"}
    source = {"teacher": fingerprint, "sampling": settings, "seed": args.seed}
    keys = [answer_key(source, ids) for ids in dataset["teacher_prompt_ids"]]
    prompts = dict(zip(keys, dataset["teacher_prompt_ids"], strict=True))

    shared: list[Any] = [None]
    if accelerator.is_main_process:
        remove_incomplete(folder)
        num_ids = accelerator.unwrap_model(teacher).get_input_embeddings().num_embeddings
        shared = [_read_parts(folder, prompts, num_ids)]
    known: dict[str, list[int]] = broadcast_object_list(shared)[0]
    missing = sorted(prompts.keys() - known.keys(), key=lambda key: (-len(prompts[key]), key))
    if known and missing:
        logger.warning(f"{len(known)} of {len(prompts)} teacher answers for `{name}` are in {folder} already.")
    if missing:
        size = args.rollout_batch_size or args.per_device_train_batch_size * args.gradient_accumulation_steps
        batches = [missing[start : start + size] for start in range(0, len(missing), size)]
        mine = _write_mine(
            batches, prompts, folder, teacher, accelerator, processing_class, generation_config, args, vocab_size, name
        )
        for part in gather_object([mine]):
            known.update(part)
    answers = [known[key] for key in keys]
    lengths = [len(ids) + len(answer) for ids, answer in zip(dataset["teacher_prompt_ids"], answers, strict=True)]
    dataset = dataset.remove_columns([column for column in ("completion_ids", "length") if column in dataset.features])
    return dataset.add_column("completion_ids", answers).add_column("length", lengths)


def _write_mine(
    batches: list[list[str]],
    prompts: Mapping[str, list[int]],
    folder: str,
    teacher: nn.Module,
    accelerator: Accelerator,
    processing_class: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    args: Any,
    vocab_size: int | None,
    name: str,
) -> dict[str, list[int]]:
    """This rank's share of the batches, written to `folder` as it goes."""
    mine: dict[str, list[int]] = {}
    unwritten: dict[str, list[int]] = {}
    written = time.monotonic()
    share = batches[accelerator.process_index :: accelerator.num_processes]
    # A teacher that is sharded is asked by all ranks equally often
    share += [[]] * (-(-len(batches) // accelerator.num_processes) - len(share))
    total = sum(map(len, share))
    description = f"Teacher writes answers for {name}"
    with tqdm(total=total, desc=description, unit="answer", disable=not accelerator.is_local_main_process) as bar:
        for index, batch in enumerate(share):
            answers = sample_completions(
                teacher,
                accelerator,
                [prompts[key] for key in batch],
                generation_config,
                rollout_seed(args.seed, f"answers/{batch[0] if batch else ''}", 0, 0),
                args,
                vocab_size=vocab_size,
                tokenizer=processing_class,
            )
            unwritten.update(zip(batch, answers, strict=True))
            if unwritten and (index == len(share) - 1 or time.monotonic() - written > _SECONDS_A_PART):
                _write_part(folder, unwritten, prompts, processing_class)
                mine.update(unwritten)
                unwritten, written = {}, time.monotonic()
            bar.update(len(batch))
    return mine


def _write_part(
    folder: str,
    answers: Mapping[str, list[int]],
    prompts: Mapping[str, list[int]],
    processing_class: PreTrainedTokenizerBase,
) -> None:
    os.makedirs(folder, exist_ok=True)
    table = pyarrow.table(
        {
            "key": list(answers),
            "prompt": processing_class.batch_decode([prompts[key] for key in answers]),
            "completion": processing_class.batch_decode(list(answers.values())),
            "completion_ids": list(answers.values()),
        }
    )
    name = text_hash("".join(answers))
    with whole_file(os.path.join(folder, f"answers-{name}.parquet")) as path:
        pyarrow.parquet.write_table(table, path, compression="zstd")


def _read_parts(folder: str, wanted: Mapping[str, Any], num_ids: int) -> dict[str, list[int]]:
    """The answers in `folder` that are wanted.

    Raises:
        ValueError: for a file that cannot be read, or holds anything but answers of ids below `num_ids`, naming it.
    """
    known: dict[str, list[int]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "answers-*.parquet"))):
        try:
            part = pyarrow.parquet.read_table(path, columns=["key", "completion_ids"])
            _check_part(part, num_ids)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{path} cannot be read as teacher answers ({type(error).__name__}: {error}). Delete it: its answers are then "
                "written again."
            ) from error
        rows = zip(part["key"].to_pylist(), part["completion_ids"].to_pylist(), strict=True)
        known.update({key: ids for key, ids in rows if key in wanted})
    return known


def _check_part(part: pyarrow.Table, num_ids: int) -> None:
    types = {"key": pyarrow.string(), "completion_ids": pyarrow.list_(pyarrow.int64())}
    found = dict(zip(part.schema.names, part.schema.types, strict=True))
    if found != types:
        raise ValueError(f"its columns are {found}, not {types}")
    part.validate(full=True)
    ids = pyarrow.compute.list_flatten(part["completion_ids"])
    ends = pyarrow.compute.min_max(ids).as_py()
    if part["key"].null_count or part["completion_ids"].null_count or ids.null_count:
        raise ValueError("keys or ids are missing")
    if len(ids) and not 0 <= ends["min"] <= ends["max"] < num_ids:
        raise ValueError(f"ids go from {ends['min']} to {ends['max']}; they must be from 0 to {num_ids - 1}")
