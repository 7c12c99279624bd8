"""Docstrings in the style of Hugging Face's libraries, as the Google style that mkdocstrings reads.

`name (`float`, *optional*, defaults to `1.0`): ...` becomes `name (float): ...`, as the default stands in the
signature. [`Name`] becomes a link where docs/api has the name, and code elsewhere. What is returned is said in
sentences, which Google's style would take for a type up to the first colon.
"""

import inspect
import re
from pathlib import Path

import griffe


_API = Path(__file__).parent / "api"
_REFERENCE = re.compile(r"\[`~?(?P<path>[\w.]+)`\](?!\[|\()")
_RETURNS = re.compile(r"^Returns:\n(?P<text>(?: .*(?:\n|$)|\n(?= ))+)", re.MULTILINE)
_ARGUMENT = re.compile(r"^(?P<start> +\*{0,2}\w+(?:, \w+)* )\((?P<type>.*?)\):(?=\s|$)", re.MULTILINE)


class HuggingFaceDocstrings(griffe.Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        names = _documented(pkg)
        seen = set()
        _walk(pkg, names, seen)


def _documented(package):
    """The names that docs/api has, and their paths there."""
    names = {}
    for page in sorted(_API.glob("*.md")):
        for path in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            found = package[path.removeprefix(package.path + ".")]
            names.setdefault(found.name, path)
            members = found.exports or () if found.is_module else found.members if found.is_class else ()
            for name in map(str, members):
                if not name.startswith("_") and (found[name].is_function or found[name].is_class):
                    names.setdefault(f"{found.name}.{name}", f"{path}.{name}")
                    names.setdefault(name, f"{path}.{name}")
    return names


def _walk(found, names, seen):
    if found.is_alias or found.path in seen:
        return
    seen.add(found.path)
    if found.docstring is not None:
        found.docstring.value = _google(found.docstring.value, names)
    for member in found.members.values():
        _walk(member, names, seen)


def _google(text, names):
    text = _ARGUMENT.sub(lambda match: f"{match['start']}({_type(match['type'])}):", text)
    text = _RETURNS.sub(lambda match: f"**Returns:** {inspect.cleandoc(match['text'])}\n", text)
    return _REFERENCE.sub(lambda match: _reference(match["path"], names), text)


def _type(text):
    text = re.sub(r", \*optional\*.*$", "", text)
    text = re.sub(r"\[?`~?([^`]*)`\]?", r"\1", text)
    return text if "of shape" in text or "[" in text else re.sub(r",? or |, ", " | ", text)


def _reference(path, names):
    name = path.split(".")[-1]
    known = names.get(path) or names.get(name)
    return f"[`{name}`][{known}]" if known else f"`{name}`"
