"""Prompt-shaped knowledge distillation for Hugging Face TRL."""

from .data.primed import DataCollatorForPrimedDistillation
from .data.priming import PrimingTemplate
from .models.soft_prompt import PromptEncoderConfig, SoftPrompt
from .teacher_cache import TeacherCache, build_teacher_cache, verify_teacher_cache
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
    "verify_teacher_cache",
]
__version__ = "0.1.0.dev0"
