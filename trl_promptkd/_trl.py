"""The only module that imports what TRL, PEFT, transformers or bitsandbytes do not promise to keep.

Each name has its reason. `tests/test_trl.py` names what is relied on, so that an upgrade fails there first.
"""

import inspect
import os
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # shards the teacher as accelerate shards the student
from peft.tuners.p_tuning import PromptEncoder as PTuningEncoder  # the MLP and LSTM reparameterization
from peft.tuners.prompt_tuning import (
    PromptEmbedding,  # builds the soft prompt without wrapping the teacher
    PromptTuningInit,
)
from peft.tuners.tuners_utils import BaseTunerLayer  # tells an adapted output head
from peft.utils.other import (
    AuxiliaryTrainingWrapper,  # tells which weights are an adapter's
)
from transformers.conversion_mapping import get_model_conversion_mapping  # names of weights in older checkpoints
from transformers.core_model_loading import WeightRenaming
from trl import SFTConfig, SFTTrainer
from trl.import_utils import is_vllm_available  # which versions TRL supports
from trl.models import prepare_deepspeed  # shards the teacher under ZeRO-3, as TRL's own trainers do
from trl.models import utils as _model_utils
from trl.trainer.utils import (
    create_model_from_path,  # loads a student as TRL does
    print_prompt_completions_sample,  # the table of sampled completions
    remove_none_values,  # what TRL tells users to apply to rows with tool calls
)


with warnings.catch_warnings():
    # TRL warns on import that experimental classes may change. The range in pyproject.toml is what is tested.
    warnings.filterwarnings("ignore", message=r"[\s\S]*experimental[\s\S]*")
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer  # what PromptKDTrainer extends
    except ImportError:  # a TRL without it: PromptKD has all of its fields, and runs none of its code
        GKDConfig, GKDTrainer = SFTConfig, SFTTrainer


__all__ = [
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "GKDConfig",
    "GKDTrainer",
    "PTuningEncoder",
    "PromptEmbedding",
    "PromptTuningInit",
    "accelerate_launcher",
    "create_model_from_path",
    "fsdp2_prepare_model",
    "is_vllm_available",
    "keep_four_bit_weights_differentiable",
    "models_are_whole",
    "names_in_model",
    "old_names_of_checkpointing",
    "prepare_deepspeed",
    "print_prompt_completions_sample",
    "remove_none_values",
    "rename_checkpointing",
    "sampling_loop",
    "unwrap_model_for_generation",
    "vllm_generation_module",
]


# Before TRL 1.16, checkpointing was switched on again with transformers' defaults
_TAKES_CHECKPOINTING_KWARGS = (
    "gradient_checkpointing_kwargs" in inspect.signature(_model_utils.unwrap_model_for_generation).parameters
)


@contextmanager
def old_names_of_checkpointing():
    """Inside, TRL and PEFT may call checkpointing what it was called before transformers renamed it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


@contextmanager
def unwrap_model_for_generation(model, accelerator, gradient_checkpointing_kwargs=None):
    """TRL's context: gathers ZeRO-3 parameters and switches checkpointing off. Afterwards it is on again as before."""
    kwargs = {"gradient_checkpointing_kwargs": gradient_checkpointing_kwargs} if _TAKES_CHECKPOINTING_KWARGS else {}
    context = _model_utils.unwrap_model_for_generation(model, accelerator, **kwargs)
    with old_names_of_checkpointing():
        unwrapped = context.__enter__()
    try:
        yield unwrapped
    except BaseException as error:
        context.__exit__(type(error), error, error.__traceback__)
        raise
    with old_names_of_checkpointing():
        context.__exit__(None, None, None)
        if not _TAKES_CHECKPOINTING_KWARGS and unwrapped.is_gradient_checkpointing:
            unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)


def rename_checkpointing(config) -> None:
    """Pass a configuration's `gradient_checkpointing` on under the name that newer transformers want.

    The old name is TRL's default. The oldest transformers that we support know no other name, and the newest warns
    about the old one by itself. Must run before the configuration's own `__post_init__`.
    """
    for setting in ("checkpointing", "checkpointing_kwargs"):
        if getattr(config, f"activation_{setting}", False) is None:
            setattr(config, f"activation_{setting}", getattr(config, f"gradient_{setting}"))


def sampling_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """The loop that `model.generate` runs for greedy decoding and sampling. For a `custom_generate` that only adds a
    processor."""
    return model._sample(
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **kwargs,
    )


def vllm_generation_module():
    """TRL's module around vLLM, imported on first use, as importing vLLM takes seconds.

    The engine runs in this process, so that its random state and its weights can be reached, unless the user sets it
    otherwise.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from trl.generation import vllm_generation

    return vllm_generation


@contextmanager
def models_are_whole():
    """Inside, a new model has its weights in one piece, although ZeRO-3 shards those of others."""
    from transformers.integrations import deepspeed

    config, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def names_in_model(model, keys):
    """The names that a checkpoint's keys have in `model` -> the keys, as `from_pretrained` renames them.

    Weights that it computes from several others keep their keys.
    """
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    names = {}
    for key in keys:
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        names[name] = key
    return names


def accelerate_launcher():
    """What TRL's own commands start `accelerate launch` with. Imported on first use, as it takes half a second."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument  # --accelerate_config fsdp2
    from trl.cli.commands.training import _subtract_subsequence

    return SimpleNamespace(
        default_config_file=default_config_file,
        launch_command=launch_command,
        launch_command_parser=launch_command_parser,
        resolve_accelerate_config_argument=resolve_accelerate_config_argument,
        subtract_subsequence=_subtract_subsequence,
    )


def keep_four_bit_weights_differentiable(model) -> int:
    """Stop bitsandbytes from repacking 4-bit weights for its inference-only CPU kernel, and undo what it has done.

    On a CPU with AVX512-BF16, the first forward pass without gradients rewrites the weights of every `Linear4bit` into
    a layout whose kernel has no backward. From then on, gradients through the layer are silently wrong by a factor of
    thousands. Nothing happens on a GPU, on other CPUs or to other layers.

    Returns:
        `int`: The number of 4-bit layers found.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    if not layers:
        return 0
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                layer.weight.data, layer.weight.quant_state
            )
    return len(layers)
