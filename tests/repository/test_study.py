"""The study's page says what its runs say, and its small world is what the page says of it."""

import json
import random
import re

import pytest


@pytest.fixture(scope="module")
def world(study):
    return study("world")


@pytest.fixture(scope="module")
def report(study):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    return study("report")


class TestPage:
    @pytest.fixture
    def page(self, report):
        return (report.DOCS / "study.md").read_text(encoding="utf-8")

    def test_its_tables_are_made_of_the_committed_runs(self, report, pages, page, tmp_path):
        copy = tmp_path / "study.md"
        copy.write_text(page, encoding="utf-8")
        pages.fill(copy, report.all_tables(report.Runs()))
        assert copy.read_text(encoding="utf-8") == page, "run `python benchmarks/study/report.py`"

    def test_its_numbers_are_those_of_the_runs_and_of_the_set_up(self, report, pages, page):
        said = report.sentences(report.Runs())
        assert pages.missing(page, [*said, *report.SET_UP]) == []
        assert pages.unaccounted(page, [*said, *report.SET_UP]) == ""

    def test_runs_that_are_compared_had_one_teacher(self, report):
        teachers = {
            group: {run["teacher"] for runs in names.values() for run in runs}
            for group, names in report.Runs().groups.items()
        }
        (first,) = teachers["first"]
        assert teachers["tune"] == {first}
        (kept,) = teachers["main"]
        assert teachers["explore"] == teachers["share"] == {kept}
        assert set(json.loads(report.LINES.read_text())) == {first, kept}

    def test_equal_time(self, study):
        """Each method's steps and what comes before them take the time of 120 steps of PromptKD, to a step."""
        run = study("run")
        for name, stages in run.methods(run.BUDGET).items():
            kinds = ["anchored" if stage.get("anchor") else stage["method"] for stage in stages]
            spent = [stage["steps"] * run.COSTS[kind] for stage, kind in zip(stages, kinds, strict=True)]
            before = run.RANKING if "text" in name else 0.0
            before += run.WRITING if "SeqKD" in name else 0.0
            longest = sum(run.COSTS[kind] for kind in kinds)
            assert run.BUDGET - longest <= sum(spent) + before <= run.BUDGET, name


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

    def test_who_may_have_written_an_answer(self, world):
        rng = random.Random(4)
        for _ in range(200):
            problem = world.make_problem(rng)
            assert world.writer_of(world.write_answer(problem, "brief", rng), problem) == "brief"
            assert world.writer_of(world.write_answer(problem, "careful", rng), problem) == "careful"
            slipped = world.write_answer(problem, "pupil", rng)
            right = all(right_steps(slipped)) and world.said_result(slipped) == problem.result
            assert world.writer_of(slipped, problem) == ("careful" if right else "pupil")

    def test_answers_survive_the_tokenizer(self, world):
        tokenizer, rng = world.make_tokenizer(), random.Random(3)
        for _ in range(100):
            problem = world.make_problem(rng)
            ids = tokenizer(f"{problem.question} answer : {world.write_answer(problem, 'careful', rng)}").input_ids
            assert tokenizer.unk_token_id not in ids
            assert world.said_result(tokenizer.decode(ids)) == problem.result
