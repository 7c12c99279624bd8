# ruff: noqa: RUF001  the texts of other scripts are meant
import json
import math
import os
import string
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy
import pytest
from fuzzing import SECONDS, fuzz
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from trl_promptkd import metrics
from trl_promptkd.metrics import (
    RULES,
    extract_final_number,
    gsm8k_accuracy,
    gsm8k_row_scores,
    instruction_row_scores,
    instruction_scores,
    normalized,
    reference_number,
    without_thoughts,
)


# Real data are looked for here; without them, the tests that need them are skipped
DATA = Path(os.environ.get("TRL_PROMPTKD_DATA", ROOT.parent / "shared" / "data"))


def real_rows(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there (TRL_PROMPTKD_DATA names the folder)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestWithoutThoughts:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("18", "18"),
            ("", ""),
            ("<think>3 or 4?</think>18", "18"),
            ("<think>\n\n</think>\n\n18", "18"),
            ("<think>a</think>18<think>b</think>eggs", "18 eggs"),
            ("<think>a", ""),
            ("<think>a</think>18<think>b", "18"),
            ("opened in the prompt</think>18", "18"),
            ("opened in the prompt</think>\n<think>again</think>18", "18"),
            ("<think>a<think>b</think>c</think>18", "18"),
            ("<think>I close it with </think>, no: </think>18", "18"),
            ("I think <b>18</b>", "I think <b>18</b>"),
        ],
    )
    def test_what_remains(self, text, answer):
        assert without_thoughts(text).split() == answer.split()
        assert without_thoughts(" a\n\n b ") == " a\n\n b "


# ------------------------------------------------------------------------------------------------ final numbers

PAPER = [
    # 1. The first box with a number
    (r"So she makes $\boxed{18}$. That is for 3 days.", 18),
    (r"\boxed{18\text{ dollars}}", 18),
    (r"\boxed{\text{18 eggs}}", 18),
    (r"\boxed{\$1,234.50}", 1234.5),
    (r"\boxed{x = -7}", -7),
    (r"\boxed{\frac{1}{2}}", 0.5),
    (r"\boxed{-\dfrac{3}{4}}", -0.75),
    (r"\boxed{3/4}", 0.75),
    (r"\boxed {18}", 18),
    (r"\boxed{18", 18),
    (r"\boxed{} and \boxed{\frac{1}{0}} and \boxed{18} and \boxed{3}", 18),
    ("16\nThe answer is 17, \\boxed{18}", 18),
    ("\\boxed{none}\nThe answer is 5. Not 6.", 5),
    # 2. The first line, if its numbers are all equal
    ("18", 18),
    ("#### 18", 18),
    ("  \n18\n3", 18),
    ("$22.00. \n## Step 1: There are 16 eggs.", 22),
    ("18 18.0 $18\n3", 18),
    ("She has 16 eggs.\nShe eats 3.", 16),
    ("no number here\n3, 4", 4),
    # 3. The number after the first statement
    ("3 and 4.\nTHE FINAL ANSWER IS 7. Not 8.", 7),
    ("3 and 4.\nSo the correct answer is: **$7**, not 8", 7),
    ("3 and 4.\nThe final answer is\n\n7\n\nof 8", 7),
    ("3 and 4. The answer is 7. Question: 5 or 6? The answer is 8.", 7),
    ("3 and 4. The answer is not known.", 4),
    # 4. The last number
    ("16 - 3 - 4 = 9\n9 * 2 = 18", 18),
    ("16 and 7\n#### 18", 18),
    ("3, 4 and 1,234.50 dollars", 1234.5),
    ("3 or \u20ac 5,000", 5000),
    ("3 or -3", -3),
    ("3 or \u22123", -3),
    ("3 or -$3.50", -3.5),
    ("3 or .5", 0.5),
    ("3 or $.5", 0.5),
    ("16-7", 7),
    ("(9)-7", 7),
    ("16 - 7", 7),
    ("18,20", 20),
    ("3, 1,234,567", 1234567),
    ("1,2345", 2345),
    ("3 or 1.2.", 1.2),
    ("5 of 25%", 25),
    # None of them
    ("", None),
    ("eighteen", None),
    ("The answer is", None),
    ("inf, NaN, \u0661\u0668", None),
    ("9" * 400, None),
    # Thoughts
    ("<think>3\n\\boxed{4}</think>\n\n18 eggs", 18),
    ("16 or 3 </think> 18", 18),
    ("<think>The answer is 18.", None),
]
HARNESS = [  # text, strict, flexible
    ("16 - 7 = 9\n#### 18", 18, 18),
    ("#### 1,234.50", 1234.5, 1234.5),
    ("#### -3", -3, -3),
    ("#### 18.", 18, 18),
    ("#### 18\n#### 19", 18, 19),
    ("#### $18", None, 18),
    ("####18", None, 18),
    ("The answer is 18.", None, 18),
    ("It is $5, or 7 eggs.", None, 7),
    ("It is 18. Really...", None, None),  # the last run is the three points
    ("1.2.3", None, None),
    ("none", None, None),
    ("<think>#### 3</think>#### 4", 4, 4),
    ("<think>#### 3", None, None),
]


PIECES = [
    *(
        "1",
        "1,",
        ",111",
        "1.",
        "-",
        "$",
        "1/",
        "#### ",
        "####\n",
        " ",
        "the ",
        "the answer is ",
        "<think>",
        "</think>",
    ),
    *("{", "}", "boxed{", "boxed{}", "boxed{1/0}", "boxed", "\\frac{", "\\frac{1}{", "\\frac{1}{2}", "a."),
]


class TestExtractFinalNumber:
    @pytest.mark.parametrize(("text", "value"), PAPER)
    def test_the_papers_rules(self, text, value):
        assert extract_final_number(text) == value
        assert extract_final_number(text, rule="paper") == value

    @pytest.mark.parametrize(("text", "strict", "flexible"), HARNESS)
    def test_the_harness_rules(self, text, strict, flexible):
        assert extract_final_number(text, rule="strict") == strict
        assert extract_final_number(text, rule="flexible") == flexible

    def test_bad_arguments_are_refused(self):
        with pytest.raises(TypeError, match="An answer is 18, a int; it must be a text"):
            extract_final_number(18)
        with pytest.raises(ValueError, match="`rule` is 'last'; it must be 'strict' or 'flexible' or 'paper'"):
            extract_final_number("18", rule="last")

    @fuzz(400)
    @given(
        st.lists(st.sampled_from([*PIECES, *"2.%\n=", "9" * 400]), max_size=40).map("".join) | st.text(max_size=200),
        st.sampled_from(RULES),
    )
    def test_any_text_gives_a_finite_number_or_none(self, text, rule):
        value = extract_final_number(text, rule)
        assert value is None or (type(value) is float and math.isfinite(value))

    @pytest.mark.parametrize("piece", PIECES)
    def test_long_texts_end_soon(self, piece):
        """Of 100,000 characters: anything that is not linear takes minutes."""
        text = piece * (100_000 // len(piece))
        start = time.process_time()
        for rule in RULES:
            extract_final_number(text, rule)
        gsm8k_row_scores([text], [18])
        with pytest.raises(ValueError, match=r"x is '.*\.\.\., which (holds no finite number|does not say)"):
            reference_number(f"{text} of {text}", "x")
        assert time.process_time() - start < SECONDS


WAYS = (  # to end an answer with a number
    "#### {}",
    "#### {}.",
    "#### {}..",
    "#### ${}",
    "####{}",
    "###  {}",
    "#### {} eggs",
    "#### {}\n\nQuestion: and 5 more?\n#### 5",
    "The answer is {}.",
    "The answer is ${}!",
    "It is -{}",
    "It is {}%, which is more than 3 and less than $.",
    "\\boxed{{{}}}",
    "{}\n",
    "{}, I think...",
    "I cannot tell.",
    "",
)
FORMS = ("{}", "{:,}", "{}.00", "{:,}.5", "0{}", "-{}", "{}{:,}")


def harness_scores(text, gold):
    """What the installed lm_eval makes of one answer, by the filters and the metric of its own task file."""
    import yaml
    from lm_eval import filters, tasks
    from lm_eval.api.metrics import exact_match_fn

    config = harness_scores.__dict__.setdefault(
        "config", yaml.safe_load((Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    )
    (metric,) = config["metric_list"]
    assert metric["metric"] == "exact_match"
    settings = {name: metric[name] for name in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    scores = {}
    for pipeline in config["filter_list"]:
        found = [[text]]
        for step in pipeline["filter"]:
            arguments = {name: value for name, value in step.items() if name != "function"}
            found = list(filters.get_filter(step["function"])(**arguments).apply(found, [{}]))
        scores[pipeline["name"]] = exact_match_fn(predictions=found, references=[gold], **settings)["exact_match"] == 1
    return {"strict": scores["strict-match"], "flexible": scores["flexible-extract"]}


class TestHarness:
    @pytest.mark.slow
    def test_strict_and_flexible_are_lm_evals_to_the_row(self):
        """GSM8K's 1,319 right answers in many forms, right and wrong, by lm_eval's filters and metric and by ours.

        `lm_eval` is in the extra `dev`.
        """
        pytest.importorskip("lm_eval")
        rows = real_rows("gsm8k/test.jsonl")
        assert len(rows) == 1319
        counts = dict.fromkeys(("strict", "flexible"), 0)
        number = 0
        for index, row in enumerate(rows):
            reasoning, _, gold = row["answer"].rpartition("\n#### ")
            right = int(gold.replace(",", ""))
            texts = [row["answer"], reasoning]
            for way in range(len(WAYS)):
                value = right + (index + way) % 3 // 2  # every third one is wrong
                form = FORMS[(index + way) % len(FORMS)] if (index + way) % 2 else FORMS[way % 2]
                ending = WAYS[way].format(form.format(value, value))
                texts.append(ending if (index // 2 + way) % 2 else f"{reasoning}\n{ending}")
            found = gsm8k_row_scores(texts, [row["answer"]] * len(texts))
            for text, ours in zip(texts, found, strict=True):
                theirs = harness_scores(text, row["answer"])
                assert {rule: ours[rule] for rule in theirs} == theirs, (text, row["answer"])
                counts = {rule: counts[rule] + theirs[rule] for rule in counts}
                number += 1
        # Neither rule takes everything or nothing
        assert all(0.1 * number < count < 0.9 * number for count in counts.values())

    def test_strict_and_flexible_take_gsm8ks_own_answers(self):
        answers = [row["answer"] for row in real_rows("gsm8k/test.jsonl")]
        scores = gsm8k_accuracy(answers, answers)
        assert (scores["strict"], scores["flexible"]) == (100, 100)


# ------------------------------------------------------------------------------------------------ scores


class TestInstructionScores:
    def test_by_hand(self):
        """the cat sat / the cat: 2 words of 3 and 2, F = 2 * (2/3 * 1) / (2/3 + 1) = 0.8; equal: 1; nothing: 0."""
        scores = instruction_scores(
            ["The cat sat", "  A, dog!", "", "red"], [["the cat", "x"], ["a dog"], ["blue"], ["green", "blue"]]
        )
        assert scores == pytest.approx({"rougeL": (80 + 100) / 4, "exact_match": 25.0})
        assert instruction_scores(["running dogs"], [["run dog"]])["rougeL"] == 100  # the stemmer is on

    def test_each_metric_takes_its_own_best_reference(self):
        rows = instruction_row_scores(["a b c d"], [["a b c d e", "A B, C D."]])
        assert rows == [{"rougeL": pytest.approx(100), "exact_match": 100.0}]

    def test_thoughts_do_not_count_in_predictions_and_references_stay_as_they_are(self):
        (row,) = instruction_row_scores(["<think>a dog</think>the cat"], [["<think>a</think> the cat"]])
        # the cat / think a think the cat: 2 of 2 and 2 of 5 words, F = 4 / 7
        assert row == {"rougeL": pytest.approx(400 / 7), "exact_match": 0}

    @pytest.mark.parametrize(
        ("predictions", "references", "error", "message"),
        [
            (["a"], [["a"], ["b"]], ValueError, "There are 1 `predictions` and 2 `references`"),
            ([], [], ValueError, "There are 0 `predictions` and 0 `references`"),
            (["a"], ["a"], TypeError, r"`references\[0\]` is 'a', a str; it must be a list of texts. Write \[text\]"),
            (["a", "b"], [["a"], []], ValueError, r"`references\[1\]` is empty"),
            (["a"], [[1]], TypeError, r"`references\[0\]` is \[1\], a list; it must be a list of texts"),
            ([[1, 2]], [["a"]], TypeError, r"`predictions\[0\]` is \[1, 2\], a list; it must be a text. Decode"),
            ("a", [["a"]], TypeError, "`predictions` is 'a', a str; it must be a list"),
        ],
    )
    def test_bad_rows_are_refused(self, predictions, references, error, message):
        with pytest.raises(error, match=message):
            instruction_scores(predictions, references)


TEXTS = {  # a text, its first part, and how many of how many tokens that is
    "Russian": ("Москва — столица России.", "Москва — столица", 2, 3),
    "Ukrainian": ("Їжак п’є молоко", "Їжак", 1, 4),
    "Greek": ("Η Αθήνα είναι όμορφη.", "Η Αθήνα", 2, 4),
    "Hindi": ("दिल्ली भारत की राजधानी है।", "दिल्ली भारत", 2, 5),
    "Bengali": ("ঢাকা বাংলাদেশের রাজধানী", "ঢাকা", 1, 3),
    "Tamil": ("சென்னை தமிழ்நாட்டின் தலைநகரம்", "சென்னை", 1, 3),
    "Arabic": ("القاهِرة عاصمة مصر، أليس كذلك؟", "القاهِرة عاصمة مصر", 3, 5),
    "Persian": ("می‌خواهم بروم", "می‌خواهم", 1, 2),
    "Hebrew": ("ירושלים היא בירת ישראל", "ירושלים היא", 2, 4),
    "Korean": ("서울은 한국의 수도입니다.", "서울은", 1, 3),
    "Amharic": ("አዲስ አበባ።", "አዲስ", 1, 2),
    "Georgian": ("თბილისი დიდია", "თბილისი", 1, 2),
    "Armenian": ("Երևան մեծ է։", "Երևան", 1, 3),
    "Chinese": ("北京是中国的首都。", "北京是", 3, 8),
    "Japanese": ("東京のタワーです。", "東京の", 3, 8),
    "Thai": ("น้ำดี", "น้ำ", 2, 3),  # NFKC writes the vowel of "water" after its consonant
    "Lao": ("ນ້ຳດີ", "ນ້ຳ", 2, 3),
    "Khmer": ("ភាសាខ្មែរ", "ភាសា", 2, 5),
    "Burmese": ("မြန်မာ", "မြန်", 2, 3),
    "mixed": ("Привет, 世界! Running 3.", "Привет, 世界", 3, 5),
    "digits": ("१२ ٣٤ ５６", "१२", 1, 3),
}
FORMS_OF_UNICODE = ("NFC", "NFD", "NFKC", "NFKD")


class TestScripts:
    @pytest.mark.parametrize("language", TEXTS)
    @pytest.mark.parametrize("form", FORMS_OF_UNICODE)
    def test_a_text_equals_itself_in_any_form(self, language, form):
        text = TEXTS[language][0]
        (row,) = instruction_row_scores([unicodedata.normalize(form, text)], [[text]])
        assert row == {"rougeL": 100, "exact_match": 100}

    @pytest.mark.parametrize("language", TEXTS)
    def test_a_part_of_a_text_scores_by_its_tokens(self, language):
        """F of precision 1 and recall part / whole."""
        text, part, of_part, of_whole = TEXTS[language]
        (row,) = instruction_row_scores([part], [[text]])
        assert row["rougeL"] == pytest.approx(200 * of_part / (of_part + of_whole))
        assert row["exact_match"] == 0

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("кот", "кит"),
            ("दिल्ली", "दिल्ला"),
            ("मैं", "मे"),  # the marks differ, the consonant is the same
            ("ที่", "ทุ"),
            ("كَتَبَ", "كُتُبُ"),
            ("日", "月"),
            ("서울", "부산"),
            ("Ừ", "Ờ"),
        ],
    )
    def test_different_words_have_nothing_in_common(self, one, other):
        assert instruction_scores([one], [[other]]) == {"rougeL": 0, "exact_match": 0}

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("МОСКВА", "москва"),
            ("ΟΔΥΣΣΕΥΣ", "Οδυσσευς"),
            ("ＡＢＣ１２", "abc12"),
            ("ｶﾞｽ", "ガス"),
            ("كتــاب", "كتاب"),
            ("Ừ", "ừ"),
        ],
    )
    def test_one_word_in_two_spellings_is_one(self, one, other):
        assert instruction_scores([one], [[other]]) == {"rougeL": 100, "exact_match": 100}

    @pytest.mark.parametrize(
        "text",
        [
            "“Don’t” – she said… café, naïve, à la carte, €5 and £3, ½ of m², nº 1 🙂",
            "José García-Márquez's Erdoğan; Wałęsa, Hawaiʻi and 10 µm",
            "Running runners ran. The U.S.A. (2021) C++ e-mail",
            "\u212aelvin \u0130stanbul co\u00adoperate e\u0301",
        ],
    )
    def test_latin_text_has_the_tokens_of_rouge_score(self, text):
        from rouge_score.tokenizers import DefaultTokenizer

        assert metrics.ScriptTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)

    @pytest.mark.parametrize("name", ["Ω", "富士山", "Фудзи"])
    def test_english_that_quotes_a_foreign_name_scores_as_with_rouge_score(self, name):
        """4 words in common, of 17 and 4: the name is none."""
        sentence = f"The mountain ({name}) is really high, and it has snow on top during all of the long year."
        words = 17
        (row,) = instruction_row_scores(["The mountain is high."], [[sentence]])
        assert row["rougeL"] == pytest.approx(100 * 2 * 4 / (words + 4))

    def test_real_english_has_the_tokens_of_rouge_score_and_minillms_exact_match(self):
        """Each text against the one before: equal to the last digit, and equal texts the same ones."""
        from rouge_score.rouge_scorer import RougeScorer

        original = RougeScorer(["rougeL"], use_stemmer=True)
        texts = [
            row[column]
            for name in ("dolly/minillm_valid", "self_instruct/minillm_valid", "vicuna/minillm_valid")
            for row in real_rows(f"{name}.jsonl")
            for column in ("instruction", "output")
        ]
        latin = [text[:400] for text in texts if not any(is_foreign(letter) for letter in text)]
        assert len(latin) > 0.95 * len(texts)
        scores = instruction_row_scores(latin[1:], [[text] for text in latin[:-1]])
        for before, text, row in zip(latin[:-1], latin[1:], scores, strict=True):
            assert row["rougeL"] == 100 * original.score(before, text)["rougeL"].fmeasure
            assert row["exact_match"] == 100 * (minillm(before) == minillm(text))


def is_foreign(letter):
    return letter.isalnum() and not letter.isascii() and not unicodedata.name(letter).startswith("LATIN")


def minillm(text):
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


class TestNormalized:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("北京。", "北京"),
            ("为什么？！", "为什么"),
            ("「はい」、そうです。", "はいそうです"),
            ("«Да», — сказал он…", "да сказал он"),
            ("نعم، أليس كذلك؟", "نعم أليس كذلك"),
            ("है।", "है"),
            ("« Oui »", "oui"),
            ("¿Qué?", "qué"),
            ("Straße", "STRASSE"),
            ("cafe\u0301", "café"),
            ("ﬁne", "fine"),
            ("Ａ１", "a1"),
            ("\u200fשלום", "שלום"),
            ("a\u3000b", "a b"),
        ],
    )
    def test_equal(self, one, other):
        assert normalized(one) == normalized(other)
        assert instruction_scores([one], [[other]])["exact_match"] == 100

    @pytest.mark.parametrize(("one", "other"), [("й", "и"), ("कि", "की"), ("x²", "x2"), ("nº", "no"), ("か", "が")])
    def test_different(self, one, other):
        assert normalized(one) != normalized(other)

    @pytest.mark.parametrize(
        "text",
        [
            "“Don’t” – she said…",
            "A, dog!  (2)",
            "wait…",
            "nº 1, x², ½ and what the letter Ω says",
            "§ 5 · café, naïve",
            "E=mc^2",
        ],
    )
    def test_english_stays_as_in_minillm(self, text):
        assert normalized(text) == minillm(text)


class TestGSM8KAccuracy:
    def test_by_hand(self):
        predictions = ["16 - 7 = 9\n#### 18", "It is $18", "#### 18\nOr 19?", "none", "<think>18</think>", "18.00"]
        references = ["9 * 2 = 18\n#### 18", 18, "#### 18", "#### 1,000", 18.0, "18"]
        assert gsm8k_accuracy(predictions, references) == {"strict": 200 / 6, "flexible": 200 / 6, "paper": 400 / 6}
        rows = gsm8k_row_scores(predictions, references)
        assert rows[1]["values"] == {"strict": None, "flexible": 18.0, "paper": 18.0}
        assert [row["strict"] for row in rows] == [True, False, True, False, False, False]
        assert [row["flexible"] for row in rows] == [True, True, False, False, False, False]
        assert [row["paper"] for row in rows] == [True, True, True, False, False, True]

    @pytest.mark.parametrize(("prediction", "right"), [("#### 2.50", (True, True)), ("#### 2.5", (False, False))])
    def test_the_harness_compares_texts_and_the_paper_numbers(self, prediction, right):
        (row,) = gsm8k_row_scores([prediction], ["#### $2.50"])
        assert (row["strict"], row["flexible"]) == right
        assert row["paper"]

    @pytest.mark.parametrize(
        "reference", [1234, 1234.0, "1,234", "$1,234", "x\n#### 1,234", "\\boxed{1,234}", "1234 eggs"]
    )
    def test_all_kinds_of_references_compare_as_the_harness_writes_numbers(self, reference):
        assert gsm8k_accuracy(["#### 1,234."], [reference]) == dict.fromkeys(RULES, 100)

    @pytest.mark.parametrize(
        ("reference", "value"),
        [
            ("18", 18),
            ("$1,800", 1800),
            ("18 eggs", 18),
            ("16 - 7 = 9\n#### 9", 9),
            ("7 and \\boxed{18}", 18),
            ("\\boxed{18 \\text{ of } 20}", 18),
            ("#### 17\n#### 18", 18),
            ("#### -0.5", -0.5),
            ("18 %", 18),
            (-0.5, -0.5),
            (numpy.int64(18), 18),
        ],
    )
    def test_references(self, reference, value):
        assert reference_number(reference, "x") == value

    @pytest.mark.parametrize(
        ("reference", "error", "message"),
        [
            ("no number", ValueError, r"`references\[0\]` is 'no number', which holds no finite number"),
            ("She has 3 eggs.", ValueError, "does not say which of its numbers is the right answer. Give that alone"),
            ("9 * 2 = 18", ValueError, "does not say which"),
            ("#### none, or 3", ValueError, "does not say which"),
            (float("nan"), ValueError, "holds no finite number"),
            (10**400, ValueError, "holds no finite number"),
            (None, TypeError, "a NoneType; it must be a number or a text"),
            (True, TypeError, "a bool"),
        ],
    )
    def test_bad_references_are_refused(self, reference, error, message):
        with pytest.raises(error, match=message):
            gsm8k_accuracy(["18"], [reference])


class TestModules:
    def test_load_gives_the_same_as_the_functions(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        predictions, references = ["the cat sat", "dog"], [["the cat", "a"], ["dog"]]
        module = metrics.load("instruction_scores")
        assert module.compute(predictions=predictions, references=references) == pytest.approx(
            instruction_scores(predictions, references)
        )
        predictions, references = ["The answer is 18.", "3, 4"], ["#### 18", "3"]
        assert metrics.load("gsm8k").compute(predictions=predictions, references=references) == gsm8k_accuracy(
            predictions, references
        )

    @pytest.mark.parametrize(
        ("call", "package"), [("load('gsm8k')", "evaluate"), ("instruction_scores(['a'], [['a']])", "rouge_score")]
    )
    def test_missing_packages_are_named_where_they_are_needed_first(self, call, package):
        code = (
            "import sys\n"
            "for name in ('evaluate', 'rouge_score'): sys.modules[name] = None\n"
            "from trl_promptkd import metrics\n"
            "assert metrics.extract_final_number('18') == 18\n"
            f"try: metrics.{call}\n"
            "except ImportError as error: print(error)\n"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert f"the package {package}, which is not installed" in run.stdout
        assert 'pip install "trl_promptkd[evaluate]"' in run.stdout
