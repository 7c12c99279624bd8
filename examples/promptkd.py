r"""Distil a student from a prompted teacher with PromptKD, from flags or a YAML file.

    accelerate launch examples/promptkd.py --config examples/configs/promptkd_gpt2_120m.yaml
    accelerate launch examples/promptkd.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher_model_name_or_path HuggingFaceTB/SmolLM2-1.7B-Instruct \
        --dataset_name HuggingFaceH4/ultrachat_200k --dataset_train_split train_sft --output_dir smollm2-promptkd

Flags win over the file.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from script_parser import ScriptParser
from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd.trainer.sampling_config import SamplingConfig


# The template of both papers' evaluation: methods differ by it, so it is the same for training and scoring
_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass
class PromptKDScriptArguments(ScriptArguments):
    """TRL's script arguments, and where local files and instruction columns are."""

    data_files: str | None = field(
        default=None,
        metadata={"help": "A file, or a pattern of files, of the training split, as for `--dataset_name json`."},
    )
    eval_data_files: str | None = field(
        default=None, metadata={"help": "The same for the evaluation split; without it, local files have none."}
    )
    instruction_template: bool = field(
        default=False,
        metadata={
            "help": "Build prompts from `instruction`, `input` (or `context`) and `output` (or `response`) columns with the "
            "template of the PromptKD paper, instead of using the data set's own format."
        },
    )


def from_instruction(row: dict[str, str]) -> dict[str, str]:
    """`prompt` and `completion` in the paper's template."""
    given = row.get("input") or row.get("context") or ""
    head = f"{_PREAMBLE_WITH_INPUT if given else _PREAMBLE}\n\n### Instruction:\n{row['instruction']}\n\n"
    middle = f"### Input:\n{given}\n\n" if given else ""
    answer = row["output"] if row.get("output") is not None else row["response"]
    return {"prompt": f"{head}{middle}### Response:\n", "completion": answer}


def load_splits(args: PromptKDScriptArguments, wants_eval: bool):
    """Training and evaluation data; the latter is `None` where it is not wanted."""
    if args.data_files is not None:
        files = {"train": args.data_files} | ({"test": args.eval_data_files} if args.eval_data_files else {})
        data = load_dataset(args.dataset_name or "json", data_files=files, streaming=args.dataset_streaming)
        train, test = data["train"], data.get("test")
    else:
        data = load_dataset(args.dataset_name, name=args.dataset_config, streaming=args.dataset_streaming)
        train = data[args.dataset_train_split]
        test = data[args.dataset_test_split] if wants_eval else None
    if args.instruction_template:
        train, test = (
            split and split.map(from_instruction, remove_columns=split.column_names) for split in (train, test)
        )
    return train, test if wants_eval else None


def make_trainer(
    script_args: PromptKDScriptArguments, training_args: PromptKDConfig, model_args: ModelConfig, prompt_args
) -> PromptKDTrainer:
    quantization_config = get_quantization_config(model_args)
    model_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype),
    }
    if quantization_config is not None:
        model_kwargs["quantization_config"] = quantization_config
    training_args.model_init_kwargs = {**model_kwargs, **(training_args.model_init_kwargs or {})}
    train_dataset, eval_dataset = load_splits(script_args, wants_eval=training_args.eval_strategy != "no")
    return PromptKDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        prompt_encoder_config=prompt_args,
    )


def main(script_args: PromptKDScriptArguments, training_args, model_args, prompt_args) -> None:
    trainer = make_trainer(script_args, training_args, model_args, prompt_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def make_parser() -> ScriptParser:
    groups = {
        "data": (PromptKDScriptArguments,),
        "distillation (PromptKDConfig)": (PromptKDConfig, SFTConfig, SamplingConfig),
        "the teacher's soft prompt (PromptEncoderConfig)": (PromptEncoderConfig,),
        "sampling of the student's answers, vLLM": (SamplingConfig,),
        "the student (TRL's ModelConfig)": (ModelConfig,),
    }
    return ScriptParser(
        groups, (PromptKDScriptArguments, PromptKDConfig, ModelConfig, PromptEncoderConfig), description=__doc__
    )


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
