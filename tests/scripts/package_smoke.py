"""README's two examples and the commands, with the installed package alone: `python package_smoke.py README.md`.

Used by `make test-package`, from a folder without the sources. Tiny models and data sets stand in for the Hub's.
"""

import importlib.resources
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trl_promptkd


TEXT = "suppose you are a student . the cat dog sat on mat who is what where"
WORDS = TEXT.split()
COMMANDS = (
    "--help",
    "promptkd --help",
    "primed --help",
    "quickstart --help",
    "doctor --help",
    "cache build --help",
    "eval --help",
    "rank-priming --help",
    "analyze --help",
)


def save_model(folder: str) -> None:
    vocab = {token: index for index, token in enumerate(["<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), eos_token_id=0, **size)).save_pretrained(folder)


def tiny(code: str, folder: str) -> str:
    """An example of README with a tiny model for the Hub's. All else stays, as it must run with and without a GPU."""
    code, replaced = re.subn(r'"HuggingFaceTB/[^"]*"', repr(folder), code)
    assert replaced == 2, code
    return code


def rows(name: str, *args, **kwargs) -> datasets.Dataset:
    texts = [" ".join(WORDS[i : i + 3]) for i in range(8)]
    prompt, answer = ("question", "answer") if "gsm8k" in name else ("prompt", "completion")
    return datasets.Dataset.from_dict({prompt: texts, answer: [f" {text}" for text in texts]})


def check(readme: Path) -> None:
    installed = Path(trl_promptkd.__file__).parent
    assert "site-packages" in installed.parts, f"{installed} is not the installed package"
    assert importlib.resources.files("trl_promptkd").joinpath("py.typed").is_file()
    command = Path(sys.executable).with_name("trl-promptkd")
    for flags in COMMANDS:
        subprocess.run([command, *flags.split()], check=True, stdout=subprocess.DEVNULL)
    said = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    assert said.strip() == f"trl-promptkd {trl_promptkd.__version__}", said
    assert trl_promptkd.metrics.extract_final_number("#### 18") == 18

    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    examples = [code for code in blocks if "Trainer(" in code]
    assert len(examples) == 2
    datasets.load_dataset = rows
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for code in examples:
            namespace: dict = {}
            exec(tiny(code, folder), namespace)
            trainer = namespace["trainer"]
            assert trainer.state.global_step == trainer.args.max_steps
            assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
            print(f"{type(trainer).__name__}: {len(code.strip().splitlines())} lines of README ran.")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
