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

    @pytest.fixture
    def real(self, report, study):
        return study("report_real")

    def test_its_tables_are_made_of_the_committed_runs(self, report, real, pages, page, tmp_path):
        copy = tmp_path / "study.md"
        copy.write_text(page, encoding="utf-8")
        pages.fill(copy, report.all_tables(report.Runs()))
        pages.fill(copy, real.real_tables(real.RealRuns()))
        assert copy.read_text(encoding="utf-8") == page, "run `python benchmarks/study/report.py`"

    def test_its_numbers_are_those_of_the_runs_and_of_the_set_up(self, report, real, pages, page):
        said = [*report.sentences(report.Runs()), *real.real_sentences(real.RealRuns())]
        assert pages.missing(page, [*said, *report.SET_UP]) == []
        assert pages.unaccounted(page, [*said, *report.SET_UP]) == ""

    def test_a_text_is_ranked_by_all_lines_but_the_empty_one(self, report):
        runs = report.Runs()
        some = report.texts(runs)
        lines = report.teacher_lines(runs)["main"]
        assert {text.line for text in some} == lines.keys() - {""}
        assert len(report.steps_shown(some)) == len(some) - 2
        of_teachers, of_students = report.gains(runs, some)
        assert of_teachers == sorted(of_teachers, reverse=True)
        gkd = {run["settings"]["seed"]: run["end"]["sampled_accuracy"] for run in runs["main"]["GKD"]}
        by_hand = [run["end"]["sampled_accuracy"] - gkd[run["settings"]["seed"]] for run in some[0].students]
        assert of_students[0] == pytest.approx(100 * sum(by_hand) / len(by_hand))

    def test_students_of_a_mode_had_its_answers(self, report):
        writers = {"mixed": "gold", "careful": "careful", "pupil": "pupil"}
        for mode, named in report.by_mode(report.Runs()).items():
            for name, runs in named.items():
                settings = [run["settings"] for run in runs]
                assert [one["writer"] for one in settings] == [writers[mode]] * 3, name
                assert [one["seed"] for one in settings] == [210, 211, 212], name

    def test_a_text_was_a_clear_gain_on_the_real_model_and_a_prompt_was_not(self, real):
        """What the first lines of the study, README and the home page say."""
        runs = real.RealRuns()
        text, prompt = (runs.difference(name, "GKD", "rougeL") for name in ("GKD, fixed text", "PromptKD"))
        assert text.mean - text.half > 0
        assert prompt.mean - prompt.half < 0 < prompt.mean + prompt.half
        bold = real.real_against_table(runs, "GKD").splitlines()[2]
        assert bold.startswith(f"| GKD, fixed text | **+{text.mean:.1f}")

    def test_the_real_students_got_worse_by_following_their_teacher(self, real):
        runs = real.RealRuns()
        for name in runs.methods.keys() - {"SFT"}:
            found = runs.difference(name, real.START, "rougeL")
            assert found.mean + found.half < 0, name

    def test_runs_that_are_compared_had_one_teacher(self, report):
        teachers = {
            group: {run["teacher"] for runs in names.values() for run in runs}
            for group, names in report.Runs().groups.items()
        }
        (first,) = teachers["first"]
        assert teachers["tune"] == {first}
        (kept,) = teachers["main"]
        assert all(teachers[group] == {kept} for group in ("explore", "share", "texts", "modes"))
        assert set(json.loads(report.LINES.read_text())) == {first, kept}

    def test_equal_time(self, study):
        """Each method's steps and what comes before them take the time of 120 steps of PromptKD, to a step."""
        run = study("run")
        for name, stages in [*run.methods(run.BUDGET).items(), *run.of_modes(run.BUDGET).items()]:
            kinds = ["anchored" if stage.get("anchor") else stage["method"] for stage in stages]
            kinds = ["gkd"] if name == run.FROZEN else kinds  # its prompt takes no time
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
