"""What users get wrong, and the errors they get: the cases of test_bad_inputs.py, and docs/errors.md, which is written of them:

make errors
"""

import os

from paths import ROOT


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from runs import short_run
from tiny import CHAT_TEMPLATE, WORDS, answered_dataset, chat_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig

from trl_promptkd import (
    DataCollatorForPrimedDistillation,
    GenerationMetricsCallback,
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
    SoftPrompt,
    TeacherCache,
    build_teacher_cache,
)
from trl_promptkd.cli import main
from trl_promptkd.evaluation import evaluate_model
from trl_promptkd.metrics import extract_final_number, gsm8k_accuracy, instruction_scores, load


NAN = float("nan")
USER, ANSWER = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}


class ExitCode2(Exception):  # noqa: N818
    """How a command line tool refuses: with this on its standard error."""


@dataclass(frozen=True)
class Case:
    """
    One bad input.

    Args:
        name: Of the test.
        does: What the user does, in Markdown.
        run: Does it, in a folder.
        error: What is raised.
        says: The message's decisive part.
        remedy: How the message's last part begins, which says what to do.
        needs_weights: Whether a model must be loaded or be at hand before this can be seen.
    """

    name: str
    does: str
    run: Callable[[Path], Any]
    error: type[Exception]
    says: str
    remedy: str
    needs_weights: bool = False

    def message(self, folder: Path) -> str:
        """What the user gets."""
        weights = contextlib.nullcontext()
        if not self.needs_weights:
            weights = mock.patch.object(
                PreTrainedModel, "from_pretrained", side_effect=AssertionError("loads weights")
            )
        try:
            with weights:
                self.run(folder)
        except Exception as error:
            if type(error) is not self.error:
                raise
            return _neutral(str(error), folder)
        raise AssertionError("was accepted")

    def row(self, message: str) -> str:
        """Of the table."""
        problem, found, remedy = message.partition(self.remedy)
        assert found, f"{self.name}: {self.remedy!r} is not in {message!r}"
        error = "exit code 2" if self.error is ExitCode2 else f"`{self.error.__name__}`"
        cells = (
            self.does,
            f"{error}: {_cell(problem.rstrip(' ;,'))}",
            _cell(self.remedy[0].upper() + self.remedy[1:] + remedy),
        )
        return f"| {' | '.join(cells)} |"


def _neutral(message: str, folder: Path) -> str:
    """Without the folders of this run, and without what other packages say, which changes with their versions."""
    message = message.replace(f"{folder}{os.sep}", "").replace(str(folder), "folder").replace(os.getcwd(), "/home/you")
    message = re.sub(r"shard-\w+", "shard-0a1b", message)
    message = re.sub(r"greedy-\w+\.jsonl", "greedy-0a1b.jsonl", message)
    return re.sub(r" \((We couldn't|'utf-8' codec|Error while).*?\)(?=\.|$)", "", message, flags=re.DOTALL)


def _cell(text: str, limit: int = 330) -> str:
    text = text if len(text) <= limit else f"{text[:limit].rsplit(' ', 1)[0]} ..."
    return text.replace("\n", " ").replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


# ---------------------------------------------------------------------------------------------------- doing things


def promptkd(folder: Path, rows=None, model="no/such-student", teacher="no/such-teacher", args=None, **kwargs):
    dataset = prompt_dataset(4) if rows is None else Dataset.from_list(rows) if type(rows) is list else rows
    kwargs = {"processing_class": tiny_tokenizer(), **kwargs}
    args = short_run(PromptKDConfig, folder, args or {})
    return PromptKDTrainer(model=model, teacher_model=teacher, args=args, train_dataset=dataset, **kwargs)


def primed(folder: Path, rows=None, model="no/such-student", teacher="no/such-teacher", args=None, **kwargs):
    dataset = answered_dataset(4) if rows is None else Dataset.from_list(rows) if type(rows) is list else rows
    kwargs = {"processing_class": tiny_tokenizer(), **kwargs}
    args = short_run(PrimedDistillConfig, folder, args or {})
    return PrimedDistillTrainer(model=model, teacher_model=teacher, args=args, train_dataset=dataset, **kwargs)


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def saved(folder: Path, model=None, tokenizer=None) -> str:
    if model is not None:
        model.save_pretrained(folder / "teacher")
    (tokenizer or tiny_tokenizer()).save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def truncated_teacher(folder: Path):
    teacher = saved(folder, tiny_model())
    cut_short(folder / "teacher" / "model.safetensors")
    primed(folder, model=tiny_model(), teacher=teacher)


def spoiled(model):
    model.get_output_embeddings().weight.data.fill_(NAN)
    return model


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def classifier():
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )


def bert():
    return BertForMaskedLM(
        BertConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )


def frozen_adapter():
    return get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")).requires_grad_(False)


def saved_adapter(folder: Path) -> str:
    frozen_adapter().save_pretrained(folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "no/such"')
    )
    return str(folder / "adapter")


def with_token(**special):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.add_special_tokens(special)
    return tokenizer


def without_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def refusing():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('Roles must alternate') }}{% endif %}" + CHAT_TEMPLATE
    )
    return tokenizer


def without_pad():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def same_object(folder: Path):
    student = tiny_model()
    promptkd(folder, model=student, teacher=student)


def soft_prompt(virtual=7):
    config = PromptEncoderConfig(num_virtual_tokens=virtual, prompt_init="random")
    return SoftPrompt(config, tiny_model(), tiny_tokenizer())


def prompt_of_another_shape(folder: Path):
    soft_prompt(3).save_adapter(str(folder / "teacher_prompt"))
    soft_prompt(7).load_parameters(str(folder / "teacher_prompt"))


def truncated_prompt(folder: Path):
    soft_prompt().save_adapter(str(folder / "teacher_prompt"))
    cut_short(folder / "teacher_prompt" / "prompt_encoder.safetensors")
    soft_prompt().load_parameters(str(folder / "teacher_prompt"))


def resumed_from_weights_alone(folder: Path):
    saves = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer = primed(folder, model=tiny_model(seed=1), teacher=tiny_model(seed=2), args=saves)
    trainer.train()
    trainer.train(resume_from_checkpoint=True)


def resumed_without_prompt(folder: Path):
    trainer = promptkd(
        folder, model=tiny_model(seed=1), teacher=tiny_model(seed=2), args={"save_strategy": "steps", "save_steps": 1}
    )
    trainer.train()
    (folder / "run" / "checkpoint-1" / "prompt_training_state.safetensors").unlink()
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-1"))


def cache(folder: Path, **kwargs) -> Path:
    kwargs = {"priming": PrimingTemplate("red "), "preset": "standard", **kwargs}
    build_teacher_cache(tiny_model(seed=2), answered_dataset(4), str(folder / "cache"), tiny_tokenizer(), **kwargs)
    return folder / "cache"


def from_cache(folder: Path, rows=None, args=None, **kwargs):
    args = {"kd_temperature": 1.0, **(args or {})}
    kwargs = {"priming": PrimingTemplate("red "), **kwargs}
    primed(folder, rows, teacher=None, args=args, teacher_cache=str(cache(folder)), **kwargs)


def opened(folder: Path, spoil: Callable[[Path], Any]):
    path = cache(folder)
    spoil(path)
    TeacherCache(str(path))


def forget_shards(path: Path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(re.sub(r'"shards": \[.*?\n \]', '"shards": []', text, flags=re.DOTALL))


def the_shard(path: Path) -> Path:
    return next(path.glob("*.parquet"))


def command(folder: Path, *flags: str):
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        try:
            code = main([flag.replace("FOLDER", str(folder)) for flag in flags])
        except SystemExit as exit_:  # argparse
            code = exit_.code
    assert code == 2, code
    raise ExitCode2(out.getvalue().strip().splitlines()[-1])


def build_command(folder: Path, *flags: str):
    written(folder / "rows.json", b'{"prompt": "the cat", "completion": "sat"}\n')
    command(folder, "cache", "build", "--teacher", "no/such-teacher", "--output_dir", "FOLDER/cache", *flags)


def attention_command(
    folder: Path,
    *flags: str,
    models: tuple[str, ...] = ("no/such-student",),
    rows: bytes = b'{"prompt": "the cat", "completion": "sat"}\n',
):
    written(folder / "rows.json", rows)
    files = ("--dataset", "FOLDER/rows.json", "--output_dir", "FOLDER/out")
    command(folder, "analyze", "attention", "--models", *models, *files, *flags)


def saved_tokenizer(path: Path, **kwargs) -> str:
    tiny_tokenizer(**kwargs).save_pretrained(path)
    return str(path)


def saved_model(path: Path, **settings) -> str:
    tiny_model(**settings).save_pretrained(path)
    return saved_tokenizer(path)


def analyze(folder: Path, analysis: str, *flags: str):
    written(folder / "rows.json", b'{"prompt": "the cat"}\n')
    command(folder, "analyze", analysis, "--teacher", "no/such-teacher", *flags)


def analyze_prompt(folder: Path, *flags: str, teacher=None):
    """Of a saved prompt, with a teacher whose tokenizer is there and whose weights may be."""
    saved(folder, teacher)
    if not (folder / "run").exists():
        soft_prompt().save_adapter(str(folder / "run" / "teacher_prompt"))
    written(folder / "rows.json", b'{"prompt": "the cat"}\n')
    where = ("--prompt", "FOLDER/run", "--output_dir", "FOLDER/out")
    command(folder, "analyze", "prompt", "--teacher", "FOLDER/teacher", *where, *flags)


def prompts_of_two_runs(folder: Path):
    for step, virtual in ((1, 3), (2, 7)):
        soft_prompt(virtual).save_adapter(str(folder / "run" / f"checkpoint-{step}" / "teacher_prompt"))
    analyze_prompt(folder)


def prompt_of_another_kind(folder: Path):
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "run")
    analyze_prompt(folder)


def evaluate_rows(rows: Any, **settings: Any):
    """Refused before the model is asked, so that there is none."""
    tokenizer = settings.pop("tokenizer", None) or tiny_tokenizer()
    evaluate_model(None, tokenizer, {"rows": Dataset.from_list(rows)}, **settings)


def without_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def eval_command(folder: Path, *flags: str):
    tiny_tokenizer().save_pretrained(folder / "model")
    written(folder / "rows.json", b'{"instruction": "the cat", "output": "sat"}\n')
    command(folder, "eval", "instruct", "--model", "FOLDER/model", *flags)


def damaged_answers(folder: Path):
    model, settings = tiny_model(), {"max_new_tokens": 2, "output_dir": str(folder / "answers")}
    evaluate_model(model, tiny_tokenizer(), {"rows": answered_dataset(2)}, **settings)
    (path,) = (folder / "answers").iterdir()
    os.replace(written(path, b"{}"), path)
    evaluate_model(model, tiny_tokenizer(), {"rows": answered_dataset(2)}, **settings)


# ---------------------------------------------------------------------------------------------------- the cases


def _setting(
    config: str, settings: dict[str, Any], error: type[Exception], says: str, remedy: str, does: str = ""
) -> Case:
    text = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    makes = {
        "PromptKDConfig": lambda folder: short_run(PromptKDConfig, folder, settings),
        "PrimedDistillConfig": lambda folder: short_run(PrimedDistillConfig, folder, settings),
        "PromptEncoderConfig": lambda folder: PromptEncoderConfig(**settings),
    }
    name = "_".join([config, *map(str, settings), *map(str, settings.values())])
    return Case(re.sub(r"[^\w.-]+", "_", name)[:70], does or f"`{config}({text})`", makes[config], error, says, remedy)


P, R, E = "PromptKDConfig", "PrimedDistillConfig", "PromptEncoderConfig"
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST |= {"load_best_model_at_end": True, "max_steps": 2}
ARGUMENTS = [
    Case(
        "best_of_several_sets",
        "`load_best_model_at_end=True` with several evaluation sets",
        lambda folder: promptkd(folder, args=BEST, eval_dataset={"a": prompt_dataset(2), "b": prompt_dataset(2)}),
        ValueError,
        "`metric_for_best_model` is 'eval_forward_kl', but `eval_dataset` is a dict",
        "Set it to one of 'eval_a_forward_kl'",
    ),
    Case(
        "early_stopping_by_nothing",
        "an `EarlyStoppingCallback`, and no `metric_for_best_model`",
        lambda folder: promptkd(folder, callbacks=[EarlyStoppingCallback()]),
        ValueError,
        "holds an EarlyStoppingCallback, but `metric_for_best_model` is None",
        "Set it to the metric to stop by",
    ),
    Case(
        "two_dtypes",
        "`model_init_kwargs={'dtype': 'float32', 'torch_dtype': 'bfloat16'}`",
        lambda folder: primed(folder, args={"model_init_kwargs": {"dtype": "float32", "torch_dtype": "bfloat16"}}),
        ValueError,
        "two names of one setting",
        "Leave 'torch_dtype' out",
    ),
    Case(
        "bits_beside_quantization_config",
        "`model_init_kwargs={'load_in_4bit': True}`",
        lambda folder: primed(folder, args={"model_init_kwargs": {"load_in_4bit": True}}),
        ValueError,
        "holds 'load_in_4bit', which transformers no longer takes there",
        "Write `model_init_kwargs={'quantization_config'",
    ),
    _setting(P, {"lmbda": 1.5}, ValueError, "`lmbda` is 1.5", "it must be between 0 and 1"),
    _setting(
        P, {"lmbda": "1.0"}, TypeError, "`lmbda` is '1.0', a str", "it must be a number. Write it without quotes"
    ),
    _setting(P, {"lmbda": None}, TypeError, "`lmbda` is None", "it must be a number"),
    _setting(P, {"beta": NAN}, ValueError, "`beta` is nan", "it must be finite, and between 0 and 1"),
    _setting(
        P, {"temperature": 0.0}, ValueError, "`temperature` is 0.0", "it must be above 0. For greedy decoding set"
    ),
    _setting(P, {"temperature": "warm"}, TypeError, "`temperature` is 'warm', a str", "it must be a number"),
    _setting(P, {"loss_temperature": NAN}, ValueError, "`loss_temperature` is nan", "it must be finite, and above 0"),
    _setting(P, {"regularization_coef": -0.1}, ValueError, "`regularization_coef` is -0.1", "it must be at least 0"),
    _setting(
        P,
        {"prompt_divergence": "jsd"},
        ValueError,
        "`prompt_divergence` is 'jsd'",
        "it must be 'reverse' or 'forward'",
    ),
    _setting(P, {"prompt_update": None}, ValueError, "`prompt_update` is None", "it must be 'sequential' or"),
    _setting(P, {"overlong": "cut"}, ValueError, "`overlong` is 'cut'", "it must be 'error' or 'drop'"),
    _setting(P, {"seq_kd": "no"}, TypeError, "`seq_kd` is 'no', a str", "it must be True or False"),
    _setting(P, {"top_p": 1.5}, ValueError, "`top_p` is 1.5", "it must be above 0 and at most 1"),
    _setting(P, {"top_k": 0.5}, TypeError, "`top_k` is 0.5, a float", "it must be a whole number"),
    _setting(P, {"max_new_tokens": "16"}, TypeError, "`max_new_tokens` is '16', a str", "it must be a whole number"),
    _setting(P, {"max_new_tokens": 0}, ValueError, "`max_new_tokens` is 0", "it must be above 0"),
    _setting(
        P, {"rollout_batch_size": 1.5}, TypeError, "`rollout_batch_size` is 1.5", "it must be a whole number or None"
    ),
    _setting(P, {"loss_chunk_size": -1}, ValueError, "`loss_chunk_size` is -1", "it must be above 0"),
    _setting(P, {"max_length": -5}, ValueError, "`max_length` is -5", "it must be above 0"),
    _setting(P, {"learning_rate": NAN}, ValueError, "`learning_rate` is nan", "it must be finite, and at least 0"),
    _setting(
        P, {"gradient_accumulation_steps": 0}, ValueError, "`gradient_accumulation_steps` is 0", "it must be above 0"
    ),
    _setting(P, {"seed": -1}, ValueError, "`seed` is -1", "it must be at least 0"),
    _setting(P, {"packing": True}, ValueError, "`packing=True` has no meaning in PromptKD", "Leave it at False"),
    _setting(
        P,
        {"completion_only_loss": False},
        ValueError,
        "`completion_only_loss=False` has no meaning",
        "Omit it",
    ),
    _setting(
        P,
        {"generation_kwargs": {"do_smaple": False}},
        ValueError,
        "GenerationConfig does not know",
        "Did you mean 'do_sample'?",
    ),
    _setting(P, {"generation_kwargs": {"max_new_tokens": 9}}, ValueError, "holds 'max_new_tokens'", "Set that"),
    _setting(
        P,
        {"generation_kwargs": {"num_return_sequences": 2}},
        ValueError,
        "every prompt gets one completion",
        "Leave it away",
    ),
    _setting(
        P,
        {"generation_kwargs": "{do_sample: false}"},
        ValueError,
        "`generation_kwargs` is the text",
        "it must be a dict, or one written as JSON",
    ),
    _setting(P, {"vllm_mode": "remote"}, ValueError, "`vllm_mode` is 'remote'", "it must be 'colocate' or 'server'"),
    _setting(
        P,
        {"vllm_gpu_memory_utilization": 3.0},
        ValueError,
        "`vllm_gpu_memory_utilization` is 3.0",
        "it must be above 0 and at most 1",
    ),
    _setting(
        P,
        {"teacher_model_init_kwargs": [1]},
        TypeError,
        "`teacher_model_init_kwargs` is [1], a list",
        "it must be a dict or None",
    ),
    _setting(R, {"alpha": 1.5}, ValueError, "`alpha` is 1.5", "it must be between 0 and 1"),
    _setting(
        R, {"alpha": 0.5, "response_source": "student"}, ValueError, "own samples are no hard labels", "Set `alpha=0`"
    ),
    _setting(R, {"kd_beta": "0"}, TypeError, "`kd_beta` is '0', a str", "it must be a number"),
    _setting(
        R, {"kd_temperature": float("inf")}, ValueError, "`kd_temperature` is inf", "it must be finite, and above 0"
    ),
    _setting(R, {"kd_temperature": None}, TypeError, "`kd_temperature` is None", "it must be a number"),
    _setting(R, {"skew": 1.0}, ValueError, "`skew` is 1.0", "it must be at least 0 and below 1"),
    _setting(R, {"skew": 0.1, "kd_beta": 0.5}, ValueError, "only the forward and the reverse KL", "Set `skew=0`"),
    _setting(
        R,
        {"response_source": "gold"},
        ValueError,
        "`response_source` is 'gold'",
        "it must be 'dataset' or 'teacher' or",
    ),
    _setting(
        R,
        {"teacher_max_length": 2.5},
        TypeError,
        "`teacher_max_length` is 2.5, a float",
        "it must be a whole number or None",
    ),
    _setting(R, {"pad_to_multiple_of": -8}, ValueError, "`pad_to_multiple_of` is -8", "it must be above 0"),
    _setting(E, {"num_virtual_tokens": 0}, ValueError, "`num_virtual_tokens` is 0", "a soft prompt needs at least 1"),
    _setting(
        E, {"num_virtual_tokens": "7"}, TypeError, "`num_virtual_tokens` is '7', a str", "it must be a whole number"
    ),
    _setting(
        E,
        {"prompt_init": "zeros"},
        ValueError,
        "`prompt_init` is 'zeros'",
        "it must be 'text' or 'random' or 'vocab'",
    ),
    _setting(E, {"prompt_init_text": "  "}, ValueError, "which holds no text", "Give a text, or set"),
    _setting(E, {"prompt_init_text": None}, TypeError, "`prompt_init_text` is None", "it must be a text"),
    _setting(E, {"encoder": "gru"}, ValueError, "`encoder` is 'gru'", "it must be 'embedding' or 'mlp' or 'lstm'"),
    _setting(
        E,
        {"prompt_learning_rate": "1e-3"},
        TypeError,
        "`prompt_learning_rate` is '1e-3', a str",
        "it must be a number or None. Write it without quotes",
    ),
    _setting(E, {"prompt_max_grad_norm": -1.0}, ValueError, "`prompt_max_grad_norm` is -1.0", "it must be at least 0"),
    Case(
        "config_of_another_trainer",
        "`args=SFTConfig(...)`",
        lambda folder: PromptKDTrainer("a", "b", SFTConfig(str(folder), bf16=False, use_cpu=True)),
        TypeError,
        "`args` is a SFTConfig",
        "PromptKDTrainer needs a `trl_promptkd.PromptKDConfig`",
    ),
    Case(
        "no_train_dataset",
        "no `train_dataset`",
        lambda folder: PrimedDistillTrainer("a", args=short_run(PrimedDistillConfig, folder, {})),
        ValueError,
        "`train_dataset`",
        "is required",
    ),
    Case(
        "formatting_func",
        "`formatting_func=...`",
        partial(promptkd, formatting_func=str),
        ValueError,
        "`formatting_func` is not supported",
        "Build `prompt` and `completion` columns",
    ),
    Case(
        "compute_loss_func",
        "`compute_loss_func=...`",
        partial(primed, compute_loss_func=str),
        ValueError,
        "`compute_loss_func` is not supported",
        "Subclass PrimedDistillTrainer",
    ),
    Case(
        "prompt_config_dict",
        "`prompt_encoder_config={'num_virtual_tokens': 3}`",
        partial(promptkd, prompt_encoder_config={"num_virtual_tokens": 3}),
        TypeError,
        "is a dict, which does not describe a soft prompt",
        "Pass a `trl_promptkd.PromptEncoderConfig`",
    ),
    Case(
        "prompt_config_lora",
        "`prompt_encoder_config=LoraConfig()`",
        partial(promptkd, prompt_encoder_config=LoraConfig()),
        TypeError,
        "is a LoraConfig, which does not describe a soft prompt",
        "Pass a `trl_promptkd.PromptEncoderConfig`",
    ),
    Case(
        "prompt_config_width",
        "`prompt_encoder_config=PromptTuningConfig(token_dim=77, ...)`",
        lambda folder: SoftPrompt(
            PromptTuningConfig(num_virtual_tokens=3, token_dim=77), tiny_model(), tiny_tokenizer()
        ),
        ValueError,
        "`token_dim` of `prompt_encoder_config` is 77, but the teacher's embeddings have 32",
        "Leave it at None",
        needs_weights=True,
    ),
    Case(
        "peft_config_dict",
        "`peft_config={'r': 8}`",
        partial(promptkd, peft_config={"r": 8}),
        TypeError,
        "`peft_config` is a dict",
        "it must be a configuration of PEFT's",
    ),
    Case(
        "peft_config_of_a_classifier",
        "`peft_config=LoraConfig(task_type='SEQ_CLS')`",
        partial(primed, peft_config=LoraConfig(task_type="SEQ_CLS")),
        ValueError,
        "the student is a language model",
        "Set `task_type='CAUSAL_LM'`",
    ),
    Case(
        "peft_config_of_a_prompt",
        "`peft_config=PromptTuningConfig(...)`",
        partial(primed, peft_config=PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        ValueError,
        "prompt learning for the *student*",
        "Use LoRA",
    ),
    Case(
        "init_kwargs_of_a_loaded_teacher",
        "a loaded teacher, and `teacher_model_init_kwargs`",
        lambda folder: promptkd(
            folder, teacher=tiny_model(), args={"teacher_model_init_kwargs": {"dtype": "float32"}}
        ),
        ValueError,
        "`teacher_model` is not loaded by the trainer",
        "Pass the teacher's name, or leave",
    ),
    Case(
        "teacher_dtype",
        "`teacher_model_init_kwargs={'dtype': 'bf16'}`",
        partial(promptkd, args={"teacher_model_init_kwargs": {"dtype": "bf16"}}),
        ValueError,
        "`teacher_model_init_kwargs['dtype']` is 'bf16'",
        "it must be the name of a torch dtype",
    ),
    Case(
        "teacher_quantization",
        "`teacher_model_init_kwargs={'quantization_config': {'load_in_3bit': True}}`",
        partial(primed, args={"teacher_model_init_kwargs": {"quantization_config": {"load_in_3bit": True}}}),
        ValueError,
        "holds 'load_in_3bit', which bitsandbytes does not know",
        "Set 'load_in_4bit' or 'load_in_8bit'",
    ),
    Case(
        "quantized_student",
        "a 4-bit student (`model_init_kwargs`) without `peft_config`",
        partial(primed, args={"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}),
        ValueError,
        "quantized weights cannot be trained",
        "Pass a `peft_config`",
    ),
    Case(
        "tokenizer_by_name",
        "`processing_class='gpt2'`",
        partial(promptkd, processing_class="gpt2"),
        TypeError,
        "`processing_class` is a str",
        "Pass `AutoTokenizer.from_pretrained(name)`",
    ),
    Case(
        "no_tokenizer",
        "a student without a tokenizer beside it",
        partial(promptkd, processing_class=None),
        OSError,
        "No tokenizer could be loaded for the student 'no/such-student'",
        "Check the name, or pass the tokenizer",
    ),
    Case(
        "eos_token",
        "`eos_token='<end>'`, which the tokenizer does not have",
        partial(promptkd, args={"eos_token": "<end>"}),
        ValueError,
        "`eos_token` is '<end>', which the tokenizer does not have",
        "Name one of its tokens",
    ),
    Case(
        "torch_compile",
        "`torch_compile=True`",
        partial(promptkd, args={"torch_compile": True}),
        ValueError,
        "`torch_compile` is True",
        "Set it to False",
    ),
    Case(
        "hyperparameter_search",
        "`trainer.hyperparameter_search()`",
        lambda folder: promptkd(folder, model=tiny_model(), teacher=tiny_model(seed=2)).hyperparameter_search(),
        NotImplementedError,
        "`hyperparameter_search` is not supported",
        "`examples/search.py` makes one for each trial",
        needs_weights=True,
    ),
    Case(
        "priming_name",
        "`priming='techer'`",
        partial(primed, priming="techer"),
        ValueError,
        "`priming` is 'techer'",
        "the names are 'teacher', 'ground_truth'",
    ),
    Case(
        "priming_empty",
        "`PrimingTemplate('')`",
        lambda folder: PrimingTemplate(""),
        ValueError,
        "which says nothing",
        "For a teacher that sees what the student sees set `priming=None`",
    ),
    Case(
        "priming_placement",
        "`PrimingTemplate(text, 'middle')`",
        lambda folder: PrimingTemplate("x", "middle"),
        ValueError,
        "`placement` is 'middle'",
        "it must be one of 'prefix', 'suffix', 'system'",
    ),
    Case(
        "priming_syntax",
        "`PrimingTemplate('{{ topic')`",
        lambda folder: PrimingTemplate("{{ topic"),
        ValueError,
        "is not a valid Jinja template",
        "Text that contains '{{'",
    ),
    Case(
        "collator_tokenizer",
        "`DataCollatorForPrimedDistillation('gpt2')`",
        lambda folder: DataCollatorForPrimedDistillation("gpt2"),
        TypeError,
        "`processing_class` is a str",
        "it must be a tokenizer",
    ),
    Case(
        "collator_pad_token",
        "`DataCollatorForPrimedDistillation` with a tokenizer without pad token",
        lambda folder: DataCollatorForPrimedDistillation(without_pad()),
        ValueError,
        "The tokenizer has no pad token",
        "Set `tokenizer.pad_token = tokenizer.eos_token`",
    ),
    Case(
        "cache_and_teacher",
        "`teacher_model` and `teacher_cache`",
        partial(primed, teacher_cache="x"),
        ValueError,
        "are both set",
        "pass one of them",
    ),
    Case(
        "cache_of_student_samples",
        "`teacher_cache`, and `response_source='student'`",
        partial(primed, teacher=None, teacher_cache="x", args={"response_source": "student"}),
        ValueError,
        "knows nothing of the student's samples",
        "Pass a live `teacher_model`",
    ),
    Case(
        "cli_no_teacher",
        "`trl-promptkd cache build` without `--teacher`",
        lambda folder: command(folder, "cache", "build", "--output_dir", "x"),
        ExitCode2,
        "arguments are required",
        "--teacher",
    ),
    Case(
        "attention_prompt_without_teacher",
        "... `--prompt` without `--teacher`",
        lambda folder: attention_command(folder, "--prompt", "teacher_prompt"),
        ExitCode2,
        "`--prompt` is 'teacher_prompt', but whose prompt it is is not said",
        "Pass `--teacher`, too",
    ),
    Case(
        "attention_twice",
        "... the same model twice",
        lambda folder: attention_command(folder, models=("a", "b", "a/")),
        ExitCode2,
        "'a' is given twice in `--models` and `--teacher`",
        "Give each once",
    ),
    Case(
        "cli_two_primings",
        "`trl-promptkd cache build --priming ... --priming_file ...`",
        lambda folder: build_command(folder, "--priming", "teacher", "--priming_file", "x"),
        ExitCode2,
        "are both given",
        "choose one",
    ),
    Case(
        "cli_init_kwargs",
        "`trl-promptkd cache build --teacher_init_kwargs '{dtype: float32}'`",
        lambda folder: build_command(folder, "--teacher_init_kwargs", "{dtype: float32}"),
        ExitCode2,
        "argument --teacher_init_kwargs: '{dtype: float32}' is not the",
        "JSON of a dict, such as",
    ),
    Case(
        "cli_analyze_rows",
        "`trl-promptkd analyze exposure --rows 0`",
        lambda folder: analyze(
            folder, "exposure", "--student", "no/such-student", "--dataset", "FOLDER/rows.json", "--rows", "0"
        ),
        ExitCode2,
        "argument --rows: '0' is not allowed",
        "it must be a whole number, 1 or more",
    ),
    Case(
        "cli_analyze_no_student",
        "`trl-promptkd analyze prompt --responses student` without `--student`",
        lambda folder: analyze(folder, "prompt", "--prompt", "FOLDER", "--responses", "student"),
        ExitCode2,
        "there is no `--student`",
        "Pass one, or set `--responses dataset`",
    ),
    Case(
        "cli_analyze_no_dataset",
        "the same with `--student` and without `--dataset`",
        lambda folder: analyze(folder, "prompt", "--prompt", "FOLDER", "--responses", "student", "--student", "x"),
        ExitCode2,
        "there is no `--dataset`, whose prompts it answers",
        "Pass one",
    ),
    Case(
        "metric_name",
        "`metrics.load('rouge')`",
        lambda folder: load("rouge"),
        ValueError,
        "The metric is 'rouge'",
        "it must be 'gsm8k' or 'instruction_scores'",
    ),
    Case(
        "metric_rule",
        "`extract_final_number('18', rule='last')`",
        lambda folder: extract_final_number("18", rule="last"),
        ValueError,
        "`rule` is 'last'",
        "it must be 'strict' or 'flexible' or 'paper'",
    ),
    Case(
        "eval_task",
        "`GenerationMetricsCallback(..., task='mmlu')`",
        lambda folder: GenerationMetricsCallback(
            promptkd(folder, model=tiny_model(), teacher=tiny_model()), chat_dataset(), task="mmlu"
        ),
        ValueError,
        "`task` is 'mmlu'",
        "it must be 'instruct' or 'gsm8k'",
    ),
    Case(
        "callback_trainer",
        "`GenerationMetricsCallback` without a trainer",
        lambda folder: GenerationMetricsCallback(chat_dataset(), chat_dataset()),
        TypeError,
        "`trainer` is a Dataset; it must be a Trainer",
        "Make it first",
    ),
    Case(
        "eval_seeds",
        "`evaluate_model(seeds=[10, 10])`",
        lambda folder: evaluate_rows(chat_dataset(), seeds=[10, 10]),
        ValueError,
        "`seeds` are [10, 10]",
        "they must be different whole numbers",
    ),
    Case(
        "eval_template",
        "`evaluate_model(template='chat')`, and a tokenizer without a chat template",
        lambda folder: evaluate_rows(chat_dataset(), template="chat", tokenizer=without_chat_template()),
        ValueError,
        "the tokenizer has no chat template",
        "Choose 'paper' or 'plain'",
    ),
    Case(
        "eval_greedy_temperature",
        "`evaluate_model(temperature=0.7)` without seeds",
        lambda folder: evaluate_rows(chat_dataset(), temperature=0.7),
        ValueError,
        "`temperature` is 0.7, but answers are greedy",
        "Give seeds",
    ),
    Case(
        "cli_eval_greedy_seeds",
        "`trl-promptkd eval instruct --greedy --seeds 1`",
        lambda folder: eval_command(folder, "--dataset", "FOLDER/rows.json", "--greedy", "--seeds", "1"),
        ExitCode2,
        "`--greedy` and `--seeds` [1] are both given",
        "Leave one of them away",
    ),
    Case(
        "cli_eval_twice",
        "`trl-promptkd eval instruct --dataset a --dataset a`",
        lambda folder: eval_command(folder, "--dataset", "FOLDER/rows.json", "--dataset", "FOLDER/rows.json"),
        ExitCode2,
        "is given twice in `--dataset`",
        "Give each once",
    ),
    Case(
        "cli_eval_split",
        "`trl-promptkd eval instruct --dataset openai/gsm8k` without a split",
        lambda folder: eval_command(folder, "--dataset", "openai/gsm8k"),
        ExitCode2,
        "`--dataset` is 'openai/gsm8k', whose split is not said",
        "Pass `--dataset_split`",
    ),
    Case(
        "callback_no_tokenizer",
        "`GenerationMetricsCallback` of a trainer without `processing_class`",
        lambda folder: GenerationMetricsCallback(
            Trainer(tiny_model(), TrainingArguments(str(folder), use_cpu=True, report_to="none")), chat_dataset()
        ),
        ValueError,
        "The trainer's `processing_class` is none; it must be a tokenizer",
        "Make the trainer with",
    ),
    Case(
        "cli_eval_batch_size",
        "`trl-promptkd eval instruct --batch_size 0`",
        lambda folder: eval_command(folder, "--dataset", "FOLDER/rows.json", "--batch_size", "0"),
        ExitCode2,
        "`batch_size` is 0",
        "it must be above 0",
    ),
]


def _data(
    name: str, does: str, rows: Any, says: str, remedy: str, error: type[Exception] = ValueError, run=primed, **kwargs
) -> Case:
    return Case(name, does, partial(run, rows=rows, **kwargs), error, says, remedy)


FORM = "it must have a role and a content"
DATA = [
    _data(
        "name",
        "`train_dataset='trl-lib/...'`",
        "trl-lib/ultrafeedback-prompt",
        "`train_dataset` is a str",
        "it must be a `datasets.Dataset`",
        TypeError,
    ),
    _data(
        "list",
        "a list of rows as `eval_dataset`",
        None,
        "`eval_dataset` is a list",
        "it must be a `datasets.Dataset`",
        TypeError,
        eval_dataset=[{"prompt": "the"}],
    ),
    _data(
        "dataset_dict",
        "all splits at once (`DatasetDict`)",
        DatasetDict(train=answered_dataset(2)),
        "`train_dataset` is a DatasetDict with the keys ['train']",
        "Pass one of them",
        TypeError,
    ),
    _data(
        "empty",
        "a data set without rows",
        Dataset.from_dict({"prompt": [], "completion": []}),
        "`train_dataset` is empty",
        "Check its path, split and filters",
    ),
    _data(
        "columns",
        "only a column `text`",
        [{"text": "x"}],
        "has neither a `messages` nor a `prompt` column; its columns are ['text']",
        "Rename a column",
    ),
    _data(
        "eval_columns",
        "the same in one of several `eval_dataset`s",
        None,
        "`eval_dataset['a']` has neither a `messages` nor a `prompt` column",
        "Rename a column",
        eval_dataset={"a": Dataset.from_list([{"text": "x"}])},
    ),
    _data(
        "prompts_alone",
        "prompts without answers, `PrimedDistillTrainer`",
        prompt_dataset(2),
        "holds prompts without answers",
        "Set `response_source='teacher'`",
    ),
    _data(
        "prompts_alone_lmbda",
        "prompts without answers, `lmbda=0.5`",
        None,
        "`lmbda` is below 1",
        "Set `lmbda=1.0`",
        run=promptkd,
        args={"lmbda": 0.5},
    ),
    _data(
        "answer_none",
        "an answer that is `None`",
        [{"prompt": "the", "completion": "cat"}, {"prompt": "the", "completion": None}],
        "1 of 2 rows in `train_dataset` have no answer",
        "Set `response_source='teacher'`",
    ),
    _data(
        "prompt_none",
        "a prompt that is `None`",
        [{"prompt": "the", "completion": "cat"}, {"prompt": None, "completion": "cat"}],
        "Row 1 of `train_dataset`: A row has neither a prompt nor messages",
        "Filter such rows out",
    ),
    _data(
        "prompt_empty",
        "a prompt that is `''`",
        [{"prompt": ""}],
        "Row 0 of `train_dataset`: A row's prompt has no tokens",
        "Filter such rows out",
        run=promptkd,
    ),
    _data(
        "prompt_int",
        "a prompt that is a number",
        [{"prompt": 3, "completion": "x"}],
        "A row's `prompt` is 3",
        "it must be a text or a list of messages",
    ),
    _data(
        "prompt_strings",
        "a prompt that is a list of texts",
        [{"prompt": ["the", "cat"]}],
        "A row's `prompt` is ['the', 'cat']",
        "it must be a text or a list of messages",
        run=promptkd,
    ),
    _data(
        "prompt_dict",
        "a prompt that is one message, not a list",
        [{"prompt": USER, "completion": "x"}],
        "A row's `prompt` is {'role': 'user', 'content': 'the cat'}",
        "it must be a text or a list of messages",
    ),
    _data(
        "prompt_no_messages",
        "a prompt that is an empty list",
        [{"prompt": [], "completion": "x"}],
        "A row's `prompt` is an empty list of messages",
        "Filter such rows out",
    ),
    _data(
        "answer_float",
        "an answer that is a number",
        [{"prompt": "the", "completion": 4.5}],
        "A row's `completion` is 4.5",
        "it must be a text or a list of messages",
    ),
    _data(
        "answer_other_form",
        "a text as prompt, messages as answer",
        [{"prompt": "the cat", "completion": [ANSWER]}],
        "`prompt` is a text, but its `completion` a list of messages",
        "Make both texts or both messages",
    ),
    _data(
        "answer_of_user",
        "an answer with the role `user`",
        [{"prompt": [USER], "completion": [USER]}],
        "Its roles are ['user']",
        "Filter such rows out",
        run=primed,
    ),
    _data(
        "messages_text",
        "`messages` that are a text",
        [{"messages": "the cat"}],
        "A row's `messages` is 'the cat'",
        "it must be a list of messages",
    ),
    _data(
        "messages_strings",
        "`messages` that are texts",
        [{"messages": ["the cat", "sat"]}],
        "A row's `messages` is ['the cat', 'sat']",
        "it must be a list of messages",
    ),
    _data(
        "messages_sharegpt",
        "`messages` in ShareGPT's form",
        [{"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        "hold the message {'from': 'human', 'value': 'a'}",
        FORM,
    ),
    _data(
        "messages_content_none",
        "a message without content",
        [{"messages": [USER, {"role": "assistant", "content": None}]}],
        "hold the message {'role': 'assistant', 'content': None}",
        FORM,
    ),
    _data(
        "messages_content_int",
        "a message whose content is a number",
        [{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": 4}]}],
        "hold the message {'role': 'user', 'content': 3}",
        FORM,
    ),
    _data(
        "messages_without_answer",
        "`messages` without an answer at their end",
        [{"messages": [USER]}],
        "must end with an assistant message",
        "Rows without an answer go into a `prompt` column",
        run=promptkd,
    ),
    _data(
        "messages_answer_only",
        "`messages` that hold an answer only",
        [{"messages": [ANSWER]}],
        "hold an answer only",
        "A message that it answers must come before it",
    ),
    _data(
        "tool_calls",
        "an answer that calls a tool, and a chat template that leaves calls out",
        [{"messages": [USER, {**ANSWER, "content": None, "tool_calls": [{"function": {"name": "cat"}}]}]}],
        "Row 0 of `train_dataset`: The chat template ignores `tool_calls`: it writes nothing of the answer's",
        "Use a template that writes tool calls",
    ),
    _data(
        "answers_empty",
        "answers that are all empty",
        [{"prompt": "the", "completion": ""}, {"prompt": "cat", "completion": " "}],
        "2 of 2 answers in `train_dataset` are empty: the student learns to stop at once",
        "Check how the data was made",
    ),
    _data(
        "prompt_calls",
        "a prompt that ends with a call of a tool",
        [{"prompt": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "cat"}}]}]}],
        "A row's `prompt` ends with an assistant message that calls a tool",
        "Add the tool's result",
        run=promptkd,
    ),
    _data(
        "image_part",
        "a content part that is an image",
        [{"prompt": [{**USER, "content": [{"type": "image", "image": "cat.png"}]}]}],
        "A row's `prompt` hold a content part of the type 'image'",
        "Filter such rows out",
        run=promptkd,
    ),
    _data(
        "images",
        "a column of images",
        [{"prompt": "the cat", "images": ["cat.png"]}],
        "A row's `images` column is not empty, but multimodal rows are not supported, text only",
        "Filter such rows out",
        run=promptkd,
    ),
    _data(
        "roles",
        "roles that the chat template does not allow",
        [{"messages": [USER, ANSWER]}],
        "The chat template refuses a conversation with the roles ['user', 'assistant']: Roles must alternate",
        "Change the data",
        processing_class=refusing(),
    ),
    _data(
        "tools",
        "`tools` that are a number",
        [{"messages": [USER, ANSWER], "tools": 3}],
        "A row's `tools` are 3",
        "they must be a list of JSON schemas",
    ),
    _data(
        "template_kwargs",
        "`chat_template_kwargs` that are a text",
        [{"messages": [USER, ANSWER], "chat_template_kwargs": "x"}],
        "A row's `chat_template_kwargs` are 'x'",
        "they must be a dict",
    ),
    _data(
        "no_chat_template",
        "conversations, and a tokenizer without chat template",
        chat_dataset(2),
        "the tokenizer has no chat template",
        "Use an instruction-tuned model's tokenizer",
        processing_class=without_template(),
    ),
    _data(
        "ids_empty",
        "tokenized rows with an empty prompt",
        [{"prompt_ids": [], "completion_ids": [7]}],
        "A row's prompt has no tokens",
        "Filter such rows out",
        run=promptkd,
    ),
    _data(
        "ids_negative",
        "tokenized rows with a negative id",
        [{"prompt_ids": [-1, 7]}],
        "`prompt_ids` hold the id -1",
        "Tokenize the data with",
        run=promptkd,
    ),
    _data(
        "ids_beyond",
        "tokenized rows with ids of another tokenizer",
        [{"prompt_ids": [7], "completion_ids": [999]}],
        "`completion_ids` hold the id 999, which the tokenizer does not have (its ids go up to 39)",
        "Tokenize the data with",
    ),
    _data(
        "ids_text",
        "tokenized rows with texts for ids",
        [{"prompt_ids": "the cat", "completion_ids": [7]}],
        "A row's `prompt_ids` are 'the cat'",
        "they must be a list of whole numbers",
    ),
    _data(
        "ids_int",
        "tokenized rows with one id for a list",
        [{"prompt_ids": [7], "completion_ids": 7}],
        "A row's `completion_ids` are 7",
        "they must be a list of whole numbers",
    ),
    _data(
        "ids_and_priming",
        "tokenized rows, and a priming text",
        [{"prompt_ids": [7], "completion_ids": [8]}],
        "cannot be put into a prompt that is tokenized already",
        "Add `teacher_prompt_ids`",
        priming="teacher",
    ),
    _data(
        "overlong",
        "prompts longer than `max_length`",
        [{"prompt": "the " * 50}],
        "1 of 1 prompts in `train_dataset` do not fit into `max_length=20`",
        "Set `max_length` to at least 50",
        run=promptkd,
        args={"max_length": 20},
    ),
    _data(
        "overlong_teacher",
        "a priming text that leaves no room in `teacher_max_length`",
        None,
        "rows, as the teacher sees them, in `train_dataset` do not fit",
        "Set `teacher_max_length` to at least",
        args={"teacher_max_length": 4},
        priming="teacher",
    ),
    _data(
        "streamed_for_the_teacher",
        "streamed data with `response_source='teacher'`",
        prompt_dataset(2).to_iterable_dataset(),
        "`train_dataset` is streamed",
        "Load it without streaming",
        args={"response_source": "teacher"},
    ),
    _data(
        "streamed_for_a_cache",
        "streamed data with a teacher cache",
        answered_dataset(4).to_iterable_dataset(),
        "are looked up before training",
        "Load it without streaming",
        run=from_cache,
    ),
    _data(
        "not_in_the_cache",
        "rows that are not in the teacher cache",
        answered_dataset(6),
        "2 of 6 rows in `train_dataset` are not in the teacher cache",
        "Build the cache with these rows",
        run=from_cache,
    ),
    _data(
        "priming_column",
        "a priming text with a column that is not there",
        None,
        "uses 'gold', which `train_dataset` does not have",
        "Rename or add a column",
        priming=PrimingTemplate("{{ gold }}"),
    ),
    _data(
        "priming_system",
        "`PrimingTemplate(text, 'system')` and plain texts",
        None,
        "needs conversations",
        "Use 'prefix' or 'suffix'",
        priming=PrimingTemplate("x", "system"),
    ),
    _data(
        "priming_without_user",
        "a priming text, and a conversation without user",
        [{"messages": [{"role": "system", "content": "a"}, ANSWER]}],
        "There is no user message to prime",
        "Use `placement='system'`",
        priming="teacher",
    ),
    Case(
        "cli_column",
        "`--prompt_column` that is not there",
        lambda folder: build_command(folder, "--data_files", "FOLDER/rows.json", "--prompt_column", "quest"),
        ExitCode2,
        "`prompt_column` is 'quest'",
        "the columns are ['completion', 'prompt']",
    ),
    Case(
        "attention_no_answers",
        "`trl-promptkd analyze attention` on prompts without answers",
        lambda folder: attention_command(
            folder, rows=b'{"prompt": "the cat"}\n', models=(saved_tokenizer(folder / "student"),)
        ),
        ExitCode2,
        "`--dataset` holds prompts without answers",
        "for that of prompts too pass `--queries all`",
    ),
    Case(
        "cli_analyze_answers",
        "`trl-promptkd analyze prompt --responses dataset` of rows without answers",
        lambda folder: analyze_prompt(folder, "--dataset", "FOLDER/rows.json"),
        ExitCode2,
        "`--dataset` holds prompts without answers",
        "Set `--responses student`",
    ),
    Case(
        "evaluate_columns",
        "`evaluate_model` with rows that have none of the columns it reads",
        lambda folder: evaluate_rows([{"text": "the cat"}]),
        ValueError,
        "Row 0 of `rows`: it has none of `instruction`, `question`, `prompt` and `messages`; its columns are ['text']",
        "Rename columns",
    ),
    Case(
        "eval_empty_instruction",
        "`evaluate_model` with an empty `instruction`",
        lambda folder: evaluate_rows([{"instruction": "", "output": "sat"}]),
        ValueError,
        "its `instruction` is '', which asks nothing",
        "Filter such rows out",
    ),
    Case(
        "eval_messages",
        "`evaluate_model` with `messages` that end with the user's turn, and no `references`",
        lambda folder: evaluate_rows([{"messages": [USER]}]),
        ValueError,
        "its `messages` are not a conversation that ends with an assistant message",
        "Filter such rows out",
    ),
    Case(
        "cli_eval_column",
        "`trl-promptkd eval instruct --prompt_column text` without such a column",
        lambda folder: eval_command(folder, "--dataset", "FOLDER/rows.json", "--prompt_column", "text"),
        ExitCode2,
        "`--prompt_column` is 'text'; the columns are ['instruction', 'output']",
        "Name one of them",
    ),
    Case(
        "cli_analyze_overlong",
        "`trl-promptkd analyze prompt --max_length` below all prompts",
        lambda folder: analyze_prompt(
            folder,
            *("--dataset", "FOLDER/rows.json", "--max_length", "1"),
            *("--responses", "student", "--student", "FOLDER/student"),
        ),
        ExitCode2,
        "They would be left out, so that no row remains",
        "Set `max_length` to at least",
    ),
    Case(
        "eval_no_answer",
        "`evaluate_model` with a row without a right answer",
        lambda folder: evaluate_rows([{"instruction": "the cat", "output": None}]),
        ValueError,
        "its right answer is None",
        "it must be a text or a list of texts",
    ),
    Case(
        "eval_no_number",
        "`task='gsm8k'` with a right answer without a number",
        lambda folder: evaluate_rows([{"question": "the cat", "answer": "unknown"}], task="gsm8k"),
        ValueError,
        "the right answer is 'unknown', which holds no finite number to compare with",
        "Give the right answer as a number",
    ),
    Case(
        "eval_long_prompts",
        "`max_prompt_length` below all prompts",
        lambda folder: evaluate_rows([{"prompt": "the cat sat", "completion": "on"}], max_prompt_length=2),
        ValueError,
        "all 1 prompts are longer than `max_prompt_length=2`",
        "Raise it",
    ),
    Case(
        "references_flat",
        "`instruction_scores(['the cat'], ['the cat'])`",
        lambda folder: instruction_scores(["the cat"], ["the cat"]),
        TypeError,
        "`references[0]` is 'the cat', a str; it must be a list of texts",
        "Write [text] for a single one",
    ),
    Case(
        "references_unequal",
        "other numbers of `predictions` and `references`",
        lambda folder: gsm8k_accuracy(["18"], [18, 3]),
        ValueError,
        "There are 1 `predictions` and 2 `references`",
        "Give one of each per row",
    ),
]
FILES = [
    Case(
        "priming_missing",
        "`PrimingTemplate.from_file` of a file that is not there",
        lambda folder: PrimingTemplate.from_file(folder / "priming.txt"),
        FileNotFoundError,
        "priming.txt, the file with the priming text, does not exist",
        "Check the path",
    ),
    Case(
        "priming_latin1",
        "`PrimingTemplate.from_file` of a file in another encoding",
        lambda folder: PrimingTemplate.from_file(written(folder / "priming.txt", "é".encode("latin1"))),
        ValueError,
        "is not UTF-8",
        "Save it as UTF-8",
    ),
    Case(
        "priming_blank",
        "`PrimingTemplate.from_file` of an empty file",
        lambda folder: PrimingTemplate.from_file(written(folder / "priming.txt", b"\n")),
        ValueError,
        "which says nothing",
        "set `priming=None`",
    ),
    Case(
        "priming_invalid",
        "`PrimingTemplate.from_file` of a file with an unknown filter",
        lambda folder: PrimingTemplate.from_file(written(folder / "priming.txt", b"{{ a | shout }}")),
        ValueError,
        "No filter named 'shout'",
        "(line 1). Text that contains",
    ),
    Case(
        "collator_text",
        "`data_collator='x'`",
        partial(promptkd, data_collator="x"),
        TypeError,
        "`data_collator` is a str",
        "it must be callable with a list of rows",
    ),
    Case(
        "callbacks_text",
        "`callbacks=['x']`",
        partial(promptkd, callbacks=["x"]),
        TypeError,
        "`callbacks` holds a str",
        "it must hold `transformers.TrainerCallback`s only",
    ),
    Case(
        "template_missing",
        "a `chat_template_path` that is not there",
        partial(primed, args={"chat_template_path": "none.jinja"}),
        FileNotFoundError,
        "none.jinja, the file with the chat template (`chat_template_path`), does not exist",
        "Check the path",
    ),
    Case(
        "template_of_a_model",
        "a model's name as `chat_template_path`",
        partial(primed, args={"chat_template_path": "org/model"}),
        ValueError,
        "`chat_template_path` is 'org/model'",
        "only a .jinja or .j2 file is supported",
    ),
    Case(
        "template_empty",
        "an empty `chat_template_path`",
        lambda folder: promptkd(folder, args={"chat_template_path": written(folder / "chat.jinja", b"")}),
        ValueError,
        "chat.jinja, the file of `chat_template_path`, is empty",
        "Write a template to it",
    ),
    Case(
        "template_invalid",
        "a `chat_template_path` that is no Jinja",
        lambda folder: promptkd(
            folder, chat_dataset(2), args={"chat_template_path": written(folder / "chat.jinja", b"{{ messages")}
        ),
        ValueError,
        "The chat template is not valid Jinja",
        "Correct the file of `chat_template_path`",
    ),
    Case(
        "model_folder",
        "a student's folder that is not there",
        partial(primed, model="./none"),
        FileNotFoundError,
        "`model` is './none', and there is no such folder",
        "Check the path",
    ),
    Case(
        "teacher_folder",
        "a teacher's folder that is not there",
        partial(promptkd, teacher="./none"),
        FileNotFoundError,
        "`teacher_model` is './none', and there is no such folder",
        "Check the path",
    ),
    Case(
        "prompt_missing",
        "resuming from a checkpoint without a soft prompt",
        lambda folder: soft_prompt().load_parameters(str(folder)),
        FileNotFoundError,
        "prompt_encoder.safetensors is missing",
        "Resume from another checkpoint",
        needs_weights=True,
    ),
    Case(
        "prompt_shape",
        "resuming with another `num_virtual_tokens`",
        prompt_of_another_shape,
        ValueError,
        "holds another soft prompt than this run's",
        "Resume with the `PromptEncoderConfig` the run was started with",
        needs_weights=True,
    ),
    Case(
        "prompt_truncated",
        "resuming from a checkpoint that was cut off",
        truncated_prompt,
        ValueError,
        "prompt_encoder.safetensors cannot be read as safetensors",
        "Resume from another checkpoint",
        needs_weights=True,
    ),
    Case(
        "prompt_state",
        "resuming from a checkpoint with a file missing",
        resumed_without_prompt,
        ValueError,
        "is not a whole checkpoint: prompt_training_state.safetensors is missing",
        "Resume from an older one, or set `resume_from_checkpoint=True`",
        needs_weights=True,
    ),
    Case(
        "resume_weights_alone",
        "resuming from a checkpoint that was saved with `save_only_model=True`",
        resumed_from_weights_alone,
        ValueError,
        "was saved with `save_only_model=True`, which leaves out the optimizer",
        "Set `save_only_model=False`",
        needs_weights=True,
    ),
    Case(
        "cache_nowhere",
        "a `teacher_cache` that is neither a folder nor on the Hub",
        lambda folder: primed(folder, teacher=None, teacher_cache="no/such-cache"),
        FileNotFoundError,
        "'no/such-cache' is neither a folder nor a data set on the Hub",
        "build a cache with `build_teacher_cache`",
    ),
    Case(
        "cache_number",
        "a `teacher_cache` that is a number",
        lambda folder: primed(folder, teacher=None, teacher_cache=3),
        TypeError,
        "`teacher_cache` is a int",
        "it must be a folder, the id of a data set on the Hub, or a `TeacherCache`",
    ),
    Case(
        "cache_none",
        "a `teacher_cache` folder without a cache",
        lambda folder: primed(folder, teacher=None, teacher_cache=str(folder)),
        FileNotFoundError,
        "has no manifest.json: it is no teacher cache",
        "Build one with",
    ),
    Case(
        "cache_unfinished",
        "a cache whose build was killed",
        lambda folder: opened(folder, forget_shards),
        ValueError,
        "is not finished",
        "Build it again with the same arguments",
    ),
    Case(
        "cache_damaged",
        "a cache with a damaged shard",
        lambda folder: opened(folder, lambda path: cut_short(the_shard(path))),
        ValueError,
        "is damaged: its SHA-256 is not the manifest's",
        "Delete it and build the cache again",
    ),
    Case(
        "cache_shard_missing",
        "a cache with a missing shard",
        lambda folder: opened(folder, lambda path: the_shard(path).unlink()),
        FileNotFoundError,
        "is missing",
        "Build the cache again",
    ),
    Case(
        "cache_manifest",
        "a cache with a damaged manifest",
        lambda folder: opened(folder, lambda path: written(path / "manifest.json", b"no JSON")),
        ValueError,
        "manifest.json is not JSON",
        "The cache is damaged; build it again",
    ),
    Case(
        "cache_tokenizer",
        "a cache of another tokenizer",
        partial(from_cache, processing_class=tiny_tokenizer(["imagine", "a"])),
        ValueError,
        "made with another number of tokens: 40 there, 8 here",
        "Use the one it was made with",
    ),
    Case(
        "cache_priming",
        "a cache of another priming text",
        partial(from_cache, priming=None),
        ValueError,
        "made with another priming",
        "Use the one it was made with",
    ),
    Case(
        "cache_temperature",
        "a `kd_temperature` that the cache does not serve",
        partial(from_cache, args={"kd_temperature": 2.0}),
        ValueError,
        "`kd_temperature` is 2.0",
        "Set `kd_temperature=1.0`",
    ),
    Case(
        "cache_answers",
        "`response_source='teacher'`, and a cache of the data's answers",
        partial(from_cache, args={"response_source": "teacher"}),
        ValueError,
        "are the data's",
        "Set `response_source='dataset'`",
    ),
    Case(
        "cache_of_other_settings",
        "building a cache into the folder of another one",
        lambda folder: cache(folder, preset=str(cache(folder) and "tiny")),
        ValueError,
        "`preset` is 'standard' there and 'tiny' here",
        "Choose another `output_dir`",
    ),
    Case(
        "cli_info",
        "`trl-promptkd cache info` of a folder without a cache",
        lambda folder: command(folder, "cache", "info", "FOLDER"),
        ExitCode2,
        "it is no teacher cache",
        "Build one with",
    ),
    Case(
        "cli_analyze_no_prompt",
        "`trl-promptkd analyze exposure --prompt` of a folder without a soft prompt",
        lambda folder: analyze(
            folder,
            "exposure",
            *("--student", "no/such-student", "--dataset", "FOLDER/rows.json", "--prompt", "FOLDER"),
        ),
        ExitCode2,
        "holds no soft prompt",
        "Pass the folder",
    ),
    Case(
        "cli_analyze_lora",
        "`trl-promptkd analyze prompt --prompt` of a LoRA adapter",
        prompt_of_another_kind,
        ExitCode2,
        "run holds a LORA adapter, which is no soft prompt",
        "Pass the folder of a soft prompt",
    ),
    Case(
        "cli_analyze_two_runs",
        "`trl-promptkd analyze prompt --prompt` of a folder with the checkpoints of two runs",
        prompts_of_two_runs,
        ExitCode2,
        "they are not of one run",
        "Pass the folder of one run",
    ),
    Case(
        "eval_answers",
        "answers of an evaluation, in `output_dir`, that are damaged",
        damaged_answers,
        ValueError,
        "line 1, is no answer of this evaluation",
        "Delete the file",
    ),
    Case(
        "cli_eval_file",
        "`trl-promptkd eval instruct --dataset` with a file that is not there",
        lambda folder: eval_command(folder, "--dataset", "FOLDER/none.jsonl"),
        ExitCode2,
        "none.jsonl', and there is no such file",
        "Check the path",
    ),
]
MODELS = [
    Case(
        "model_none",
        "no `model`",
        partial(promptkd, model=None),
        ValueError,
        "`model`, the student, is required",
        "a name, a model or a PEFT model",
    ),
    Case(
        "model_path",
        "a `pathlib.Path` as `model`",
        partial(promptkd, model=Path("student")),
        TypeError,
        "`model` is a P",
        "it must be a name, a folder (as a `str`)",
    ),
    Case(
        "model_empty",
        "`teacher_model=''`",
        partial(primed, teacher=""),
        ValueError,
        "`teacher_model` is an empty text",
        "it must be a name",
    ),
    Case(
        "model_module",
        "any torch module as `teacher_model`",
        partial(primed, teacher=torch.nn.Linear(2, 2)),
        TypeError,
        "`teacher_model` is a Linear",
        "it must be a name",
    ),
    Case(
        "one_object",
        "one object as `model` and `teacher_model`",
        same_object,
        ValueError,
        "is the very object that is trained",
        "For self-distillation leave `teacher_model=None`",
    ),
    Case(
        "encoder_decoder",
        "an encoder-decoder model as `model`",
        lambda folder: primed(folder, model=t5()),
        ValueError,
        "`model` is an encoder-decoder model (T5Config)",
        "only decoder-only language models are supported",
    ),
    Case(
        "encoder_decoder_by_name",
        "the folder of an encoder-decoder model as `teacher_model`",
        lambda folder: promptkd(folder, teacher=saved(folder, t5())),
        ValueError,
        "`teacher_model` is an encoder-decoder model",
        "only decoder-only language models are supported",
    ),
    Case(
        "classifier",
        "a classifier's checkpoint as `teacher_model`",
        lambda folder: primed(folder, teacher=saved(folder, classifier())),
        ValueError,
        "is a LlamaForSequenceClassification, which does not predict next tokens",
        "Choose a model with a language model's head",
    ),
    Case(
        "masked_language_model",
        "BERT as `model`",
        lambda folder: primed(folder, model=bert()),
        ValueError,
        "is a BertForMaskedLM, which does not predict next tokens",
        "Choose a model with a language model's head",
    ),
    Case(
        "without_head",
        "a model without its output head (`AutoModel`) as `teacher_model`",
        lambda folder: promptkd(folder, teacher=LlamaModel(tiny_model().config)),
        ValueError,
        "is a LlamaModel, which does not predict next tokens",
        "Choose a model with a language model's head",
    ),
    Case(
        "teacher_with_a_prompt",
        "a teacher that carries a PEFT soft prompt",
        lambda folder: promptkd(
            folder,
            teacher=get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        ),
        ValueError,
        "already carries a soft prompt",
        "Pass the model below it",
    ),
    Case(
        "other_tokenizer",
        "a teacher with another tokenizer",
        lambda folder: promptkd(folder, teacher=saved(folder, tokenizer=tiny_tokenizer(["imagine", *WORDS[1:]]))),
        ValueError,
        "the first token that differs has id 6, which is 'suppose' for the student",
        "Choose two models of one family",
    ),
    Case(
        "loaded_teacher_without_name",
        "loaded models without a name, and no `processing_class`",
        lambda folder: promptkd(folder, model=tiny_model(), processing_class=None),
        ValueError,
        "`processing_class` is missing, and `model` has no name",
        "Pass it",
    ),
    Case(
        "frozen_student",
        "a student whose weights all have `requires_grad=False`",
        lambda folder: promptkd(folder, model=tiny_model().requires_grad_(False)),
        ValueError,
        "is a LlamaForCausalLM without trainable weights",
        "Call `model.requires_grad_(True)`",
    ),
    Case(
        "frozen_adapter",
        "a student by `PeftModel.from_pretrained` without `is_trainable=True`",
        lambda folder: primed(folder, model=frozen_adapter()),
        ValueError,
        "has no trainable weights: its active adapter 'default' is frozen",
        "Load it with `PeftModel.from_pretrained(model, folder, is_trainable=True)`",
    ),
    Case(
        "adapter_and_peft_config",
        "an adapter's folder as `model`, and a `peft_config`",
        lambda folder: promptkd(
            folder, model=saved_adapter(folder), peft_config=LoraConfig(task_type="CAUSAL_LM", r=2)
        ),
        ValueError,
        "an adapter, and `peft_config` is set too",
        "Leave `peft_config` out",
    ),
    Case(
        "pad_token_without_resizing",
        "a pad token that was added to the tokenizer, but not to the models",
        lambda folder: promptkd(
            folder,
            model=tiny_model(vocab_size=30),
            teacher=tiny_model(vocab_size=30, seed=1),
            processing_class=with_token(pad_token="[PAD]"),
        ),
        ValueError,
        "pad token is '[PAD]' with id 30, but the student has embeddings for the ids below 30 only",
        "call `model.resize_token_embeddings(len(tokenizer))`",
        needs_weights=True,
    ),
    Case(
        "chat_token_without_resizing",
        "rows with such a token",
        lambda folder: primed(
            folder,
            [{"prompt": "the <chat>", "completion": "cat"}],
            model=tiny_model(vocab_size=30),
            teacher=tiny_model(vocab_size=30, seed=1),
            processing_class=with_token(additional_special_tokens=["<chat>"]),
        ),
        ValueError,
        "holds the token '<chat>' with id 30, but the student has embeddings for the ids below 30 only",
        "call `model.resize_token_embeddings(len(tokenizer))`",
        needs_weights=True,
    ),
    Case(
        "small_vocabulary",
        "a teacher with fewer entries than the tokenizer has tokens",
        lambda folder: promptkd(folder, model=tiny_model(), teacher=tiny_model(vocab_size=20)),
        ValueError,
        "The teacher's vocabulary has 20 entries, but the tokenizer has 40 tokens",
        "Student, teacher and `processing_class` must share one tokenizer",
        needs_weights=True,
    ),
    Case(
        "few_positions",
        "rows that need more positions than GPT-2 has",
        lambda folder: primed(
            folder, [{"prompt": "the " * 200, "completion": "cat"}], model=tiny_model("gpt2"), teacher=tiny_model()
        ),
        ValueError,
        "The student has 128 positions, but the longest row needs 202",
        "Lower `max_length`",
        needs_weights=True,
    ),
    Case(
        "bias_without_teacher",
        "`LoraConfig(bias='all')`, and no teacher",
        lambda folder: primed(
            folder,
            model=tiny_model(),
            teacher=None,
            peft_config=LoraConfig(task_type="CAUSAL_LM", bias="all"),
            priming="teacher",
        ),
        ValueError,
        "trains weights of the model below it, which is to be the teacher",
        "Set `bias='none'`",
        needs_weights=True,
    ),
    Case(
        "attention_tokenizers",
        "`trl-promptkd analyze attention` on models of different tokenizers",
        lambda folder: attention_command(
            folder, models=(saved_tokenizer(folder / "one"), saved_tokenizer(folder / "two", words=WORDS[::-1]))
        ),
        ExitCode2,
        "the first token that differs has id 6, which is 'suppose'",
        "Choose two models of one family",
    ),
    Case(
        "attention_positions",
        "... on rows that need more positions than GPT-2 has",
        lambda folder: attention_command(
            folder,
            rows=b'{"prompt": "the cat", "completion": "' + b"sat " * 200 + b'"}\n',
            models=(saved_model(folder / "student", family="gpt2"),),
        ),
        ExitCode2,
        "has 128 positions, but the longest row needs 203",
        "Lower `--max_length`.",
        needs_weights=True,
    ),
    Case(
        "teacher_name",
        "a teacher's name that is wrong",
        lambda folder: promptkd(folder, model=tiny_model()),
        OSError,
        "`teacher_model` is 'no/such-teacher', which cannot be loaded",
        "Check the name, and that the Hub can be reached",
    ),
    Case(
        "teacher_truncated",
        "a teacher whose file was cut off",
        truncated_teacher,
        OSError,
        "could not be loaded",
        "Check the name (a Hub id or a folder), that you have access to it, and that its files are whole",
        needs_weights=True,
    ),
    Case(
        "cache_of_a_small_teacher",
        "a cache of a teacher with fewer entries than the tokenizer has tokens",
        lambda folder: build_teacher_cache(
            tiny_model(vocab_size=10), answered_dataset(4), str(folder / "cache"), tiny_tokenizer()
        ),
        ValueError,
        "vocabulary has 10 entries, but the tokenizer has 40 tokens",
        "must share one tokenizer",
    ),
    Case(
        "nan_teacher",
        "a teacher with NaN among its weights",
        lambda folder: promptkd(folder, model=tiny_model(seed=1), teacher=spoiled(tiny_model())).train(),
        FloatingPointError,
        "The loss is nan at step 1",
        "Check the weights for NaN",
        needs_weights=True,
    ),
    Case(
        "nan_teacher_primed",
        "the same in `PrimedDistillTrainer`",
        lambda folder: primed(folder, model=tiny_model(seed=1), teacher=spoiled(tiny_model())).train(),
        FloatingPointError,
        "The loss is nan at step 1",
        "Check the weights for NaN",
        needs_weights=True,
    ),
    Case(
        "cli_analyze_tokenizer",
        "`trl-promptkd analyze` with a teacher beside which there is no tokenizer",
        lambda folder: analyze(folder, "exposure", "--student", "no/such-student", "--dataset", "FOLDER/rows.json"),
        ExitCode2,
        "`--teacher` is 'no/such-teacher', beside which there is no tokenizer",
        "Save one there",
    ),
    Case(
        "cli_analyze_another_teacher",
        "`trl-promptkd analyze prompt` of a prompt for another teacher",
        lambda folder: analyze_prompt(folder, teacher=tiny_model(hidden_size=64)),
        ExitCode2,
        "has 32 numbers a token, but the teacher's embeddings have 64",
        "Pass the teacher that it was trained with",
        needs_weights=True,
    ),
    Case(
        "cli_analyze_nan",
        "`trl-promptkd analyze prompt` with a teacher with NaN among its weights",
        lambda folder: analyze_prompt(
            folder,
            *("--dataset", "FOLDER/rows.json", "--responses", "student", "--student", "FOLDER/teacher"),
            teacher=spoiled(tiny_model()),
        ),
        ExitCode2,
        "hold NaN or infinities",
        "Check its weights",
        needs_weights=True,
    ),
]
GROUPS = {"Arguments": ARGUMENTS, "Data": DATA, "Files": FILES, "Models": MODELS}
CASES = [case for cases in GROUPS.values() for case in cases]

HEAD = """# Errors

What goes wrong most easily, what you then read, and what to do: {number} inputs, each of them a case of
`tests/refusals/test_bad_inputs.py`, which also keeps this page true. It is written by `make errors`.

All but {late} of them come before weights are loaded, which those need to be seen.
"""


def page(rows: dict[str, str]) -> str:
    """docs/errors.md, of each case's row."""
    late = sum(case.needs_weights for case in CASES)
    parts = [HEAD.format(number=len(CASES), late=late)]
    for title, cases in GROUPS.items():
        table = [rows[f"{title}-{case.name}"] for case in cases]
        parts.append(
            "\n".join([f"## {title}\n", "| what you do | the error | what to do |", "| --- | --- | --- |", *table, ""])
        )
    return "\n".join(parts)


def write_page() -> None:
    rows = {}
    for title, cases in GROUPS.items():
        for case in cases:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                rows[f"{title}-{case.name}"] = case.row(case.message(Path(folder)))
    (ROOT / "docs" / "errors.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    write_page()
