"""Tiny models and a tiny tokenizer, built in-process: no test needs a network."""

import copy
import json

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeSharedConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    OlmoeConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RwkvConfig,
)


TEXT = "suppose you are a student . the cat dog sat on mat who is what where when red blue green one two three four"
WORDS = TEXT.split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
VOCAB_SIZE = 40


def tiny_tokenizer(words=None, pad_is_eos=True) -> PreTrainedTokenizerFast:
    """By default with as many tokens as the models have entries, some of which no text holds."""
    special = ["<eos>", "<unk>", "<user>", "<assistant>", "<system>", "<pad>"]
    unused = [f"unused{index}" for index in range(len(special) + len(WORDS), VOCAB_SIZE)] if words is None else []
    words = WORDS if words is None else words
    vocab = {token: index for index, token in enumerate([*special, *words, *unused])}
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
_EXPERTS = {**_GLU, "num_experts_per_tok": 2}
# Mixtures of experts; those of Qwen2-MoE and Granite share some among all tokens
EXPERTS = {
    "mixtral": (MixtralConfig, {**_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeConfig, {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "granite_shared": (GraniteMoeSharedConfig, {**_EXPERTS, "num_local_experts": 4, "shared_intermediate_size": 24}),
    "olmoe": (OlmoeConfig, {**_EXPERTS, "num_experts": 4}),
}
# Models whose logits are more than a matrix times the states
HEADS = {
    "scaled (Cohere)": (CohereConfig, {**_GLU, "logit_scale": 0.5}),
    "scaled (Cohere 2)": (Cohere2Config, {**_GLU, "logit_scale": 3.0, "sliding_window": 6}),
    "divided (Granite)": (GraniteConfig, {**_GLU, "logits_scaling": 4.0}),
    "multiplied (HyperCLOVA X)": (HyperCLOVAXConfig, {**_GLU, "logits_scaling": 4.0}),
    "capped (Gemma 2)": (Gemma2Config, {**_GLU, "final_logit_softcapping": 0.5, "head_dim": 8}),
}
# Of other kinds: a state instead of attention (RWKV's ignores the attention mask), dropout that is read from the
# configuration (Falcon), embeddings for each layer beside the input's (Gemma 4), itself as its decoder (Llama 4), its
# head as its decoder (ModernBERT), distances instead of positions (BLOOM), norms of queries and keys (Qwen 3)
OTHERS = {
    "mamba": (MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "rwkv": (RwkvConfig, {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    "falcon": (FalconConfig, {**_SMALL, "multi_query": True, "new_decoder_architecture": False}),
    "gemma4": (Gemma4TextConfig, {**_GEMMA, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40}),
    "llama4": (
        Llama4TextConfig,
        {**_GLU, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    ),
    "modernbert": (ModernBertDecoderConfig, {**_SMALL, "intermediate_size": 48}),
    "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "qwen3": (Qwen3Config, {**_GLU, "head_dim": 8}),
}


def tiny_model(family="llama", seed=0, vocab_size=VOCAB_SIZE, dtype=torch.float32, **overrides):
    """A random model whose logits are far from uniform, so that divergences are not all nearly zero."""
    config_class, settings = (CONFIGS | EXPERTS | HEADS | OTHERS)[family]
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = config_class(vocab_size=vocab_size, **{**special, **settings, **overrides})
    return _random_model(AutoModelForCausalLM, config, seed, dtype)


def tiny_multimodal_model(family="gemma3", seed=0):
    """A model of images and texts, whose text model is that of [`tiny_model`]."""
    text = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    vision = {**_SMALL, "num_hidden_layers": 1, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
    if family == "gemma3":
        config = Gemma3Config(text_config={**_GEMMA, **text}, vision_config=vision, image_token_id=39)
    elif family == "llava":
        config = LlavaConfig(
            text_config={"model_type": "qwen2", **_GLU, **text},
            vision_config={"model_type": "siglip_vision_model", **vision},
            image_token_index=39,
        )
    return _random_model(AutoModelForImageTextToText, config, seed)


def _random_model(auto_class, config, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    model = auto_class.from_config(config, dtype=dtype)
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


def words(start, count):
    return " ".join(WORDS[start : start + count])


def prompt_dataset(size=8) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_list([{"prompt": words(i, 2 + i % 4)} for i in range(size)])


def answered_dataset(size=8) -> Dataset:
    rows = [{"prompt": words(i, 2 + i % 4), "completion": f" {words(i + 3, 2 + i % 3)}"} for i in range(size)]
    return Dataset.from_list(rows)


def chat_dataset(size=8) -> Dataset:
    turns = [(words(i, 2 + i % 3), words(i + 3, 2)) for i in range(size)]
    roles = ("user", "assistant")
    messages = [[{"role": r, "content": t} for r, t in zip(roles, turn, strict=True)] for turn in turns]
    return Dataset.from_dict({"messages": messages})


def save_models(folder, **models):
    """Each model below `folder` by its name, with a tokenizer beside it."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)


def save_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
