"""Prompt-shaped knowledge distillation for Hugging Face TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .data.primed import DataCollatorForPrimedDistillation
    from .data.priming import PrimingTemplate
    from .models.soft_prompt import PromptEncoderConfig, SoftPrompt
    from .teacher_cache import TeacherCache, build_teacher_cache, merge_teacher_caches, verify_teacher_cache
    from .trainer.callbacks import GenerationMetricsCallback
    from .trainer.primed_distill_config import PrimedDistillConfig
    from .trainer.primed_distill_trainer import PrimedDistillTrainer
    from .trainer.promptkd_config import PromptKDConfig
    from .trainer.promptkd_trainer import PromptKDTrainer

__all__ = [
    "DataCollatorForPrimedDistillation",
    "GenerationMetricsCallback",
    "PrimedDistillConfig",
    "PrimedDistillTrainer",
    "PrimingTemplate",
    "PromptEncoderConfig",
    "PromptKDConfig",
    "PromptKDTrainer",
    "SoftPrompt",
    "TeacherCache",
    "build_teacher_cache",
    "merge_teacher_caches",
    "verify_teacher_cache",
]
__version__ = "0.1.0.dev0"

# Imported when they are first used: `import trl_promptkd` alone loads neither torch nor transformers
_MODULES = {
    "DataCollatorForPrimedDistillation": "data.primed",
    "GenerationMetricsCallback": "trainer.callbacks",
    "PrimedDistillConfig": "trainer.primed_distill_config",
    "PrimedDistillTrainer": "trainer.primed_distill_trainer",
    "PrimingTemplate": "data.priming",
    "PromptEncoderConfig": "models.soft_prompt",
    "PromptKDConfig": "trainer.promptkd_config",
    "PromptKDTrainer": "trainer.promptkd_trainer",
    "SoftPrompt": "models.soft_prompt",
    "TeacherCache": "teacher_cache",
    "build_teacher_cache": "teacher_cache",
    "merge_teacher_caches": "teacher_cache",
    "verify_teacher_cache": "teacher_cache",
}

_PARTS = ("analysis", "divergences", "doctor", "evaluation", "metrics", "teacher_cache")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f".{name}", __name__)
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_PARTS])
