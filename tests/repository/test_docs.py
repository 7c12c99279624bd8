"""What the documentation says is true: its code runs, its commands are understood, and the tests it names are there.

The python blocks of a page run in their order in one namespace. Every name of a model or data set, on the Hub or on
disk, is a folder with a tiny stand-in. `<!-- not run: reason -->` on the line before a block leaves it out.
"""

import argparse
import ast
import importlib
import itertools
import json
import re
import shlex
import shutil
import sys

import datasets
import pytest
import torch
import transformers
import yaml
from accelerate.commands.launch import launch_command_parser
from doc_pages import blocks_of
from paths import ROOT, load_module
from tiny import WORDS, tiny_model, tiny_tokenizer
from torch.distributed.run import get_args_parser

import trl_promptkd
from benchmarks.__main__ import parse as parse_benchmark
from trl_promptkd.cli import parse_args


PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.findall(r"`(test_\w+\.py)::(\w+)`", "".join(page.read_text(encoding="utf-8") for page in PAGES))
# What is a model's name: on the Hub, or a folder called student or teacher
MODELS = re.compile(r"(?:Qwen|HuggingFaceTB|meta-llama|openai-community|facebook)/[\w.-]+|.*(?:student|teacher)")
TEACHERS = re.compile(r"teacher|[7-9]B|[1-9]\d+B")
# Data sets on the Hub, and files, that the pages read: what a row of each is made of
QUESTION, ANSWER = " ".join(WORDS[3:8]), " ".join(WORDS[8:11])
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
DATA = {
    "trl-lib/ultrafeedback-prompt": {"prompt": [USER]},
    "trl-lib/Capybara": {"messages": [USER, ASSISTANT]},
    "openai/gsm8k": {"question": QUESTION, "answer": "two and two #### 4"},
    "databricks/databricks-dolly-15k": {"instruction": QUESTION, "context": "", "response": ANSWER, "category": "qa"},
    "dev.jsonl": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "rows.jsonl": {"prompt": QUESTION, "completion": " " + ANSWER},
    "prompts.jsonl": {"prompt": QUESTION},
}
# What is read without being data or a model
FILES = {"priming.jinja": "Explain it to a {{ grade }} grader. "}


BLOCKS = {page.relative_to(ROOT).as_posix(): blocks_of(page.read_text(encoding="utf-8")) for page in PAGES}


def having(language):
    return [page for page, blocks in BLOCKS.items() if any(block.language == language for block in blocks)]


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Folders of a tiny teacher and of a tiny student."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for seed, role in enumerate(("teacher", "student")):
        tiny_model(seed=seed).save_pretrained(folder / role)
        tiny_tokenizer().save_pretrained(folder / role)
    return folder


def write_data(folder, name, row):
    rows = "\n".join(json.dumps(row) for _ in range(12))
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.write_text(rows)
        return
    path.mkdir()
    for split in ("train", "test"):
        (path / f"{split}.jsonl").write_text(rows)
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    configs = [{"config_name": config, "data_files": files} for config in ("default", "main")]
    (path / "README.md").write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")


def texts_of(code):
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


@pytest.fixture
def folder(tmp_path, stand_ins, monkeypatch):
    """The working folder of a page: short runs, nothing sent anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".datasets")
    for name, row in DATA.items():
        write_data(tmp_path, name, row)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)

    complete = transformers.TrainingArguments.__post_init__

    def shortened(args):
        args.max_steps, args.use_cpu, args.bf16, args.report_to = 1, True, False, "none"
        args.per_device_train_batch_size = min(args.per_device_train_batch_size, 2)
        args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)
        args.max_new_tokens = min(getattr(args, "max_new_tokens", 4), 4)
        complete(args)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", shortened)
    configure = transformers.GenerationConfig.__init__

    def brief(config, **kwargs):
        configure(config, **kwargs)
        config.max_new_tokens = min(config.max_new_tokens or 4, 4)

    monkeypatch.setattr(transformers.GenerationConfig, "__init__", brief)
    ours = (trl_promptkd.PromptKDTrainer, trl_promptkd.PrimedDistillTrainer, trl_promptkd.TeacherCache)
    for owner in (transformers.Trainer, transformers.PreTrainedModel, datasets.Dataset, *ours):
        monkeypatch.setattr(owner, "push_to_hub", lambda self, *args, **kwargs: None)
    return tmp_path


# The page on the Hub is run by test_hub.py, against a server
@pytest.mark.parametrize("page", [page for page in having("python") if page != "docs/hub.md"])
def test_python_runs(page, folder, stand_ins):
    blocks = [block for block in BLOCKS[page] if block.language == "python" and block.not_run is None]
    for block in blocks:
        for name in texts_of(block.text):
            if MODELS.fullmatch(name) and not (folder / name).exists():
                shutil.copytree(stand_ins / ("teacher" if TEACHERS.search(name) else "student"), folder / name)
    namespace = {"__name__": "page"}
    for block in blocks:
        # Its line numbers are the page's
        exec(compile("\n" * block.line + block.text, ROOT / page, "exec"), namespace)


def commands_of(text):
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


ON_CPU = ("--use_cpu", "--bf16", "false", "--output_dir", "run")


def check_script(script, flags):
    """The script's own parser takes the flags, or that of the command that it is."""
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    source = path.read_text(encoding="utf-8")
    if command := re.search(r'main\(\["(\w+)"', source):
        check_command(["trl-promptkd", command[1], *flags], launch=False)
    elif "def read_flags(" in source:
        _, module, flags = load_module(script).read_flags(flags)
        module.make_parser().parse_args_and_config([*flags, *ON_CPU])
    elif main := re.search(r"^from (trl_promptkd\S+) import main$", source, re.MULTILINE):
        check_main(importlib.import_module(main[1]).main, [script, *flags])
    else:
        unknown = [flag for flag in flags if flag.startswith("--") and f'"{flag}"' not in source]
        assert set(unknown) <= {"--help"}, script


class ParsedError(Exception):
    """Flags were understood, and nothing was run with them."""


def check_main(main, argv):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser):
        parse(parser)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(ParsedError):
            main()


def check_command(words, launch=True):
    program, *rest = words
    if "..." in rest:
        rest = rest[: rest.index("...")]
        if program == "trl-promptkd":
            return
    if program == "trl-promptkd":
        training = rest[:1] in (["promptkd"], ["primed"])
        if not {"--help", "--help_all"} & set(rest):
            parse_args([*rest, *ON_CPU] if training else rest, launch)
    elif program == "accelerate" and rest[:1] == ["launch"]:
        launcher = launch_command_parser().parse_args(rest[1:])
        assert launcher.config_file is None or (ROOT / launcher.config_file).is_file(), launcher.config_file
        if launcher.module:
            check_command(["trl-promptkd", *launcher.training_script_args], launch=False)
        else:
            check_script(launcher.training_script, launcher.training_script_args)
    elif program == "torchrun":
        launcher = get_args_parser().parse_args(rest)
        check_script(launcher.training_script, launcher.training_script_args)
    elif words[:3] == ["python", "-m", "benchmarks"]:
        if "--help" not in rest:
            parse_benchmark(rest[2:])
    elif program == "python" and rest[0].startswith(("examples/", "benchmarks/", "tests/")):
        check_script(rest[0], rest[1:])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), shlex.join(words)
    elif words[:2] == ["pip", "install"]:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", shlex.join(rest)))):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"there is no extra {extra}"


@pytest.mark.parametrize("page", having("bash"))
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # pages start processes for several GPUs
    for block in BLOCKS[page]:
        if block.language == "bash" and block.not_run is None:
            for words in commands_of(block.text):
                check_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "trl-promptkd doctor --modell a --dataset b",
        "accelerate launch --config_file examples/accelerate_configs/none.yaml examples/promptkd.py --output_dir a",
        "accelerate launch examples/promptkd.py --config examples/configs/quickstart.yaml --lambda 1",
        "trl-promptkd promptkd --config examples/configs/quickstart.yaml --lambda 1",
        "python examples/smollm2.py --folder models",
        "python examples/smollm2.py --student_layers none",
        "torchrun --nproc_per_node 2 examples/promptkd.py --config examples/configs/quickstart.yaml --lambda 1",
        "python benchmarks/none.py",
        "python -m benchmarks none",
        "python -m benchmarks scaling --lambda 1",
        "make everything",
        "pip install '.[gpu]'",
    ],
)
def test_a_command_that_is_not_there_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_command(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lists_are_lists_on_the_site_too(page):
    """The site wants an empty line before a list, and four spaces before an item within an item."""
    lines = ["", *re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S).splitlines()]
    for before, line in itertools.pairwise(lines):
        if item := re.match(r"( *)(?:[-*]|\d+\.) ", line):
            assert len(item[1]) % 4 == 0, line
            assert not before or before.startswith("  ") or re.match(r" *(?:[-*]|\d+\.) ", before), line


def test_few_blocks_are_not_run_and_each_for_a_reason():
    blocks = [block for page in BLOCKS.values() for block in page if block.language in ("python", "bash")]
    left_out = [block for block in blocks if block.not_run is not None]
    assert all(len(block.not_run.split()) > 2 for block in left_out)
    assert len(left_out) <= len(blocks) / 10


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_what_holds_a_promise_is_there(file, name):
    (path,) = (ROOT / "tests").rglob(file)
    source = path.read_text(encoding="utf-8")
    assert re.search(rf"^ *(def|class) {name}\b", source, re.MULTILINE), f"{file} has no {name}"
