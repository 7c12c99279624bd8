"""Building a cache: what is refused, and what the folder is to hold; `writer.py` fills it."""

import json
import os
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.primed import tokenize_primed_dataset
from ..data.priming import PrimingTemplate, resolve_priming
from ..field_checks import check_choice, check_kind, check_positive
from ..files import remove_incomplete
from ..generation.rollouts import rollout_config
from ..generation.teacher_answers import weights_fingerprint, write_teacher_answers
from ..models.compare import check_forward
from ..models.limits import check_positions, check_rows_embedded, embedded_by
from ..models.teacher import freeze, load_teacher
from ..models.tokenizer import shared_vocab_size
from .codec import PRESETS
from .manifest import MANIFEST_FILE, Manifest, describe_priming, describe_tokenizer
from .reader import TeacherCache
from .writer import CacheWriter


__all__ = ["build_teacher_cache"]


def build_teacher_cache(
    teacher: str | PreTrainedModel,
    dataset: Dataset,
    output_dir: str,
    processing_class: PreTrainedTokenizerBase,
    priming: str | PrimingTemplate | None = None,
    preset: str = "standard",
    response_source: str = "dataset",
    max_length: int | None = None,
    teacher_max_length: int | None = None,
    overlong: str = "drop",
    batch_size: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generation_kwargs: dict[str, Any] | None = None,
    teacher_model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    seed: int = 42,
    num_proc: int | None = None,
) -> TeacherCache:
    """Run a teacher once and keep its distributions at every completion token of a data set.

    A build that was killed resumes when it is started again with the same arguments. Rows that are there are not
    computed again, and new rows of a longer data set are added. Under `accelerate launch` the rows are shared out
    among the ranks, which must see one file system.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`]): The teacher; a name is loaded with
            `teacher_model_init_kwargs`.
        dataset ([`~datasets.Dataset`]): Rows as for [`PrimedDistillTrainer`].
        output_dir (`str`): The cache's folder; made if it is not there.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of teacher and student.
        priming (`str` or [`PrimingTemplate`], *optional*): What the teacher sees, as for [`PrimedDistillTrainer`].
        preset (`str`, *optional*, defaults to `"standard"`): How much is kept: `"tiny"` (draws, for the forward KL
            only), `"standard"`, `"faithful"` or `"exact"` (any divergence at any temperature).
        response_source (`str`, *optional*, defaults to `"dataset"`): Whose answers are judged: `"dataset"` or
            `"teacher"`, which writes them first. `cache.dataset()` is then a training set with them.
        max_length, teacher_max_length, overlong, max_new_tokens, temperature, top_k, top_p, generation_kwargs: As in
            [`PrimedDistillConfig`].
        batch_size (`int`, *optional*, defaults to `8`): Rows at once on one device.
        seed (`int`, *optional*, defaults to `42`): Of the teacher's samples.
        num_proc (`int`, *optional*): Processes that tokenize.

    Returns:
        [`TeacherCache`]. Its `manifest.receipt` has `kl_mean` and `kl_p95` (KL(teacher || kept), nats a token, on
        `kl_tokens` tokens: an eighth of the batches; the percentile from 256 of them a shard), `tail_mass_p50` and
        `tail_mass_p95` (of what is not kept token by token), `bytes_per_token` on disk without the basis,
        `basis_bytes` and `decode_microseconds_per_token`.

    Raises:
        ValueError: for an unknown preset or source, rows that cannot be used, a folder that holds another cache, and a
            teacher whose logits are not its output head applied to its last hidden state.
    """
    args = SimpleNamespace(
        preset=preset,
        response_source=response_source,
        overlong=overlong,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generation_kwargs=generation_kwargs or {},
        seed=seed,
        rollout_batch_size=batch_size,
        gradient_checkpointing_kwargs=None,
        disable_tqdm=False,
    )
    check_choice(args, "preset", list(PRESETS))
    check_choice(args, "response_source", ("dataset", "teacher"))
    check_choice(args, "overlong", ("drop", "error"))
    for name in ("batch_size", "max_new_tokens", "temperature"):
        check_kind(name, getattr(args, name), int | float)
    check_positive(args, "batch_size", "max_new_tokens", "temperature")
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a {type(processing_class).__name__}; it must be a tokenizer: "
            "`AutoTokenizer.from_pretrained(name)`."
        )
    if isinstance(dataset, IterableDataset):
        raise ValueError("`dataset` is streamed, but rows are found by their content. Load it without streaming.")
    template = resolve_priming(priming)
    # Before tokenizing, which asks `PartialState()`: that alone does not find the ranks of `accelerate launch --cpu`
    accelerator = Accelerator()
    needed = None
    if response_source == "dataset":
        needed = (
            "`response_source` is 'dataset', so that the data's own answers are judged. Set "
            "`response_source='teacher'`."
        )
    dataset = tokenize_primed_dataset(
        dataset, "dataset", processing_class, template, max_length, teacher_max_length, needed, overlong, num_proc
    )
    if isinstance(teacher, str):
        teacher = load_teacher(teacher, teacher_model_init_kwargs, trust_remote_code)
    vocab_size = shared_vocab_size(teacher, teacher, processing_class)
    seen = {"teacher": (teacher, ("teacher_prompt_ids", "completion_ids"))}
    check_rows_embedded(dataset, "dataset", processing_class, embedded_by(seen, processing_class))
    longest = max(dataset["length"]) + (max_new_tokens if response_source == "teacher" else 0)
    check_positions(
        "teacher", teacher, longest, "Lower `teacher_max_length` to leave such rows out, or `max_new_tokens`."
    )
    freeze(teacher)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "generation_kwargs", "seed")
    sampling = {name: getattr(args, name) for name in names}
    config, fingerprint = teacher.config, weights_fingerprint(teacher)
    manifest = Manifest(
        teacher={
            "name": config._name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "quantization": str(getattr(teacher, "quantization_method", None) or "none"),
            "weights": fingerprint,
        },
        **describe_tokenizer(processing_class),
        vocab_size=vocab_size,
        priming=describe_priming(template),
        response_source=response_source,
        preset=preset,
        sampling=json.loads(json.dumps(sampling)) if response_source == "teacher" else None,  # as it is read again
        max_length=max_length,
        teacher_max_length=teacher_max_length,
    )
    _claim_folder(output_dir, manifest, accelerator)
    model = accelerator.prepare_model(teacher, evaluation_mode=True)
    check_forward("teacher", teacher, processing_class, accelerator, vocab_size=vocab_size)
    pad_token_id = processing_class.pad_token_id
    if pad_token_id is None:
        pad_token_id = processing_class.eos_token_id or 0  # any will do: masks come from lengths
    if response_source == "teacher":
        generation_config = rollout_config(teacher, teacher, processing_class, args)
        generation_config.pad_token_id = pad_token_id
        dataset = write_teacher_answers(
            dataset,
            os.path.join(output_dir, "_teacher_answers"),
            model,
            fingerprint,
            accelerator,
            processing_class,
            generation_config,
            args,
            vocab_size,
            "the cache",
        )
    CacheWriter(model, teacher, dataset, output_dir, manifest, batch_size, pad_token_id, accelerator).run()
    return TeacherCache(output_dir, verify_checksums=False)


def _claim_folder(folder: str, manifest: Manifest, accelerator: Accelerator) -> None:
    """Write the manifest of an empty folder, or refuse a folder that holds another cache."""
    path = os.path.join(folder, MANIFEST_FILE)
    if accelerator.is_main_process:
        os.makedirs(folder, exist_ok=True)
        remove_incomplete(folder)
        if not os.path.isfile(path):
            manifest.save(path)
    accelerator.wait_for_everyone()
    there, here = Manifest.load(path).settings(), manifest.settings()
    for name in here:
        if there[name] != here[name]:
            raise ValueError(
                f"{folder} holds a cache that was made differently: `{name}` is {there[name]!r} there and "
                f"{here[name]!r} here. Choose another `output_dir`, or the same settings to resume it."
            )
