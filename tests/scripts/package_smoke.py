"""README's two examples and the commands, with the installed package alone: `python package_smoke.py README.md`.

Used by `make test-package`, from a folder without the sources. The Hub's models and data sets are replaced by tiny ones in a folder.
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
]


def save_model(folder: Path) -> None:
    vocab = {token: index for index, token in enumerate(["<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    ).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), eos_token_id=0, **size)).save_pretrained(folder)


def tiny(code: str, folder: Path) -> str:
    """An example of README with a tiny model for the Hub's, and one step on the CPU."""
    code = re.sub(r'"Qwen/[^"]*"', repr(str(folder)), code)
    code = re.sub(
        r"(Config\(output_dir=)(\"[^\"]*\")",
        r"\1\2, max_steps=1, use_cpu=True, bf16=False, report_to='none'",
        code,
        count=1,
    )
    return code.replace("trainer.push_to_hub()", "trainer.save_model()")


def rows(*args, **kwargs) -> datasets.Dataset:
    texts = [" ".join(WORDS[i : i + 3]) for i in range(8)]
    names = ("question", "answer") if "gsm8k" in args[0] else ("prompt", "completion")
    return datasets.Dataset.from_dict({names[0]: texts, names[1]: [" " + text for text in texts]})


def check(readme: Path) -> None:
    installed = Path(trl_promptkd.__file__).parent
    assert "site-packages" in installed.parts, f"{installed} is not the installed package"
    assert importlib.resources.files("trl_promptkd").joinpath("py.typed").is_file()
    command = Path(sys.executable).with_name("trl-promptkd")
    for flags in (
        ["--help"],
        ["doctor", "--help"],
        ["cache", "build", "--help"],
        ["eval", "--help"],
        ["analyze", "--help"],
    ):
        subprocess.run([command, *flags], check=True, stdout=subprocess.DEVNULL)
    said = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    assert said.strip() == f"trl-promptkd {trl_promptkd.__version__}", said
    metric = trl_promptkd.metrics.extract_final_number("#### 18")
    assert metric == 18

    examples = [
        code
        for code in re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
        if "Trainer(" in code
    ]
    assert len(examples) == 2
    datasets.load_dataset = rows
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(model)
        for code in examples:
            namespace: dict = {}
            exec(tiny(code, model), namespace)
            trainer = namespace["trainer"]
            assert trainer.state.global_step == 1
            assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
            print(f"{type(trainer).__name__}: {len(code.strip().splitlines())} lines of README ran.")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
