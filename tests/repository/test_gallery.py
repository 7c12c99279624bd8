"""The gallery's script makes what its page shows, and each run goes wrong as the page says."""

import re

import pytest
from paths import ROOT, load_module


PAGE = ROOT / "docs" / "gallery.md"
WRONG = {"good": [], "collapsing": ["Collapse"], "colluding": ["Collusion"], "cut": ["Cut answers"]}


@pytest.fixture
def gallery():
    return load_module("benchmarks/gallery.py")


@pytest.fixture
def page(tmp_path):
    """A copy of the page without what the script writes."""
    (tmp_path / "images").mkdir()
    text = PAGE.read_text(encoding="utf-8")
    emptied = re.sub(r"(<!-- (?:overview|\w+: \w+) -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)
    assert len(emptied) < len(text)
    (tmp_path / "gallery.md").write_text(emptied, encoding="utf-8")
    return tmp_path / "gallery.md"


def titles(text):
    return re.findall(r"<title>(.+?)</title>", text)


def test_script_writes_all_that_the_page_shows(gallery, page, tmp_path):
    """With runs that are too short to show anything."""
    gallery.make_runs(tmp_path / "runs", steps=4, teacher_steps=2, student_steps=2)
    gallery.write_page(tmp_path / "runs", page)
    text, committed = page.read_text(encoding="utf-8"), PAGE.read_text(encoding="utf-8")
    # Numbers, samples and verdicts differ, but not the places and the columns
    heads = re.compile(r"^(?:<!-- .* -->|\| (?:run|step|rule) .*|\| ---.*)$", re.MULTILINE)
    assert heads.findall(text) == heads.findall(committed)
    images = re.findall(r"\((images/.+?)\)", committed)
    assert len(images) == 16
    for image in images:
        drawn = (tmp_path / image).read_text(encoding="utf-8")
        assert titles(drawn) == titles((PAGE.parent / image).read_text(encoding="utf-8"))
        assert "polyline" in drawn
        assert "prefers-color-scheme: dark" in drawn
    for name in gallery.RUNS:
        assert (tmp_path / "runs" / name / "report.html").is_file()


def test_a_page_without_a_place_is_noticed(gallery, page):
    page.write_text(page.read_text(encoding="utf-8").replace("<!-- good: report -->", ""), encoding="utf-8")
    with pytest.raises(SystemExit, match="has no place for 'good: report'"):
        gallery.fill(page, {"good: report": "x"})


@pytest.mark.parametrize(("name", "wrong"), WRONG.items())
def test_the_page_says_of_each_run_what_is_wrong(name, wrong):
    text = PAGE.read_text(encoding="utf-8")
    report = text.partition(f"<!-- {name}: report -->")[2].partition("<!-- end -->")[0]
    found = re.findall(r"^\| (.+?) \| \*\*look at this\*\* ", report, flags=re.MULTILINE)
    assert set(wrong) <= set(found)
    assert name != "good" or found == []


@pytest.mark.slow
def test_the_runs_go_wrong_as_the_page_says(gallery, page, tmp_path):
    gallery.make_runs(tmp_path / "runs")
    found = gallery.write_page(tmp_path / "runs", page)
    for name, wrong in WRONG.items():
        signs = [sign.name.split(":")[0] for sign in found[name] if sign.verdict == "wrong"]
        assert set(wrong) <= set(signs)
        assert name != "good" or signs == []
