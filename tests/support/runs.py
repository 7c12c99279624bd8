"""Settings of a short run on tiny models."""


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
