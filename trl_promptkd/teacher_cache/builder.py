"""Building a cache: the teacher's forward passes, written down as they come, so that a build can be killed at any moment."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from numbers import Real
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checks import check_positions
from ..data import pad_rows
from ..divergences import kl_divergence
from ..files import remove_incomplete, whole_file
from ..forward import completion_states, inside_forward
from ..primed_collator import tokenize_primed_dataset
from ..priming import PrimingTemplate, resolve_priming
from ..rollouts import rollout_config
from ..teacher import freeze, load_teacher, shared_vocab_size
from ..teacher_answers import weights_fingerprint, write_teacher_answers
from .codec import PRESETS, Basis, Preset, decode, encode, tail_masses
from .manifest import MANIFEST_FILE, Manifest, describe_priming, describe_tokenizer, digest, row_key
from .reader import BASIS_FILE, TeacherCache, read_shard, sha256_of


__all__ = ["build_teacher_cache"]

logger = logging.get_logger(__name__)

_CALIBRATION_TOKENS = 8192
_SECONDS_A_SHARD = 30.0  # at most so much work is lost when a build is killed
_BYTES_A_SHARD = 64 * 2**20
_RECEIPT_EVERY = 8  # batches
_LABEL = b"trl_promptkd"


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
    """Ask a teacher once for its distributions at every completion token of a data set, and keep them.

    A build that was killed goes on where it was when it is started again with the same arguments; rows that are there are not
    computed again, and new rows of a longer data set are added. Under `accelerate launch` the rows are shared out among the ranks,
    which must see one file system.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`]): The teacher; a name is loaded with `teacher_model_init_kwargs`.
        dataset ([`~datasets.Dataset`]): Rows as for [`PrimedDistillTrainer`].
        output_dir (`str`): The cache's folder; made if it is not there.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of teacher and student.
        priming (`str` or [`PrimingTemplate`], *optional*): What the teacher sees, as for [`PrimedDistillTrainer`].
        preset (`str`, *optional*, defaults to `"standard"`): How much is kept: `"tiny"` (draws, for the forward KL only),
            `"standard"`, `"faithful"` or `"exact"` (any divergence at any temperature).
        response_source (`str`, *optional*, defaults to `"dataset"`): Whose answers are judged: `"dataset"` or `"teacher"`, which writes them first;
            they are then in the cache, and `cache.dataset()` is a training set.
        max_length, teacher_max_length, overlong, max_new_tokens, temperature, top_k, top_p, generation_kwargs: As in [`PrimedDistillConfig`].
        batch_size (`int`, *optional*, defaults to `8`): Rows at once on one device.
        seed (`int`, *optional*, defaults to `42`): Of the teacher's samples.
        num_proc (`int`, *optional*): Processes that tokenize.

    Returns:
        [`TeacherCache`]. Its `manifest.receipt` has `kl_mean` and `kl_p95` (KL(teacher || kept), nats a token, on `kl_tokens` tokens: an
        eighth of the batches; the percentile from 256 of them a shard), `tail_mass_p50` and `tail_mass_p95` (of what is not kept token by token),
        `bytes_per_token` on disk without the basis, `basis_bytes` and `decode_microseconds_per_token`.

    Raises:
        ValueError: for an unknown preset or source, rows that cannot be used, a folder that holds another cache, and a teacher whose logits are
            not its output head applied to its last hidden state.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` is {preset!r}; it must be one of {', '.join(map(repr, PRESETS))}.")
    if response_source not in ("dataset", "teacher"):
        raise ValueError(f"`response_source` is {response_source!r}; it must be 'dataset' or 'teacher'.")
    if overlong not in ("drop", "error"):
        raise ValueError(f"`overlong` is {overlong!r}; it must be 'drop' or 'error'.")
    if isinstance(dataset, IterableDataset):
        raise ValueError("`dataset` is streamed, but rows are found by their content. Load it without streaming.")
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a {type(processing_class).__name__}; it must be a tokenizer: `AutoTokenizer.from_pretrained(name)`."
        )
    numbers = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "temperature": temperature}
    for name, value in numbers.items():
        if not isinstance(value, Real) or not value > 0:
            raise ValueError(f"`{name}` is {value!r}; it must be above 0.")
    template = resolve_priming(priming)
    # Before tokenizing: `PartialState()`, which that asks, does not find the ranks of `accelerate launch --cpu` by itself
    accelerator = Accelerator()
    needed = None
    if response_source == "dataset":
        needed = "`response_source` is 'dataset', so that the data's own answers are judged. Set `response_source='teacher'`."
    dataset = tokenize_primed_dataset(
        dataset, "dataset", processing_class, template, max_length, teacher_max_length, needed, overlong, num_proc
    )
    if isinstance(teacher, str):
        teacher = load_teacher(teacher, teacher_model_init_kwargs, trust_remote_code)
    if not isinstance(teacher, PreTrainedModel | PeftModel):
        raise TypeError(
            f"`teacher` is a {type(teacher).__name__}; it must be a name, a folder or a causal language model."
        )
    shared_vocab_size(teacher, teacher, processing_class)  # refuses one that is too small for the tokenizer
    longest = max(dataset["length"]) + (max_new_tokens if response_source == "teacher" else 0)
    check_positions(
        "teacher", teacher, longest, "Lower `teacher_max_length` to leave such rows out, or `max_new_tokens`."
    )
    freeze(teacher)
    sampling: Any = None
    if response_source == "teacher":
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "generation_kwargs": generation_kwargs or {},
            "seed": seed,
        }
        sampling = json.loads(json.dumps(sampling))  # as it comes back from the manifest
    config = teacher.config
    pad_token_id = processing_class.pad_token_id
    pad_token_id = (
        (processing_class.eos_token_id or 0) if pad_token_id is None else pad_token_id
    )  # masks come from lengths
    head = teacher.get_output_embeddings()
    manifest = Manifest(
        teacher={
            "name": config._name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "quantization": str(getattr(teacher, "quantization_method", None) or "none"),
            "weights": weights_fingerprint(teacher),
        },
        **describe_tokenizer(processing_class),
        vocab_size=getattr(head, "out_features", head.weight.size(0)),
        priming=describe_priming(template),
        response_source=response_source,
        preset=preset,
        sampling=sampling,
        max_length=max_length,
        teacher_max_length=teacher_max_length,
    )
    _claim_folder(output_dir, manifest, accelerator)
    model = accelerator.prepare_model(teacher, evaluation_mode=True)
    if sampling is not None:
        args = SimpleNamespace(
            **sampling,
            rollout_batch_size=batch_size,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        )
        generation_config: GenerationConfig = rollout_config(teacher, teacher, processing_class, args)
        generation_config.pad_token_id = pad_token_id
        dataset = write_teacher_answers(
            dataset,
            os.path.join(output_dir, "_teacher_answers"),
            model,
            manifest.teacher["weights"],
            accelerator,
            processing_class,
            generation_config,
            args,
            manifest.real_vocab_size if manifest.real_vocab_size < manifest.vocab_size else None,
            "the cache",
        )
    build = _Build(model, teacher, dataset, output_dir, manifest, batch_size, pad_token_id, accelerator)
    build.run()
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
                f"{folder} holds a cache that was made differently: `{name}` is {there[name]!r} there and {here[name]!r} here. Choose another "
                "`output_dir`, or the same settings to go on with it."
            )


class _Build:
    """One build: which rows are missing, and the passes over them."""

    def __init__(self, model, teacher, dataset, folder, manifest, batch_size, pad_token_id, accelerator):
        self.model, self.teacher, self.folder, self.manifest = model, teacher, folder, manifest
        self.batch_size, self.pad_token_id, self.accelerator = batch_size, pad_token_id, accelerator
        self.preset: Preset = PRESETS[manifest.preset]
        self.rows: dict[str, dict[str, Any]] = {}
        for row in dataset:
            self.rows.setdefault(row_key(row["teacher_prompt_ids"], row["completion_ids"]), row)
        self.label = {"settings": digest(manifest.settings()), "basis": ""}  # in every shard

    def run(self) -> None:
        self.basis = None if self.preset.draws else self._basis()
        if self.basis is not None:
            self.label["basis"] = sha256_of(self._path(BASIS_FILE))
        done = self._finished_keys()
        missing = sorted(self.rows.keys() - done, key=lambda key: (-self.rows[key]["length"], key))
        if done and missing:
            logger.warning(f"{len(self.rows) - len(missing)} of {len(self.rows)} rows are in {self.folder} already.")
        batches = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        self._write_share(batches[self.accelerator.process_index :: self.accelerator.num_processes])
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._finish()
        self.accelerator.wait_for_everyone()

    # -------------------------------------------------------------------------------------------- the teacher

    def _states(self, keys: list[str]) -> list[tuple[Tensor, Tensor]]:
        """Hidden states and logits of some rows, row by row."""
        rows = [self.rows[key] for key in keys]
        completions = [row["completion_ids"] for row in rows]
        batch = pad_rows([row["teacher_prompt_ids"] for row in rows], completions, self.pad_token_id)
        ids, mask, labels = (
            batch[name].to(self.accelerator.device) for name in ("input_ids", "attention_mask", "labels")
        )

        def ask(teacher: torch.nn.Module) -> tuple[Tensor, Tensor]:
            known = completion_states(teacher, ids, mask, labels, vocab_size=self.manifest.vocab_size)
            return known.states, known.logits()

        with torch.no_grad(), self.accelerator.autocast():
            states, logits = inside_forward(self.model, ask)
        lengths = list(map(len, completions))
        return list(zip(states.split(lengths), logits.split(lengths), strict=True))

    def _basis(self) -> Basis:
        """The cache's coordinates: what lies there, or fitted to some rows, the same ones whatever the order of the data."""
        path = self._path(BASIS_FILE)
        if self.accelerator.is_main_process and os.path.isfile(path):
            checksum = Manifest.load(self._path(MANIFEST_FILE)).files.get(BASIS_FILE)
            if checksum is not None and checksum != sha256_of(path):
                logger.warning(f"{path} is damaged; the coordinates are fitted and all rows made anew.")
                os.remove(path)
        if self.accelerator.is_main_process and not os.path.isfile(path):
            keys, tokens = [], 0
            for key in sorted(self.rows):
                if tokens >= _CALIBRATION_TOKENS:
                    break
                keys.append(key)
                tokens += len(self.rows[key]["completion_ids"])
            keys.sort(key=lambda key: self.rows[key]["length"])
            states = []
            with tqdm(total=len(keys), desc="Teacher cache: fitting coordinates", unit="row") as bar:
                for start in range(0, len(keys), self.batch_size):
                    part = self._states(keys[start : start + self.batch_size])
                    states += [hidden for hidden, _ in part]
                    bar.update(len(part))
            head, settings = self.teacher.get_output_embeddings(), self.teacher.config.get_text_config()
            vocab = self.manifest.vocab_size
            if not head.weight.is_floating_point() or head.weight.device.type == "meta":
                raise ValueError(
                    "The teacher's output head is quantized or not in memory, and the coordinates of this preset come from it. Leave the head "
                    "out of the quantization (`llm_int8_skip_modules=['lm_head']`), or use `preset='tiny'`."
                )
            rank = self.preset.rank
            if rank is not None and tokens < 4 * head.weight.size(1):
                logger.warning(
                    f"The coordinates are fitted to {tokens} tokens only, too few to leave any of them out: rows take more bytes. Build with "
                    "more rows first."
                )
                rank = None
            basis = Basis.fit(
                torch.cat(states),
                head.weight[:vocab],
                None if getattr(head, "bias", None) is None else head.bias[:vocab],
                logit_scale=_logit_scale(settings),
                softcap=getattr(settings, "final_logit_softcapping", None) or 0.0,
                rank=rank,
            )
            self._check_head(basis, *part[-1])
            basis.save(path)
        self.accelerator.wait_for_everyone()
        return Basis.load(path).to(self.accelerator.device)

    def _check_head(self, basis: Basis, hidden: Tensor, logits: Tensor) -> None:
        """Whether this teacher's logits are its output head applied to its last hidden state, as far as is known here."""
        head, settings = self.teacher.get_output_embeddings(), self.teacher.config.get_text_config()
        expected = head(hidden.to(head.weight.device)).to(logits.device).float() * _logit_scale(settings)
        if basis.softcap:
            expected = basis.softcap * torch.tanh(expected / basis.softcap)
        off = kl_divergence(logits.log_softmax(dim=-1), expected.log_softmax(dim=-1)).mean()
        exact = Preset(step=1e-3)
        kept = decode(
            encode(hidden, logits, basis.to(hidden.device), exact),
            basis.to(hidden.device),
            exact,
            logits.size(-1),
            hidden.device,
        )
        if basis.analysis.size(1) == hidden.size(1):  # nothing is left out
            off = torch.maximum(off, kl_divergence(logits.log_softmax(dim=-1), kept).mean())
        if not off <= 1e-3:
            raise ValueError(
                f"The logits of {type(self.teacher).__name__} are not its output head applied to its last hidden state (they differ by "
                f"{off:.2e} nats): something comes after it that this version does not know. Distil from the live teacher instead."
            )

    # -------------------------------------------------------------------------------------------- the shards

    def _shards(self) -> Iterator[str]:
        for name in sorted(os.listdir(self.folder)):
            if name.startswith("shard-") and name.endswith(".parquet"):
                yield os.path.join(self.folder, name)

    def _finished_keys(self) -> set[str]:
        """The keys of all rows that are there; a shard that cannot be read is taken away and made anew."""
        done: set[str] = set()
        checksums = {shard["file"]: shard["sha256"] for shard in Manifest.load(self._path(MANIFEST_FILE)).shards}
        if self.accelerator.is_main_process:
            for path in list(self._shards()):
                name = os.path.basename(path)
                damaged = checksums.get(name, "") != "" and sha256_of(path) != checksums[name]
                try:
                    label = _label_of(path)
                except (OSError, ValueError, pyarrow.ArrowException):
                    damaged, label = True, {}
                if not damaged and label.get("settings") != self.label["settings"]:
                    raise ValueError(
                        f"{path} belongs to a cache that was made differently (another teacher, priming, preset, ...). Choose another `output_dir`, "
                        "or delete the file."
                    )
                try:
                    keys = [] if damaged else read_shard(path, self.manifest)["key"].to_pylist()
                except ValueError:
                    damaged = True
                if damaged or label.get("basis") != self.label["basis"]:
                    why = "is damaged" if damaged else "was made with other coordinates"
                    logger.warning(f"The shard {path} {why}; its rows are made anew.")
                    os.remove(path)
                    continue
                done.update(keys)
        if self.accelerator.num_processes > 1:
            done = broadcast_object_list([done])[0]
        return done

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _write_share(self, batches: list[list[str]]) -> None:
        shard: list[dict[str, Any]] = []
        divergences: list[Tensor] = []
        tails: list[Tensor] = []
        written, size = time.monotonic(), 0
        total = sum(len(self.rows[key]["completion_ids"]) for batch in batches for key in batch)
        bar = tqdm(
            total=total,
            desc="Teacher cache",
            unit="token",
            disable=not self.accelerator.is_local_main_process or not total,
        )
        with bar:
            for index, batch in enumerate(batches):
                for key, (hidden, logits) in zip(batch, self._states(batch), strict=True):
                    payload = encode(hidden, logits, self.basis, self.preset, seed=int(key[:15], 16))
                    if index % _RECEIPT_EVERY == 0 and not self.preset.draws:
                        kept = decode(payload, self.basis, self.preset, logits.size(-1), logits.device)
                        divergences.append(kl_divergence(logits.log_softmax(dim=-1), kept).cpu())
                        if self.preset.top_k:
                            tails.append(tail_masses(payload))
                    row = self.rows[key]
                    names = ("prompt_ids", "teacher_prompt_ids", "completion_ids")
                    ids = {name: row[name] for name in names}
                    if ids["prompt_ids"] == ids["teacher_prompt_ids"]:
                        ids["prompt_ids"] = None  # not said twice
                    shard.append({"key": key, **ids, **payload})
                    size += sum(map(len, payload.values()))
                    bar.update(len(row["completion_ids"]))
                late = time.monotonic() - written > _SECONDS_A_SHARD or size > _BYTES_A_SHARD
                if index == len(batches) - 1 or late:
                    self._write_shard(shard, {"kl": _summary(divergences), "tail": _summary(tails)})
                    shard, divergences, tails, written, size = [], [], [], time.monotonic(), 0

    def _write_shard(self, rows: list[dict[str, Any]], summaries: dict[str, dict]) -> None:
        types = {name: pyarrow.binary() for name in rows[0]} | {"key": pyarrow.string()}
        types |= {
            name: pyarrow.list_(pyarrow.int32()) for name in ("prompt_ids", "teacher_prompt_ids", "completion_ids")
        }
        table = pyarrow.table({name: pyarrow.array([row[name] for row in rows], type=types[name]) for name in rows[0]})
        table = table.replace_schema_metadata({_LABEL: json.dumps({**self.label, **summaries})})
        name = hashlib.blake2b("".join(row["key"] for row in rows).encode(), digest_size=16).hexdigest()
        try:
            with whole_file(self._path(f"shard-{name}.parquet")) as path:
                pyarrow.parquet.write_table(
                    table,
                    path,
                    compression="zstd",
                    compression_level=9,
                    use_dictionary=False,
                    write_page_checksum=True,
                )
        except OSError as error:
            raise OSError(
                f"The teacher cache in {self.folder} could not be written ({error}). What is there is kept: make room and start the build again."
            ) from error

    def _finish(self) -> None:
        """Checksums and the receipt, into the manifest."""
        self.manifest.shards = []
        summaries: dict[str, list[dict]] = {"kl": [], "tail": []}
        keys: list[str] = []
        for path in self._shards():
            table = pyarrow.parquet.read_table(path, columns=["key", "completion_ids"])
            keys += table["key"].to_pylist()
            for name, values in summaries.items():
                values.append(_label_of(path)[name])
            self.manifest.shards.append(
                {
                    "file": os.path.basename(path),
                    "rows": len(table),
                    "tokens": sum(map(len, table["completion_ids"].to_pylist())),
                    "bytes": os.path.getsize(path),
                    "sha256": sha256_of(path),
                }
            )
        self.manifest.files = {} if self.basis is None else {BASIS_FILE: sha256_of(self._path(BASIS_FILE))}
        tokens = sum(shard["tokens"] for shard in self.manifest.shards)
        self.manifest.data = digest(sorted(keys))
        self.manifest.receipt = {}
        samples = {name: [x for part in parts for x in part["sample"]] for name, parts in summaries.items()}
        if samples["kl"]:
            count = sum(part["count"] for part in summaries["kl"])
            self.manifest.receipt |= {
                "kl_mean": sum(part["sum"] for part in summaries["kl"]) / count,
                "kl_p95": float(np.quantile(samples["kl"], 0.95)),
                "kl_tokens": count,
            }
        if samples["tail"]:
            for percent in (50, 95):
                self.manifest.receipt[f"tail_mass_p{percent}"] = float(np.quantile(samples["tail"], percent / 100))
        self.manifest.receipt |= {
            "rows": sum(shard["rows"] for shard in self.manifest.shards),
            "tokens": tokens,
            "bytes_per_token": sum(shard["bytes"] for shard in self.manifest.shards) / max(tokens, 1),
            "basis_bytes": 0 if self.basis is None else os.path.getsize(self._path(BASIS_FILE)),
        }
        self.manifest.save(self._path(MANIFEST_FILE))
        cache = TeacherCache(self.folder, verify_checksums=False).to(self.accelerator.device)
        some = list(range(min(16, len(cache))))
        start = time.perf_counter()
        decoded = len(cache.log_probs(some))
        self.manifest.receipt["decode_microseconds_per_token"] = 1e6 * (time.perf_counter() - start) / max(decoded, 1)
        self.manifest.save(self._path(MANIFEST_FILE))


def _summary(values: list[Tensor]) -> dict[str, Any]:
    """Sum, number, and at most 256 of some values, evenly spread: a shard's part of the receipt."""
    joined = torch.cat(values).double() if values else torch.zeros(0)
    some = joined[:: max(-(-len(joined) // 256), 1)]
    return {"sum": float(joined.sum()), "count": len(joined), "sample": [round(float(value), 4) for value in some]}


def _label_of(path: str) -> dict[str, Any]:
    """What a shard says about itself."""
    return json.loads((pyarrow.parquet.read_schema(path).metadata or {}).get(_LABEL, b"{}"))


def _logit_scale(settings: Any) -> float:
    if getattr(settings, "logits_scaling", None):  # Granite divides
        return 1 / settings.logits_scaling
    return getattr(settings, "logit_scale", None) or 1.0  # Cohere multiplies
