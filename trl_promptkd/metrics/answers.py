r"""The final number of an answer to a word problem, by the rules of the response priming paper's evaluation, in their order.

1. `\boxed{}`, and GSM8K's own `#### n`;
2. the numbers of the first line, if they are all equal;
3. the number after "the [final/correct] answer is";
4. the last number.

Source: the paper's released code (arXiv 2412.17846), which reads numbers as runs of digits and commas. What is different here, as that is misled:

- numbers are read as a reader would ([`find_numbers`]): signs, fractions, separators, LaTeX, units, no labels of steps;
- of several boxes and of several statements the last one counts (there: the first), but not what follows in a new question that a model has gone on with;
- a first line that is a sentence with one number in it is a step of a derivation where one follows, and no answer;
- where the last sentence with a number holds several, the result of an equation goes before what comes after it
  ("... = 255 miles after 4 hours").
"""

import re
from itertools import pairwise

from .numbers import Number, find_numbers, plain_text, read_number_words


__all__ = ["RULES", "extract_answer", "extract_final_number"]

RULES = ("boxed", "first_line", "answer_is", "last_number", "number_word", "none")

_MARKER = re.compile(r"(?<!#)####(?!#)[ \t]{0,4}([^\n]{0,60})")
_BOX = re.compile(r"\\f?boxed\s?\{")
_BARE_BOX = re.compile(r"\\f?boxed\s{1,2}([0-9][0-9,.]{0,40})")
# Where a model goes on with a new question, or with the next turn of a conversation
_CONTINUATION = re.compile(
    r"^[ \t>]{0,4}(?:#{1,6} {0,2})?(?:\*\*)?(?:(?:Next |New |Another )?(?:Question|Problem|Exercise|Instruction|Input|User|Human)\b"
    r"(?: {0,2}#?[0-9]{1,4})?(?:\*\*)? {0,2}(?:[:.]|$)|Q ?[0-9]{0,4} ?:)|<\|(?:im_start|im_end|eot_id|endoftext|end_of_text)\|>",
    re.IGNORECASE | re.MULTILINE,
)
_GOODBYE = re.compile(r"\b(?:let me know|i hope (?:this|that|it)|feel free to|if you have any)\b", re.IGNORECASE)
_STATEMENT = re.compile(
    r"\banswer\b(?:['\u2019]s)?(?: to (?:the|this|your) (?:question|problem))?[*_ \t]{0,4}"
    r"(?:(?:is|was|will be|would be|should be|must be|equals)\b|[:=])[*_ \t:]{0,4}(?:\n{1,2}[ \t]{0,4})?",
    re.IGNORECASE,
)
# The start of a line that answers at once: "18 eggs.", "Answer: $18"
_ANSWERS_AT_ONCE = re.compile(r"[\s$€£¥₹({\[\"'~≈=:*#-]{0,12}")
_UNIT = re.compile(
    r"[^\w.!?\n]{0,6}(?:[^\W\d]{1,24}[^\w.!?\n]{1,4}){0,4}(?:[^\W\d]{1,24})?[^\w.!?\n]{0,6}(?:[.!?](?!\d)|$)"
)
_DERIVATION = re.compile(
    r"=|\b(?:therefore|thus|hence|so|total|altogether|left|remaining|finally)\b|[+*\u00d7\u00f7]", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_ALSO = re.compile(
    r"\b(?:which|or|equivalent|i\.e|that is|meaning|rounded|approximately|about)\b|[≈→=]|\bso\b", re.IGNORECASE
)
_BOXES = 20  # of them are looked into, from the last one on
_SHORT = 6  # words of a text that may be nothing but its answer
_OPERATOR = re.compile(r"[-+*/\u00d7\u00f7=x·^%]|\bof\b|\btimes\b")


def extract_final_number(text: str) -> float | None:
    """The number that an answer ends up with; `None` where it has none. See the module for the rules.

    Percentages are their number (`50 %` is 50), times are hours (`7:30` is 7.5).
    """
    return extract_answer(text)[0]


def extract_answer(text: str) -> tuple[float | None, str]:
    r"""The final number of an answer, and the rule that found it.

    Returns:
        The number, finite, or `None`; and one of [`RULES`]: `"boxed"` (`\boxed{}` or `#### n`), `"first_line"`, `"answer_is"`,
        `"last_number"`, `"number_word"` (digits are nowhere, and the answer is written out), `"none"`.

    Raises:
        TypeError: for what is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"An answer is {text!r}, a {type(text).__name__}; it must be a text.")
    text = _own_part(text)
    boxed = _marked(text)
    if boxed is None:
        boxed = _boxed(text)
    if boxed is not None:
        return boxed, "boxed"
    text = plain_text(text).strip()
    numbers = find_numbers(text)
    strong = [number for number in numbers if not number.is_weak]
    for rule, find in (("first_line", _first_line), ("answer_is", _stated), ("last_number", _last)):
        value = find(text, strong)
        if value is None:
            value = find(text, numbers)
        if value is not None:
            return value, rule
    value = _in_words(text)
    return (value, "none" if value is None else "number_word")


def _own_part(text: str) -> str:
    """An answer without the new question that a model has gone on with, and without polite last words."""
    digit = re.search("[0-9]", text)
    if digit is None:
        return text
    continuation = _CONTINUATION.search(text, digit.end())
    if continuation:
        text = text[: continuation.start()]
    goodbye = _GOODBYE.search(text, digit.end())
    if goodbye and not _STATEMENT.search(text, goodbye.end()) and not _BOX.search(text, goodbye.end()):
        text = text[: goodbye.start()]
    return text


def _marked(text: str) -> float | None:
    """The number behind the first `####` that has one alone: what follows in a line `#### 2 ways to see it` is a heading."""
    for match in _MARKER.finditer(text):
        line = plain_text(match[1]).strip()
        numbers = find_numbers(line)
        if len(numbers) == 1 and _answers_at_once(line, numbers[0], max_words=2):
            return numbers[0].value
    return None


def _boxed(text: str) -> float | None:
    """The last number in the last box that has one."""
    boxes = []
    for match in list(_BOX.finditer(text))[-_BOXES:]:
        depth, end = 1, match.end()
        limit = min(len(text), end + 500)
        while end < limit and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        boxes.append(text[match.end() : end - 1 if not depth else end])
    boxes = boxes or [match[1] for match in _BARE_BOX.finditer(text)]
    for box in reversed(boxes):
        numbers = find_numbers(plain_text(box))
        if numbers:
            return _chained(plain_text(box), numbers)
    return None


def _answers_at_once(line: str, number: Number, max_words: int = 4) -> bool:
    """Whether a line begins with its number, and says no more than a unit until its first sentence ends."""
    if not _ANSWERS_AT_ONCE.fullmatch(line[max(number.start - 13, 0) : number.start]) or number.start > 13:
        return False
    unit = _UNIT.match(line, number.end)
    return unit is not None and len(unit[0].split()) <= max_words + 1


def _first_line(text: str, numbers: list[Number]) -> float | None:
    end = text.find("\n")
    end = len(text) if end < 0 else end
    found = [number for number in numbers if number.end <= end]
    if not found or len({number.value for number in found}) > 1:
        return None
    first = text[:end]
    rest = [number for number in numbers if number.start >= end]
    repeats = len(found) > 1 and "=" not in first
    if not rest or repeats or _STATEMENT.search(first) or _answers_at_once(first, found[0]):
        return found[0].value
    goes_on = first.startswith("1.") or _STATEMENT.search(text, end) or _DERIVATION.search(text, end)
    return None if goes_on else found[0].value


def _stated(text: str, numbers: list[Number]) -> float | None:
    """The number of the last statement that has one."""
    found, at = None, 0
    for match in _STATEMENT.finditer(text):
        while at < len(numbers) and numbers[at].end <= match.end():
            at += 1
        start = _start_of_words(text, match.end())
        end = _SENTENCE_END.search(text, start, start + 400)
        limit = start + 400 if end is None else end.start()
        inside = [number for number in numbers[at : at + 20] if number.start < limit]
        if inside:
            found = _chained(text, inside)
    return found


def _start_of_words(text: str, start: int) -> int:
    end = min(start + 20, len(text))
    while start < end and text[start] in " \n\t*_$:.-":
        start += 1
    return start


def _chained(text: str, numbers: list[Number]) -> float:
    """The first number; where it begins an equation, the result of that."""
    result = numbers[0].value
    for left, right in pairwise(numbers):
        between = text[left.end : right.start]
        if len(between) > 40 or re.search(r"[.;,:(\n]", between) or not _OPERATOR.search(between):
            break
        if "=" in between:
            result = right.value
    return result


def _last(text: str, numbers: list[Number]) -> float | None:
    if not numbers:
        return None
    ends = [match.start() for match in _SENTENCE_END.finditer(text, 0, numbers[-1].start)]
    start = ends[-1] if ends else 0
    sentence = [number for number in numbers if number.start >= start]
    if start and "=" not in text[start:] and len(sentence) > 1:
        # The last sentence may repeat the result among other numbers: "So she pays $53 for 16 glasses."
        results = [a for a in numbers if a.end <= start and _follows_equals(text, a)]
        if results and results[-1].value in [number.value for number in sentence]:
            return results[-1].value
    return _result(text, sentence)


def _follows_equals(text: str, number: Number) -> bool:
    return text[max(number.start - 6, 0) : number.start].rstrip(" $€£¥₹~").endswith(("=", "≈"))


def _result(text: str, numbers: list[Number]) -> float:
    """The result of a sentence's last equation, unless something puts it otherwise afterwards; without one, the last number."""
    for number in reversed(numbers):
        if _follows_equals(text, number):
            tail = text[number.end : numbers[-1].start]
            if _ALSO.search(tail) or not re.search("[A-Za-z]{2}", tail):
                break
            return number.value
    return numbers[-1].value


def _in_words(text: str) -> float | None:
    """A number that is written out, where an answer is stated or a text begins with it."""
    for match in reversed(list(_STATEMENT.finditer(text))):
        value = read_number_words(text[match.end() : match.end() + 200])
        if value is not None:
            return value
    return read_number_words(text) if len(text[:200].split()) <= _SHORT else None
