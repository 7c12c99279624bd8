import json

import numpy as np
import pytest
from datasets import Dataset
from tiny import WORDS, chat_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PrimingTemplate
from trl_promptkd.cli.rank_priming import verdict
from trl_promptkd.data.priming import PRIMING_TEMPLATES
from trl_promptkd.evaluation import evaluate_model, primed_rows, rank_priming
from trl_promptkd.intervals import holm
from trl_promptkd.metrics import instruction_row_scores


RED, BLUE = PrimingTemplate("red red "), PrimingTemplate(" blue", placement="suffix")
SMALL = {"max_new_tokens": 6, "batch_size": 4}


def questions(size=8):
    rows = [{"instruction": " ".join(WORDS[i : i + 3]), "output": " ".join(WORDS[i + 1 : i + 5])} for i in range(size)]
    return Dataset.from_list(rows)


def problems(size=4, mark="#### "):
    return Dataset.from_list([{"question": WORDS[i], "answer": f"one and one {mark}{i}"} for i in range(size)])


def rank(dataset=None, texts=(RED, BLUE), model=None, **settings):
    dataset = questions() if dataset is None else dataset
    return rank_priming(model or tiny_model(), tiny_tokenizer(), dataset, texts, **{**SMALL, **settings})


def by_name(result):
    return {text["name"]: text for text in result["texts"]}


def kept_answers(folder):
    """The lines of each file, by the start of its name and its seed."""
    return {
        tuple(path.name.split("-")[:2]): [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }


def word_share(answer, row):
    """A score of the user's own: how many of the answer's words are in the question."""
    words = answer.split()
    return sum(word in row["instruction"].split() for word in words) / max(len(words), 1)


class TestPrompts:
    def prompts(self, row, texts, template="chat", scorer="rougeL"):
        tokenizer, dataset = tiny_tokenizer(), Dataset.from_list([row, row])
        sets = primed_rows(tokenizer, dataset, texts, scorer, template).sets
        return [tokenizer.decode(rows.prompt_ids[0]) for rows in sets.values()]

    def test_each_text_stands_where_it_says_and_no_text_comes_first(self):
        texts = [RED, BLUE, PrimingTemplate("green", placement="system")]
        row = {"question": "the cat", "answer": "sat"}
        assert self.prompts(row, texts) == [
            "<user> the cat <assistant>",
            "<user> red red the cat <assistant>",
            "<user> the cat blue <assistant>",
            "<system> green <user> the cat <assistant>",
        ]
        assert self.prompts(row, texts[:2], "plain") == ["the cat", "red red the cat", "the cat blue"]

    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            ({"prompt": "the cat", "completion": "sat"}, "sat red the cat"),
            ({"instruction": "the", "input": "cat", "output": ["sat", "on"]}, "<user> sat red the cat <assistant>"),
            ({"instruction": "the", "output": "sat", "messages": []}, "<user> sat red the <assistant>"),
            (chat_dataset(1)[0], "<user> a student red suppose you <assistant>"),
        ],
    )
    def test_a_text_may_use_the_right_answer_and_columns(self, row, prompt):
        text = PrimingTemplate("{{ reference_answer }} {{ color }} ")
        assert self.prompts({**row, "color": "red"}, [text])[1] == prompt

    def test_a_row_that_has_messages_too_is_primed_where_it_is_read(self):
        turns = [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "mat"}]
        row = {"instruction": "the cat", "output": "sat", "messages": turns}
        assert self.prompts(row, [RED]) == ["<user> the cat <assistant>", "<user> red red the cat <assistant>"]

    def test_rows_that_are_too_long_with_any_text_are_left_out_with_all(self):
        rows = [{"prompt": "the " * n, "completion": "a", "number": n} for n in (1, 5, 2, 4)]
        found = primed_rows(tiny_tokenizer(), Dataset.from_list(rows), [RED], max_prompt_length=6)
        assert [[len(ids) for ids in one.prompt_ids] for one in found.sets.values()] == [[1, 2, 4], [3, 4, 6]]
        assert [row["number"] for row in found.rows] == [1, 2, 4]
        assert [one.left_out for one in found.sets.values()] == [1, 1]

    def test_without_texts_all_built_in_ones_are_compared_and_none_twice(self):
        found = primed_rows(tiny_tokenizer(), questions())
        assert list(found.sets) == [None, *PRIMING_TEMPLATES.values()]
        found = primed_rows(tiny_tokenizer(), questions(), ["teacher", None, RED, PRIMING_TEMPLATES["teacher"]])
        assert list(found.sets) == [None, PRIMING_TEMPLATES["teacher"], RED]

    def test_a_scorer_of_ones_own_needs_no_right_answers(self):
        dataset = Dataset.from_list([{"prompt": "the cat"}, {"prompt": "a dog"}])
        assert primed_rows(tiny_tokenizer(), dataset, [RED], word_share).sets[RED].references == [[], []]
        with pytest.raises(ValueError, match="its right answer is None"):
            primed_rows(tiny_tokenizer(), dataset, [RED], "rougeL")

    @pytest.mark.parametrize(
        ("dataset", "scorer"), [(problems(), "gsm8k"), (problems(mark=""), "rougeL"), (questions(), "rougeL")]
    )
    def test_the_scorer_is_chosen_by_the_right_answers(self, dataset, scorer):
        assert primed_rows(tiny_tokenizer(), dataset, [RED]).scorer == scorer


class TestScores:
    def test_are_those_of_the_kept_answers(self, tmp_path):
        result = rank(samples=2, seed=3, output_dir=str(tmp_path))
        files, tokenizer = kept_answers(tmp_path), tiny_tokenizer()
        assert len(files) == 6
        references = [[row["output"]] for row in questions()]
        starts = {"no text": "no_text", "'red red '": "_red_red__", "' blue' (suffix)": "__blue___suffix_"}
        for name, start in starts.items():
            found = by_name(result)[name]
            samples = [[line["completion"] for line in files[start, f"seed{seed}"]] for seed in (3, 4)]
            assert samples[0] != samples[1]
            scores = [[row["rougeL"] for row in instruction_row_scores(texts, references)] for texts in samples]
            assert found["row_scores"] == pytest.approx(np.mean(scores, axis=0))
            assert found["score"][0] == pytest.approx(np.mean(scores))
            lines = [line for seed in (3, 4) for line in files[start, f"seed{seed}"]]
            assert found["cut"] == pytest.approx(sum(not line["ended"] for line in lines) / 16)
            lengths = [len(tokenizer(line["completion"])["input_ids"]) for line in lines]
            assert found["length"] == pytest.approx(np.mean(lengths))
        assert max(found["score"][0] for found in result["texts"]) > 0

    @pytest.mark.parametrize(
        ("scorer", "expected"), [("gsm8k", [0, 100, 100, 100]), ("exact_match", [0, 0, 100, 100])]
    )
    def test_of_other_metrics(self, scorer, expected, monkeypatch):
        dataset = Dataset.from_list([{"question": WORDS[i], "answer": "#### 1" if i % 2 else "2"} for i in range(4)])
        answers = ["1", "It is 1", "2", "#### 1"]
        monkeypatch.setattr("trl_promptkd.evaluation.ranking.judged_texts", lambda *_: answers)
        assert by_name(rank(dataset, scorer=scorer))["no text"]["row_scores"] == expected

    def test_without_a_text_they_are_those_of_evaluate_model(self):
        result = by_name(rank(seed=20))["no text"]
        expected = evaluate_model(tiny_model(), tiny_tokenizer(), {"a": questions()}, seeds=[20], **SMALL)["sets"]["a"]
        assert result["score"][0] == pytest.approx(expected["mean"]["rougeL"])
        assert result["cut"] == pytest.approx(1 - expected["terminated_share"])

    def test_a_texts_answers_are_drawn_from_the_random_states_of_no_text(self, monkeypatch):
        seen = []

        def write(model, tokenizer, rows, config, row_seeds, *others):
            seen.append(row_seeds)
            return [{"row": i, "prompt": "", "completion": "a", "ended": True} for i in range(len(rows.prompt_ids))]

        monkeypatch.setattr("trl_promptkd.evaluation.ranking.write_answers", write)
        rank(samples=2)
        assert seen[0::2] == [seen[0]] * 3
        assert seen[1::2] == [seen[1]] * 3
        assert seen[0] != seen[1]

    def test_a_scorer_of_ones_own_gets_answer_and_row(self, tmp_path):
        result = rank(scorer=word_share, output_dir=str(tmp_path))
        lines = kept_answers(tmp_path)["no_text", "seed10"]
        expected = [word_share(line["completion"], row) for line, row in zip(lines, questions(), strict=True)]
        assert by_name(result)["no text"]["row_scores"] == pytest.approx(expected)
        assert any(expected)
        assert result["scorer"].endswith(":word_share")


class TestRanking:
    def made_up(self, scores, **settings):
        """A ranking of texts whose answers have these scores, the first those of no text."""
        left = iter(scores)
        size = len(scores[0])
        dataset = Dataset.from_list([{"prompt": "the cat", "number": i} for i in range(size)])
        current = []

        def score(answer, row):
            if row["number"] == 0:
                current[:] = next(left)
            return current[row["number"]]

        texts = [PrimingTemplate(f"{WORDS[i]} ") for i in range(len(scores) - 1)]
        return rank(dataset, texts, scorer=score, max_new_tokens=1, num_rows=size, **settings)

    def test_order_differences_intervals_and_p_values(self):
        stats = pytest.importorskip("scipy.stats")
        generator = np.random.default_rng(0)
        none = generator.normal(size=60)
        scores = [none, none + generator.normal(0.1, 0.5, 60), none + generator.normal(0.6, 0.5, 60), none - 0.05]
        result = self.made_up(scores)
        assert [text["name"] for text in result["texts"]] == ["'you '", "'suppose '", "no text", "'are '"]
        assert result["best"] == "'you '"
        found, p_values = by_name(result), []
        for name, other in zip(("'suppose '", "'you '", "'are '"), scores[1:], strict=True):
            test = stats.ttest_rel(other, none)
            limits = test.confidence_interval(0.95)
            expected = ((other - none).mean(), limits.low, limits.high)
            assert found[name]["difference"] == pytest.approx(expected, abs=0.015)
            p_values.append(test.pvalue)
        corrected = [found[name]["p"] for name in ("'suppose '", "'you '", "'are '")]
        assert corrected == pytest.approx(holm(p_values), abs=0.02)
        half = 1.96 * none.std() / 60**0.5
        expected = (none.mean(), none.mean() - half, none.mean() + half)
        assert found["no text"]["score"] == pytest.approx(expected, abs=0.05)
        assert [found["no text"][name] for name in ("difference", "p", "text", "placement")] == [None] * 4
        widest = max((other - none).std(ddof=1) for other in scores[1:]) / 60**0.5
        # Quantiles of the normal distribution at 1 - 0.025 / 3 and at 0.8
        assert result["smallest_seen"] == pytest.approx((2.394 + 0.842) * widest, rel=1e-3)

    def test_noise_makes_no_text_the_best(self):
        generator = np.random.default_rng(1)
        result = self.made_up(generator.normal(size=(3, 40)).tolist())
        assert result["best"] is None
        said = verdict(result)
        assert said.startswith("No text is better than none here. With 40 rows, a difference of ")
        assert f"{result['smallest_seen']:.3g}" in said

    def test_a_text_that_is_surely_worse_is_not_the_best(self):
        result = self.made_up([[1.0] * 30, [0.0] * 30])
        assert result["best"] is None
        assert by_name(result)["'suppose '"]["p"] < 0.001

    def test_equal_scores_say_nothing(self):
        result = self.made_up([[1.0] * 5, [1.0] * 5])
        assert result["smallest_seen"] is None
        assert verdict(result) == "No text changed a score on these 5 rows. Choose another scorer, or other rows."
