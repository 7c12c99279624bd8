import json

import pytest
from tiny import WORDS, save_rows, tiny_model, tiny_tokenizer

from trl_promptkd import PrimingTemplate
from trl_promptkd.cli import main
from trl_promptkd.cli.rank_priming import imported, read_texts, verdict
from trl_promptkd.evaluation import answers
from trl_promptkd.generation import store


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny_model(seed=2).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    rows = [{"prompt": " ".join(WORDS[i : i + 3]), "completion": f" {WORDS[i]} {WORDS[i + 1]}"} for i in range(8)]
    save_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "texts.txt").write_text("red red\n\nblue\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(*more):
    sizes = ["--max_new_tokens", "6", "--batch_size", "4"]
    return ["rank-priming", "--model", "teacher", "--dataset", "rows.jsonl", *sizes, *more]


class TestTexts:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.txt", "Go on. \nBe {{ kind }}.\r\n"),
            ("a.yaml", "- Go on.\n- 'Be {{ kind }}.'\n"),
            ("a.jsonl", '"Go on."\n\n{"text": "Be {{ kind }}.\\n"}\n'),
        ],
    )
    def test_a_bare_text_has_a_line_break_before_the_question(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        assert read_texts(str(tmp_path / name), "prefix") == [
            PrimingTemplate("Go on.\n"),
            PrimingTemplate("Be {{ kind }}.\n"),
        ]

    def test_other_placements(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("[Go on., {text: 'Be kind. ', placement: prefix}, {text: ' Go.'}]")
        for placement, first in (("suffix", "\nGo on."), ("system", "Go on.")):
            expected = [(first, placement), ("Be kind. ", "prefix"), (" Go.", placement)]
            assert [(text.text, text.placement) for text in read_texts(str(path), placement)] == expected


class TestCommand:
    def test_table_and_sentence(self, folder, capsys):
        assert main(flags("--texts", "texts.txt", "--priming", "teacher")) == 0
        out, err = capsys.readouterr()
        assert out.startswith("teacher: rougeL, template chat, 8 rows, 1 each at temperature 1.0, seed 10\n")
        table = [line.split("  ")[1].strip() for line in out.splitlines() if " to " in line]
        assert sorted(table) == ["'blue\\n'", "'red red\\n'", "no text", "teacher"]
        assert all(name in out for name in ("score, % (95 %)", "against no text (95 %)", "tokens", "cut, %"))
        assert "With 8 rows, a difference of " in out
        assert "ROUGE-L, as not all right answers end with `#### 18`" in err

    def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_table(self, folder, capsys, monkeypatch):
        sampled = []
        generate = answers.generate_completions

        def counted(model, prompt_ids, *args, **kwargs):
            sampled.append(len(prompt_ids))
            if len(sampled) == killed_at:
                raise KeyboardInterrupt
            return generate(model, prompt_ids, *args, **kwargs)

        monkeypatch.setattr(answers, "generate_completions", counted)
        monkeypatch.setattr(store, "SECONDS_A_PART", 0.0)
        words = flags("--texts", "texts.txt", "--samples", "2", "--json", "--output_dir")
        killed_at = None
        assert main([*words, "whole"]) == 0
        whole, out = sampled[:], capsys.readouterr().out
        assert sum(whole) == 3 * 2 * 8
        sampled.clear()
        killed_at = 6
        with pytest.raises(KeyboardInterrupt):
            main([*words, "killed"])
        sampled.clear()
        killed_at = None
        assert main([*words, "killed"]) == 0
        assert sum(sampled) == sum(whole) - 5 * 4
        assert capsys.readouterr().out == out
        assert (folder / "killed" / "ranking.json").read_text() + "\n" == out
        assert len(json.loads(out)["texts"]) == 3

    def test_a_scorer_of_ones_own_is_found_in_the_current_folder(self, folder, capsys):
        (folder / "my_scores_here.py").write_text(
            "def is_short(answer, row):\n    return len(answer) < len(row['prompt'])\n"
        )
        assert main(flags("--texts", "texts.txt", "--scorer", "my_scores_here:is_short", "--json")) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["scorer"] == "my_scores_here:is_short"
        assert {score for text in result["texts"] for score in text["row_scores"]} <= {0, 1}
        assert imported("os.path:basename")("a/b") == "b"

    def test_a_scorer_that_fails_is_named_with_its_row(self, folder, capsys):
        (folder / "my_failures_here.py").write_text(
            "def fails(answer, row):\n    return row['gold']\n\ndef nan(answer, row):\n    return float('nan')\n"
        )
        for name, says in (
            ("fails", "`scorer` my_failures_here:fails failed on row 0: KeyError: 'gold'. It gets an answer"),
            ("nan", "`scorer` my_failures_here:nan is nan for row 0, whose answer is "),
        ):
            assert main(flags("--texts", "texts.txt", "--scorer", f"my_failures_here:{name}")) == 2
            assert says in capsys.readouterr().err


class TestVerdict:
    def said(self, **text):
        best = {"name": "x", "difference": [12.04, 3.0, 20.0], "p": 0.0123, "placement": "prefix", **text}
        none = {"name": "no text", "difference": None, "p": None}
        return verdict({"rows": 100, "smallest_seen": 11.26, "best": best["name"], "texts": [best, none]})

    def test_the_best_text_comes_with_how_to_use_it(self):
        limit = " With 100 rows, a difference of 11.3 would have been seen four times in five."
        assert self.said(name="teacher") == (
            "teacher is best, +12 against no text (p = 0.012). To use it: `priming: teacher` in a recipe, or "
            "`--priming teacher`." + limit
        )
        said = self.said(name="' Go.\\n'", text=" Go.\n", placement="suffix")
        assert said == (
            "' Go.\\n' is best, +12 against no text (p = 0.012). To use it: `priming_text: \" Go.\\n\"` and "
            "`priming_placement: suffix` in a recipe, or the flags of these names." + limit
        )

    def test_a_text_that_shows_the_right_answer_is_said_to(self):
        said = self.said(name="reference_answer", text="{{ reference_answer }}")
        assert "It shows the teacher the right answer" in said
