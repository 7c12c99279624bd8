"""Run by test_distributed.py, once alone and once under torchrun: one short training, its result written to a folder.

Arguments: folder, method (`promptkd`, `primed`), rows a rank, steps, sampling (`greedy`, `sampled`), whose answers.
"""

import os
import sys


sys.path.insert(0, os.path.dirname(__file__))

import torch
from safetensors.torch import save_file
from tiny import answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
    build_teacher_cache,
)


folder, method, rows, steps, sampling, source = sys.argv[1:]
torch.set_num_threads(1)
common = {
    "output_dir": folder,
    "per_device_train_batch_size": int(rows),
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": int(steps),
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_new_tokens": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "generation_kwargs": {"do_sample": sampling == "sampled"},
    "train_sampling_strategy": "sequential",
}
models = {"model": tiny_model(seed=1), "teacher_model": tiny_model(seed=2), "processing_class": tiny_tokenizer()}
if method == "promptkd":
    trainer = PromptKDTrainer(
        **models,
        args=PromptKDConfig(**common, prompt_update="simultaneous"),
        train_dataset=prompt_dataset(16),
        eval_dataset=answered_dataset(5),
        prompt_encoder_config=PromptEncoderConfig(
            prompt_init_text="suppose you are a student .", prompt_learning_rate=0.01, prompt_init="vocab"
        ),
    )
    logged = ["loss", "kl/prompt_gain", "prompt/grad_norm", "grad_norm"]
else:
    if source == "cache":
        cache = build_teacher_cache(
            models.pop("teacher_model"),
            answered_dataset(16),
            f"{folder}/cache",
            tiny_tokenizer(),
            PrimingTemplate("red blue "),
            "exact",
        )
        models["teacher_cache"], source = cache, "dataset"
    trainer = PrimedDistillTrainer(
        **models,
        args=PrimedDistillConfig(**common, response_source=source, rollout_batch_size=2),
        train_dataset=answered_dataset(16),
        eval_dataset=answered_dataset(5),
        priming=PrimingTemplate("red blue "),
    )
    logged = ["loss", "kl/student_teacher", "completion_tokens", "num_tokens", "grad_norm"]
trainer.train()
unwrapped = trainer.accelerator.unwrap_model(trainer.model)
tensors = {name: value.clone() for name, value in unwrapped.state_dict().items() if name != "lm_head.weight"}
if method == "promptkd":
    tensors["prompt"] = trainer.prompt_embeddings()
tensors["log"] = torch.tensor([float(trainer.state.log_history[0][name]) for name in logged])
metrics = trainer.evaluate()
names = ["eval_loss", *(["eval_reverse_kl", "eval_forward_kl"] if method == "promptkd" else ["eval_ce", "eval_kd"])]
tensors["evaluation"] = torch.tensor([metrics[name] for name in names])
rank = trainer.accelerator.process_index
save_file({name: value.contiguous() for name, value in tensors.items()}, f"{folder}/rank{rank}.safetensors")
