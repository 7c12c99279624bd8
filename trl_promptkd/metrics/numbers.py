"""The numbers in a text, as a reader would read them: `$1,234.50`, `3/4`, `-5 %`, `\\frac{1}{2}`, `2 million`.

Every pattern is bounded or starts where no digit comes before it, so that the work grows with the length of the text and no
faster, whatever the text is.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any


__all__ = ["Number", "find_numbers", "plain_text"]


@dataclass(frozen=True)
class Number:
    """
    One number and where it stands in a text that [`plain_text`] has made plain.

    Args:
        value: What it says; finite.
        start: Its first character, sign included.
        end: The character after its last one.
        is_weak: Whether it is an ordinal (`3rd`), which answers only where nothing else does.
    """

    value: float
    start: int
    end: int
    is_weak: bool = False


_ANNOTATION = re.compile(r"<<([^<>\n]{0,200})>>(\s?[$€£]?-?[0-9.])?")
_PARTS = {"half": " 1/2", "third": " 1/3", "quarter": " 1/4"}
_SIGNS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "⅕": "1/5", "⅛": "1/8"}
_PART = r"(-?)\s?\\?\$?([0-9][0-9.,]{0,20})"
# `-\frac{1}{2}`, where the sign is no subtraction; `\frac{-1}{2}`; `\frac12`; `½`
_FRACTION = re.compile(
    rf"((?<![0-9)\]}}%])(?<![0-9)\]}}%] )- ?\$?)?(?:\\[dt]?frac\s?(?:\{{\s?{_PART}\s?\}}\s?\{{\s?{_PART}\s?\}}|([0-9])([0-9]))|([{''.join(_SIGNS)}]))"
)
_REWRITTEN: tuple[tuple[re.Pattern, Any], ...] = (
    (re.compile(r"\\\\\[[0-9.]{1,6}\s?(?:pt|em|ex|mm|cm)\]|\\[hv]space\*?\{[^{}]{0,20}\}"), " "),
    (re.compile(r"\\[,!;: ]|\\q?quad\b|[\u200b\ufeff]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"[\u2212\u2013\u2011\ufe63\uff0d]"), "-"),
    (re.compile(r"\\pm(?![a-z])|\+ ?/ ?-"), "\u00b1"),
    (re.compile(r"\\[gl]eq?(?![a-z])|[\u2264\u2265]"), "<"),
    (re.compile(r"-\\(?:text|textbf|mathrm|mathbf|mbox|textit)\s?\{([^{}]{0,200})\}"), r"-\1 "),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit)\s?\{([^{}]{0,200})\}"), r" \1 "),
    (_FRACTION, lambda match: _without_frac(match)),
    (re.compile(r"\\(?:times|cdot)(?![a-z])"), "\u00d7"),
    (re.compile(r"\\div(?![a-z])"), "\u00f7"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-z])"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"(?<=[0-9]) and (?:a|one)[ -](half|quarter|third)\b", re.IGNORECASE), lambda m: _PARTS[m[1].lower()]),
    (re.compile(r"(?<=[0-9]) and (?=[0-9]{1,2}/[0-9]{1,2}(?![0-9/]))"), " "),
    (re.compile(r"[\u00a0\u202f\u2009](?=[0-9]{3}(?![0-9]))"), "\u00a0"),
    # Emphasis, but not a power: `**18**`, `__18__`, `2**3`
    (re.compile(r"(?<![0-9])\*\*|\*\*(?![0-9])|__|`"), ""),
    (
        re.compile(r"(?<![0-9.])([0-9]{1,15}(?:\.[0-9]{1,15})?)\s?[x\u00d7*]\s?10\s?\^\s?\{?\s?([-+]?[0-9]{1,3})\}?"),
        r"\1e\2",
    ),
    (re.compile(r"(?<![0-9.,/^_{])10\s?\^\s?\{?\s?([0-9]{1,2})(?![0-9])\}?"), r"1e\1"),
)
_DIGITS = re.compile(
    r"(?<![0-9])(?:"
    r"[0-9]{1,3}(?:,[0-9]{3}){1,9}(?![0-9])(?:\.[0-9]+)?"  # 1,234,567.8
    r"|[0-9]{1,3}(?:, 000){1,4}(?![0-9])"  # 18, 000
    r"|[0-9]{1,2}(?:,[0-9]{2}){1,6},[0-9]{3}(?![0-9])(?:\.[0-9]+)?"  # 12,34,567 (India)
    r"|[0-9]{1,3}(?:\.[0-9]{3}){1,9},[0-9]{1,2}(?!,?[0-9])"  # 1.234,50
    r"|[0-9]{1,3}(?:[ \u00a0][0-9]{3}){1,9}(?![0-9]|[ \u00a0/:][0-9])(?:\.[0-9]+)?"  # 1 234
    r"|(?<![0-9],)(?<!are )(?<!were )(?<!and )(?<!ages )(?<!numbers )[0-9]+,[0-9]{1,2}(?!,?[0-9])"  # 0,5, but not 1,2,3
    r"|[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?"
    r"|\.[0-9]+)"
)
_CURRENCY = "$€£¥₹"
_BEFORE_SIGN = " \n\t([{=:*\"'~≈," + _CURRENCY
_CURRENCY_CODES = ("usd", "eur", "gbp", "inr", "rs", "rs.", "us")
_SCALE = re.compile(r"\s?(hundred|thousand|million|billion)\b(?!-[a-z])", re.IGNORECASE)
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9}
_THOUSANDS = re.compile(r"\Athousand (?:and )?\Z|[0-9] ?thousand (?:and )?\Z", re.IGNORECASE)
_LETTERS = {"K": 1e3, "M": 1e6, "B": 1e9}
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
_NEGATION = re.compile(r"\b(?:negative|minus)\s\Z", re.IGNORECASE)
_LABEL = re.compile(
    r"\b(?:step|question|problem|example|part|case|option|method|phase|figure|table|equation|q) ?[#(]{0,2}\Z",
    re.IGNORECASE,
)
_SURENESS = re.compile(r" ?(?:%|percent) (?:sure|certain|confident|positive|correct|confidence)\b", re.IGNORECASE)
_CONFIDENCE = re.compile(r"\bconfiden(?:ce|t)(?: (?:level|score|of|is)){0,3}[:* ]{0,4}\Z", re.IGNORECASE)
_SUBSCRIPT = re.compile(r"[A-Za-z0-9)}]_\{?\Z|[\^\u00b1]\{? ?\Z")
_WORD = re.compile(r"[A-Za-z]+\.?\Z")
_LINE_START = re.compile(r"[ \t]{0,12}(?:#{1,6}[ \t]{1,3})?\(?")
_ENUMERATED = re.compile(r"[.)][ \t]{1,4}[^\s]")


def plain_text(text: str) -> str:
    """`text` without LaTeX, emphasis and calculator annotations around its numbers."""
    text = _ANNOTATION.sub(_without_annotation, text.replace("\r\n", "\n"))
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    return text


def _without_frac(match: re.Match) -> str:
    sign, top_sign, top, bottom_sign, bottom, top_digit, bottom_digit, one = match.groups()
    fraction = _SIGNS[one] if one else f"{top or top_digit}/{bottom or bottom_digit}"
    is_negative = bool(sign) ^ (top_sign == "-") ^ (bottom_sign == "-")
    return f" {'-' * is_negative}{fraction}"


def _without_annotation(match: re.Match) -> str:
    """`<<48/2=24>>24` -> `24`, and `<<48/2=24>> clips` -> `24 clips`."""
    return match[2] or match[1].rpartition("=")[2]


def find_numbers(text: str) -> list[Number]:
    """The numbers in a plain text, in their order; without step labels, dates and parts of names, and without enumerators
    (`1. ...`) unless there is nothing else."""
    numbers: list[Number] = []
    enumerators: list[Number] = []
    for number in _merged(text, [_read(match) for match in _DIGITS.finditer(text)]):
        if not math.isfinite(number.value):
            continue
        if _is_enumerator(text, number, len(enumerators)):
            enumerators.append(number)
        elif not _is_name(text, number):
            number = _signed(text, _scaled(text, number))
            last = numbers[-1] if numbers else None
            if last and last.value >= 1e3 > number.value > 0 and _THOUSANDS.search(text[last.start : number.start]):
                numbers[-1] = replace(last, value=last.value + number.value, end=number.end)
            else:
                numbers.append(number)
    return numbers or enumerators


def _read(match: re.Match) -> Number:
    digits = match[0].replace(" ", "").replace("\u00a0", "")
    if len(digits) > 400:  # beyond every float, and slow to read
        return Number(math.inf, match.start(), match.end())
    if re.fullmatch(r"[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]{1,2}", digits):
        digits = digits.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"[0-9]+,[0-9]{1,2}", digits):
        digits = digits.replace(",", ".")
    return Number(float(digits.replace(",", "")), match.start(), match.end())


def _merged(text: str, parts: list[Number]) -> list[Number]:
    """Fractions, mixed numbers and times as one number each; dates as none."""
    numbers: list[Number] = []
    at = 0
    while at < len(parts):
        part = parts[at]
        gaps = [text[a.end : b.start] for a, b in zip(parts[at : at + 2], parts[at + 1 : at + 3], strict=False)]
        if len(gaps) == 2 and gaps[0] == gaps[1] and gaps[0] in ("/", "-") and _is_date(parts[at : at + 3]):
            at += 3
            continue
        if gaps and gaps[0] == "/" and parts[at + 1].value:
            part = Number(part.value / parts[at + 1].value, part.start, parts[at + 1].end)
            at += 1
            if numbers and part.value < 1 and _is_mixed(text, numbers[-1], part):
                whole = numbers.pop()
                part = Number(whole.value + part.value, whole.start, part.end)
        elif gaps and gaps[0] == ":" and _is_time(part, parts[at + 1]):
            part = Number(part.value + parts[at + 1].value / 60, part.start, parts[at + 1].end)
            at += 1
        numbers.append(part)
        at += 1
    return numbers


def _is_mixed(text: str, whole: Number, part: Number) -> bool:
    """`2 1/2`, and `2-1/2` where nothing is reckoned with it."""
    gap = text[whole.end : part.start]
    if gap == "-":
        return not re.match(r"\s?[-=+*/\u00d7]", text[part.end : part.end + 2])
    return gap in (" ", "  ")


def _is_date(parts: list[Number]) -> bool:
    widths = [part.end - part.start for part in parts]
    return 4 in (widths[0], widths[2]) and sorted(widths)[:2] <= [2, 2] and widths[1] <= 2


def _is_time(hours: Number, minutes: Number) -> bool:
    return hours.value <= 24 and minutes.end - minutes.start == 2 and minutes.value < 60


def _is_enumerator(text: str, number: Number, counted: int) -> bool:
    """Whether a number only counts lines: `1. ...`, `2) ...`; the first one is 1, and each goes on where the last one was."""
    before = text[max(number.start - 20, 0) : number.start]
    if "\n" not in before and number.start >= 20:
        return False
    return bool(
        number.value == counted + 1
        and _LINE_START.fullmatch(before.rpartition("\n")[2])
        and _ENUMERATED.match(text, number.end, number.end + 20)
    )


def _is_name(text: str, number: Number) -> bool:
    """Whether a number is part of a name or a label, or says how sure the answer is: `x2`, `Step 3`, a power, `95% sure`."""
    before = text[max(number.start - 30, 0) : number.start].rpartition("\n")[2]
    if _SUBSCRIPT.search(before) or _LABEL.search(before[-12:]) or _CONFIDENCE.search(before):
        return True
    if _SURENESS.match(text, number.end, number.end + 20):
        return True
    word = _WORD.search(before[-12:])
    return word is not None and word[0].lower() not in _CURRENCY_CODES and not word[0].endswith(".")


def _scaled(text: str, number: Number) -> Number:
    scale = _SCALE.match(text, number.end, number.end + 12)
    if scale:
        return replace(number, value=number.value * _SCALES[scale[1].lower()], end=scale.end())
    is_money = text[max(number.start - 1, 0) : number.start] in tuple(_CURRENCY)
    letter = re.match(r"[kKMB]\b" if is_money else r"K\b", text[number.end : number.end + 2])
    if letter:
        return replace(number, value=number.value * _LETTERS[letter[0].upper()], end=number.end + 1)
    is_result = text[max(number.start - 2, 0) : number.start].rstrip().endswith("=")
    return replace(number, is_weak=not is_result and bool(_ORDINAL.match(text, number.end, number.end + 3)))


def _signed(text: str, number: Number) -> Number:
    """With its sign: `-5`, `-$5`, `$-5`, `negative 5`; but `3-2` and `16 - 3` subtract, and `- 5` may begin a line."""
    start = number.start
    if text[max(start - 1, 0) : start] in tuple(_CURRENCY):
        start -= 1
    if text[max(start - 1, 0) : start] == "-":
        before = text[max(start - 4, 0) : start - 1]
        subtracts = before.rstrip(" " + _CURRENCY)[-1:] in tuple("0123456789)%]}")
        if not subtracts and (not before or before[-1] in _BEFORE_SIGN):
            return replace(number, value=-number.value, start=start - 1)
        return number
    word = _NEGATION.search(text[max(start - 10, 0) : start])
    if word and not re.search(r"[0-9)] $", text[max(start - 14, 0) : start - len(word[0])]):
        return replace(number, value=-number.value)
    return number
