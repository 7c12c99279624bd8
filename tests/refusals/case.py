"""One bad input, and what bad inputs are built from. Each runs in an empty folder, which is the current one."""

import contextlib
import io
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from datasets import Dataset
from runs import short_run
from tiny import answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
    SoftPrompt,
    build_teacher_cache,
)
from trl_promptkd.cli import main


NAN = float("nan")
ANSWERED_ROW = '{"prompt": "the cat", "completion": "sat"}\n'


class ExitCode2(Exception):  # noqa: N818
    """A command line tool's refusal, with the last line of its standard error."""


@dataclass(frozen=True)
class Case:
    """
    One bad input.

    Args:
        does: What the user does, in Markdown.
        run: Does it.
        says: What the message must hold, in this order and separated by " | ": what is wrong, and what to do.
        error: What is raised.
        needs_weights: Whether this can only be seen with a model's weights.
    """

    does: str
    run: Callable[[], Any]
    says: str
    error: type[Exception] = ValueError
    needs_weights: bool = False

    @property
    def name(self) -> str:
        """Of the test."""
        return re.sub(r"[^\w.]+", "_", self.does).strip("_")

    def message(self, folder: Path) -> str:
        """What the user gets."""
        weights = mock.patch.object(PreTrainedModel, "from_pretrained", side_effect=AssertionError("loads weights"))
        try:
            with contextlib.chdir(folder), contextlib.nullcontext() if self.needs_weights else weights:
                self.run()
        except Exception as error:
            if type(error) is not self.error:
                raise
            return _neutral(str(error), folder)
        raise AssertionError("was accepted")

    def cell(self, message: str) -> str:
        """What the user reads, in a table."""
        error = "exit code 2" if self.error is ExitCode2 else f"`{self.error.__name__}`"
        text = message if len(message) <= 600 else f"{message[:600].rsplit(' ', 1)[0]} ..."
        for old, new in (("\n", " "), ("|", r"\|"), ("<", "&lt;"), ("*", r"\*")):
            text = text.replace(old, new)
        return f"{error}: {text}"


def _neutral(message: str, folder: Path) -> str:
    """Without the folders of this run, and without what other packages say, which changes with their versions."""
    message = message.replace(f"{folder}{os.sep}", "").replace(str(folder), "/home/you")
    message = re.sub(r"(shard|greedy)-\w+\.", r"\1-0a1b.", message)
    others = r"Cannot find an|We couldn't|'utf-8' codec|Error while"
    return re.sub(rf" \(({others}).*?\)(?=\.|$)", "", message, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------- doing things


def _train(trainer_class, config_class, make_dataset, rows=None, args=None, **settings):
    """A trainer, by default of models that are not there: what is refused is refused before they are looked for."""
    settings = {
        "model": "no/such-student",
        "teacher_model": "no/such-teacher",
        "processing_class": tiny_tokenizer(),
        "train_dataset": make_dataset(4) if rows is None else Dataset.from_list(rows),
        **settings,
    }
    return trainer_class(args=short_run(config_class, Path(), args or {}), **settings)


promptkd = partial(_train, PromptKDTrainer, PromptKDConfig, prompt_dataset)
primed = partial(_train, PrimedDistillTrainer, PrimedDistillConfig, answered_dataset)
MADE_BY = {
    PromptKDTrainer: promptkd,
    PrimedDistillTrainer: primed,
    PromptKDConfig: lambda **settings: short_run(PromptKDConfig, Path(), settings),
    PrimedDistillConfig: lambda **settings: short_run(PrimedDistillConfig, Path(), settings),
}


def call(function, says, error=ValueError, needs_weights=False, **settings):
    """A call with bad arguments; its table row is the call."""
    text = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    run = partial(MADE_BY.get(function, function), **settings)
    return Case(f"`{function.__qualname__}({text})`", run, says, error, needs_weights)


def command(line, says, prepare=None, needs_weights=False):
    """A command line that is refused, in a folder with files, tokenizers and a soft prompt; `prepare` adds to them."""

    def run():
        Path("rows.jsonl").write_text(ANSWERED_ROW)
        Path("prompts.jsonl").write_text('{"prompt": "the cat"}\n')
        Path("instructions.jsonl").write_text('{"instruction": "the cat", "output": "sat"}\n')
        for role in ("teacher", "student"):
            tiny_tokenizer().save_pretrained(role)
        if prepare is not None:
            prepare()
        elif "--prompt run" in line:
            soft_prompt().save_adapter("run/teacher_prompt")
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                code = main(shlex.split(line))
            except SystemExit as exit_:  # argparse
                code = exit_.code
        assert code == 2, code
        raise ExitCode2(said.getvalue().strip().splitlines()[-1])

    return Case(f"`trl-promptkd {line}`", run, says, ExitCode2, needs_weights)


def written(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def saved(model, folder: str = "teacher", tokenizer=None) -> str:
    """A model's folder."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def without(attribute: str):
    """A tokenizer without its pad token, or without its chat template."""
    tokenizer = tiny_tokenizer()
    setattr(tokenizer, attribute, None)
    return tokenizer


def soft_prompt(num_virtual_tokens=7) -> SoftPrompt:
    config = PromptEncoderConfig(num_virtual_tokens=num_virtual_tokens, prompt_init="random")
    return SoftPrompt(config, tiny_model(), tiny_tokenizer())


def cache(folder: str = "cache", **settings) -> str:
    settings = {"priming": PrimingTemplate("red "), "preset": "standard", **settings}
    build_teacher_cache(tiny_model(seed=2), answered_dataset(4), folder, tiny_tokenizer(), **settings)
    return folder


BY_API = {
    "response_source": "teacher",
    "teacher_answers_url": "http://127.0.0.1:9/v1",
    "teacher_answers_model": "teacher",
}


def by_api(**settings):
    """Response priming with a teacher behind an API, which nobody asks."""
    return primed(args=BY_API, **{"teacher_model": None, **settings})


def from_cache(args=None, **settings):
    """Response priming from a cache that fits, but for `settings`."""
    args = {"kd_temperature": 1.0, **(args or {})}
    settings = {"priming": PrimingTemplate("red "), "teacher_model": None, "teacher_cache": cache(), **settings}
    return primed(args=args, **settings)
