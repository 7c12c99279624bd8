"""Prompt-shaped knowledge distillation for Hugging Face TRL."""

from .prompt_encoder import PromptEncoderConfig, SoftPrompt
from .promptkd_config import PromptKDConfig
from .promptkd_trainer import PromptKDTrainer


__all__ = ["PromptEncoderConfig", "PromptKDConfig", "PromptKDTrainer", "SoftPrompt"]
__version__ = "0.1.0.dev0"
