"""Tiny models and a tiny tokenizer, built in-process: no test needs a network."""

import copy

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)


WORDS = [
    "suppose",
    "you",
    "are",
    "a",
    "student",
    ".",
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "who",
    "is",
    "what",
    "where",
    "when",
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
    "four",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
VOCAB_SIZE = 40


def tiny_tokenizer(words=WORDS, pad_is_eos=True) -> PreTrainedTokenizerFast:
    special = ["<eos>", "<unk>", "<user>", "<assistant>", "<system>", "<pad>"]
    vocab = {token: index for index, token in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>" if pad_is_eos else "<pad>",
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GLU = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
_GEMMA = {**_GLU, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama": (LlamaConfig, _GLU),
    "mistral": (MistralConfig, {**_GLU, "sliding_window": 6}),
    "qwen2": (Qwen2Config, _GLU),
    "gemma2": (Gemma2Config, _GEMMA),
    "gemma3": (Gemma3TextConfig, _GEMMA),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": (OPTConfig, {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}),
    "gpt_neox": (GPTNeoXConfig, {**_SMALL, "intermediate_size": 48}),
    "phi": (PhiConfig, {**_SMALL, "intermediate_size": 48}),
}


def tiny_model(family="llama", seed=0, vocab_size=VOCAB_SIZE, dtype=torch.float32, **overrides):
    """A random model whose logits are far from uniform, so that divergences are not all nearly zero."""
    config_class, settings = CONFIGS[family]
    config = config_class(
        vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=0, **{**settings, **overrides}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    return model.eval()


def dequantized(model):
    """A copy of a 4-bit model whose layers hold the same weights in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear4bit):
                weight = dequantize_4bit(child.weight.data, child.weight.quant_state).float()
                linear = torch.nn.Linear(weight.size(1), weight.size(0), bias=False)
                linear.weight.data = weight
                setattr(module, name, linear)
    return model


def weights(model):
    """A copy of all tensors."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def difference(a, b):
    """The largest difference between two copies of [`weights`]."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


def prompt_dataset(size=8) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_list([{"prompt": " ".join(WORDS[i : i + 2 + i % 4])} for i in range(size)])


def answered_dataset(size=8) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": " ".join(WORDS[i : i + 2 + i % 4]), "completion": " " + " ".join(WORDS[i + 3 : i + 5 + i % 3])}
            for i in range(size)
        ]
    )


def chat_dataset(size=8) -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": " ".join(WORDS[i : i + 2 + i % 3])},
                    {"role": "assistant", "content": " ".join(WORDS[i + 3 : i + 5])},
                ]
            }
            for i in range(size)
        ]
    )
