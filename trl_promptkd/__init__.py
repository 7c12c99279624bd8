"""Prompt-shaped knowledge distillation for Hugging Face TRL."""

from .callbacks import GenerationMetricsCallback
from .primed_collator import DataCollatorForPrimedDistillation
from .primed_distill_config import PrimedDistillConfig
from .primed_distill_trainer import PrimedDistillTrainer
from .priming import PrimingTemplate
from .prompt_encoder import PromptEncoderConfig, SoftPrompt
from .promptkd_config import PromptKDConfig
from .promptkd_trainer import PromptKDTrainer
from .teacher_cache import TeacherCache, build_teacher_cache, verify_teacher_cache


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
