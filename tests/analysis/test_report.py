import json
import pickle
import re
from html.parser import HTMLParser

import pandas
import pytest
import torch

from trl_promptkd.analysis.report import read_run, report_page
from trl_promptkd.cli import main


NAMES = ("kl/prompt_gain", "kl/prompted_plain", "kl/student_plain", "rollout/terminated_share", "entropy/student")
LOGS = {
    "good": ([(0.02, 0.05, 1.2, 0.8, 2.0), (0.08, 0.1, 0.7, 0.9, 1.8)], [(2.0, 1.2), (1.6, 0.7)]),
    "colluding": ([(0.02, 0.05, 1.2, 0.8, 2.0), (0.67, 0.83, 0.85, 0.9, 1.2)], []),
    "collapsed": ([(0.02, 0.05, 1.2, 0.8, 2.0), (0.08, 0.1, 0.7, 0.9, 1.8)], [(11.8, 1.2), (15.4, 0.8)]),
}


def write_state(folder, history, step=20, **state):
    folder.mkdir(parents=True, exist_ok=True)
    state = {"log_history": history, "global_step": step, "max_steps": 20, "train_batch_size": 2, **state}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def write_samples(folder, step=10, **columns):
    (folder / "completions").mkdir(exist_ok=True, parents=True)
    known = {"step": step, "prompt": ["who", "what", "where", "when"], "completion": list("abcd")}
    table = pandas.DataFrame({**known, **columns})
    table.to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")


def log_of(kind):
    steps, sides = LOGS[kind]
    history = [{"step": 10 * i, **dict(zip(NAMES, step, strict=True))} for i, step in enumerate(steps, 1)]
    for i, (forward, reverse) in enumerate(sides, 1):
        history.append({"step": 10 * i, "eval_forward_kl": forward, "eval_reverse_kl": reverse})
    return history


def page_of(folder):
    return report_page(read_run(str(folder)))[0]


class Page(HTMLParser):
    """Checks that tags are closed, and collects texts by tag and what a browser would fetch or run."""

    EMPTY = ("meta", "line", "polyline", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.outside, self.tags = [], {}, [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        outside = {"src", "href", "style"}.intersection(name for name, _ in attributes)
        if outside or tag in ("script", "img", "link", "iframe", "object"):
            self.outside.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def verdicts(page):
    found = re.findall(r'<li class="(\w+)"><h3><b>.*?</b>([\w ]+)', page)
    return {name: verdict for verdict, name in found}


class TestReport:
    @pytest.mark.parametrize(
        ("kind", "wrong"), [("good", []), ("colluding", ["Collusion"]), ("collapsed", ["Collapse"])]
    )
    def test_says_what_looks_wrong(self, tmp_path, kind, wrong):
        found = verdicts(page_of(write_state(tmp_path, log_of(kind))))
        assert list(found) == ["Collusion", "Collapse", "Cut answers", "Short answers given up"]
        assert [name for name, verdict in found.items() if verdict == "wrong"] == wrong

    def test_is_one_page_that_fetches_and_runs_nothing(self, tmp_path):
        write_samples(tmp_path, completion=["<script>alert(1)</script>", "<b>", "&amp;", "{{ 7 * 7 }}"])
        (tmp_path / "README.md").write_text("## Settings\n\n| `beta` | `<i>1</i>` |\n")
        page = page_of(write_state(tmp_path, [*log_of("good"), {"step": 20, "<img src=x>": 1.0}]))
        parsed = Page(page)
        assert parsed.outside == []
        assert "http" not in page.replace("http-equiv", "")
        assert parsed.texts["pre"][1::2] == ["<script>alert(1)</script>", "<b>", "&amp;", "{{ 7 * 7 }}"]
        assert "<i>1</i>" in parsed.texts["td"]
        assert "<img src=x>" in parsed.texts["td"]

    def test_works_for_runs_of_both_trainers(self, make, tmp_path):
        source = {} if make.method == "promptkd" else {"response_source": "student"}
        saves = {"save_strategy": "steps", "save_steps": 3}
        trainer = make(max_steps=3, log_completions=True, num_completions_to_print=0, **saves, **source)
        trainer.train()
        page = page_of(trainer.args.output_dir)
        parsed = Page(page)
        assert {"promptkd": "PromptKD", "primed": "response priming"}[make.method] in page
        titles = parsed.texts["h3"]
        wanted = ["Distance to the teacher, in training", "Entropies", "Length of samples", "Cut samples", "Loss"]
        if make.method == "promptkd":
            wanted += ["Gain and distance of the prompted teacher", "Drift of the soft prompt"]
        assert set(wanted) <= set(titles)
        assert [title for title in titles if title.startswith("Step ")] == ["Step 1", "Step 2", "Step 3"]
        last = trainer.state.log_history[2]["rollout/terminated_share"]
        assert f"cut at max_new_tokens: {1 - last:.4g}" in page
        assert "max_new_tokens" in parsed.texts["td"]  # of the card's settings

    def test_opens_no_pickle(self, promptkd, monkeypatch):
        trainer = promptkd(save_strategy="steps", save_steps=1)
        trainer.train()

        def refuse(*args, **kwargs):
            raise AssertionError("a pickle was opened")

        for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
            monkeypatch.setattr(module, name, refuse)
        assert "PromptKD" in page_of(trainer.args.output_dir)

    def test_of_a_checkpoint_ends_at_its_step(self, tmp_path):
        for step in (10, 20):
            write_state(tmp_path / f"checkpoint-{step}", log_of("good")[: step // 10], step)
            write_samples(tmp_path, step)
        assert "step 20 of 20" in page_of(tmp_path)
        page = page_of(tmp_path / "checkpoint-10")
        assert "step 10 of 20" in page
        assert "Step 20" not in page
        assert f"<h1>{tmp_path.name}/checkpoint-10</h1>" in page

    def test_shows_samples_of_three_moments(self, tmp_path):
        for step in range(1, 6):
            write_samples(tmp_path, step, completion=[f"{step}{letter}" for letter in "abcd"])
        page = page_of(write_state(tmp_path, [{"step": step, "loss": 1.0} for step in range(1, 6)]))
        assert re.findall(r"<h3>Step (\d+)</h3>", page) == ["1", "3", "5"]
        assert all(f"<pre>3{letter}</pre>" in page for letter in "abcd")
        assert "<pre>2a</pre>" not in page

    def test_leaves_out_samples_of_an_earlier_run_in_the_same_folder(self, tmp_path):
        for step in (2, 3, 4):
            write_samples(tmp_path, step, completion=[f"{step}{letter}" for letter in "abcd"])
        page = page_of(write_state(tmp_path, [{"step": step, "loss": 1.0} for step in (3, 6)]))
        assert re.findall(r"<h3>Step (\d+)</h3>", page) == ["3"]

    def test_takes_whatever_columns_there_are(self, tmp_path):
        write_samples(tmp_path, 1, length=[3, 4, 5, 6], ended=[True, False, True, True], score=[0.5, None, 1, 2])
        page = page_of(write_state(tmp_path, [{"step": 1, "mine": 1.0, "text": "x"}, {"step": 2, "mine": 3.0}]))
        assert "length 3 · ended · score 0.5" in page
        assert "length 4 · cut · score nan" in page
        assert re.search(r"<td>mine</td><td[^>]*>1</td><td[^>]*>3</td>", page)

    def test_long_samples_are_cut(self, tmp_path):
        write_samples(tmp_path, completion=["a" * 5000, "b", "c", "d"])
        page = page_of(write_state(tmp_path, log_of("good")))
        assert "a" * 1500 + " ... (3500 letters more)</pre>" in page
        assert "a" * 1501 not in page

    def test_without_samples_and_settings_says_so(self, tmp_path):
        page = page_of(write_state(tmp_path, [], max_steps=None, train_batch_size=None))
        assert "<code>log_completions=True</code> keeps them" in page
        assert "None are saved beside the run" in page
        assert "Nothing was logged" in page


class TestCharts:
    def test_draw_each_series_within_its_frame(self, tmp_path):
        history = [{"step": i, "loss": value, "kl/student_plain": 2.0} for i, value in enumerate((3.0, -1.0, 7.0))]
        parsed = Page(page_of(write_state(tmp_path, history)))
        lines = [tag["points"] for name, tag in parsed.tags if name == "polyline"]
        assert len(lines) == 2
        for line in lines:
            places = [tuple(map(float, place.split(","))) for place in line.split()]
            assert len(places) == 3
            assert all(0 <= x <= 360 and 0 <= y <= 190 for x, y in places)
        heights = [float(place.split(",")[1]) for place in lines[1].split()]
        assert heights[2] < heights[0] < heights[1]  # up is more

    def test_leave_out_what_is_not_finite(self, tmp_path):
        history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": float("inf")}]
        page = page_of(write_state(tmp_path, history))
        assert "<circle" in page  # one value is a dot
        assert "nan" not in page

    def test_show_every_evaluation_set(self, tmp_path):
        history = [{"step": 1, "eval_a_forward_kl": 1.0, "eval_b_forward_kl": 2.0}]
        page = page_of(write_state(tmp_path, history))
        assert "KL(teacher ‖ student), on answers (a): 1<" in page
        assert "KL(teacher ‖ student), on answers (b): 2<" in page

    def test_more_lines_than_colours_are_more_charts(self, tmp_path):
        history = [{"step": 1, **{f"eval_{name}_{side}_kl": 1.0 for name in "abc" for side in ("forward", "reverse")}}]
        page = page_of(write_state(tmp_path, history))
        for name in "abc":
            assert f"on answers ({name})" in page
            assert f"samples ({name})" in page

    def test_show_every_teacher(self, tmp_path):
        history = [{"step": 1, "kl/student_teacher": 1.5, "kl/student_teacher/a": 1.0, "kl/student_teacher/b": 2.0}]
        page = page_of(write_state(tmp_path, history))
        assert "(a): 1<" in page
        assert "(b): 2<" in page

    def test_of_long_runs_stay_small(self, tmp_path):
        history = [{"step": i, "loss": 1 / (i + 1)} for i in range(100_000)]
        page = page_of(write_state(tmp_path, history))
        assert len(page) < 30_000
        assert f"loss: {1 / 100_000:.4g}" in page


class TestCommand:
    def test_writes_the_page_and_prints_what_looks_wrong(self, tmp_path, capsys):
        write_state(tmp_path, log_of("colluding"))
        assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("Collusion: the soft prompt follows the student. At step 20")
        assert "Cut answers" not in printed
        assert (tmp_path / "page.html").read_text(encoding="utf-8") == page_of(tmp_path)

    @pytest.mark.parametrize(
        ("prepare", "message"),
        [
            (lambda folder: None, "holds no run"),
            (lambda folder: (folder / "trainer_state.json").write_text("{"), "is not JSON"),
            (lambda folder: (folder / "trainer_state.json").write_text("[]"), "does not hold a dict"),
            (lambda folder: write_state(folder, None), "it has no log"),
            (
                lambda folder: [write_state(folder, []), write_samples(folder), _spoil(folder)],
                "completions_00010.parquet cannot be read",
            ),
            (
                lambda folder: [write_state(folder, []), _other_table(folder)],
                "holds no samples of a run",
            ),
        ],
    )
    def test_refuses_what_is_no_run(self, tmp_path, capsys, prepare, message):
        prepare(tmp_path)
        assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "page.html").exists()


def _spoil(folder):
    (folder / "completions" / "completions_00010.parquet").write_bytes(b"PAR1 no more")


def _other_table(folder):
    (folder / "completions").mkdir()
    pandas.DataFrame({"a": [1]}).to_parquet(folder / "completions" / "other.parquet")
