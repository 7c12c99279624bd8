"""Numbers that are written out: `twenty-five`, `one hundred and five`, `three quarters`, `a dozen`."""

import re


__all__ = ["find_number_words", "read_number_words"]

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_SMALL.split())} | {
    word: 20 + 10 * i for i, word in enumerate(_TENS)
}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9}
_PARTS = {"half": 1 / 2, "halves": 1 / 2, "third": 1 / 3, "thirds": 1 / 3, "quarter": 1 / 4, "quarters": 1 / 4}
_PARTS |= {"fourth": 1 / 4, "fourths": 1 / 4, "fifth": 1 / 5, "fifths": 1 / 5, "eighth": 1 / 8, "eighths": 1 / 8}
_ARTICLES = ("a", "an", "the", "about", "approximately")


def read_number_words(text: str) -> float | None:
    """The number that a text begins with in words; `None` for any other text."""
    return _read(re.findall(r"[a-z]+", text[:200].lower())[:16])


def _read(words: list[str]) -> float | None:
    total, group, found, at = 0.0, 0.0, False, 0
    while at < len(words) and words[at] in _ARTICLES:
        at += 1
    if at < len(words) and words[at] in ("half", "quarter", "dozen", "hundred", "thousand", "million"):
        # "half an hour", "a dozen", but not "the third day"
        return _PARTS.get(words[at]) or {"dozen": 12.0}.get(words[at]) or _SCALES[words[at]]
    for i in range(at, len(words)):
        word = words[i]
        if word in _WORDS:
            group, found = group + _WORDS[word], True
        elif word in _SCALES and found:
            group *= _SCALES[word]
            if word != "hundred":
                total, group = total + group, 0.0
        elif word == "dozen" and found:
            return 12 * (total + group)
        elif word in _PARTS and found:
            return (total + group) * _PARTS[word]
        elif word == "and" and found and words[i + 1 : i + 3] in (["a", "half"], ["one", "half"], ["a", "quarter"]):
            return total + group + _PARTS[words[i + 2]]
        elif word != "and" or not found:
            break
    return total + group if found else None


_LEADING = "|".join([*sorted(set(_WORDS) - {"one", "zero"}), "one hundred", "dozen"])
_CARDINAL = re.compile(
    rf"\b(?:{_LEADING})\b(?:(?: and)?[ -](?:hundred|thousand|million|billion|dozen|{'|'.join(_WORDS)})\b){{0,9}}"
)
_BEHIND = re.compile(r"\b(?:after|in|for|by|per|each|at|from|with|than|every|buying|eating|the)\s\Z")


def find_number_words(sentence: str) -> float | None:
    """The last number written out in a sentence, one right after "for", "after" and the like only where it is the only one.

    A lone "one" or "half" is none: "no one", "half of the eggs".
    """
    sentence = sentence[:400].lower()
    found = behind = None
    for match in _CARDINAL.finditer(sentence):
        if _BEHIND.search(sentence[max(match.start() - 12, 0) : match.start()]):
            behind = read_number_words(match[0])
        else:
            found = read_number_words(match[0])
    return behind if found is None else found
