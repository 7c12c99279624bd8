"""Building a cache: checks of the arguments, and the manifest of the folder. `writer.py` fills it."""

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
from ..files import content_hash, remove_incomplete
from ..generation.rollouts import rollout_config
from ..generation.teacher_answers import write_teacher_answers
from ..models.limits import check_positions, check_rows_embedded, embedded_by
from ..models.tokenizer import shared_vocab_size
from .codec import PRESETS
from .manifest import MANIFEST_FILE, Manifest, describe_priming, describe_tokenizer, differing, part_numbers
from .reader import BASIS_FILE, TeacherCache
from .sources import EngineStates, ForwardStates, ServerStates, StatesSource
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
    backend: str = "transformers",
    teacher_server: str | None = None,
    vllm_kwargs: dict[str, Any] | None = None,
    part: str | None = None,
    basis: str | None = None,
) -> TeacherCache:
    """Run a teacher once and keep its distributions at every completion token of a data set.

    A killed build resumes when it is started again with the same arguments. Finished rows are not computed again, and
    new rows of a longer data set are added. Under `accelerate launch` the ranks share the rows. They must see one file
    system.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`]): The teacher. A name is loaded with
            `teacher_model_init_kwargs`. If it runs in vLLM (`backend`), it must be a name, and only its output head is
            loaded here.
        dataset ([`~datasets.Dataset`]): Rows as for [`PrimedDistillTrainer`].
        output_dir (`str`): The cache's folder. It is created if it does not exist.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of teacher and student.
        priming (`str` or [`PrimingTemplate`], *optional*): What the teacher sees, as for [`PrimedDistillTrainer`].
        preset (`str`, *optional*, defaults to `"standard"`): How much is kept: `"tiny"` (draws, for the forward KL
            only), `"standard"`, `"faithful"` or `"exact"` (any divergence at any temperature).
        response_source (`str`, *optional*, defaults to `"dataset"`): Source of the answers: `"dataset"`, or
            `"teacher"`, which generates them first. `cache.dataset()` is then a training set with them.
        max_length, teacher_max_length, overlong, max_new_tokens, temperature, top_k, top_p, generation_kwargs: As in
            [`PrimedDistillConfig`].
        batch_size (`int`, *optional*, defaults to `8`): Rows per batch on one device, or per call of vLLM. vLLM is
            faster with more of them.
        seed (`int`, *optional*, defaults to `42`): Seed of the teacher's samples.
        num_proc (`int`, *optional*): Number of processes that tokenize.
        backend (`str`, *optional*, defaults to `"transformers"`): What runs the teacher: `"transformers"`, `"vllm"` in
            this process, or `"server"`, a vLLM server in pooling mode. vLLM generates no answers in this mode, so
            `response_source` must be `"dataset"`.
        teacher_server (`str`, *optional*): URL of the server, such as `"http://host:8000"`.
        vllm_kwargs (`dict`, *optional*): Arguments of `vllm.LLM`, such as `{"tensor_parallel_size": 4}`.
        part (`str`, *optional*): Build only this part of the cache, such as `"2/3"`. Every host finds its own rows, as
            the content of the teacher's prompt decides on a row's part. [`merge_teacher_caches`] joins the parts.
        basis (`str`, *optional*): `basis.safetensors` of another cache of this teacher. Parts after the first need
            that of the first, as rows in other coordinates cannot be merged. The preset `"tiny"` has none.

    Returns:
        [`TeacherCache`]. Its `manifest.receipt` has:

        - `rows`, `tokens`: how many there are.
        - `kl_mean`, `kl_p95`: mean and 95th percentile of KL(teacher || kept), in nats per token. They come from
            `kl_tokens` tokens, which are an eighth of the batches. The percentile comes from up to 256 tokens per
            shard.
        - `tail_mass_p50`, `tail_mass_p95`: percentiles of the probability that is not kept token by token.
        - `bytes_per_token`, `basis_bytes`: size on disk, per token without the basis, and of the basis.
        - `decode_microseconds_per_token`: time to decode.

    Raises:
        ConnectionError, TimeoutError: if a server stops. Finished rows are kept, and the same call resumes.
        ValueError: if the preset or source is unknown, rows cannot be used, the folder holds another cache, or the
            teacher's logits are not its output head applied to its last hidden state.
    """
    args = SimpleNamespace(
        preset=preset,
        response_source=response_source,
        backend=backend,
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
    check_choice(args, "backend", ("transformers", "vllm", "server"))
    for name in ("batch_size", "max_new_tokens", "temperature"):
        check_kind(name, getattr(args, name), int | float)
    check_positive(args, "batch_size", "max_new_tokens", "temperature")
    _check_part(part, basis, preset, output_dir)
    how = (teacher, teacher_model_init_kwargs, trust_remote_code)
    source = _source(backend, *how, response_source, teacher_server, vllm_kwargs)
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
    if backend == "vllm" and accelerator.num_processes > 1:
        raise ValueError(
            f"`backend` is 'vllm', but {accelerator.num_processes} processes were launched. vLLM spreads a teacher "
            "over several GPUs itself: start one process, with `vllm_kwargs={'tensor_parallel_size': ...}`."
        )
    needed = None
    if response_source == "dataset":
        needed = (
            "`response_source` is 'dataset', so that the data's own answers are judged. Set "
            "`response_source='teacher'`."
        )
    dataset = tokenize_primed_dataset(
        dataset, "dataset", processing_class, template, max_length, teacher_max_length, needed, overlong, num_proc
    )
    whole = dataset
    if part is not None:
        dataset = _rows_of_part(dataset, part)
    loaded = source.load()
    vocab_size = shared_vocab_size(loaded, loaded, processing_class)
    seen = {"teacher": (loaded, ("teacher_prompt_ids", "completion_ids"))}
    check_rows_embedded(whole, "dataset", processing_class, embedded_by(seen, processing_class))
    longest = max(whole["length"]) + (max_new_tokens if response_source == "teacher" else 0)
    check_positions(
        "teacher", loaded, longest, "Lower `teacher_max_length` to leave such rows out, or `max_new_tokens`."
    )
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "generation_kwargs", "seed")
    sampling = {name: getattr(args, name) for name in names}
    identity = source.identity()
    manifest = Manifest(
        teacher=identity,
        **describe_tokenizer(processing_class),
        vocab_size=vocab_size,
        priming=describe_priming(template),
        response_source=response_source,
        preset=preset,
        sampling=json.loads(json.dumps(sampling)) if response_source == "teacher" else None,  # as it is read again
        max_length=max_length,
        teacher_max_length=teacher_max_length,
        part=part,
    )
    _claim_folder(output_dir, manifest, accelerator)
    source.start(accelerator, processing_class, vocab_size, longest)
    if isinstance(source, ForwardStates) and response_source == "teacher":
        generation_config = rollout_config(loaded, loaded, processing_class, args)
        generation_config.pad_token_id = source.pad_token_id
        dataset = whole = write_teacher_answers(
            dataset,
            os.path.join(output_dir, "_teacher_answers"),
            source.model,
            str(identity["weights"]),
            accelerator,
            processing_class,
            generation_config,
            args,
            vocab_size,
            "the cache",
        )
    CacheWriter(source, dataset, whole, output_dir, manifest, batch_size, accelerator, basis).run()
    return TeacherCache(output_dir, verify_checksums=False)


def _source(
    backend: str,
    teacher: str | PreTrainedModel,
    init_kwargs: dict[str, Any] | None,
    trust_remote_code: bool,
    response_source: str,
    teacher_server: str | None,
    vllm_kwargs: dict[str, Any] | None,
) -> StatesSource:
    """The source of hidden states for a backend, before anything is loaded."""
    for name, value, of in (("teacher_server", teacher_server, "server"), ("vllm_kwargs", vllm_kwargs, "vllm")):
        if value and backend != of:
            raise ValueError(f"`{name}` is {value!r}, but `backend` is {backend!r}. Set `backend={of!r}`, or omit it.")
    if backend == "transformers":
        return ForwardStates(teacher, init_kwargs, trust_remote_code)
    if not isinstance(teacher, str):
        raise TypeError(
            f"`teacher` is a {type(teacher).__name__}, but with `backend={backend!r}` it runs elsewhere and only its "
            "output head is loaded here. Pass its name, a Hub id or a folder."
        )
    if response_source == "teacher":
        raise ValueError(
            f"`response_source` is 'teacher', but with `backend={backend!r}` the teacher only reads answers and "
            "writes none. Let a server that generates write them first, and build from that data set with "
            "`response_source='dataset'`. Or use `backend='transformers'`."
        )
    if backend == "vllm":
        return EngineStates(teacher, init_kwargs, trust_remote_code, vllm_kwargs=vllm_kwargs)
    if teacher_server is None:
        raise ValueError(
            "`backend` is 'server', but `teacher_server` is missing. Pass its address: 'http://host:8000'."
        )
    return ServerStates(teacher, init_kwargs, trust_remote_code, url=teacher_server)


def _check_part(part: str | None, basis: str | None, preset: str, folder: str) -> None:
    """Reject a part whose rows could not be merged, and coordinates for a preset without any."""
    first = part is None or part_numbers(part)[0] == 1
    if basis is not None and PRESETS[preset].draws:
        raise ValueError(f"`basis` is {basis!r}, but the preset {preset!r} keeps draws, without coordinates. Omit it.")
    if basis is not None and not os.path.isfile(basis):
        raise FileNotFoundError(f"`basis` is {basis!r}, and there is no such file. Check the path.")
    needs_basis = not first and basis is None and not PRESETS[preset].draws
    if needs_basis and not os.path.isfile(os.path.join(folder, BASIS_FILE)):
        raise ValueError(
            f"`part` is {part!r}, but `basis` is missing: all parts need the coordinates of the first, or they cannot "
            f"be merged. Start that one first. As soon as {BASIS_FILE} is in its folder, copy that file here and pass "
            "its path."
        )


def _rows_of_part(dataset: Dataset, part: str) -> Dataset:
    """The rows of one part. All answers to one prompt are in one part, even those that a teacher has yet to write."""
    number, count = part_numbers(part)
    shares = [int(content_hash(ids), 16) % count for ids in dataset["teacher_prompt_ids"]]
    mine = [index for index, share in enumerate(shares) if share == number - 1]
    if not mine:
        raise ValueError(
            f"`part` is {part!r}, which has none of the {len(dataset)} rows in `dataset`. Build fewer parts."
        )
    return dataset.select(mine)


def _claim_folder(folder: str, manifest: Manifest, accelerator: Accelerator) -> None:
    """Write the manifest of an empty folder, or reject a folder that holds another cache."""
    path = os.path.join(folder, MANIFEST_FILE)
    if accelerator.is_main_process:
        os.makedirs(folder, exist_ok=True)
        remove_incomplete(folder)
        if not os.path.isfile(path):
            manifest.save(path)
    accelerator.wait_for_everyone()
    there = Manifest.load(path)
    differs = differing(there.settings() | {"part": there.part}, manifest.settings() | {"part": manifest.part})
    if differs is not None:
        raise ValueError(
            f"{folder} holds a cache that was made differently: {differs}. Choose another `output_dir`, or the same "
            "settings to resume it."
        )
