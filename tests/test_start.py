"""`import trl_promptkd` loads neither torch nor transformers; what is named in it is imported when it is used."""

import subprocess
import sys

import pytest

import trl_promptkd


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_no_heavy_module():
    code = "import sys, trl_promptkd; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_parts_of_the_package_are_there_without_an_import_of_their_own():
    assert run("import trl_promptkd; print(trl_promptkd.metrics.extract_final_number('It is 7.'))") == "7.0"


def test_all_public_names_can_be_imported():
    for name in trl_promptkd.__all__:
        assert getattr(trl_promptkd, name).__name__ == name
        assert name in dir(trl_promptkd)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        trl_promptkd.Trainer  # noqa: B018


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["doktor"], ["promptkdd"], ["analyze", "--help"]])
def test_the_command_loads_no_heavy_module_before_a_tool_is_named(words):
    code = (
        "import sys; from trl_promptkd.cli import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    assert run(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("tool", ["eval", "promptkd", "quickstart"])
def test_a_tools_help_has_no_foreign_noise(tool):
    code = f"from trl_promptkd.cli import main; main(['{tool}', '--help'])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"usage: trl-promptkd {tool}")
    assert not shown.stderr
