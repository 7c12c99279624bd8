"""The precision on a CPU. TRL's configurations use bfloat16 by default, which transformers rejects without a GPU."""

from typing import Any

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging


__all__ = ["choose_precision"]

logger = logging.get_logger(__name__)


def choose_precision(config: Any) -> None:
    """Set `bf16` to False on a CPU, with a warning of one line. `use_cpu=True` with `bf16=True` keeps it."""
    without_gpu = not (is_torch_bf16_gpu_available() or is_torch_xla_available())
    if config.fp16 or config.bf16 is False or not (config.use_cpu or without_gpu):
        return
    if config.bf16 is None:
        logger.warning_once("`bf16` is not set, and this run is on a CPU: it trains in float32.")
    elif not config.use_cpu:
        logger.warning_once(
            "`bf16` is True, but no GPU was found: this run is on a CPU, and trains in float32. Set `use_cpu=True`, "
            "too, to train in bfloat16 there."
        )
    else:
        return
    config.bf16 = False
