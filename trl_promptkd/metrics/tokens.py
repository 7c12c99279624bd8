"""Prepares texts of any script for ROUGE-L and exact match.

English text is treated as by `rouge_score` and MiniLLM's code.
"""

import string
import unicodedata
from typing import Any

import regex


__all__ = ["ScriptTokenizer", "is_foreign", "normalized"]

# Fullwidth and halfwidth forms count to these: NFKC makes plain letters and digits of them
_OTHER = r"[[\p{L}\p{Nd}]--\p{Latin}--\p{Common}]|[ー〆\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uffdc]"
_OTHER_LETTER = regex.compile(rf"(?V1){_OTHER}")
# Marks belong to their letter. Joiners and the Arabic tatweel only change how a word looks
_OTHER_RUN = regex.compile(rf"(?V1)(?:{_OTHER})(?:{_OTHER}|[\p{{M}}\p{{Cf}}\u0640])*")
_INVISIBLE = regex.compile(r"[\p{Cf}\u0640]")
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}ー〆\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Javanese}\p{Balinese}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Sundanese}&&[\p{L}\p{Nd}]]"
)
_TOKEN = regex.compile(
    rf"(?V1)[a-z0-9]+|{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{Nd}}]--\p{{Latin}}--\p{{Common}}--{_UNSPACED}]"
    rf"[[\p{{L}}\p{{M}}\p{{Nd}}]--\p{{Latin}}--[0-9]--{_UNSPACED}]*"
)
_ASCII = regex.compile(r"[A-Za-z0-9]")
_LETTER = regex.compile(r"[\p{L}\p{Nd}]")
_LATIN_WORD = regex.compile(r"\p{L}[\p{L}\p{M}]*")
_LETTERS = regex.compile(r"(?V1)[[\p{L}\p{M}\p{Nd}]--\p{Lm}--[ªº]]+")  # not the raised ones: "nº" is not "no"
_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = regex.compile(r"\p{P}+")
# English text has quotes, dashes, dots and section marks of its own, which MiniLLM leaves in
_FOREIGN_PUNCTUATION = regex.compile(r"(?V1)[\p{P}--[\u2010-\u205e§¶·]]+")


def is_foreign(text: str) -> bool:
    """Whether more than a tenth of a text's letters and digits are of other scripts than Latin, or none is ASCII.

    English that quotes a foreign name or a Greek letter is not foreign.
    """
    return 10 * len(_OTHER_LETTER.findall(text)) > len(_LETTER.findall(text)) or not _ASCII.search(text)


class ScriptTokenizer:
    """Splits texts of any script into tokens for `rouge_score`.

    - Runs of ASCII letters and digits in lower case, stemmed: `rouge_score`'s own tokens. It has no others.
    - Words of other scripts: letters with their combining marks, and digits. They are in NFKC form and case-folded,
        but not stemmed.
    - Single characters with their combining marks in scripts that put no spaces between words (Chinese, Japanese,
      Thai, Khmer, ...).
    - Latin words with their accents, but only if a text has nothing else ("Ừ"). Otherwise accents split words, as in
      `rouge_score`.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english: Any = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        plain = _OTHER_RUN.sub(lambda run: _plain(run[0]), text.lower())
        tokens: list[str] = []
        for token in _TOKEN.findall(plain):
            tokens += self._english.tokenize(token) if token.isascii() else [token]
        return tokens or _LATIN_WORD.findall(unicodedata.normalize("NFC", plain))


def _plain(run: str) -> str:
    """A run of other scripts in a form that all its equivalents share."""
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", run)).casefold()
    return unicodedata.normalize("NFKC", text)


def normalized(text: str) -> str:
    """Case-folded, without punctuation, with single spaces: what exact match compares.

    From English text, only ASCII punctuation is removed, as in MiniLLM. From text in other scripts ([`is_foreign`]),
    all Unicode punctuation is. Signs that English does not have ("«", "¿") are removed from any text. Letters that are
    equivalent in Unicode (NFKC) count as equal.
    """
    if is_foreign(text):
        text = _PUNCTUATION.sub("", _plain(text))
    else:
        text = _LETTERS.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text).casefold()
        text = _FOREIGN_PUNCTUATION.sub("", unicodedata.normalize("NFC", text))
    return " ".join(text.translate(_NO_ASCII_PUNCTUATION).split())
