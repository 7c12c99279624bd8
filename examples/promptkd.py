r"""Distil a student from a prompted teacher with PromptKD, from flags or a YAML file.

    accelerate launch examples/promptkd.py --config examples/configs/promptkd_gpt2_120m.yaml
    accelerate launch examples/promptkd.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher_model_name_or_path HuggingFaceTB/SmolLM2-1.7B-Instruct \
        --dataset_name HuggingFaceH4/ultrachat_200k --dataset_train_split train_sft --output_dir smollm2-promptkd

Flags win over the file.
"""

from dataclasses import dataclass, field

from scripts import DataArguments, ScriptParser, load_splits, student_init_kwargs, train_and_save
from trl import ModelConfig, get_peft_config

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd.evaluation.rows import instruction_text


@dataclass
class PromptKDScriptArguments(DataArguments):
    """Where the data is, and its template."""

    instruction_template: bool = field(
        default=False,
        metadata={
            "help": "Build prompts from `instruction`, `input` (or `context`) and `output` (or `response`) columns "
            "with the template of the PromptKD paper, instead of using the data set's own format."
        },
    )


def from_instruction(row: dict[str, str]) -> dict[str, str]:
    """`prompt` and `completion` in the template of both papers' evaluation."""
    prompt = instruction_text(row["instruction"], row.get("input") or row.get("context") or "")
    return {"prompt": prompt, "completion": row["output"] if row.get("output") is not None else row["response"]}


def make_trainer(
    script_args: PromptKDScriptArguments,
    training_args: PromptKDConfig,
    model_args: ModelConfig,
    prompt_args: PromptEncoderConfig,
) -> PromptKDTrainer:
    training_args.model_init_kwargs = student_init_kwargs(training_args, model_args)
    splits = load_splits(script_args, wants_eval=training_args.eval_strategy != "no")
    if script_args.instruction_template:
        splits = [split and split.map(from_instruction, remove_columns=split.column_names) for split in splits]
    return PromptKDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits[0],
        eval_dataset=splits[1],
        peft_config=get_peft_config(model_args),
        prompt_encoder_config=prompt_args,
    )


def make_parser() -> ScriptParser:
    return ScriptParser(
        (PromptKDScriptArguments, PromptKDConfig, ModelConfig, PromptEncoderConfig), description=__doc__
    )


def main() -> None:
    script_args, *others = make_parser().parse_args_and_config()
    train_and_save(make_trainer(script_args, *others), script_args)


if __name__ == "__main__":
    main()
