r"""The final number of an answer to a word problem, by the rules of the response priming paper's evaluation, in their order.

1. `\boxed{}`, and GSM8K's own `#### n`;
2. the numbers of the first line, if they are all equal;
3. the number after "the [final/correct] answer is";
4. the last number.

Source: the paper's released code (arXiv 2412.17846), which reads numbers as runs of digits and commas. What is different here, as that is misled:

- only the model's own answer is read ([`own_part`]): not its thoughts, nor a new question that it went on with;
- numbers are read as a reader would ([`find_numbers`]): signs, fractions, separators, LaTeX, units, no labels of steps;
- of several boxes and of several statements the last one counts (there: the first); a stated equation counts with its result;
- "Answer:" states something only where a number and no more than its unit follow: a derivation may follow as well;
- a first line counts where it answers at once ("18 eggs.", "The answer is 18"), or repeats one number; a sentence is a step of a
  derivation if numbers follow, and so is a number that later lines reckon with ("16 eggs", "16 - 7 = 9");
- where the last sentence with a number holds several, the result of an equation goes before what comes after it
  ("... = 255 miles after 4 hours"), and numbers in brackets or after prepositions go behind the others ([`result_of`]).
"""

import re

from .numbers import Number, find_numbers, plain_text
from .own_part import own_part
from .sentences import SENTENCE_END, answers_at_once, follows_equals, result_of, stated_value
from .words import find_number_words, read_number_words


__all__ = ["RULES", "extract_answer", "extract_final_number", "gold_number"]

RULES = ("boxed", "first_line", "answer_is", "last_number", "number_word", "none")

_MARKER = re.compile(r"(?<!#)####(?!#)[ \t]{0,4}([^\n]{0,60})")
_BOX = re.compile(r"\\f?boxed\s?\{")
_BARE_BOX = re.compile(r"\\f?boxed\s{1,2}([0-9][0-9,.]{0,40})")
_STATEMENT = re.compile(
    r"\banswer\b(?:['\u2019]s)?(?: (?:to|for|in|here)\b[^.=:\n]{0,50}?)?[*_ \t]{0,4}"
    r"\b(?:is(?: equal to)?|was|will be|would be|should be|must be|equals|comes (?:out )?to|turns out to be)\b"
    r"(?! (?:not )?(?:in|at|to|on)\b)[*_ \t:]{0,4}(?:\n{1,2}[ \t]{0,4})?",
    re.IGNORECASE,
)
# "Answer:" may stand before a derivation: it states something only where the answer follows at once
_HEADING = re.compile(
    r"\b(final |correct )?(?:answer|ans)\b[*_ \t]{0,4}[:=][*_ \t:]{0,4}(?:\n{1,2}[ \t]{0,4})?", re.IGNORECASE
)
_CONCLUDES = re.compile(
    r"=|\b(?:therefore|thus|hence|so|total|altogether|left|remaining|finally)\b|[+*\u00d7\u00f7]", re.IGNORECASE
)
_OPERAND_AFTER = re.compile(r"\s?(?:[a-z]{1,12} )?[-+*/\u00d7\u00f7x]\s?[$€£]?[0-9][^\n]{0,60}=")
_OPERAND_BEFORE = re.compile(r"[0-9] ?(?:[a-z]{1,12} )?[-+*/\u00d7\u00f7x] ?[$€£]?\Z")
_ENUMERATED = re.compile(r"1[.)] {1,3}[A-Z]")
_CUT_OFF = re.compile(r"=[\s$€£]{0,4}\Z")
_BOXES = 20  # of them are looked into, from the last one on
_SHORT = 6  # words of a text that may be nothing but its answer


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
    text = own_part(text)
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


def gold_number(text: str) -> float | None:
    r"""The right answer that a text gives: behind `####`, in `\boxed{}`, or the text's only number where that and a unit is all it is."""
    value = _marked(text)
    value = _boxed(text) if value is None else value
    if value is None:
        plain = plain_text(text).strip()
        numbers = find_numbers(plain)
        if len(numbers) == 1 and answers_at_once(plain, 0, numbers[0], max_words=3):
            value = numbers[0].value
    return value


def _marked(text: str) -> float | None:
    """The number behind the first `####` that begins with one: what follows in a line `#### 2 ways to see it` is a heading."""
    for match in _MARKER.finditer(text):
        line = plain_text(match[1]).strip()
        numbers = find_numbers(line)
        if not numbers or numbers[0].start > 16:
            continue
        is_alone = answers_at_once(line, 0, numbers[0], max_words=2)
        if is_alone or (line[: numbers[0].start].strip(" $€£-*:") == "" and not text[match.end() :].strip()):
            return numbers[0].value
    return None


def _boxed(text: str) -> float | None:
    """The last number in the last box that has one; of an equation the result, and a plain sum or product is worked out."""
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
        plain = plain_text(box)
        numbers = find_numbers(plain)
        if numbers:
            value = stated_value(plain, numbers)
            return numbers[0].value if value is None else value
    return None


def _first_line(text: str, numbers: list[Number]) -> float | None:
    """The number of the first line, if it is one number, and the line no step of a derivation."""
    if not numbers:
        return None
    end = text.find("\n")
    end = len(text) if end < 0 else end
    found = [number for number in numbers if number.end <= end]
    rest = numbers[len(found) :]
    if not found:
        return None
    if len({number.value for number in found}) > 1:
        return _first_sentence(text, numbers)
    repeats = len(found) > 1 and "=" not in text[:end] and not _HEADING.search(text, 0, found[0].start)
    if not rest or repeats or _states(text, found[0]):
        return found[0].value
    if not answers_at_once(text, 0, found[0]) or "=" in text[: found[0].start]:
        return None
    return None if _is_operand(text, found[0].value, rest) or _is_list(text, end, rest) else found[0].value


def _first_sentence(text: str, numbers: list[Number]) -> float | None:
    """The number of a first sentence that is nothing else, where no derivation and no other such sentence follows: "72 clips. 48 in
    April, 24 in May."."""
    end = SENTENCE_END.search(text, numbers[0].end)
    if end is None or end[0] == "\n" or not answers_at_once(text, 0, numbers[0]):
        return None
    if _CONCLUDES.search(text, end.end()) or _STATEMENT.search(text, end.end()):
        return None
    other = next(number for number in numbers if number.start >= end.end()) if numbers[-1].start >= end.end() else None
    return None if other is None or answers_at_once(text, end.end(), other) else numbers[0].value


def _states(text: str, number: Number) -> bool:
    """Whether the first line states its number: "The answer is 18", "Answer: 18"."""
    statement = _STATEMENT.search(text, 0, number.start)
    if statement:
        return True
    heading = _HEADING.search(text, 0, number.start)
    return heading is not None and answers_at_once(text, heading.end(), number)


def _is_operand(text: str, value: float, rest: list[Number]) -> bool:
    """Whether later lines reckon with a first line's number: "16 eggs\n16 - 7 = 9"."""
    return any(
        number.value == value
        and (
            _OPERAND_AFTER.match(text, number.end)
            or (
                _OPERAND_BEFORE.search(text[max(number.start - 20, 0) : number.start])
                and re.match(r"[^\n]{0,60}=", text[number.end : number.end + 61])
            )
        )
        for number in rest
    )


def _is_list(text: str, end: int, rest: list[Number]) -> bool:
    """Whether every line is a number with its unit: "5 apples\n6 pears\n11 fruits"."""
    if len(rest) < 2 or not re.search(r"[^\W\d]{2}", text[:end]):
        return False
    lines = [line for line in text[end:].split("\n") if line.strip()]
    if len(lines) != len(rest):
        return False
    starts, at = [], end
    for line in lines:
        at = text.index(line, at)
        starts.append(at)
        at += len(line)
    return all(answers_at_once(text, start, number) for start, number in zip(starts, rest, strict=True))


def _stated(text: str, numbers: list[Number]) -> float | None:
    """The number of the last statement that has one."""
    found, at = None, 0
    matches = [*_STATEMENT.finditer(text), *_HEADING.finditer(text)]
    for match in sorted(matches, key=lambda match: match.start()):
        while at < len(numbers) and numbers[at].end <= match.end():
            at += 1
        start = _start_of_words(text, match.end())
        end = SENTENCE_END.search(text, start, start + 400)
        limit = start + 400 if end is None else end.start()
        inside = [number for number in numbers[at : at + 20] if number.start < limit]
        if not inside:
            continue
        if match.re is _STATEMENT:
            value = stated_value(text, inside)
        elif _ENUMERATED.match(text, inside[0].start) and "\n2" in text[inside[0].end :]:
            continue
        elif answers_at_once(text, match.end(), inside[0]) or (
            match[1] and len(inside) == 1 and "=" not in text[match.end() :]
        ):
            value = inside[0].value
        else:
            continue
        found = found if value is None else value
    return found


def _start_of_words(text: str, start: int) -> int:
    end = min(start + 20, len(text))
    while start < end and text[start] in " \n\t*_$:.-":
        start += 1
    return start


def _last(text: str, numbers: list[Number]) -> float | None:
    if not numbers:
        return None
    if _CUT_OFF.search(text[-8:]) and len(numbers) > 1:
        # A text that ends within an equation: what stands before its sentence
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        whole = [number for number in numbers if ends and number.end <= ends[-1]]
        numbers = whole or numbers
    ends = [match.start() for match in SENTENCE_END.finditer(text, 0, numbers[-1].start)]
    start = ends[-1] if ends else 0
    if ends and re.match(r"[.!?\s]{1,3}\([^()\n=]{0,120}\)\W{0,4}\Z", text[start:]):
        start = ends[-2] if len(ends) > 1 else 0
    sentence = [number for number in numbers if number.start >= start]
    if start and "=" not in text[start:] and len(sentence) > 1:
        # The last sentence may repeat the result among other numbers: "So she pays $53 for 16 glasses."
        results = [a for a in numbers if a.end <= start and follows_equals(text, a)]
        if results and results[-1].value in [number.value for number in sentence]:
            return results[-1].value
    return result_of(text, sentence, start)


def _in_words(text: str) -> float | None:
    """A number that is written out, where an answer is stated, a text begins with it, or in the last sentence."""
    for match in reversed([*_STATEMENT.finditer(text), *_HEADING.finditer(text)]):
        value = read_number_words(text[match.end() : match.end() + 200])
        if value is not None:
            return value
    value = read_number_words(text) if len(text[:200].split()) <= _SHORT else None
    if value is None and not re.search("[0-9]", text):
        sentences = [sentence for sentence in SENTENCE_END.split(text[-2000:]) if sentence.strip()]
        value = find_number_words(sentences[-1]) if sentences else None
    return value
