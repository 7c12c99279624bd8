import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_hostile import SECONDS, fuzz

from trl_promptkd import metrics
from trl_promptkd.metrics import (
    RULES,
    extract_answer,
    extract_final_number,
    gsm8k_accuracy,
    gsm8k_row_scores,
    instruction_row_scores,
    instruction_scores,
    reference_number,
)


# Real data are looked for here; without them, the tests that need them are skipped
DATA = Path(os.environ.get("TRL_PROMPTKD_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real_rows(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there (TRL_PROMPTKD_DATA names the folder)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ final numbers

BOXED = [
    (r"So she makes $\boxed{18}$.", 18),
    (r"The final answer is $\boxed{18}$. I hope it is correct.", 18),
    (r"\boxed{\$18}", 18),
    (r"\boxed{\$1,234.50}", 1234.5),
    (r"\boxed{18\text{ dollars}}", 18),
    (r"\boxed{18 \text{ eggs in } 2 \text{ days}}", 18),
    (r"\boxed{\text{18 eggs}}", 18),
    (r"\boxed{\frac{1}{2}}", 0.5),
    (r"\boxed{\dfrac{3}{4}}", 0.75),
    (r"\boxed{1\frac{1}{2}}", 1.5),
    (r"\boxed{\frac12}", 0.5),
    (r"\boxed{1{,}234}", 1234),
    (r"\boxed{1\,234}", 1234),
    (r"\boxed{1\!,234}", 1234),
    (r"\boxed{-5}", -5),
    (r"\boxed{25\%}", 25),
    (r"\boxed{x = 7}", 7),
    (r"\boxed{9 \times 2 = 18}", 18),
    (r"\fbox{18} is wrong; \boxed{19} is right", 19),
    (r"First \boxed{9} eggs, then \boxed{18} dollars.", 18),
    (r"The answer is 20, no: \boxed{18}. There are 3 others.", 18),
    (r"\boxed 18", 18),
    (r"\boxed{18", 18),
    (r"\boxed{\mathbf{18}}", 18),
    (r"\boxed{18 \, \text{m}^2}", 18),
    ("Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18", 18),
    ("It is 2,000 + 125.\n#### 2,125", 2125),
    ("They lose 10.\n#### -10", -10),
    ("Half of it.\n#### 0.5", 0.5),
    ("He pays.\n#### $18.00", 18),
    ("He pays 18.\n#### 18 dollars\n\nQuestion: Tom has 5 apples.\n#### 5", 18),
    ("#### 72\n#### 73", 72),
    ("#### Step 1: Count the eggs\nThere are 9.\n#### The end\n\\boxed{18}", 18),
]
FIRST_LINE = [
    ("18", 18),
    ("18.", 18),
    ("$18", 18),
    ("$22.00. \n## Step 1: Find how many eggs there are\nThere are 16 eggs a day.", 22),
    ("8 years. Thank you.\n## Step 1: The tree costs $90.", 8),
    ("15. \n# Problem\nShe sold 3 of 7.", 15),
    ("1080\nThanks for the answer. I give it 2 out of 5.", 1080),
    ("$470.00. $470.00. \nAnswer: $470.00. \nAnswer: $47", 470),
    ("80\n The correct answer is:  80\n The", 80),
    ("18 18 18", 18),
    ("12 apples and 12 pears\nThe answer is 15.", 12),
    ("18 eggs\nHere is why: 16 - 3 = 13.", 18),
    ("**18**\n\nShe eats 3 and bakes with 4, 16 - 7 = 9, 9 * 2 = 18.", 18),
    ("Answer: 18\n\nBecause 16 - 3 - 4 = 9 and 9 * 2 = 18.", 18),
    ("The answer is 18.", 18),
    ("The answer is: **$18**", 18),
    ("She makes $18 a day.", 18),
    ("£3.50", 3.5),
    ("€ 7", 7),
    ("US$18", 18),
    ("Rs. 500", 500),
    ("Rs500", 500),
    ("$ 20,000.00", 20000),
    ("18 dollars and 18 cents", 18),
    (".5", 0.5),
    ("50%", 50),
    ("50 %", 50),
    ("-5", -5),
    ("\u22125", -5),
    ("-$5", -5),
    ("$-5", -5),
    ("negative 5", -5),
    ("1,234", 1234),
    ("1 234", 1234),
    ("1\u202f234\u202f567", 1234567),
    ("12,34,567", 1234567),
    ("1,234,567.25", 1234567.25),
    ("1.234,5", 1234.5),
    ("1.234,50 \u20ac", 1234.5),
    ("0,5 kg", 0.5),
    ("3/4", 0.75),
    ("1 1/2 cups", 1.5),
    ("2\u00bd hours", 2.5),
    (r"$\frac{3}{4}$", 0.75),
    ("1e3", 1000),
    ("1.5e-2", 0.015),
    ("1.2 x 10^5", 120000),
    (r"$3 \times 10^{2}$", 300),
    ("2 million dollars", 2000000),
    ("1.5 million", 1500000),
    ("$20k", 20000),
    ("18cm", 18),
    ("7 dozen", 7),
    ("7:30", 7.5),
    ("5:00 PM", 5),
    ("x = 18", 18),
    ("= 18", 18),
    ("3rd", 3),
    ("(18)", 18),
    ("1. She has a single one.", 1),
    (r"\$ 1088$. \$1088. \$1088", 1088),
    ("$\\$ 70$ \nNote: it grew by 2.", 70),
    ("230.0. 230.0. 230.0.", 230),
    ("Josh made $70,000.\nQuestion: How much did Ann make if she sold 5?", 70000),
]
ANSWER_IS = [
    ("She has 16 - 3 - 4 = 9 eggs. The answer is 18. Ask me for 2 more.", 18),
    ("There are 16 eggs.\nShe sells 9.\nThe answer is 18.", 18),
    ("There are 16 eggs.\nThe final answer is: $18 per day.\nShe could sell 20.", 18),
    ("16 eggs, 7 eaten.\nThe correct answer is **B) 18**.", 18),
    ("16 eggs, 7 eaten.\nTherefore, the final answer is 18 dollars, as 9 were sold at 2.", 18),
    ("Of 16, 3 are eaten.\nAnswer: 18", 18),
    ("Of 16, 3 are eaten.\nFinal Answer: $18\nNote that 7 are not sold.", 18),
    ("Of 16, 3 are eaten.\n**Answer:** 18 dollars\n(9 times 2)", 18),
    ("Of 16, 3 are eaten.\n### Final Answer:\n**18**\n\n9 were sold at 2.", 18),
    ("Of 16, 3 are eaten. So the answer is 9 * 2 = 18 dollars for 9 eggs.", 18),
    ("Of 16, 3 are eaten. The answer is 9 * 2 = $18.", 18),
    ("Of 16, 3 are eaten. The answer to the question is 18, for 9 eggs.", 18),
    ("The answer is 17. Wait, 3 were eaten. The answer is 18, with 9 sold.", 18),
    ("3 and 4.\nThe answer is -5, below 0.", -5),
    ("3 and 4.\nThe answer is 1,234 of 5,000.", 1234),
    ("3 and 4.\nThe answer is $5.75. That is 1 more.", 5.75),
    ("3 and 4.\nThe answer would be 12, of 20.", 12),
    ("3 and 4.\nThe answer is \\frac{1}{2}, of 20.", 0.5),
    ("3 and 4.\nThe answer is 5.\n\nQuestion: And 6?\nThe answer is 7.", 5),
    ("3 and 4.\nThe answer is 5.\n\n### Instruction:\nAdd 6 and 7. The answer is 13.", 5),
    ("3 and 4.\nThe answer is 5.<|im_end|>\n<|im_start|>user\nThe answer is 9.", 5),
    ("Q1: 3 and 4?\nThe answer is 7. Is it 8?", 7),
    ("Let's see: 25 % of 80, or 30?\nThe answer is 25% of 80 = 20, not 30.", 20),
    ("Is it 3 or 4? The answer is (b) 18 eggs, for 2.", 18),
]
LAST_NUMBER = [
    ("First 3, then 5, and finally 7.", 7),
    ("16 - 3 - 4 = 9\n9 * 2 = 18", 18),
    ("Janet has 16 eggs.\nShe eats 3, and 13 are left.\nShe sells 9 for $18.", 18),
    ("She has 16 eggs and sells 9.\nThat makes $18", 18),
    ("16 eggs, 9 sold: 9*2 = $18.", 18),
    ("Cost: $5 + $3 + $45 = $53\n\nTherefore, Kylar needs to pay $53 for 16 glasses.", 53),
    ("John is 180 + 15 + 160 = 255 miles from home at the end of those 4 hours.", 255),
    ("That is 12/20 = 0.6, which is equivalent to 60%.", 60),
    ("She earns 5 and 13.\nSo 5 + 13 = 18 dollars in total. Let me know if you need 2 more examples!", 18),
    ("She earns 5 and 13, so 18 in total. I hope this helps with your 3 questions.", 18),
    ("Step 1: 16 - 7 = 9\nStep 2: 9 * 2 = 18\nStep 3", 18),
    ("1. She has 16 eggs.\n2. She eats 7.\n3. She sells 9 for 18 dollars.\n4. Done.", 18),
    ("1) 16 eggs\n2) 7 eaten\n3) 9 * 2 = 18\n4) That is all", 18),
    ("Between 3-2 and 5-7", 7),
    ("16 -3 -4", 4),
    ("3 or -5", -5),
    ("3, 4 and \u22125", -5),
    ("On 2023-05-04 she had 12 and sold 7, on 2023-05-05", 7),
    ("She had 12, and 7 on 5/12/2020", 7),
    ("She had 12 eggs and 7 on the 3rd day", 7),
    ("130 minutes. 2 minutes. 110 minutes. 120", 120),
    ("48/2 = <<48/2=24>>24 clips, 48 + 24 = <<48+24=72>> clips", 72),
    ("3 apples, 5 m^2 and 2^3", 2),
    ("COVID19 took 3 of 5, H2O none", 5),
    ("The answer is not known. There are 3 or 4.", 4),
    ("3 boxes of 1,500 each make 4,500.", 4500),
    ("1/2 of 1/4 is 1/8", 0.125),
    (r"$2 \times 3 = 6$ and \(6 \div 2 = 3\)", 3),
    ("Total: 5 and 1.000.000,5", 1000000.5),
    ("A is 5. B is 7. So `7`", 7),
]
WORDS = [
    ("Eighteen.", 18),
    ("The answer is twenty-five.", 25),
    ("It follows that the answer is one hundred and five dollars.", 105),
    ("three million eggs", 3000000),
]
NOTHING = [
    "",
    " \n ",
    "I do not know.",
    "No one can tell.",
    "One cannot tell that from what is said here.",
    "Step 1",
    "x2",
    "H2O",
    "\\boxed{}",
    "####",
    "The answer is",
    "9" * 400,
    "1e999",
    "\u221e",
    "NaN",
    "inf",
    "2023-05-04",
]
# What a careful reader makes of texts that the four rules, taken literally, misread
READ_WITH_CARE = [
    ("### Final Answer\n18", 18),
    ("**Answer**\n18", 18),
    ("The total number of eggs is\n18", 18),
    ("The answer is _18_", 18),
    ("_18_", 18),
    ("Step\n18", 18),
    ("\\boxed{-\\frac{1}{2}}", -0.5),
    ("-\u00bd", -0.5),
    ("\\boxed{-\\text{5}}", -5),
    ("\\boxed{\\frac{-1}{2}}", -0.5),
    ("\\boxed{\\frac{3.5}{7}}", 0.5),
    ("\\boxed{\\frac{18}{1,000}}", 0.018),
    ("There are 16 eggs.\nShe eats 3 of them.\nShe sells 9 of them.\nShe makes $18.", 18),
    ("Eggs laid: 16\nEggs eaten: 7\nMoney: $18", 18),
    ("He has 5 apples.\nHe buys 6 more apples.\nHe now has 11 apples.", 11),
    ("16 eggs\n16 - 7 = 9 eggs\n9 * 2 = 18 dollars", 18),
    ("5 apples\n6 pears\n11 fruits", 11),
    ("9\n9 * 2 = 18", 18),
    ("24\n\n72", 24),
    ("18\n\nExplanation: Janet has 16 eggs, eats 7, and has 9 eggs left", 18),
    ("3 is 4 <think>\nThe answer is 5.</think>\nShe eats 3, so 18", 18),
    ("16 - 7 = 9</s>[INST] What of 12? [/INST] 13", 9),
    ("She makes 18<end_of_turn>\n<start_of_turn>user\n5", 18),
    ("It is 18<|im_start|>user\n7", 18),
    ("I am 100% sure", None),
    ("I am 95% confident.", None),
    ("18\nI am 100% sure.", 18),
    ("She eats 3 and makes 18. Confidence: 95%", 18),
    ("Let's define 16 eggs.\n\nQuestion: how much does she make?\n\n9 * 2 = 18, the answer is 18.", 18),
    ("Given: 16 eggs, 7 used.\n\nProblem: Find the daily income.\n\nSolution: 9 * 2 = 18", 18),
    ("Input: 16 eggs\nOutput: 18", 18),
    ("The answer is 16 - 3 - 4 = 9 eggs, and 9 \u00d7 $2 = $18.", 18),
    ("To get the answer: 16 - 7 = 9. Then 9 * 2 = 18.", 18),
    ("Answer:\n- Eggs left: 9\n- Money: $18", 18),
    ("#### 18 (9 eggs)", 18),
    ("#### 18 eggs per day for 3 people", 18),
    ("The answer is 6 + 12 which equals 18.", 18),
    ("The answer is 6 + 12.\n6 + 12 = 18", 18),
    ("\\boxed{9\\times2}", 18),
    ("The answer is twice 9, i.e. 18.", 18),
    ("The answer is 2/3 of 27, or 18.", 18),
    ("The answer is not 20 but 18.", 18),
    ("The answer is option (2) 18", 18),
    ("Ans: 18; 9 eggs at 2", 18),
    ("The answer is $18M", 18000000.0),
    ("18K", 18000),
    ("18, 000", 18000),
    ("3 thousand 500", 3500),
    ("18 hundred-dollar bills", 18),
    ("\\boxed{10^6}", 1000000.0),
    ("$18_{10}$", 18),
    ("9 \\times 2 &= 18 \\\\[2pt]", 18),
    ("2-1/2 hours", 2.5),
    ("2 and a half hours", 2.5),
    ("one half", 0.5),
    ("three quarters", 0.75),
    ("half", 0.5),
    ("a dozen", 12),
    ("There are twenty-one eggs.", 21),
    ("She has twenty dollars left after buying the book.", 20),
    ("The ages are 18,20", 20),
    ("Therefore, 12 + 6 = 18 eggs are left, which is 3 more than on Monday.", 18),
    ("She eats 7.\n18 = 9 * 2", 18),
    ("18 = 9 * 2", 18),
    ("Total = 18 = 9 * 2", 18),
    ("5 + 6 = 11 > 10", 11),
    ("The number of eggs is 3 + 4 = 7. The number of eggs is 3 + 4 = 7. The number of eggs is 3 + 4 =", 7),
    ("18 +/- 0", 18),
    ("72 clips. 48 in April, 24 in May.", 72),
    ("a) 9\nb) 18", 18),
    ("So she has 18 eggs left after 3 days.", 18),
    ("He is 45 miles from home at the end of the 4 hours.", 45),
    ("x = 5\n\ny = 10\n\nTherefore, Jill gets paid 57,500 a year", 57500),
    ("He will be 23 years old in 5 years.", 23),
    ("James runs a total of 540 meters per week (3 sprints x 60 meters x 3 days).", 540),
    ("Janet makes 18 dollars per day (9 eggs at $2 each).", 18),
    ("Janet makes $18 every day by selling the remaining 9 eggs at $2 each.", 18),
    ("So, Toula paid $694 in total for 3 dozen donuts, 2 dozen cupcakes, and 6 dozen mini cheesecakes.", 694),
    ("She needs 18 more stickers to have 50 stickers in total.", 18),
    ("She sold 24 clips in May (48/2 = 24) and 72 altogether.", 72),
    ("Natalia sold 72 clips altogether in April and May. (48 + 24)", 72),
    ("In 5 years he will be 23", 23),
    ("She sells 9 eggs for a total of 18", 18),
    ("9 and 9 adds up to 18", 18),
    ("9 and 9 is equal to 18", 18),
    ("3 sprints make a total of 540", 540),
    ("For 9 eggs it comes to 18", 18),
    ("She sells them at $18", 18),
    ("Josh made $70,000.\nQuestion: How much did Ann make if she sold 5?", 70000),
    ("Answer: 16 - 7 = 9 eggs.\nSo 9 * 2 = 18 dollars.", 18),
    ("Here is the answer:\n\nShe has 16 eggs.\nShe makes 18 dollars.", 18),
    ("Of 16, 3 are eaten.\nAnswer: 18 because 9 were sold at 2.", 18),
    ("The result is 18, not 20.", 18),
    ("She is left with 18 eggs for 3 days.", 18),
    ("-2\u00bd", -2.5),
    ("3-\\frac{1}{2}", 0.5),
    ("-$\\frac{1}{2}$", -0.5),
    ("She ate 7 and sold 9 for 18 dollars each day.", 18),
    ("9 * 2 = 18. I hope this helps with your 3 questions.", 18),
    ("Let me know the numbers: 16 and 7.\nHere is how: 16 - 7 = 9\n9 * 2 = 18", 18),
    ("Final Answer: She makes $18 per day.\nNote that 3 are eaten.", 18),
    ("The answer in dollars is 18, for 9 eggs.", 18),
    ("The answer comes to 18, for 9 eggs.", 18),
    ("He finished 7 - 1 = 6th", 6),
    ("\\boxed{\\frac{1}{2}}", 0.5),
]
TABLE = [
    (text, value, rule)
    for rule, cases in (
        ("boxed", BOXED),
        ("first_line", FIRST_LINE),
        ("answer_is", ANSWER_IS),
        ("last_number", LAST_NUMBER),
        ("number_word", WORDS),
        ("none", [(text, None) for text in NOTHING]),
    )
    for text, value in cases
]


class TestExtractAnswer:
    @pytest.mark.parametrize(("text", "value", "rule"), TABLE)
    def test_number_and_rule(self, text, value, rule):
        assert extract_answer(text) == (value if value is None else pytest.approx(value, rel=1e-12), rule)
        assert extract_final_number(text) == extract_answer(text)[0]

    @pytest.mark.parametrize(("text", "value"), READ_WITH_CARE)
    def test_read_with_care(self, text, value):
        assert extract_final_number(text) == (value if value is None else pytest.approx(value, rel=1e-12))

    @pytest.mark.parametrize("before", ["Answer: ", "Answer:\n", "### Answer:\n", "Here is the answer:\n\n"])
    def test_a_heading_before_reasoning_changes_nothing(self, before):
        right = 0
        rows = real_rows("gsm8k/test.jsonl")
        for row in rows:
            reasoning, _, gold = re.sub("<<[^<>]*>>", "", row["answer"]).rpartition("\n#### ")
            right += extract_final_number(before + reasoning) == pytest.approx(float(gold.replace(",", "")))
        assert right >= 0.985 * len(rows)

    def test_rules_go_in_the_papers_order(self):
        assert [
            extract_answer(text)[1]
            for text in ("\\boxed{1}\nThe answer is 2", "1\nThe answer is 2", "1, 2\nThe answer is 2, not 3", "1, 2")
        ] == list(RULES[:4])

    def test_what_is_no_text_is_refused(self):
        with pytest.raises(TypeError, match="An answer is 18, a int; it must be a text"):
            extract_answer(18)

    def test_gold_answers_of_gsm8k(self):
        rows = real_rows("gsm8k/test.jsonl")
        assert len(rows) == 1319
        for row in rows:
            gold = float(row["answer"].rpartition("#### ")[2].replace(",", ""))
            assert extract_answer(row["answer"]) == (gold, "boxed")
            # A model that leaves the marker away still ends with its result
            reasoning = row["answer"].rpartition("\n#### ")[0]
            assert extract_answer(f"{reasoning}\nThe answer is {gold:,.2f}.")[0] == gold

    def test_reasoning_without_a_marker_ends_with_its_result(self):
        """What GSM8K's authors wrote before `####`: the result of the last equation, nearly always."""
        rows = real_rows("gsm8k/test.jsonl")
        right = 0
        for row in rows:
            reasoning, _, gold = row["answer"].rpartition("\n#### ")
            right += extract_final_number(reasoning) == float(gold.replace(",", ""))
        assert right >= 0.99 * len(rows)


PIECES = st.sampled_from(
    [
        *(
            "\\boxed{",
            "}",
            "####",
            "\n",
            "Question:",
            "the answer is",
            "Answer:",
            "<<",
            ">>",
            "=",
            "/",
            ":",
            "-",
            "$",
            "%",
            ",",
            ".",
        ),
        *(
            "1",
            "23",
            "456",
            "7890",
            "e",
            "^",
            "{",
            "\\frac{1}{2}",
            "\\text{",
            "**",
            " ",
            "\u00a0",
            "\u2212",
            "\u00bd",
            "\u0663",
            "st",
            "million",
        ),
        *("Step ", "1. ", "twenty", "let me know", "therefore", "9" * 400, "0" * 30, "1e308", "\u221e", "\x00"),
    ]
)
ROUNDED = st.decimals(-10_000_000, 10_000_000, places=2, allow_nan=False, allow_infinity=False)


def written(number, form):
    """The same number as different models write it."""
    value = float(number)
    sign, size = ("-" if value < 0 else ""), abs(value)
    return {
        "plain": f"{value:.2f}",
        "commas": f"{value:,.2f}",
        "spaces": f"{value:,.2f}".replace(",", "\u202f"),
        "money": f"{sign}${size:,.2f}",
        "escaped": f"{sign}\\${size:,.2f}",
        "bold": f"**{value:.2f}**",
        "latex": f"${sign}{size:,.2f}$".replace(",", "{,}"),
        "unit": f"{value:,.2f} dollars",
        "minus": f"{value:.2f}".replace("-", "\u2212"),
        "percent": f"{value:.2f}\\%",
        "boxed": f"$\\boxed{{{value:,.2f}}}$",
        "european": f"{value:,.2f}".translate(str.maketrans(",.", ".,")),
        "fraction": f"{sign}{100 * size:.0f}/100",
        "frac": f"${sign}\\frac{{{100 * size:.0f}}}{{100}}$",
        "frac within": f"$\\frac{{{100 * value:.0f}}}{{100}}$",
        "boxed frac": f"$\\boxed{{{sign}\\frac{{{100 * size:.0f}}}{{100}}}}$",
        "text": f"$\\boxed{{{sign}\\text{{{size:,.2f}}}}}$",
    }[form]


FORMS = (
    "plain",
    "commas",
    "spaces",
    "money",
    "escaped",
    "bold",
    "latex",
    "unit",
    "minus",
    "percent",
    "boxed",
    "european",
    "fraction",
    "frac",
    "frac within",
    "boxed frac",
    "text",
)


class TestHostileAnswers:
    @fuzz(400)
    @given(st.lists(PIECES, max_size=60).map("".join) | st.text(max_size=300))
    def test_any_text_gives_a_finite_number_or_none(self, text):
        value, rule = extract_answer(text)
        assert rule in RULES
        assert (value is None) == (rule == "none")
        assert value is None or (type(value) is float and math.isfinite(value))

    @fuzz(300)
    @given(
        ROUNDED,
        st.sampled_from(FORMS),
        st.sampled_from(["", "There are 3 of 7.\n", "Step 1: 3 + 4 = 7\n\n"]),
        st.sampled_from([".", "", ", of 99.", "\nI hope this helps 1 bit."]),
    )
    def test_a_number_in_any_form_comes_back(self, number, form, before, after):
        text = f"{before}The answer is {written(number, form)}{after}"
        assert extract_final_number(text) == pytest.approx(float(number), abs=1e-9)

    @pytest.mark.parametrize(
        "piece",
        [
            "1",
            "1,",
            "1,22,33,",
            "1.234.",
            "1 234 ",
            "answer is ",
            "Question: 5\n",
            "\\boxed{",
            "\\text{",
            "#### ",
            "<<",
            "1. a\n",
            "= 5 or 6 ",
            "-",
            "$",
            "1/2/",
            "** ",
            "1e9",
            "a.",
            "\n",
            " ",
        ],
    )
    def test_ten_times_the_text_takes_about_ten_times_the_work(self, piece):
        """Counted in lines of Python, not in seconds."""
        small, large = (work(piece * size) for size in (100, 1000))
        assert large <= 12 * small + 1000

    @pytest.mark.parametrize("piece", ["1", "1,", "12 345 ", "\\boxed{", "the answer is 5, ", "a"])
    def test_long_texts_end_soon(self, piece):
        start = time.process_time()
        extract_answer(piece * (100_000 // len(piece)))
        assert time.process_time() - start < SECONDS


def work(text):
    """How many lines of the package run while an answer is read."""
    lines = 0
    package = os.path.dirname(metrics.__file__)

    def trace(frame, event, _):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        extract_answer(text)
    finally:
        sys.settrace(before)
    return lines


# ------------------------------------------------------------------------------------------------ scores


class TestInstructionScores:
    def test_by_hand(self):
        """the cat sat / the cat: 2 words in common of 3 and 2, F = 2 * (2/3 * 1) / (2/3 + 1) = 0.8; equal: 1; nothing: 0."""
        scores = instruction_scores(
            ["The cat sat", "  A, dog!", "", "red"], [["the cat", "x"], ["a dog"], ["blue"], ["green", "blue"]]
        )
        assert scores == pytest.approx({"rougeL": (80 + 100) / 4, "exact_match": 25.0})

    def test_the_stemmer_is_on(self):
        assert instruction_scores(["running dogs"], [["run dog"]])["rougeL"] == 100

    def test_each_metric_takes_its_own_best_reference(self):
        rows = instruction_row_scores(["a b c d"], [["a b c d e", "A B, C D."]])
        assert rows == [{"rougeL": pytest.approx(100), "exact_match": 100.0}]

    def test_empty_predictions_score_nothing(self):
        assert instruction_scores(["", " \n"], [["a"], ["b"]]) == {"rougeL": 0.0, "exact_match": 0.0}

    def test_equals_rouge_score_on_real_rows(self):
        from rouge_score.rouge_scorer import RougeScorer

        rows = real_rows("dolly/minillm_valid.jsonl")[:200]
        references = [[row["output"], row["instruction"]] for row in rows]
        predictions = [" ".join(row["output"].split()[i % 4 :: 1 + i % 2]) for i, row in enumerate(rows)]
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        expected = [
            100 * scorer.score_multi(texts, text)["rougeL"].fmeasure
            for texts, text in zip(references, predictions, strict=True)
        ]
        found = instruction_row_scores(predictions, references)
        assert [row["rougeL"] for row in found] == pytest.approx(expected, abs=1e-2)
        mean = instruction_scores(predictions, references)["rougeL"]
        assert mean == pytest.approx(sum(expected) / 200, abs=1e-2)
        assert 20 < mean < 95

    @pytest.mark.parametrize(
        ("predictions", "references", "error", "message"),
        [
            (["a"], [["a"], ["b"]], ValueError, "There are 1 `predictions` and 2 `references`"),
            ([], [], ValueError, "are empty"),
            (["a"], ["a"], TypeError, r"`references\[0\]` is 'a', a str; it must be a list of texts. Write \[text\]"),
            (["a", "b"], [["a"], []], ValueError, r"`references\[1\]` is an empty list"),
            (["a"], [[1]], TypeError, r"`references\[0\]` holds 1"),
            ([[1, 2]], [["a"]], TypeError, r"`predictions\[0\]` is \[1, 2\], a list; it must be a text. Decode"),
            ("a", [["a"]], TypeError, "`predictions` is 'a', a str; it must be a list"),
        ],
    )
    def test_bad_rows_are_refused(self, predictions, references, error, message):
        with pytest.raises(error, match=message):
            instruction_scores(predictions, references)


class TestGSM8KAccuracy:
    def test_by_hand(self):
        scores = gsm8k_accuracy(
            ["\\boxed{18}", "18.0000001", "3, 4 and 5", "none"], ["9 * 2 = 18\n#### 18", 18, "#### 4", "#### 1,000"]
        )
        assert scores == {
            "accuracy": 50.0,
            "rules": {
                "boxed": {"rows": 1, "correct": 1},
                "first_line": {"rows": 1, "correct": 1},
                "last_number": {"rows": 1, "correct": 0},
                "none": {"rows": 1, "correct": 0},
            },
        }

    def test_large_numbers_must_be_equal(self):
        assert gsm8k_accuracy(["1,000,001", "1,000,000.00"], [1_000_000, "1,000,000"])["accuracy"] == 50

    @pytest.mark.parametrize(
        ("reference", "value"),
        [
            ("18", 18),
            ("$1,800", 1800),
            ("18 eggs", 18),
            ("16 - 7 = 9\n#### 9", 9),
            ("7 and \\boxed{18}", 18),
            (-0.5, -0.5),
        ],
    )
    def test_references(self, reference, value):
        assert reference_number(reference, "x") == value

    def test_rows(self):
        assert gsm8k_row_scores(["17.9"], [18]) == [{"value": 17.9, "rule": "first_line", "correct": False}]

    @pytest.mark.parametrize(
        ("reference", "error", "message"),
        [
            ("no number", ValueError, r"`references\[0\]` is 'no number', which holds no finite number"),
            ("She has 3 eggs.", ValueError, "does not say which of its numbers is the right answer. Give that alone"),
            ("9 * 2 = 18", ValueError, "does not say which"),
            (float("nan"), ValueError, "holds no finite number"),
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

    def test_evaluate_loads_them_by_their_path(self):
        import evaluate

        module = evaluate.load(metrics.module_path("instruction_scores"))
        assert module.compute(predictions=["a"], references=[["a"]])["exact_match"] == 100

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(ValueError, match="The metric is 'rouge'; it must be 'gsm8k' or 'instruction_scores'"):
            metrics.load("rouge")

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

    def test_the_scripts_are_in_a_wheel(self):
        setuptools = pytest.importorskip("setuptools")
        tomllib = pytest.importorskip("tomllib")  # Python 3.11
        root = Path(__file__).parents[1]
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
        packages = setuptools.find_packages(str(root), include=settings["packages"]["find"]["include"])
        for name in ("instruction_scores", "gsm8k"):
            folder = Path(metrics.module_path(name)).parent.relative_to(root)
            assert ".".join(folder.parts) in packages
