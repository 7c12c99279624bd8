"""Flags of the training commands, for short runs."""

from tiny import WORDS, save_rows, tiny_model, tiny_tokenizer


PROMPT = {"prompt_init_text": "suppose you are a student ."}  # for PromptKD: words that the tiny tokenizer has


def as_flags(settings):
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def short_settings(folder):
    """A command's settings for a short run, with models and rows from local files."""
    size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    for seed, role in enumerate(("student", "teacher"), 1):
        tiny_model(seed=seed, **size).save_pretrained(folder / role)
        tiny_tokenizer().save_pretrained(folder / role)
    rows = [{"prompt": " ".join(WORDS[i : i + 3]), "completion": f" {WORDS[i]}"} for i in range(8)]
    save_rows(folder / "rows.jsonl", rows)
    return {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": str(folder / "rows.jsonl"),
        "eval_dataset": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "max_new_tokens": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
