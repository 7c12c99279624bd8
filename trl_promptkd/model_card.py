"""The sections of a model card that TRL's template does not have: the teacher, and what it saw."""

import os
import re
from dataclasses import asdict

from huggingface_hub import ModelCard

from .prompt_encoder import ADAPTER_FOLDER, PromptEncoderConfig


__all__ = ["add_priming_section", "add_prompt_section"]


def add_prompt_section(path: str, trainer) -> None:
    """Append settings and a loading example to the model card at `path`."""
    config, args = trainer.prompt_encoder_config, trainer.args
    settings = asdict(config) if isinstance(config, PromptEncoderConfig) else config.to_dict()
    settings |= {
        name: getattr(args, name)
        for name in (
            "prompt_update",
            "prompt_divergence",
            "regularization_coef",
            "regularization_schedule",
            "lmbda",
            "beta",
            "temperature",
            "loss_temperature",
            "max_new_tokens",
            "learning_rate",
        )
    }
    section = f"""
## The teacher's soft prompt

This model was distilled from {_teacher_name(trainer)} behind a soft prompt of {trainer.soft_prompt.peft_config.num_virtual_tokens} virtual
tokens, which was trained together with it. The prompt is in `{ADAPTER_FOLDER}/`, a PEFT adapter of the teacher. The student is
used without it.

{_table(settings)}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

teacher = AutoModelForCausalLM.from_pretrained("<the teacher>")
prompted_teacher = PeftModel.from_pretrained(teacher, "<this repository>", subfolder="{ADAPTER_FOLDER}")
```

(PEFT's own forward pass of a soft prompt is exact for rows without padding or with padding on the right.)
"""
    _append(path, section)


def add_priming_section(path: str, trainer) -> None:
    """Append the priming text and the settings of the loss to the model card at `path`."""
    args, priming = trainer.args, trainer.priming
    settings = {
        name: getattr(args, name)
        for name in (
            "alpha",
            "kd_temperature",
            "kd_beta",
            "skew",
            "response_source",
            "max_length",
            "teacher_max_length",
            "learning_rate",
        )
    }
    if args.response_source != "dataset":
        settings |= {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    seen = "which saw the prompts as they are (no priming)."
    used = ""
    if priming is not None:
        place = {
            "prefix": "before the question",
            "suffix": "after the question",
            "system": "as the system message",
        }[priming.placement]
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", priming.text)), default=0))
        seen = f"which saw this text {place} (a Jinja template):\n\n{fence}\n{priming.text}\n{fence}"
        used = "The student never saw that text: it is used with the bare question. "
    section = f"""
## The primed teacher

This model was distilled from {_teacher_name(trainer)}, {seen}

{used}Both were compared on the same completion tokens.

{_table(settings)}
"""
    _append(path, section)


def _teacher_name(trainer) -> str:
    if trainer.distils_itself:
        return "the student's own starting weights (self-distillation)"
    cache = getattr(trainer, "teacher_cache", None)
    if cache is not None:
        name, receipt = cache.manifest.teacher["name"], cache.manifest.receipt
        kept = f"preset `{cache.manifest.preset}`"
        if "kl_mean" in receipt:  # draws have none
            kept += f", KL(teacher || kept) {receipt['kl_mean']:.4f} nats a token"
        return f"`{os.path.basename(name) or 'a model without a name'}`, from a teacher cache ({kept})"
    name = trainer.accelerator.unwrap_model(trainer.teacher_model).config._name_or_path
    return f"`{os.path.basename(name) if os.path.isdir(name) else name or 'a model without a name'}`"


def _table(settings: dict) -> str:
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in settings.items() if value is not None)
    return f"| setting | value |\n| --- | --- |\n{rows}"


def _append(path: str, section: str) -> None:
    card = ModelCard.load(path)
    card.text = card.text.rstrip() + "\n" + section
    card.save(path)
