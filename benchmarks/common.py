"""Models and prompts of the benchmarks."""

import copy
from dataclasses import dataclass

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trl_promptkd.cli.smollm2 import PROMPTS, cut_layers, load_smollm2


@dataclass
class Models:
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def new_student(self) -> PreTrainedModel:
        return copy.deepcopy(self.student)


def load_models(teacher: str | None, student: str | None, layers: int = 11) -> Models:
    """The models by name or folder; without names, SmolLM2-135M-Instruct and `layers` of its 30 layers."""
    if (teacher is None) != (student is None):
        raise SystemExit("Pass both `--teacher` and `--student`, or neither.")
    if teacher is not None:
        models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (teacher, student)]
        return _never_ending(Models(*models, AutoTokenizer.from_pretrained(student)))
    smollm2, tokenizer = load_smollm2()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:16]
    cut = cut_layers(smollm2, layers, tokenizer(lines, return_tensors="pt", padding=True))
    return _never_ending(Models(smollm2, cut, tokenizer))


@torch.no_grad()
def _never_ending(models: Models) -> Models:
    """Makes the token that the student is least likely to sample the end of text, so that all samples have the same
    length."""
    tokenizer, student = models.tokenizer, models.student
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    logits = student(torch.tensor([tokenizer.encode("Once upon a time there was a student and a teacher.")])).logits[0]
    rarest = int(logits.log_softmax(dim=-1).amax(dim=0)[: len(tokenizer)].argmin())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(rarest)
    for model in (models.teacher, student):
        model.generation_config.eos_token_id = rarest
        model.config.eos_token_id = rarest
    return models


def random_models(vocab_size: int, hidden_size: int = 256, teacher_layers: int = 8, student_layers: int = 4) -> Models:
    """Models with random weights, and a tokenizer whose tokens are `t0`, `t1`, ..."""
    vocabulary = {f"t{index}": index for index in range(vocab_size)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t0", pad_token="t1", padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}t2 {{ m['content'] }} t3 {% endfor %}"
    models = [
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=3 * hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=hidden_size // 64,
                tie_word_embeddings=True,
                eos_token_id=0,
            )
        )
        for layers in (teacher_layers, student_layers)
    ]
    return _never_ending(Models(models[0].eval(), models[1], tokenizer))


def prompt_rows(
    data_files: str | None, tokenizer: PreTrainedTokenizerBase, longest: int = 192, rows: int = 256
) -> Dataset:
    """Conversations of one user turn, none longer than `longest` tokens with the template."""
    dataset = load_dataset("json", data_files=data_files or str(PROMPTS), split="train")
    if data_files is not None:
        dataset = dataset.map(
            lambda row: {
                "prompt": [
                    {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row.get("input"))))}
                ]
            }
        )
    dataset = dataset.select_columns("prompt")
    dataset = dataset.filter(
        lambda row: len(tokenizer.apply_chat_template(row["prompt"], return_dict=False)) <= longest
    )
    return dataset.select(range(min(rows, len(dataset))))
