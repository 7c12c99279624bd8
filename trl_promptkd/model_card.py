"""The section of a model card that TRL's template does not have: the teacher's soft prompt, and how to load it."""

import os
import textwrap
from dataclasses import asdict

from huggingface_hub import ModelCard

from .prompt_encoder import ADAPTER_FOLDER, PromptEncoderConfig


__all__ = ["add_prompt_section"]


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
    if trainer.teacher_model is None:
        teacher = "the student's own starting weights (self-distillation)"
    else:
        name = trainer.accelerator.unwrap_model(trainer.teacher_model).config._name_or_path
        teacher = f"`{os.path.basename(name) if os.path.isdir(name) else name or 'a model without a name'}`"
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in settings.items() if value is not None)
    section = f"""
## The teacher's soft prompt

This model was distilled from {teacher} behind a soft prompt of {trainer.soft_prompt.peft_config.num_virtual_tokens} virtual
tokens, which was trained together with it. The prompt is in `{ADAPTER_FOLDER}/`, a PEFT adapter of the teacher. The student is
used without it.

| setting | value |
| --- | --- |
{rows}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

teacher = AutoModelForCausalLM.from_pretrained("<the teacher>")
prompted_teacher = PeftModel.from_pretrained(teacher, "<this repository>", subfolder="{ADAPTER_FOLDER}")
```

(PEFT's own forward pass of a soft prompt is exact for rows without padding or with padding on the right.)
"""
    card = ModelCard.load(path)
    card.text = card.text.rstrip() + "\n" + textwrap.dedent(section)
    card.save(path)
