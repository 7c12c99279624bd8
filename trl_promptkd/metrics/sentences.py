"""Which number of a sentence is its result: that of an equation, or the one that no preposition or bracket puts in the background."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from .numbers import Number


__all__ = [
    "SENTENCE_END",
    "answers_at_once",
    "evaluated",
    "follows_equals",
    "result_of",
    "stated_value",
    "without_denied",
]

SENTENCE_END = re.compile(r"\n|(?<!i\.e)(?<!e\.g)(?<!\bvs)[.!?](?=\s|$)")
# The start of a line that answers at once: "18 eggs.", "Answer: $18", "x = 18"
_OPENING = re.compile(r"[\s$€£¥₹({\[\"'~≈=:*#_-]{0,12}(?:[A-Za-z] = ?[$€£]?)?")
_UNIT = re.compile(
    r"(?!\s?[-+*/\u00d7\u00f7=x]\s?[($0-9])[^\w.!?\n(;]{0,6}(?:[^\W\d]{1,24}(?:\^[23]|[²³])?[^\w.!?\n(;]{1,4}){0,4}(?:[^\W\d]{1,24}(?:\^[23]|[²³])?)?[^\w.!?\n(;]{0,6}"
    r"(?:[.!?](?!\d)|[;(]|$|(?=\n)|\b(?:because|since)\b)"
)
_OPERATOR = re.compile(r"[-+*/\u00d7\u00f7=x·^%]|\bof\b|\btimes\b")
_PLAIN_OPERATOR = re.compile(r"(?:\s?([+*/x\u00d7·\u00f7])\s?|\s(-)\s)[$€£]?")
_RELATION = re.compile(r"[=≈]|\b(?:equals|is|or|i\.e|makes|gives|giving|making|that is)\b", re.IGNORECASE)
_MULTIPLE = re.compile(r"\b(?:twice|half|double|triple|thrice)\s(?:of\s)?[$€£]?\Z", re.IGNORECASE)
_REASON = re.compile(r"\b(?:because|since|as)\b", re.IGNORECASE)
_ALSO = re.compile(
    r"\b(?:which|or|equivalent|i\.e|that is|meaning|rounded|approximately|about)\b|[≈→=]|\bso\b", re.IGNORECASE
)
_COMPARED = re.compile(r"[^.,\n]{0,25}\b(?:more|less|fewer|higher|lower|older|younger|longer|shorter|times)\b")
_INEQUALITY = re.compile(r"[^A-Za-z]{0,6}[<>]")
_DENIED = re.compile(r"\b(?:not|instead of|rather than)\s(?:the )?[$€£]?\Z", re.IGNORECASE)
# What stands in the background where another number does not
_BACKGROUND = re.compile(
    r"\b(?:(?P<plain>after|in|by|per|each|every|than|from|out of|compared to|in addition to|remaining|half of|each of|(?:end|start|beginning|course|first|last) of)|(?P<for>for)"
    r"|(?P<with>with)|(?P<at>at)|(?:of)(?<=% of))\s"
    r"(?:(?:about|the|another|only|all|those|these|next|first|last|other|remaining|his|her|their)\s){0,2}[$€£]?\Z",
    re.IGNORECASE,
)
_IS_LEFT_WITH = re.compile(
    r"\b(?:left|ends?|ended|ending|leav\w{1,3}|remain\w{0,3}|finish\w{0,3})(?: \w{1,12}){0,2} with [$€£]?\Z",
    re.IGNORECASE,
)
_IN_ORDER_TO = re.compile(r"\bmore\b[^.\n]{0,40}\bto (?!be\b)\w{2,12} [$€£]?\Z", re.IGNORECASE)
_MONEY = re.compile(r"\s?(?:dollars?|cents?|euros?|pounds|bucks)\b", re.IGNORECASE)
_EACH = re.compile(
    r"[^.,\n\d]{0,20}\b(?:each|apiece|per|a piece)\b(?! (?:day|week|month|year|hour|night|morning))", re.IGNORECASE
)
_REMAINS = re.compile(r"[^.,\n\d]{0,20}\b(?:left|remaining|over)\b", re.IGNORECASE)
_CLOCK = re.compile(r"\s?[ap]\.?m\b|:", re.IGNORECASE)
_COORDINATED = re.compile(r"\s[a-z]{2,15}(?: [a-z]{2,15})?(?:,| and|, and) [$€£]?|, (?:and )?[$€£]?")
_BRACKETS = re.compile(r"\([^()\n]{0,120}\)")


def answers_at_once(text: str, start: int, number: Number, max_words: int = 4) -> bool:
    """Whether a line or sentence begins with its number, and says no more than a unit until it ends, or a bracket begins."""
    if number.start - start > 16 or not _OPENING.fullmatch(text, start, number.start):
        return False
    unit = _UNIT.match(text, number.end)
    return unit is not None and len(re.findall(r"[^\W\d]+", unit[0])) <= max_words


def follows_equals(text: str, number: Number) -> bool:
    return text[max(number.start - 6, 0) : number.start].rstrip(" $€£¥₹~").endswith(("=", "≈"))


def without_denied(text: str, numbers: Sequence[Number]) -> list[Number]:
    """`numbers` without "not 20" and "rather than 20", where others are."""
    kept = [number for number in numbers if not _DENIED.search(text[max(number.start - 20, 0) : number.start])]
    return kept or list(numbers)


def evaluated(text: str, numbers: Sequence[Number]) -> float | None:
    """The value of two or three plain numbers and the operators between them; `None` for anything else."""
    if not 2 <= len(numbers) <= 3:
        return None
    terms = [numbers[0].value]
    for left, right in pairwise(numbers):
        operator = _PLAIN_OPERATOR.fullmatch(text, left.end, right.start)
        if operator is None:
            return None
        sign = operator[1] or operator[2]
        if sign in "+-":
            terms.append(right.value if sign == "+" else -right.value)
        elif sign in "/÷":
            if not right.value:
                return None
            terms[-1] /= right.value
        else:
            terms[-1] *= right.value
    total = sum(terms)
    return total if math.isfinite(total) else None


def _expression(text: str, numbers: Sequence[Number]) -> list[Number]:
    """The numbers from the first on that operators join."""
    chain = list(numbers[:1])
    for left, right in pairwise(numbers[:20]):
        if not _PLAIN_OPERATOR.fullmatch(text, left.end, right.start):
            break
        chain.append(right)
    return chain


def stated_value(text: str, numbers: Sequence[Number]) -> float | None:
    """What a statement's numbers come to: the first one; where it begins an equation, the result of the sentence's last one.

    `None` for an expression without a result, such as "the answer is 2 * (3 + 4)".
    """
    numbers = without_denied(text, numbers)
    first = numbers[0]
    begins = bool(_MULTIPLE.search(text[max(first.start - 12, 0) : first.start]))
    expression = _expression(text, numbers)
    for at, (left, right) in enumerate(pairwise(numbers)):
        between = text[left.end : right.start]
        if len(between) > 40:
            break
        if "=" in between or (begins and _RELATION.search(between)):
            value = right.value
            for later in numbers[at + 2 :]:
                if follows_equals(text, later) and not _REASON.search(text[right.end : later.start]):
                    value = later.value
            return value
        if re.search(r"[;:(\n]|[.,]\s", between) or not _OPERATOR.search(between):
            break
        begins = True
    return evaluated(text, expression) if len(expression) > 1 else first.value


def result_of(text: str, numbers: Sequence[Number], start: int) -> float:
    """The result of a sentence, from `start` on: that of its last equation, unless something puts it otherwise afterwards; without
    an equation the last number, those in brackets and after prepositions behind the others."""
    numbers = without_denied(text, numbers)
    brackets = [match.span() for match in _BRACKETS.finditer(text, start, numbers[-1].end + 130)]
    outside = [number for number in numbers if not any(a < number.start < b for a, b in brackets)]
    numbers = outside or numbers
    for at in range(len(numbers) - 1, -1, -1):
        if follows_equals(text, numbers[at]):
            return _equals(text, numbers, at)
    return _foremost(text, numbers, start)


def _equals(text: str, numbers: Sequence[Number], at: int) -> float:
    """The result of an equation, the last of a sentence, whose right side begins with one of its numbers."""
    number, after = numbers[at], numbers[at + 1 :]
    if not after:
        return number.value
    tail = text[number.end : after[-1].start]
    right = _expression(text, numbers[at:])
    if len(right) > 1:
        # `18 = 9 * 2`: the left side is the result, where it is a number by itself
        left = numbers[at - 1] if at else None
        if left and re.fullmatch(r"[^.\n]{0,30}", text[left.end : number.start]) and not _ends_expression(text, left):
            return left.value
        value = evaluated(text, right)
        if value is not None and len(right) == len(after) + 1:
            return value
    if _INEQUALITY.match(tail):
        return number.value
    if _ALSO.search(tail):
        if re.search(r"\bwhich is\b", tail) and _COMPARED.match(text, after[-1].end):
            return number.value
        return after[-1].value
    return number.value if re.search("[A-Za-z]{2}", tail) else after[-1].value


def _ends_expression(text: str, number: Number) -> bool:
    before = text[max(number.start - 8, 0) : number.start].rstrip(" $€£")
    return before[-1:] in tuple("+-*/\u00d7\u00f7x·(%") or before.endswith(" of")


def _foremost(text: str, numbers: Sequence[Number], start: int) -> float:
    """The last number that does not stand in the background; the last one where all do."""
    found, was_behind, last = None, False, None
    for number in numbers:
        before = text[max(number.start - 60, start) : number.start]
        is_behind = _is_behind(text, number, before)
        if last is not None and was_behind and _COORDINATED.fullmatch(text, last.end, number.start):
            is_behind = True
        if not is_behind:
            found = number
        was_behind, last = is_behind, number
    return (found or numbers[-1]).value


def _is_behind(text: str, number: Number, before: str) -> bool:
    if _IN_ORDER_TO.search(before):
        return True
    match = _BACKGROUND.search(before)
    if match is None:
        return False
    if match["for"]:
        is_money = before[-1:] in "$€£" or _MONEY.match(text, number.end)
        return not is_money or bool(_EACH.match(text, number.end))
    if match["with"]:
        return not (_IS_LEFT_WITH.search(before) or _REMAINS.match(text, number.end))
    if match["at"]:
        return not (_CLOCK.match(text, number.end) or ":" in text[number.start : number.end])
    return True
