"""Prints the commands of `trl-promptkd` and their flags as Markdown, from its parsers. docs/hooks.py runs this for
docs/commands.md while the other pages are made: it imports what the commands import, which takes seconds.

python docs/commands.py
"""

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from importlib import import_module

from trl_promptkd import cli


HEAD = "| flag | default | what it is |\n| --- | --- | --- |"


def cell(text: str) -> str:
    """Text in a table."""
    for old, new in (("\n", " "), ("|", r"\|"), ("<", "&lt;"), ("*", r"\*")):
        text = text.replace(old, new)
    return " ".join(text.split())


def row(flags: str, default: str, text: str) -> str:
    return f"| {flags} | {f'`{default}`' if default else ''} | {cell(text)} |"


def row_of(action: argparse.Action) -> str:
    """A flag or an argument of a tool."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    is_set = action.default not in (None, False, argparse.SUPPRESS) and action.default != {}
    told = (action.help or "").replace(" (%(default)s)", "") % {"default": action.default}
    if action.choices:
        told += f"{', ' if told else ''}one of {', '.join(f'`{choice}`' for choice in action.choices)}"
    if action.required and action.option_strings:
        names += " (required)"
    return row(names, str(action.default) if is_set else "", told)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """By their names, with what they are for."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                found[choice.dest] = (action.choices[choice.dest], choice.help)
    return found


def tool(parser: argparse.ArgumentParser, told: str, words: Sequence[str]) -> Iterator[str]:
    """A tool, and after it the tools that it consists of."""
    yield f"{'#' * (len(words) + 1)} {' '.join(words)}\n\n{cell(told[:1].upper() + told[1:])}."
    inner = subcommands(parser)
    actions = [action for action in parser._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
    if not inner:
        wanted = [f"--{action.dest} ..." for action in actions if action.required and action.option_strings]
        places = [f"{action.metavar or action.dest}".upper() for action in actions if not action.option_strings]
        yield f"```\n{' '.join(['trl-promptkd', *words, *places, *wanted])}\n```"
        if actions:
            yield "\n".join([HEAD, *map(row_of, actions)])
    for name, (command, text) in inner.items():
        yield from tool(command, text, [*words, name])


def training(name: str, told_of: str) -> Iterator[str]:
    """A training command: the flags of its `--help`, and the names of the others."""
    module = import_module(f"trl_promptkd.cli.{name}")
    told = import_module("trl_promptkd.cli.training").told
    parser = module.make_parser()
    about, _, examples = parser.description.partition("\n\n")
    yield f"## {name}\n\n{cell(told_of[:1].upper() + told_of[1:])}. {cell(about)}"
    yield f"```\n{textwrap.dedent(examples.partition(chr(10) * 2)[0]).strip()}\n```"
    shown = set()
    for title, flags in parser.sections().items():
        if flags:
            rows = []
            for flag in flags:
                names, text, default = told(flag)
                rows.append(row(", ".join(f"`{part}`" for part in names.split(", ")), default, text))
                shown.add(flag.name)
            yield f"### {name}: {title}\n\n" + "\n".join([HEAD, *rows])
    others = {flag.name for flags in parser.sections(everything=True).values() for flag in flags} - shown
    names = ", ".join(f"`--{other}`" for other in sorted(others))
    yield (
        f"### {name}: TRL's and transformers' other flags\n\nEvery field of TRL's `SFTConfig` and of transformers' "
        f"`TrainingArguments` is a flag. `trl-promptkd {name} --help_all` says what each is: {names}."
    )


def main() -> str:
    trainings = ("promptkd", "primed")
    parts: list[str] = []
    for name, (_, told) in subcommands(cli.make_parser()).items():
        if name in trainings:
            parts += training(name, told)
            continue
        if name == "analyze":
            analyses = subcommands(subcommands(cli.make_parser())[name][0])
            parts.append(f"## analyze\n\n{cell(told[:1].upper() + told[1:])}.")
            for analysis, (_, text) in analyses.items():
                inner = subcommands(cli.make_parser([name, analysis]))[name][0]
                parts += tool(subcommands(inner)[analysis][0], text, [name, analysis])
        else:
            parts += tool(subcommands(cli.make_parser([name]))[name][0], told, [name])
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(main())
