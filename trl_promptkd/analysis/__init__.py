"""What distillation did to a model, beyond its scores: `trl-promptkd analyze`.

`attention_layers.py` (one layer's weights at a time), `attention.py` (where several models look, layer by layer), `attention_plots.py`
(its pictures).
"""

from .attention import AttentionReport, HeadVariance, head_matrices, measure_attention


__all__ = ["AttentionReport", "HeadVariance", "head_matrices", "measure_attention"]
