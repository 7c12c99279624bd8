"""The model card: TRL's own, without paths of this machine, and what it does not have: the teacher and what it saw,
data, metrics, loading."""

import os
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard

from ..data.priming import PrimingTemplate
from ..files import write_text
from ..models.soft_prompt import ADAPTER_FOLDER, PromptEncoderConfig
from ..teacher_cache import TeacherCache
from ..teacher_cache.card import PLACES, fenced, hub_id, name_in_cache, quoted, settings_table, shown_name


__all__ = [
    "PROMPTKD_PAPER",
    "RESPONSE_PRIMING_PAPER",
    "complete_card",
    "hub_dataset",
    "priming_section",
    "prompt_section",
]


# What TRL's card says of a trainer's paper
PROMPTKD_PAPER = {
    "title": "PromptKD: Distilling Student-Friendly Knowledge for Generative Language Models via Prompt Tuning",
    "id": "2402.12842",
    "citation": textwrap.dedent("""\
        @inproceedings{kim2024promptkd,
            title     = {{PromptKD: Distilling Student-Friendly Knowledge for Generative Language Models
                         via Prompt Tuning}},
            author    = {Gyeongman Kim and Doohyuk Jang and Eunho Yang},
            year      = 2024,
            booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2024},
        }"""),
}
RESPONSE_PRIMING_PAPER = {
    "title": "Enhancing Knowledge Distillation for LLMs with Response-Priming Prompting",
    "id": "2412.17846",
    "citation": textwrap.dedent("""\
        @article{goyal2024enhancing,
            title   = {{Enhancing Knowledge Distillation for LLMs with Response-Priming Prompting}},
            author  = {Vijay Goyal and Mustafa Khan and Aprameya Tirupati and Harveer Saini and Michael Lam
                       and Kevin Zhu},
            year    = 2024,
            journal = {arXiv preprint arXiv:2412.17846},
        }"""),
}

_OWN_START = "the student's own starting weights (self-distillation)"
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def hub_dataset(dataset: Any) -> str | None:
    """The data set on the Hub that rows come from, by the folder that `load_dataset` keeps them in; `None` if that
    says nothing."""
    for file in getattr(dataset, "cache_files", None) or []:
        parts = Path(file["filename"]).parts
        kept = Path(datasets.config.HF_DATASETS_CACHE).parts
        if parts[: len(kept)] == kept and "___" in parts[len(kept)]:
            return hub_id(parts[len(kept)].replace("___", "/", 1))
    return None


def prompt_section(trainer) -> str:
    """The soft prompt and the settings of PromptKD."""
    config, args = trainer.prompt_encoder_config, trainer.args
    num_virtual_tokens = trainer.soft_prompt.peft_config.num_virtual_tokens
    settings = asdict(config) if isinstance(config, PromptEncoderConfig) else config.to_dict()
    settings = {name: value for name, value in settings.items() if not name.endswith("name_or_path")}
    settings |= _values(
        args,
        *("prompt_update", "prompt_divergence", "regularization_coef", "regularization_schedule", "lmbda", "beta"),
        *("temperature", "loss_temperature", "max_new_tokens", "learning_rate"),
    )
    teacher = _OWN_START if trainer.is_self_distillation else quoted(_teachers_start(trainer))
    return f"""
## The teacher's soft prompt

This model was distilled from {teacher} with a soft prompt of {num_virtual_tokens} virtual tokens, which
was trained together with it. The prompt is in `{ADAPTER_FOLDER}/`, a PEFT adapter of the teacher. The student is used
without it.

{settings_table(settings)}
"""


def priming_section(trainer) -> str:
    """The priming text and the settings of the loss."""
    args, priming = trainer.args, trainer.priming
    of_loss = ["kd_temperature", "kd_beta", "skew"] if args.alpha < 1 else []
    settings = _values(args, "alpha", *of_loss, "response_source", "max_length", "teacher_max_length", "learning_rate")
    if args.response_source != "dataset":
        settings |= _values(args, "max_new_tokens", "temperature", "top_k", "top_p")
    used = "The student never saw that text: it is used with the bare question. "
    if isinstance(priming, Mapping):
        title, each = "The primed teachers", (_one_of_several(trainer, name) for name in priming)
        taught = "\n\n".join(["several teachers. The column `teacher` of the data names the one of each row.", *each])
        used = used if any(priming.values()) else ""
    else:
        teacher = _primed_teacher_name(trainer, trainer.teacher, trainer.is_self_distillation)
        title, taught = "The primed teacher", f"{teacher}, {_seen(priming)}"
        used = used if priming else ""
    compared = "Both were compared on the same completion tokens."
    if args.teacher_answers_url is not None:
        compared = "It was trained on that teacher's answers alone, which came over an API."
    return f"""
## {title}

This model was distilled from {taught}

{used}{compared}

{settings_table(settings)}
"""


def _seen(priming: PrimingTemplate | None) -> str:
    if priming is None:
        return "which saw the prompts as they are (no priming)."
    return f"which saw this text {PLACES[priming.placement]} (a Jinja template):\n\n{fenced(priming.text)}"


def _one_of_several(trainer, name: str) -> str:
    several = trainer.teacher
    teacher = _primed_teacher_name(trainer, several.teachers[name], name in several.own_start)
    return f"**{name}**: {teacher}, {_seen(trainer.priming[name])}"


def _primed_teacher_name(trainer, teacher: Any, is_own_start: bool) -> str:
    if is_own_start:
        return _OWN_START
    if teacher.cache is not None:
        return _cached_name(teacher.cache)
    if teacher.model is None:
        return f"{quoted(teacher.name)}, which ran on a server"
    return quoted(_name_of(trainer, teacher.model))


def complete_card(trainer, section: str) -> None:
    """Mend TRL's card in `output_dir`, and put `section` and what both trainers have to say after it."""
    path = os.path.join(trainer.args.output_dir, "README.md")
    card, repo = ModelCard.load(path), trainer.hub_model_id or "<this repository>"
    # TRL takes any path that is no folder now for a name
    base, shown = hub_id(_start_of(trainer)), card.data.base_model
    card.data.base_model, card.data.pipeline_tag = base, "text-generation"
    card.data.tags = sorted(card.data.tags)  # of a set: another order in each process, and another commit
    if is_peft_model(trainer.model):
        card.data.library_name = "peft"
    text = card.text
    if base is None:
        text = text.replace(f"[{shown}](https://huggingface.co/{shown})", quoted(_start_of(trainer)))
    text = text.replace('model="None"', f'model="{repo}"')
    versions = "".join(f"- {name}: {version(package)}\n" for name, package in _PACKAGES.items())
    text = text.replace(
        "### Framework versions\n\n", f"### Framework versions\n\n- trl_promptkd: {_version()}\n{versions}"
    )
    ours = [section, _data_section(trainer), _metrics_section(trainer), _loading_section(trainer, repo)]
    card.text = f"{text.rstrip()}\n{''.join(ours)}"
    write_text(path, str(card))


_PACKAGES = {"PEFT": "peft", "Accelerate": "accelerate", "huggingface_hub": "huggingface_hub"}


def _version() -> str:
    from .. import __version__  # which is not there yet when this module is imported

    return __version__


def _data_section(trainer) -> str:
    args, rows = trainer.args, []
    for role, data in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        parts = data if isinstance(data, dict) else {"": data}
        for name, part in parts.items():
            if part is not None:
                number = len(part) if isinstance(part, Dataset) else "streamed"
                source = hub_dataset(part)
                rows.append(f"| {role} {name} | {number} | {f'`{source}`' if source else ''} |")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    table = "\n".join(["| data | rows | from | ", "| --- | --- | --- |", *rows])
    return f"""
## Data

{table}

{trainer.state.global_step} steps of {batch} rows each, seed {args.seed}.
"""


def _metrics_section(trainer) -> str:
    """The evaluation of the weights that are there now, if there was one."""
    history = trainer.state.log_history
    evaluated = [i for i, entry in enumerate(history) if any(name.startswith("eval_") for name in entry)]
    ended = max((i for i, entry in enumerate(history) if "train_runtime" in entry), default=len(history))
    if any(i > ended for i in evaluated):
        step = None  # after the training
    elif trainer.args.load_best_model_at_end and trainer.state.best_global_step and ended < len(history):
        step = trainer.state.best_global_step
    else:
        step = history[evaluated[-1]]["step"] if evaluated else None
    metrics: dict[str, float] = {}
    for i in evaluated:
        if i > ended or history[i]["step"] == step:
            metrics |= {name: value for name, value in history[i].items() if name.startswith("eval_")}
    shown = {name: f"{value:.4g}" for name, value in metrics.items() if not name.endswith(_TIMES)}
    if not shown:
        return ""
    when = "after training" if step is None else f"after step {step}"
    table = settings_table(shown, "metric")
    return f"\n## Evaluation\n\nOn the evaluation data, {when}; divergences in nats per token.\n\n{table}\n"


def _loading_section(trainer, repo: str) -> str:
    """How to load what is in the repository, as code that runs wherever the models have names on the Hub."""
    revision = f', revision="{trainer.args.hub_revision}"' if trainer.args.hub_revision else ""
    adapter, has_prompt = is_peft_model(trainer.model), hasattr(trainer, "soft_prompt")
    lines = ["from peft import PeftModel"] if adapter or has_prompt else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{revision})',
    ]
    if adapter:
        base = (
            hub_id(_start_of(trainer))
            or f"<the model that the adapter was trained on, {shown_name(_start_of(trainer))}>"
        )
        lines += [
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            f'student = PeftModel.from_pretrained(base, "{repo}"{revision})',
        ]
    else:
        lines.append(f'student = AutoModelForCausalLM.from_pretrained("{repo}"{revision})')
    exact = ""
    if has_prompt:
        name = _start_of(trainer) if trainer.is_self_distillation else _teachers_start(trainer)
        pinned = (trainer.args.teacher_model_init_kwargs or {}).get("revision")
        lines += [
            "",
            f'teacher = AutoModelForCausalLM.from_pretrained("{hub_id(name) or f"<the teacher, {shown_name(name)}>"}"'
            + (f', revision="{pinned}")' if pinned and not trainer.is_self_distillation else ")"),
            f'prompted_teacher = PeftModel.from_pretrained(teacher, "{repo}", subfolder="{ADAPTER_FOLDER}"{revision})',
        ]
        exact = "\n(PEFT's own forward pass of a soft prompt is exact for rows without padding on the left.)\n"
    code = "\n".join(lines)
    return f"\n## How to load {'both' if has_prompt else 'it'}\n\n```python\n{code}\n```\n{exact}"


def _name_of(trainer, model) -> str:
    """The name or path that a model was loaded by."""
    return trainer.accelerator.unwrap_model(model).config._name_or_path


def _start_of(trainer) -> str:
    return _name_of(trainer, trainer.model)


def _teachers_start(trainer) -> str:
    return _name_of(trainer, trainer.teacher_model)


def _cached_name(cache: TeacherCache) -> str:
    teacher, receipt = cache.manifest.teacher, cache.manifest.receipt
    kept = f"preset `{cache.manifest.preset}`"
    if "kl_mean" in receipt:  # draws have none
        kept += f", KL(teacher || kept) {receipt['kl_mean']:.4f} nats per token"
    return f"{name_in_cache(teacher)}, from a teacher cache ({kept})"


def _values(args, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}
