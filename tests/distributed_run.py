"""Run by test_distributed.py, once alone and once under torchrun: one short training, its result written to a folder."""

import os
import sys


sys.path.insert(0, os.path.dirname(__file__))

import torch
from safetensors.torch import save_file
from tiny import prompt_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer


folder, rows, steps, greedy = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "greedy"
torch.set_num_threads(1)
args = PromptKDConfig(
    output_dir=folder,
    per_device_train_batch_size=rows,
    gradient_accumulation_steps=2,
    max_steps=steps,
    learning_rate=0.05,
    optim="sgd",
    lr_scheduler_type="constant",
    max_new_tokens=6,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=False,
    use_cpu=True,
    disable_tqdm=True,
    prompt_update="simultaneous",
    generation_kwargs={"do_sample": not greedy},
    train_sampling_strategy="sequential",
)
trainer = PromptKDTrainer(
    model=tiny_model(seed=1),
    teacher_model=tiny_model(seed=2),
    args=args,
    train_dataset=prompt_dataset(16),
    eval_dataset=prompt_dataset(8),
    processing_class=tiny_tokenizer(),
    prompt_encoder_config=PromptEncoderConfig(
        prompt_init_text="suppose you are a student .", prompt_learning_rate=0.01, prompt_init="vocab"
    ),
)
trainer.train()
rank = trainer.accelerator.process_index
unwrapped = trainer.accelerator.unwrap_model(trainer.model)
tensors = {name: value.clone() for name, value in unwrapped.state_dict().items() if name != "lm_head.weight"}
log = trainer.state.log_history[0]
tensors["prompt"] = trainer.prompt_embeddings()
tensors["log"] = torch.tensor([log["loss"], log["kl/prompt_gain"], log["prompt/grad_norm"], log["grad_norm"]])
save_file({name: value.contiguous() for name, value in tensors.items()}, f"{folder}/rank{rank}.safetensors")
