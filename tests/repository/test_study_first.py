"""The first study's page says what its committed runs say: its tables, and every number in its sentences."""

import json

import pytest


pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def runs(study):
    return study("runs_first")


@pytest.fixture(scope="module")
def report(study):
    return study("report_first")


@pytest.fixture(scope="module")
def said(study):
    return study("sentences_first")


@pytest.fixture(scope="module")
def found(runs):
    return runs.Results(), json.loads(runs.REAL_RESULTS.read_text())


@pytest.fixture(scope="module")
def page(pages):
    return (pages.DOCS / "study_first.md").read_text(encoding="utf-8")


class TestPage:
    def test_its_tables_are_made_of_the_committed_runs(self, pages, report, found, page, tmp_path):
        copy = tmp_path / "study_first.md"
        copy.write_text(page, encoding="utf-8")
        pages.fill(copy, report.all_tables(*found))
        assert copy.read_text(encoding="utf-8") == page, "run `python benchmarks/study/report_first.py`"

    def test_its_sentences_say_what_the_runs_say(self, pages, said, found, page):
        assert pages.missing(page, said.sentences(*found)) == []

    def test_no_number_is_there_that_nothing_accounts_for(self, pages, said, found, page):
        assert pages.unaccounted(page, said.known(*found)) == ""

    def test_the_set_up_is_all_on_it(self, pages, said, page):
        assert [fact for fact in said.SET_UP if fact not in pages.prose(page)] == []

    def test_another_number_in_a_sentence_is_noticed(self, pages, said, found, page):
        wrong = page.replace("r = -0.84", "r = -0.94")
        assert wrong != page
        assert [sentence[:9] for sentence in pages.missing(wrong, said.sentences(*found))] == ["r = -0.84"]
        assert "r = -0.94" in pages.unaccounted(wrong, said.known(*found))

    def test_another_number_in_a_table_that_is_not_drawn_is_noticed(self, pages, said, found, page):
        wrong = page.replace("dearer in these runs, by half", "dearer in these runs, by 60 %")
        assert "by 60 %" in pages.unaccounted(wrong, said.known(*found))


def run(seed=0, *entries, **settings):
    return {"name": "x", "settings": {"seed": seed, **settings}, "measures": list(entries)}


class TestMeasures:
    def test_per_answer_is_the_mean_over_answers(self, runs):
        """Two answers of 2 and 6 tokens: KLs (1, 3) and six times 0.5 are 4 and 3 nats, 7 nats over 8 tokens."""
        entry = {"reverse_kl": 7 / 8, "mean_length": 4.0}
        assert runs.value(entry, "reverse_kl_answer") == pytest.approx(3.5)

    def test_shares_are_percent(self, runs):
        assert runs.value({"accuracy": 0.25, "forward_kl": 0.25}, "accuracy") == 25
        assert runs.value({"accuracy": 0.25, "forward_kl": 0.25}, "forward_kl") == 0.25

    def test_differences_are_between_runs_of_the_same_seed(self, runs):
        mine = [run(seed, {"accuracy": value}) for seed, value in ((0, 0.5), (2, 0.3), (7, 0.9))]
        others = [run(seed, {"accuracy": value}) for seed, value in ((2, 0.1), (0, 0.2))]
        assert runs.pairs(mine, others, "end", "accuracy") == ([50.0, 30.0], [20.0, 10.0])
        assert runs.difference(mine, others, "end", "accuracy").mean == pytest.approx(25.0)

    def test_moments(self, runs):
        entries = [{"step": step, "seconds": step / 4, "accuracy": step / 1000} for step in (0, 100, 121, 200)]
        gkd = run(0, *entries)
        promptkd = gkd | {"name": "PromptKD"}
        when = ("start", "steps", "time", "end")
        assert [runs.at(gkd, one, "step") for one in when] == [0, 200, 121, 200]
        assert [runs.at(promptkd, one, "step") for one in when] == [0, 200, 100, 200]

    def test_gain_is_what_the_prompt_takes_away(self, runs):
        assert runs.gain_share(run(0, {"reverse_kl": 0.8, "reverse_kl_prompted": 0.2})) == pytest.approx(0.75)


class TestWarning:
    def test_both_shares_are_the_smaller_one(self, runs):
        log = [
            {"kl/prompt_gain": gain, "kl/prompted_plain": moved, "kl/student_plain": 0.5}
            for gain, moved in ((0.1, 0.4), (0.3, 0.05))
        ]
        assert runs.both_shares([*log, {"loss": 1.0}]) == pytest.approx([0.2, 0.1])

    def test_the_first_entry_does_not_count(self, report):
        assert report.first_warning([0.5, 0.2, 0.3, 0.6]) == 3
        assert report.first_warning([0.5, 0.29]) is None


def test_holm_is_over_the_whole_table(pages):
    """p = 0.02 alone, but 0.04 of two tests and 0.06 of three."""

    def one(p):
        return ("accuracy", pages.Difference(5.0, 4.0, p, 5))

    assert pages.with_holm([[one(0.02)], [one(0.9)]]) == [["**+5.0 ± 4.0**"], ["+5.0 ± 4.0"]]
    assert pages.with_holm([[one(0.02), one(0.9)], [one(0.8)]]) == [["+5.0 ± 4.0", "+5.0 ± 4.0"], ["+5.0 ± 4.0"]]
