"""Students and teachers: what they are, and what they hold."""

import json
from functools import partial
from pathlib import Path

import torch
from case import NAN, Case, call, cut_short, primed, promptkd, saved
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import WORDS, answered_dataset, tiny_model, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_promptkd import PrimedDistillTrainer, PromptKDTrainer, build_teacher_cache


LORA = LoraConfig(task_type="CAUSAL_LM")
NO_HEAD = "does not predict next tokens | Choose a model with a language model's head"
DECODERS_ONLY = "encoder-decoder model (T5Config) | decoder-only"


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def bert():
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    return BertForMaskedLM(config)


def spoiled(model):
    model.get_output_embeddings().weight.data.fill_(NAN)
    return model


def frozen_adapter():
    return get_peft_model(tiny_model(), LORA).requires_grad_(False)


def saved_adapter() -> str:
    frozen_adapter().save_pretrained("adapter")
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "no/such"}))
    return "adapter"


def one_object():
    student = tiny_model()
    promptkd(model=student, teacher_model=student)


def soft_prompted_teacher():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    promptkd(teacher_model=get_peft_model(tiny_model(), config))


def other_tokenizer():
    tiny_tokenizer(["imagine", *WORDS[1:]]).save_pretrained("teacher")
    promptkd(teacher_model="teacher")


def added_token(trainer, rows=None, **special):
    """A token is added to the tokenizer, but not to the models."""
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.add_special_tokens(special)
    models = {"model": tiny_model(vocab_size=30), "teacher_model": tiny_model(vocab_size=30, seed=1)}
    trainer(**models, rows=rows, processing_class=tokenizer)


def truncated_teacher():
    saved(tiny_model())
    cut_short(Path("teacher/model.safetensors"))
    primed(model=tiny_model(), teacher_model="teacher")


KINDS = [
    call(PromptKDTrainer, "`model`, the student, is required | a name, a model or a PEFT model", model=None),
    Case(
        "a `pathlib.Path` as `model`",
        lambda: promptkd(model=Path("student")),
        "`model` is a P | a name, a folder (as a `str`)",
        TypeError,
    ),
    call(PrimedDistillTrainer, "`teacher_model` is an empty text | a name", teacher_model=""),
    Case(
        "any torch module as `teacher_model`",
        lambda: primed(teacher_model=torch.nn.Linear(2, 2)),
        "`teacher_model` is a Linear | a name",
        TypeError,
    ),
    Case("one object as `model` and `teacher_model`", one_object, "`teacher_model` | set `teacher_model=None`"),
    Case("an encoder-decoder model as `model`", lambda: primed(model=t5()), f"`model` is an {DECODERS_ONLY}"),
    Case(
        "the folder of an encoder-decoder model as `teacher_model`",
        lambda: promptkd(teacher_model=saved(t5())),
        f"`teacher_model` is an {DECODERS_ONLY}",
    ),
    Case(
        "a classifier's checkpoint as `teacher_model`",
        lambda: primed(teacher_model=saved(LlamaForSequenceClassification(tiny_model().config))),
        f"LlamaForSequenceClassification, which {NO_HEAD}",
    ),
    Case("BERT as `model`", lambda: primed(model=bert()), f"BertForMaskedLM, which {NO_HEAD}"),
    Case(
        "a model without its output head (`AutoModel`) as `teacher_model`",
        lambda: promptkd(teacher_model=LlamaModel(tiny_model().config)),
        f"LlamaModel, which {NO_HEAD}",
    ),
    Case(
        "a teacher that carries a PEFT soft prompt",
        soft_prompted_teacher,
        "`teacher_model` already carries a soft prompt | `teacher_model.get_base_model()`",
    ),
    Case(
        "a student whose weights all have `requires_grad=False`",
        lambda: promptkd(model=tiny_model().requires_grad_(False)),
        "LlamaForCausalLM without trainable weights | Call `model.requires_grad_(True)`",
    ),
    Case(
        "a Mamba student, and `padding_free=True`",
        lambda: primed(model=tiny_model("mamba"), teacher_model=tiny_model(), args={"padding_free": True}),
        "student (MambaForCausalLM) gives rows that stand end to end | Set `padding_free=False`",
    ),
    Case(
        "a student by `PeftModel.from_pretrained` without `is_trainable=True`",
        lambda: primed(model=frozen_adapter()),
        "adapter 'default' is frozen | `PeftModel.from_pretrained(model, folder, is_trainable=True)`",
    ),
    Case(
        "an adapter's folder as `model`, and a `peft_config`",
        lambda: promptkd(model=saved_adapter(), peft_config=LORA),
        "`model` is 'adapter', an adapter | Leave `peft_config` out",
    ),
    Case(
        "`LoraConfig(bias='all')`, and no teacher",
        lambda: primed(
            model=tiny_model(), teacher_model=None, peft_config=LoraConfig(task_type="CAUSAL_LM", bias="all")
        ),
        "`bias='all'` | Set `bias='none'`",
        needs_weights=True,
    ),
]
VOCABULARIES = [
    Case(
        "a teacher with another tokenizer",
        other_tokenizer,
        "id 6, which is 'suppose' for the student | 'imagine' | Choose two models of one family",
    ),
    Case(
        "loaded models without a name, and no `processing_class`",
        lambda: promptkd(model=tiny_model(), processing_class=None),
        "`processing_class` is missing | Pass it",
    ),
    Case(
        "a pad token that was added to the tokenizer, but not to the models",
        partial(added_token, promptkd, pad_token="[PAD]"),
        "'[PAD]' with id 30 | below 30 only | call `model.resize_token_embeddings(len(tokenizer))`",
        needs_weights=True,
    ),
    Case(
        "rows with a token that was added to the tokenizer, but not to the models",
        partial(
            added_token,
            primed,
            [{"prompt": "the <chat>", "completion": "cat"}],
            additional_special_tokens=["<chat>"],
        ),
        "'<chat>' with id 30 | below 30 only | call `model.resize_token_embeddings(len(tokenizer))`",
        needs_weights=True,
    ),
    Case(
        "a teacher with fewer entries than the tokenizer has tokens",
        lambda: promptkd(model=tiny_model(), teacher_model=tiny_model(vocab_size=20)),
        "20 entries, but the tokenizer has 40 tokens | must share one tokenizer",
        needs_weights=True,
    ),
    Case(
        "a cache of a teacher with fewer entries than the tokenizer has tokens",
        lambda: build_teacher_cache(tiny_model(vocab_size=10), answered_dataset(4), "cache", tiny_tokenizer()),
        "10 entries, but the tokenizer has 40 tokens | must share one tokenizer",
    ),
]
WEIGHTS = [
    Case(
        "rows that need more positions than GPT-2 has",
        lambda: primed(
            rows=[{"prompt": "the " * 200, "completion": "cat"}], model=tiny_model("gpt2"), teacher_model=tiny_model()
        ),
        "128 positions | 202 | Lower `max_length`",
        needs_weights=True,
    ),
    Case(
        "a teacher's name that is wrong",
        lambda: promptkd(model=tiny_model()),
        "`teacher_model` is 'no/such-teacher' | Check the name, and that the Hub can be reached",
        OSError,
    ),
    Case(
        "a teacher whose file was cut off",
        truncated_teacher,
        "teacher 'teacher' could not be loaded | Check the name | that its files are whole",
        OSError,
        needs_weights=True,
    ),
    *(
        Case(
            f"a teacher with NaN among its weights, {method}",
            lambda train=train: train(model=tiny_model(seed=1), teacher_model=spoiled(tiny_model())).train(),
            "loss is nan at step 1 | Check the weights for NaN",
            FloatingPointError,
            needs_weights=True,
        )
        for method, train in (("PromptKD", promptkd), ("response priming", primed))
    ),
]
CASES = KINDS + VOCABULARIES + WEIGHTS
