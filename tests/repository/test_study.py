"""The study's page says what its committed runs say, and its small world is what the page says of it."""

import importlib
import json
import random
import re
import sys

import pytest
from paths import ROOT


STUDY = ROOT / "benchmarks" / "study"


@pytest.fixture(scope="module")
def study():
    """Import a module of the study, whose scripts import each other by their bare names."""
    known = set(sys.modules)
    sys.path.insert(0, str(STUDY))
    yield importlib.import_module
    sys.path.remove(str(STUDY))
    for name in set(sys.modules) - known:
        if str(STUDY) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def report(study):
    pytest.importorskip("matplotlib")
    return study("report")


@pytest.fixture(scope="module")
def world(study):
    return study("world")


def test_the_pages_tables_are_made_of_the_committed_runs(report, tmp_path):
    text = (report.DOCS / "study.md").read_text(encoding="utf-8")
    page = tmp_path / "study.md"
    page.write_text(text, encoding="utf-8")
    real = json.loads(report.REAL_RESULTS.read_text())
    report.fill(page, report.all_tables(report.Results(report.RESULTS), real))
    assert page.read_text(encoding="utf-8") == text, "run `python benchmarks/study/report.py`"


def test_interval_by_hand(report):
    # Mean 3, variance 10 / 4; Student's t for four degrees of freedom is 2.776
    mean, half = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert report.interval([4.0, 4.0]) == (4.0, 0.0)


def test_differences_are_between_runs_of_the_same_seed(report):
    def run(seed, value):
        return {"name": "x", "settings": {"seed": seed}, "measures": [{"step": 0, "accuracy": value}]}

    found = report.paired([run(0, 0.5), run(2, 0.3), run(7, 0.9)], [run(2, 0.1), run(0, 0.1)], "end", "accuracy")
    assert found == pytest.approx([40.0, 20.0])


def right_steps(answer):
    """Of each step of an answer, whether it is right."""
    steps = re.findall(r"(\d+) ([+-]) (\d+) (?:=|makes) (\d+)", answer)
    return [int(a) + int(sign + b) == int(result) for a, sign, b, result in steps]


class TestWorld:
    def test_a_problems_text_holds_what_it_asks(self, world):
        """Worked out again from the sentences, as a reader would."""
        rng = random.Random(0)
        for _ in range(300):
            problem = world.make_problem(rng)
            thing = re.search(r"how many (\w+) \?", problem.question)[1]
            count = int(re.search(rf"has (\d+) {thing} ", problem.question)[1])
            for verb, amount in re.findall(r"then \w+ (\w+) (\d+) \.", problem.question):
                count += int(amount) if verb in world.GAINS else -int(amount)
                assert 0 <= count < 100
            assert count == problem.result

    @pytest.mark.parametrize("writer", ["careful", "brief"])
    def test_careful_and_brief_answers_are_right(self, world, writer):
        rng = random.Random(1)
        for _ in range(200):
            problem = world.make_problem(rng)
            answer = world.write_answer(problem, writer, rng)
            assert world.said_result(answer) == problem.result
            assert all(right_steps(answer))

    def test_a_pupils_steps_are_wrong_as_often_as_the_page_says(self, world):
        rng = random.Random(2)
        answers = [world.write_answer(world.make_problem(rng), "pupil", rng) for _ in range(2000)]
        steps = [step for answer in answers for step in right_steps(answer)]
        assert 1 - sum(steps) / len(steps) == pytest.approx(0.3, abs=0.02)

    def test_answers_survive_the_tokenizer(self, world):
        tokenizer, rng = world.make_tokenizer(), random.Random(3)
        for _ in range(100):
            problem = world.make_problem(rng)
            ids = tokenizer(f"{problem.question} answer : {world.write_answer(problem, 'careful', rng)}").input_ids
            assert tokenizer.unk_token_id not in ids
            assert world.said_result(tokenizer.decode(ids)) == problem.result
