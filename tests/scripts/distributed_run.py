"""Run by test_distributed.py, alone and under torchrun for each way of sharding: short trainings, a folder each.

The only argument is JSON: `sharding` and `runs`, a list of settings (see `SETTINGS`).
"""

# ruff: noqa: E402

import gc
import json
import os
import signal
import sys
from pathlib import Path


SETTINGS = {
    "folder": "",
    "method": "promptkd",  # or primed
    "rows": 4,  # a rank
    "steps": 1,
    "sampled": False,  # or greedy
    "source": "dataset",  # primed: whose answers; `cache`: an offline teacher; `server`: a served one
    "several": [],  # names of teachers, two rows each in turn, so that a rank's rows name one; "own" is the student
    "cache": "",  # of that teacher, if there is one; otherwise it is built
    "size": 16,  # rows of the training data
    "student": "full",  # lora, or self: lora, and its own teacher
    "config": {},  # more of the trainer's settings
    "order": [],  # of the first rows of that data, if it is another one
    "empty_rank": -1,  # this rank's batches have nothing to train on
    "short_rank": -1,  # this rank's second batch lacks its last row
    "interrupted_rank": -1,  # this rank gets a SIGTERM in its second step
    "resume": False,  # go on from the newest checkpoint
    "family": "llama",
    "teacher_family": "",  # as the student's
    "by_name": False,  # load both models from folders: in parts under ZeRO-3, on one rank only under FSDP2
}
job = json.loads(sys.argv[1])
sharding, rank = job["sharding"], int(os.environ.get("RANK", 0))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(__file__)), "support"))

import torch


if sharding:
    # accelerate shards on GPUs only; what it does there works on CPU ranks too, if they are taken for GPUs
    import accelerate.state
    import transformers.training_args
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if sharding == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    else:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    backend = ("gloo", DistributedType.MULTI_GPU)
    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: backend
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True

from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig
from pooling_server import PoolingServer
from runs import short_run
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
from trl_promptkd.models.forward import is_sharded


class NothingToTrain:
    """The collator of a trainer, whose labels are blanked."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, rows):
        return {name: value.fill_(-100) if "labels" in name else value for name, value in self.inner(rows).items()}


class LacksARow:
    """The collator of a trainer; the second batch is without its last row."""

    def __init__(self, inner):
        self.inner, self.batches = inner, 0

    def __call__(self, rows):
        self.batches += 1
        return self.inner(rows[:-1] if self.batches == 2 else rows)


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def trainer_settings(settings):
    common = {
        "per_device_train_batch_size": settings["rows"],
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": settings["steps"],
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_on_interrupt": settings["interrupted_rank"] >= 0,
        "use_cpu": not sharding,
        "gradient_checkpointing": False,
        "generation_kwargs": {"do_sample": settings["sampled"]},
        "train_sampling_strategy": "sequential",
        **settings["config"],
    }
    if sharding.startswith("zero"):
        common["deepspeed"] = {
            "zero_optimization": {
                "stage": int(sharding[-1]),
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    return common


def make_trainer(settings):
    folder, common = settings["folder"], trainer_settings(settings)
    models = {
        "model": tiny_model(settings["family"], seed=1),
        "teacher_model": tiny_model(settings["teacher_family"] or settings["family"], seed=2),
        "processing_class": tiny_tokenizer(),
    }
    if settings["by_name"]:
        for role in ("model", "teacher_model"):
            path = f"{folder}/{role}"
            if rank == 0:
                models[role].save_pretrained(path)
            models[role] = path
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    if settings["student"] != "full":
        torch.manual_seed(3)
        models["peft_config"] = LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["q_proj", "v_proj"])
    if settings["student"] == "self":
        del models["teacher_model"]
    torch.manual_seed(0)
    if settings["method"] == "promptkd":
        data = (answered_dataset if common.get("lmbda", 1.0) < 1 else prompt_dataset)(settings["size"])
        return PromptKDTrainer(
            **models,
            args=short_run(PromptKDConfig, Path(folder), {"prompt_update": "simultaneous", **common}),
            train_dataset=data.select(settings["order"] or range(len(data))),
            eval_dataset=answered_dataset(5),
            prompt_encoder_config=PromptEncoderConfig(prompt_learning_rate=0.01, prompt_init="vocab"),
        )
    source, data, evaluation = settings["source"], answered_dataset(settings["size"]), answered_dataset(5)
    if several := settings["several"]:
        family = settings["teacher_family"] or settings["family"]
        found = {name: tiny_model(family, seed=5 + seed) for seed, name in enumerate(several) if name != "own"}
        models["teacher_model"] = {"own": None, **found} if "own" in several else found
        data, evaluation = (
            rows.add_column("teacher", [several[row // 2 % len(several)] for row in range(len(rows))])
            for rows in (data, evaluation)
        )
    if source == "cache":
        teacher = models.pop("teacher_model")
        models["teacher_cache"] = settings["cache"] or build_teacher_cache(
            teacher,
            answered_dataset(settings["size"]),
            f"{folder}/cache",
            tiny_tokenizer(),
            PrimingTemplate("red blue "),
            "exact",
        )
        assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", 1)), "each rank built all of the cache"
        source = "dataset"
    if source == "server":  # a stand-in on each rank
        served = f"{folder}/served"
        if rank == 0:
            models["teacher_model"].save_pretrained(served)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        models["teacher_server"] = PoolingServer(models["teacher_model"], name=served).__enter__().url
        models["teacher_model"] = served
        common["teacher_server_dtype"] = "float32"
        source = "dataset"
    return PrimedDistillTrainer(
        **models,
        args=short_run(
            PrimedDistillConfig, Path(folder), {"response_source": source, "rollout_batch_size": 2, **common}
        ),
        train_dataset=data,
        eval_dataset=evaluation,
        priming=PrimingTemplate("red blue "),
    )


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(settings):
    if sharding == "fsdp2":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(settings["by_name"]).lower()
    trainer = make_trainer(settings)
    if settings["empty_rank"] == rank:
        trainer.data_collator = NothingToTrain(trainer.data_collator)
    if settings["short_rank"] == rank:
        trainer.data_collator = LacksARow(trainer.data_collator)
    if settings["interrupted_rank"] == rank:
        trainer.add_callback(Interrupt())
    trainer.train(resume_from_checkpoint=settings["resume"])
    if settings["interrupted_rank"] >= 0:
        assert trainer.state.global_step == 2, trainer.state.global_step

    of_promptkd = settings["method"] == "promptkd"
    logged = ["loss", "completion_tokens", "num_tokens", "kl/student_teacher", "grad_norm"]
    evaluated = ["eval_loss", "eval_ce", "eval_kd"]
    for name in settings["several"]:
        logged += [f"kl/student_teacher/{name}", f"completion_tokens/{name}"]
        evaluated += [f"eval_kl/student_teacher/{name}", f"eval_teacher/top1_agreement/{name}"]
    if of_promptkd:
        logged = ["loss", "kl/prompt_gain", "prompt/grad_norm", "grad_norm"]
        evaluated = ["eval_loss", "eval_reverse_kl", "eval_forward_kl"]
    wrapped = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    state = trainer.accelerator.get_state_dict(wrapped) or {}
    tensors = {name: whole(value).clone() for name, value in state.items()}
    if of_promptkd:
        tensors["prompt"] = trainer.prompt_embeddings()
    tensors["log"] = torch.tensor([float(trainer.state.log_history[0].get(name, -1)) for name in logged])
    metrics = trainer.evaluate()
    tensors["evaluation"] = torch.tensor([metrics[name] for name in evaluated])
    teachers = trainer.teacher_model if settings["several"] else {"": trainer.teacher_model}
    running = [model for model in teachers.values() if model is not None]
    tensors["sharded"] = torch.tensor([is_sharded(trainer.model), bool(running) and all(map(is_sharded, running))])
    trainer.save_model(f"{settings['folder']}/saved")
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        f"{settings['folder']}/rank{rank}.safetensors",
    )
    trainer.accelerator.wait_for_everyone()


torch.set_num_threads(1)
for number, given in enumerate(job["runs"]):
    if number:
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    print(f"RUN {given['folder']}", file=sys.stderr, flush=True)
    run({**SETTINGS, **given})
