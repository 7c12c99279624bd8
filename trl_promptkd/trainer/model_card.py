"""The model card: what was distilled from what, data, scores, how to load the model, settings, and BibTeX.

TRL's card names no teacher, no data and no scores. Its metadata, badges and BibTeX are kept.
"""

import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerBase

from ..data.priming import PrimingTemplate
from ..files import write_text
from ..models.soft_prompt import ADAPTER_FOLDER, PromptEncoderConfig
from ..teacher_cache import TeacherCache
from ..teacher_cache.card import PLACES, fenced, hub_id, name_in_cache, quoted, settings_table


__all__ = [
    "PROMPTKD_PAPER",
    "RESPONSE_PRIMING_PAPER",
    "MethodSection",
    "complete_card",
    "hub_dataset",
    "priming_section",
    "prompt_section",
]


# What TRL's card says about a trainer's paper
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
_MEANINGS = {
    "loss": "the training objective",
    "forward_kl": "KL(teacher || student), the teacher without its soft prompt, on answers of the data or the teacher",
    "reverse_kl": "KL(student || teacher), the teacher without its soft prompt, on the student's samples",
    "ce": "cross-entropy of the answers",
    "kd": "the divergence from the teacher that was trained on, at `kd_temperature`",
    "kl/student_teacher": "KL(student || teacher) at `kd_temperature`",
    "entropy/student": "entropy of the student's next-token distribution",
    "entropy/teacher": "entropy of the teacher's",
    "mean_token_accuracy": "share of the tokens that the student finds likeliest",
    "teacher/top1_agreement": "share of the tokens at which both find the same one likeliest",
    "priming/gain_nats": "log-probability that the priming text adds to an answer's tokens for the teacher",
    "rougeL": "ROUGE-L of written answers, percent",
    "exact_match": "written answers that are right word for word, percent",
}
_FILES = ("json", "csv", "parquet", "text", "arrow")
_PACKAGES = {
    "TRL": "trl",
    "Transformers": "transformers",
    "PEFT": "peft",
    "Accelerate": "accelerate",
    "Pytorch": "torch",
    "Datasets": "datasets",
    "Tokenizers": "tokenizers",
    "huggingface_hub": "huggingface_hub",
}


class MethodSection(NamedTuple):
    """What a trainer says about its teacher."""

    summary: str
    """The rest of a sentence that begins with "It was distilled from"."""
    details: str
    """More paragraphs, or an empty text."""
    settings: dict[str, Any]


def hub_dataset(dataset: Any) -> str | None:
    """The data set on the Hub that rows come from, by the folder in which `load_dataset` keeps them. `None` if the
    folder does not tell."""
    for file in getattr(dataset, "cache_files", None) or []:
        parts = Path(file["filename"]).parts
        kept = Path(datasets.config.HF_DATASETS_CACHE).parts
        if parts[: len(kept)] == kept and "___" in parts[len(kept)]:
            return hub_id(parts[len(kept)].replace("___", "/", 1))
    return None


def prompt_section(trainer) -> MethodSection:
    """The soft prompt and the settings of PromptKD."""
    config, args = trainer.prompt_encoder_config, trainer.args
    num_virtual_tokens = trainer.soft_prompt.peft_config.num_virtual_tokens
    settings = asdict(config) if isinstance(config, PromptEncoderConfig) else config.to_dict()
    settings = {name: value for name, value in settings.items() if not name.endswith("name_or_path")}
    settings |= _values(
        args,
        *("prompt_update", "prompt_share", "prompt_divergence", "regularization_coef", "regularization_schedule"),
        *("lmbda", "beta", "temperature", "loss_temperature", "max_new_tokens", "learning_rate"),
    )
    teacher = _OWN_START if trainer.is_self_distillation else _linked(_teachers_start(trainer))
    prompt = f"a soft prompt of {num_virtual_tokens} virtual tokens, which was trained along with the student"
    details = (
        f"The soft prompt is in `{ADAPTER_FOLDER}/`, a PEFT adapter of the teacher. The student is used without it."
    )
    return MethodSection(f"{teacher} with {prompt}", details, settings)


def priming_section(trainer) -> MethodSection:
    """The priming text and the settings of the loss."""
    args, priming = trainer.args, trainer.priming
    of_loss = ["kd_temperature", "kd_beta", "skew"] if args.alpha < 1 else []
    settings = _values(args, "alpha", *of_loss, "response_source", "max_length", "teacher_max_length", "learning_rate")
    if args.response_source != "dataset":
        settings |= _values(args, "max_new_tokens", "temperature", "top_k", "top_p")
    same = "Both were compared on the same completion tokens."
    if args.teacher_answers_url is not None:
        same = "The student was trained on the teacher's answers alone, which came over an API."
    if isinstance(priming, Mapping):
        parts = [_one_of_several(trainer, name) for name in priming]
        if any(priming.values()):
            parts.append("The student never saw such a text: it is used with the bare question.")
        summary = "several teachers, of which the column `teacher` of the data names one for each row"
        return MethodSection(summary, "\n\n".join([*parts, same]), settings)
    teacher = _primed_teacher_name(trainer, trainer.teacher, trainer.is_self_distillation)
    if priming is None:
        return MethodSection(f"{teacher}, which saw the prompts as they are (no priming)", same, settings)
    unseen = "The student never saw it: it is used with the bare question."
    details = f"The teacher saw {_text(priming)}\n\n{unseen} {same}"
    return MethodSection(f"{teacher}, which saw a priming text that the student does not see", details, settings)


def _text(priming: PrimingTemplate) -> str:
    return f"this text {PLACES[priming.placement]} (a Jinja template):\n\n{fenced(priming.text)}"


def _one_of_several(trainer, name: str) -> str:
    several, priming = trainer.teacher, trainer.priming[name]
    teacher = _primed_teacher_name(trainer, several.teachers[name], name in several.own_start)
    seen = "the prompts as they are (no priming)." if priming is None else _text(priming)
    return f"**{name}**: {teacher}, which saw {seen}"


def _primed_teacher_name(trainer, teacher: Any, is_own_start: bool) -> str:
    if is_own_start:
        return _OWN_START
    if teacher.cache is not None:
        return _cached_name(teacher.cache)
    if teacher.model is None:
        return f"{_linked(teacher.name)} on a server"
    return _linked(_name_of(trainer, teacher.model))


def complete_card(trainer, section: MethodSection) -> None:
    """Rewrite TRL's card in `output_dir`. It begins with what readers look for, and says nothing twice."""
    path = os.path.join(trainer.args.output_dir, "README.md")
    card = ModelCard.load(path)
    card.data.base_model, card.data.pipeline_tag = hub_id(_start_of(trainer)), "text-generation"
    card.data.tags = sorted(card.data.tags)  # they come from a set, whose order changes: each push would be a commit
    card.data.licence = None  # TRL writes the word "license" there
    if is_peft_model(trainer.model):
        card.data.library_name = "peft"
    versions = "\n".join(f"- {name}: {version(package)}" for name, package in _PACKAGES.items())
    parts = [
        f"# {card.data.model_name}",
        _summary(trainer, section),
        _data_section(trainer, card.data.datasets),
        _metrics_section(trainer),
        _loading_section(trainer),
        "\n\n".join(re.findall(r"^\[<img .*$", card.text, flags=re.MULTILINE)),  # badges of wandb, trackio and comet
        f"## Settings\n\n{settings_table(section.settings)}",
        f"## Versions\n\n- trl_promptkd: {_version()}\n{versions}",
        "## Citations" + re.sub(r"[ \t]+$", "", card.text.partition("## Citations")[2], flags=re.MULTILINE).rstrip(),
    ]
    card.text = "\n" + "\n\n".join(part for part in parts if part) + "\n"
    write_text(path, str(card))


def _version() -> str:
    from .. import __version__  # not defined yet when this module is imported

    return __version__


def _linked(name: str, kind: str = "") -> str:
    """A link to the Hub, or the last part of a path."""
    known = hub_id(name)
    return f"[{known}](https://huggingface.co/{kind}{known})" if known else quoted(name)


def _summary(trainer, section: MethodSection) -> str:
    paper, part = trainer._paper, "an adapter of " if is_peft_model(trainer.model) else "a fine-tuned version of "
    method = f"{trainer._name} ([paper](https://huggingface.co/papers/{paper['id']}))"
    tools = "[TRL](https://github.com/huggingface/trl) and trl_promptkd"
    return (
        f"This model is {part}{_linked(_start_of(trainer))}. It was distilled from {section.summary}. "
        f"The method is {method}. It was trained with {tools}.\n\n{section.details}"
    )


def _data_section(trainer, training_set: str | None) -> str:
    args, lines = trainer.args, []
    for role, data in (("Training", trainer.train_dataset), ("Evaluation", trainer.eval_dataset)):
        parts = data if isinstance(data, dict) else {"": data}
        for name, part in parts.items():
            if part is not None:
                rows = f"{len(part)} rows" if isinstance(part, Dataset) else "streamed rows"
                origin = _origin(part, training_set if role == "Training" else None)
                lines.append(f"- {role}{f' (`{name}`)' if name else ''}: {rows}{origin}")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = trainer.state.global_step
    if steps:
        lines.append(f"- {steps} step{'s' if steps > 1 else ''} of {batch} rows, seed {args.seed}")
    return "## Data\n\n" + "\n".join(lines)


def _origin(dataset: Any, name: str | None) -> str:
    """Where rows come from, as far as the data set or the user says."""
    name, info = name or hub_dataset(dataset), getattr(dataset, "info", None)
    if name is not None:
        return f" of {_linked(name, 'datasets/')}"
    builder = getattr(info, "builder_name", None)
    return f" of local files ({builder})" if builder in _FILES else ""


def _metrics_section(trainer) -> str:
    """The evaluation of the current weights, if there was one."""
    history = trainer.state.log_history
    evaluated = [i for i, entry in enumerate(history) if any(name.startswith("eval_") for name in entry)]
    ended = max((i for i, entry in enumerate(history) if "train_runtime" in entry), default=len(history))
    if any(i > ended for i in evaluated):
        step = None  # after training
    elif trainer.args.load_best_model_at_end and trainer.state.best_global_step and ended < len(history):
        step = trainer.state.best_global_step
    else:
        step = history[evaluated[-1]]["step"] if evaluated else None
    metrics: dict[str, float] = {}
    for i in evaluated:
        if i > ended or history[i]["step"] == step:
            metrics |= {name: value for name, value in history[i].items() if name.startswith("eval_")}
    lines = [
        f"- `{name}`: {value:.4g}{_meaning(name)}" for name, value in metrics.items() if not name.endswith(_TIMES)
    ]
    if not lines:
        return ""
    when = "after training" if step is None else f"after step {step}"
    about = "Divergences, entropies and cross-entropies are in nats per token."
    return f"## Evaluation\n\nOn the evaluation data, {when}. {about}\n\n" + "\n".join(lines)


def _meaning(name: str) -> str:
    """What a metric means, for any evaluation set."""
    found = next((text for known, text in _MEANINGS.items() if name.endswith(f"_{known}")), None)
    return f", {found}" if found else ""


def _loading_section(trainer) -> str:
    """How to load what is in the repository, as code that runs if the models have names on the Hub."""
    output_dir = os.path.basename(os.path.abspath(trainer.args.output_dir))
    repo = trainer.hub_model_id or f"path/to/{output_dir}"
    revision = f', revision="{trainer.args.hub_revision}"' if trainer.args.hub_revision else ""
    adapter, has_prompt = is_peft_model(trainer.model), hasattr(trainer, "soft_prompt")
    lines = ["from peft import PeftModel"] if adapter or has_prompt else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{revision})',
    ]
    if adapter:
        lines += [
            f'base = AutoModelForCausalLM.from_pretrained("{_to_load(_start_of(trainer), "the-start")}")',
            f'student = PeftModel.from_pretrained(base, "{repo}"{revision})',
        ]
    else:
        lines.append(f'student = AutoModelForCausalLM.from_pretrained("{repo}"{revision})')
    lines += ["", *_example(trainer.processing_class)]
    exact = ""
    if has_prompt:
        name = _start_of(trainer) if trainer.is_self_distillation else _teachers_start(trainer)
        pinned = (trainer.args.teacher_model_init_kwargs or {}).get("revision")
        pinned = f', revision="{pinned}"' if pinned and not trainer.is_self_distillation else ""
        lines += [
            "",
            "# The teacher with its soft prompt, which the student does not need",
            f'teacher = AutoModelForCausalLM.from_pretrained("{_to_load(name, "the-teacher")}"{pinned})',
            f'prompted_teacher = PeftModel.from_pretrained(teacher, "{repo}", subfolder="{ADAPTER_FOLDER}"{revision})',
        ]
        exact = "\n\nPEFT's own forward pass of a soft prompt is exact for rows without padding on the left."
    code = "\n".join(lines)
    told = "\n\nReplace `path/to/...` by the folder where the model is." if "path/to/" in code else ""
    return f"## How to load it\n\n```python\n{code}\n```{told}{exact}"


def _to_load(name: str, otherwise: str) -> str:
    """A model's name on the Hub, or a path for the reader to fill in."""
    return hub_id(name) or "path/to/" + (os.path.basename(name.rstrip("/\\")) or otherwise)


def _example(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Code with which the student answers."""
    prompt = ['inputs = tokenizer("The capital of France is", return_tensors="pt")']
    if tokenizer.chat_template is not None:
        prompt = [
            'messages = [{"role": "user", "content": "What is the capital of France?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    return [
        *prompt,
        "output = student.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True))',
    ]


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
    if "kl_mean" in receipt:  # a cache of draws has none
        kept += f", KL(teacher || kept) {receipt['kl_mean']:.4f} nats per token"
    return f"{name_in_cache(teacher)}, from a teacher cache ({kept})"


def _values(args, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}
