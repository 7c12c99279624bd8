"""Short runs on tiny models."""

from pathlib import Path

from tiny import answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, PromptKDConfig, PromptKDTrainer


def short_run(config_class, folder, overrides):
    settings = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return config_class(**{**settings, **overrides})


def short_trainer(trainer_class, folder, args, **settings):
    """A trainer of tiny models; `args` are fields of its configuration, `settings` more arguments or others."""
    config_class, dataset = {
        PromptKDTrainer: (PromptKDConfig, prompt_dataset),
        PrimedDistillTrainer: (PrimedDistillConfig, answered_dataset),
    }[trainer_class]
    defaults = {
        "model": tiny_model(seed=1),
        "teacher_model": tiny_model(seed=2),
        "args": short_run(config_class, Path(folder), args),
        "train_dataset": dataset(),
        "processing_class": tiny_tokenizer(),
    }
    return trainer_class(**{**defaults, **settings})
