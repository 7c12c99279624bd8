"""Run by test_distributed.py, once alone and once under torchrun: one short training, its result written to a folder.

The only argument is JSON: see `SETTINGS`.
"""

# ruff: noqa: E402
import json
import os
import signal
import sys


SETTINGS = {
    "folder": "",
    "method": "promptkd",  # or primed
    "sharding": "",  # fsdp2, zero2, zero3
    "rows": 4,  # a rank
    "steps": 1,
    "sampled": False,  # or greedy
    "source": "dataset",  # primed: whose answers; `cache`: an offline teacher
    "student": "full",  # lora, or self: lora, and its own teacher
    "config": {},  # more of the trainer's settings
    "empty_rank": -1,  # this rank's batches have nothing to train on
    "interrupted_rank": -1,  # this rank gets a SIGTERM in its second step
    "resume": False,  # go on from the newest checkpoint
    "family": "llama",
    "by_name": False,  # load both models from folders: in parts under ZeRO-3, on one rank only under FSDP2
}
settings = {**SETTINGS, **json.loads(sys.argv[1])}
sys.path.insert(0, os.path.dirname(__file__))

import torch


if settings["sharding"]:
    # accelerate shards on GPUs only; what it does there works on CPU ranks, too, where they are taken for GPUs
    import accelerate.state
    import transformers.training_args
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if settings["sharding"] == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(settings["by_name"]).lower()
    else:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    backend = ("gloo", DistributedType.MULTI_GPU)
    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: backend
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True

from peft import LoraConfig
from safetensors.torch import save_file
from tiny import answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
    build_teacher_cache,
)
from trl_promptkd.forward import is_sharded


folder, method = settings["folder"], settings["method"]
torch.set_num_threads(1)
common = {
    "output_dir": f"{folder}/run",
    "per_device_train_batch_size": settings["rows"],
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": settings["steps"],
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_new_tokens": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "save_on_interrupt": settings["interrupted_rank"] >= 0,
    "report_to": "none",
    "bf16": False,
    "use_cpu": not settings["sharding"],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "generation_kwargs": {"do_sample": settings["sampled"]},
    "train_sampling_strategy": "sequential",
    **settings["config"],
}
if settings["sharding"].startswith("zero"):
    common["deepspeed"] = {
        "zero_optimization": {
            "stage": int(settings["sharding"][-1]),
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
models = {
    "model": tiny_model(settings["family"], seed=1),
    "teacher_model": tiny_model(settings["family"], seed=2),
    "processing_class": tiny_tokenizer(),
}
if settings["by_name"]:
    for role in ("model", "teacher_model"):
        path = f"{folder}/{role}-{os.environ.get('RANK', 0)}"
        models[role].save_pretrained(path)
        models[role] = path
if settings["student"] != "full":
    torch.manual_seed(3)
    models["peft_config"] = LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["q_proj", "v_proj"])
if settings["student"] == "self":
    del models["teacher_model"]


class NothingToTrain:
    """The collator of a trainer, whose labels are blanked on one rank."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, rows):
        batch = self.inner(rows)
        if int(os.environ.get("RANK", 0)) == settings["empty_rank"]:
            batch = {name: value.fill_(-100) if "labels" in name else value for name, value in batch.items()}
        return batch


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and int(os.environ.get("RANK", 0)) == settings["interrupted_rank"]:
            os.kill(os.getpid(), signal.SIGTERM)


def make_trainer():
    if method == "promptkd":
        return PromptKDTrainer(
            **models,
            args=PromptKDConfig(**{"prompt_update": "simultaneous", **common}),
            train_dataset=(answered_dataset if common.get("lmbda", 1.0) < 1 else prompt_dataset)(16),
            eval_dataset=answered_dataset(5),
            prompt_encoder_config=PromptEncoderConfig(
                prompt_init_text="suppose you are a student .", prompt_learning_rate=0.01, prompt_init="vocab"
            ),
        )
    source = settings["source"]
    if source == "cache":
        models["teacher_cache"] = build_teacher_cache(
            models.pop("teacher_model"),
            answered_dataset(16),
            f"{folder}/cache",
            tiny_tokenizer(),
            PrimingTemplate("red blue "),
            "exact",
        )
        source = "dataset"
    return PrimedDistillTrainer(
        **models,
        args=PrimedDistillConfig(**{"response_source": source, "rollout_batch_size": 2, **common}),
        train_dataset=answered_dataset(16),
        eval_dataset=answered_dataset(5),
        priming=PrimingTemplate("red blue "),
    )


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


torch.manual_seed(0)
trainer = make_trainer()
if settings["empty_rank"] >= 0:
    trainer.data_collator = NothingToTrain(trainer.data_collator)
trainer.add_callback(Interrupt())
trainer.train(resume_from_checkpoint=settings["resume"])
if settings["interrupted_rank"] >= 0:
    assert trainer.state.global_step == 2, trainer.state.global_step

if method == "promptkd":
    logged = ["loss", "kl/prompt_gain", "prompt/grad_norm", "grad_norm"]
    evaluated = ["eval_loss", "eval_reverse_kl", "eval_forward_kl"]
else:
    logged = ["loss", "kl/student_teacher", "completion_tokens", "num_tokens", "grad_norm"]
    evaluated = ["eval_loss", "eval_ce", "eval_kd"]
state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
tensors = {}
if state is not None:
    tensors = {name: full(value).clone() for name, value in state.items()}
if method == "promptkd":
    tensors["prompt"] = trainer.prompt_embeddings()
tensors["log"] = torch.tensor([float(trainer.state.log_history[0].get(name, -1)) for name in logged])
metrics = trainer.evaluate()
sharded = [trainer.model, trainer.teacher_model]
tensors["sharded"] = torch.tensor([model is not None and is_sharded(model) for model in sharded])
tensors["evaluation"] = torch.tensor([metrics[name] for name in evaluated])
trainer.save_model(f"{folder}/saved")
rank = trainer.accelerator.process_index
save_file({name: value.contiguous() for name, value in tensors.items()}, f"{folder}/rank{rank}.safetensors")
trainer.accelerator.wait_for_everyone()
