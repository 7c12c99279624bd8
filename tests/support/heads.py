"""Models whose logits are more than a matrix times the states, and padded rows for them."""

import torch
from tiny import VOCAB_SIZE
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
)


ROWS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [19, 20, 21, 22, 23, 24]]
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
# Models whose logits are more than a matrix times the states
HEADS = {
    "scaled (Cohere)": (CohereConfig, {"logit_scale": 0.5}),
    "scaled (Cohere 2)": (Cohere2Config, {"logit_scale": 3.0, "sliding_window": 6}),
    "divided (Granite)": (GraniteConfig, {"logits_scaling": 4.0}),
    "multiplied (HyperCLOVA X)": (HyperCLOVAXConfig, {"logits_scaling": 4.0}),
    "capped (Gemma 2)": (Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 8}),
}


def head_model(name):
    config_class, settings = HEADS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_class(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0, pad_token_id=0, **_SMALL, **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


def pad(rows, side):
    """ids and mask with the padding on one side, or two tokens of it on both."""
    width = max(map(len, rows)) + (4 if side == "both" else 0)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    starts = []
    for i, row in enumerate(rows):
        start = {"right": 0, "left": width - len(row), "both": 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        starts.append(start)
    return ids, mask, starts
