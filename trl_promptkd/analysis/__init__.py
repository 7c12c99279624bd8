"""`trl-promptkd analyze`: what a student, a teacher and a soft prompt do, measured on the user's own rows.

- `exposure.py`: how a student's errors add up.
- `prompt.py`: what a soft prompt has become, and what it does. It uses `saved_prompt.py` and `token_classes.py`.
- `attention.py`: where several models attend, layer by layer.
- `log_probs.py`: several models at the same tokens.
- `plots.py`: plots, and a page of examples.
"""

from .attention import head_matrices, measure_attention
from .exposure import exposure_bias, prefix_kl, sample_prefixes
from .plots import plot_exposure
from .prompt import nearest_tokens, prompt_drift, prompt_effect
from .saved_prompt import find_prompts, initial_prompt, read_prompt


__all__ = [
    "exposure_bias",
    "find_prompts",
    "head_matrices",
    "initial_prompt",
    "measure_attention",
    "nearest_tokens",
    "plot_exposure",
    "prefix_kl",
    "prompt_drift",
    "prompt_effect",
    "read_prompt",
    "sample_prefixes",
]
