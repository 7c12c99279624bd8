"""What the documentation site makes of pages and docstrings beyond what mkdocs does."""

import inspect
import re
from types import SimpleNamespace

import pytest
from paths import ROOT, load_module

import trl_promptkd
from trl_promptkd import cli


griffe = pytest.importorskip("griffe", reason="the extra `docs` is not installed")
pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks():
    return load_module("docs/hooks.py")


def page(source):
    return SimpleNamespace(file=SimpleNamespace(src_uri=source))


class TestLinks:
    @pytest.mark.parametrize(
        ("source", "text", "expected"),
        [
            ("a.md", "[b](b.md#c), [d](https://e.f/g.py)", "[b](b.md#c), [d](https://e.f/g.py)"),
            ("a.md", "[the script](../examples/promptkd.py)", "the script (`examples/promptkd.py`)"),
            ("a.md", "[`examples/promptkd.py`](../examples/promptkd.py)", "`examples/promptkd.py`"),
            ("a.md", "[promptkd.py](../examples/promptkd.py)", "`examples/promptkd.py`"),
            ("a.md", "[changes](../CHANGELOG.md)", "[changes](changelog.md)"),
            ("api/a.md", "[b](../b.md)", "[b](../b.md)"),
            ("changelog.md", "[b](docs/b.md#c)", "[b](b.md#c)"),
            ("a.md", "![figure](images/b.png)", "![figure](images/b.png)"),
            ("a.md", "```python\n[x](../none)\n```\n[s](../Makefile)", "```python\n[x](../none)\n```\ns (`Makefile`)"),
            ("a.md", "`[x](../none)`", "`[x](../none)`"),
        ],
    )
    def test_files_that_are_not_pages_become_their_names(self, hooks, source, text, expected):
        assert hooks.on_page_markdown(text, page(source), None, None) == expected

    def test_a_file_that_is_not_there_is_a_warning(self, hooks, caplog):
        hooks.on_page_markdown("[x](../none.py)", page("a.md"), None, None)
        assert "there is no none.py" in caplog.text


class TestFormulas:
    def test_are_mathml(self, hooks):
        inline = '<p><span class="arithmatex">\\(a &lt; \\tau\\)</span></p>'
        drawn = hooks.on_page_content(inline, None, None, None)
        assert drawn.count("<math") == 1
        assert "arithmatex" not in drawn
        for part in ('display="inline"', "<mi>a</mi>", "&#x0003C;", "&#x003C4;"):
            assert part in drawn
        block = '<div class="arithmatex">\\[a\nb\\]</div>'
        assert 'display="block"' in hooks.on_page_content(block, None, None, None)


class TestCommands:
    """Compared with what `--help` prints, which argparse and the training parser write themselves."""

    @pytest.fixture(scope="class")
    def sections(self):
        """By the words of the command."""
        parts = re.split(r"^#{2,3} (.+)$", load_module("docs/commands.py").main(), flags=re.MULTILINE)[1:]
        return dict(zip(parts[::2], parts[1::2], strict=True))

    def test_each_command_is_there(self, sections):
        assert set(sections) >= {*cli._TRAININGS, *cli._TOOLS, *(f"analyze {name}" for name in cli._ANALYSES)}

    def test_each_flag_of_a_tool_is_there(self, sections, capsys):
        tools = [title.split() for title, text in sections.items() if "\ntrl-promptkd" in text and ":" not in title]
        tools = [words for words in tools if words[0] not in cli._TRAININGS]
        assert len(tools) > len(cli._TOOLS)
        for words in tools:
            with pytest.raises(SystemExit):
                cli.parse_args([*words, "--help"])
            flags = set(re.findall(r"--\w+", capsys.readouterr().out)) - {"--help"}
            assert {flag for flag in flags if f"`{flag}`" not in sections[" ".join(words)]} == set(), words

    @pytest.mark.parametrize("command", cli._TRAININGS)
    def test_each_flag_of_a_training_is_there(self, sections, command, capsys):
        page = "".join(text for title, text in sections.items() if title.split(":")[0] == command)
        with pytest.raises(SystemExit):
            cli.parse_args([command, "--help_all"])
        flags = re.findall(r"--\w+", "".join(re.findall(r"^  (--.+)$", capsys.readouterr().out, re.MULTILINE)))
        assert len(flags) > 100
        assert [flag for flag in flags if f"`{flag}`" not in page] == []

    def test_they_are_put_into_their_page(self, hooks, monkeypatch):
        monkeypatch.setitem(hooks._running, "text", "## doctor")
        page_text = (DOCS / "commands.md").read_text(encoding="utf-8")
        made = hooks.on_page_markdown(page_text, page("commands.md"), None, None)
        assert made.rstrip().endswith("## doctor")


class TestSketches:
    def test_are_those_of_the_script(self):
        figures = load_module("docs/figures.py")
        for name, (title, lines) in figures.SKETCHES.items():
            drawn = (DOCS / "images" / name).read_text(encoding="utf-8")
            assert figures.sketch(title, lines) == drawn, "run `python -m docs.figures`"


class TestPictures:
    def test_are_those_of_the_script(self):
        for name, draw in load_module("docs/pictures.py").PICTURES.items():
            assert draw() == (DOCS / "images" / name).read_text(encoding="utf-8"), "run `python docs/pictures.py`"


class TestDocstrings:
    @pytest.fixture(scope="class")
    def package(self):
        extensions = griffe.load_extensions(load_module("docs/hf_docstrings.py").HuggingFaceDocstrings)
        return griffe.load("trl_promptkd", search_paths=[DOCS.parent], extensions=extensions)

    def test_every_public_name_is_in_the_api(self):
        pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
        assert [name for name in trl_promptkd.__all__ if f"::: trl_promptkd.{name}\n" not in pages] == []

    def test_arguments_have_types_and_no_default_beside_the_signatures(self, package):
        sections = package["trainer.promptkd_config.PromptKDConfig"].docstring.parse("google")
        arguments = next(section for section in sections if section.kind.value == "parameters").value
        found = {argument.name: (str(argument.annotation), argument.default) for argument in arguments}
        assert found["lmbda"] == ("float", "1.0")
        assert found["loss_chunk_size"] == ("int", "256")

    def test_arguments_that_share_a_line_have_their_type_too(self):
        google = load_module("docs/hf_docstrings.py")._google
        text = google("Args:\n    p, q (`Tensor` of shape `(rows, seq)`, *optional*): Of both.\n", {})
        assert text == "Args:\n    p, q (Tensor of shape (rows, seq)): Of both.\n"

    def test_what_is_returned_is_text(self, package):
        text = package["trainer.promptkd_trainer.PromptKDTrainer.prompted_teacher_logits"].docstring.value
        assert "**Returns:** `Tensor` of shape `(batch, seq, vocab)`" in text
        docstring = package["doctor.diagnosis.diagnose"].docstring
        assert "**Returns:** `list` of [`Finding`][trl_promptkd.doctor.Finding], in" in docstring.value
        assert [section.kind.value for section in docstring.parse("google")][-1] == "raises"

    def test_fields_of_trl_are_left_away(self, package):
        names = package["PromptKDConfig"].parameters
        assert "lmbda" in names
        assert "learning_rate" not in names
        assert "learning_rate" in inspect.signature(trl_promptkd.PromptKDConfig).parameters

    def test_names_become_links_where_the_api_has_them(self, package):
        text = package["trainer.promptkd_config.PromptKDConfig"].docstring.value
        assert "[`PromptKDTrainer`][trl_promptkd.PromptKDTrainer]" in text
        assert "[`SamplingConfig`][trl_promptkd.trainer.sampling_config.SamplingConfig]" in text
        assert "[`~" not in text
        assert "`TrainingArguments`" in text
