"""What mkdocs does with the pages beyond its own: formulas become MathML, links out of docs/ become names of files,
and docs/commands.md gets the commands' flags."""

import html
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File


log = get_plugin_logger(__name__)

ROOT = Path(__file__).parent.parent
# Files of the repository's root that are pages too
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}

# Blocks of code and code between lines come first: what looks like a link there is none
_CODE_OR_LINK = re.compile(
    r"^ *(?P<fence>`{3,}).*?^ *(?P=fence) *$|(?P<ticks>`+)[^`]+(?P=ticks)"
    r"|(?<!!)\[(?P<text>[^\]\[]+)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)

_FUNCTION = re.compile(r"<mi>(?:log|max|min)</mi>(?!<mo[^>]*>(?:&#x00028;|\())")  # would touch what it is applied to


COMMANDS = "<!-- commands -->"
_running = {}


def on_startup(command, dirty):
    """The commands import torch and TRL. That runs beside the making of the other pages."""
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    script = [sys.executable, str(ROOT / "docs" / "commands.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    _running["commands"] = subprocess.Popen(script, env=quiet, text=True, encoding="utf-8", **pipes)


def commands_text():
    """The Markdown of all commands, once for a run of mkdocs."""
    if "text" not in _running:
        text, errors = _running["commands"].communicate()
        if _running["commands"].returncode:
            log.error("docs/commands.py failed: %s", errors)
        _running["text"] = text
    return _running["text"]


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    waits = files.get_file_from_path("commands.md")
    files.remove(waits)
    files.append(waits)  # pages are made in this order
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files that are not pages, such as ../examples/configs/x.yaml, become the files' names: there is no
    server of sources. The commands' flags are put into their page."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands_text())
    source = (
        "" if page.file.src_uri in PAGES.values() else posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    )

    def rewritten(match):
        if match["target"] is None:
            return match[0]
        text, anchor = match["text"], match["anchor"] or ""
        path = posixpath.normpath(posixpath.join(source, match["target"]))
        if path in PAGES:
            path = f"docs/{PAGES[path]}"
        if path.startswith("docs/"):
            here = posixpath.dirname(page.file.src_uri)
            return f"[{text}]({posixpath.relpath(path.removeprefix('docs/'), here or '.')}{anchor})"
        if not (ROOT / path).exists():
            log.warning("%s: there is no %s, which is linked as [%s]", page.file.src_uri, path, text)
        name = f"`{path}`"
        return name if path in text or text.strip("`") == posixpath.basename(path) else f"{text} ({name})"

    return _CODE_OR_LINK.sub(rewritten, markdown)


def on_page_content(content, page, config, files):
    """Formulas as MathML, which browsers draw without a script."""

    def drawn(match):
        latex = html.unescape(match["latex"]).strip()
        display = "block" if match["kind"] == "[" else "inline"
        drawing = _FUNCTION.sub(r'\g<0><mspace width="0.17em"/>', convert(latex, display=display))
        return f'<{match["tag"]} class="formula">{drawing}</{match["tag"]}>'

    return _FORMULA.sub(drawn, content)
