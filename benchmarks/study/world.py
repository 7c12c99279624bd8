"""The small world: word problems whose answers are worked out in steps, written by careful, brief and unsure writers.

The teacher has read answers of all three. After some lines it is always the same writer who answers, after others it
may be any. So a text or a soft prompt before the question can move it: to be more careful (and better) than it is by
itself, to write the number alone, or to slip as a pupil does. The text that PromptKD starts from says nothing of the
writer.
"""

import random
import re
from typing import NamedTuple

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


NAMES = ["ann", "ben", "cleo", "dan", "eva", "finn"]
THINGS = ["apples", "books", "coins", "pens", "shells"]
GAINS = ["buys", "finds", "gets"]
LOSSES = ["loses", "sells", "uses"]
# Who writes -> the lines that can say so. `careful` and `brief` are right, `pupil` slips
WRITERS = {
    "careful": ["you are a careful teacher .", "explain each step as a good teacher ."],
    "brief": ["only say the number .", "a short answer , no steps ."],
    "pupil": ["answer as a pupil who learns this .", "a child writes here ."],
}
# After these lines, as without a line, any of them may write
NEUTRAL = ["suppose you are a student .", "here is a question for you .", "please answer this ."]
# Two more texts that no model has read; their words are known
NEW_LINES = ["you are a good teacher who answers each step .", "please only write a short number ."]
ALL_LINES = ["", *NEUTRAL, *(line for known in WRITERS.values() for line in known), *NEW_LINES]
PLAIN_MIX = {"careful": 0.7, "brief": 0.15, "pupil": 0.15}  # who writes if the line does not say it
SLIPS = 0.3  # share of a pupil's steps that are wrong


class Problem(NamedTuple):
    question: str
    steps: tuple[tuple[int, str, int, int], ...]  # a, sign, b, result
    result: int


def make_problem(rng: random.Random) -> Problem:
    """Two or three changes of one count between 0 and 99, and a sentence about another thing that does not matter."""
    name, (thing, other) = rng.choice(NAMES), rng.sample(THINGS, 2)
    count = rng.randint(5, 60)
    sentences = [f"{name} has {count} {thing} ."]
    steps = []
    distractor = rng.randint(0, 2)  # before which change; 0: none
    for change in range(1, 3 + (rng.random() < 0.5)):
        if change == distractor:
            sentences.append(f"{name} has {rng.randint(5, 60)} {other} .")
        gain = rng.random() < 0.5 if 12 <= count <= 79 else count < 12
        amount = rng.randint(2, 19) if gain else rng.randint(2, min(19, count))
        sign, verb = ("+", rng.choice(GAINS)) if gain else ("-", rng.choice(LOSSES))
        sentences.append(f"then {name} {verb} {amount} .")
        new = count + amount if gain else count - amount
        steps.append((count, sign, amount, new))
        count = new
    sentences.append(f"how many {thing} ?")
    return Problem(" ".join(sentences), tuple(steps), count)


def write_answer(problem: Problem, writer: str, rng: random.Random) -> str:
    """An answer as `writer` gives it: in steps, or the number alone; a pupil's steps may be off by one or by ten."""
    if writer == "brief":
        return f"so {problem.result}"
    equals = rng.choice(["=", "makes"])
    lines, count = [], problem.steps[0][0]
    for _, sign, amount, _ in problem.steps:
        new = count + amount if sign == "+" else count - amount
        if writer == "pupil" and rng.random() < SLIPS:
            new = min(max(new + rng.choice([-10, -1, 1, 10]), 0), 99)
        lines.append(f"{count} {sign} {amount} {equals} {new} .")
        count = new
    return " ".join([*lines, f"so {count}"])


def gold_answer(problem: Problem, rng: random.Random) -> str:
    """What the data says: careful or brief, and right."""
    return write_answer(problem, "brief" if rng.random() < 0.2 else "careful", rng)


def teacher_text(rng: random.Random) -> tuple[str, str]:
    """A prompt and an answer, as the teacher reads them.

    Four in ten are without a line. One in ten has a line that says nothing of the writer, and half have one that does.
    """
    problem = make_problem(rng)
    draw = rng.random()
    if draw < 0.5:
        writer = rng.choices(list(PLAIN_MIX), list(PLAIN_MIX.values()))[0]
        line = rng.choice(NEUTRAL) + " " if draw < 0.1 else ""
    else:
        writer = rng.choice(list(WRITERS))
        line = rng.choice(WRITERS[writer]) + " "
    return f"{line}{problem.question} answer :", write_answer(problem, writer, rng)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words and single digits."""
    words = [*NAMES, *THINGS, *GAINS, *LOSSES]
    words += ["has", "then", "how", "many", "answer", ":", "?", "so", "=", "makes", "+", "-", ".", ","]
    words += list("0123456789")
    words += " ".join([*(line for lines in WRITERS.values() for line in lines), *NEUTRAL, *NEW_LINES]).split()
    vocab = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "<eos>", "<unk>", *words]))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ ' answer :' if m['role'] == 'user' else '<eos>' }} {% endfor %}"
    )
    return tokenizer


def said_result(text: str) -> int | None:
    """The number after the last `so` of a decoded answer, whose digits are apart."""
    found = re.findall(r"so ((?:\d ?)+)", text)
    return int(found[-1].replace(" ", "")) if found else None


def writer_of(text: str, problem: Problem) -> str:
    """Who may have written a decoded answer: `brief` (the number alone), `careful` (right steps and the right number),
    or `pupil` (all others)."""
    text = re.sub(r"(?<=\d) (?=\d)", "", text)
    if re.fullmatch(r"so \d+", text.strip()):
        return "brief"
    steps = re.findall(r"(\d+) ([+-]) (\d+) (?:=|makes) (\d+) \.", text)
    right = [(str(a), sign, str(b), str(result)) for a, sign, b, result in problem.steps]
    return "careful" if steps == right and said_result(text) == problem.result else "pupil"
