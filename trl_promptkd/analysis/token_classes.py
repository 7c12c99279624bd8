"""The kind of each token of a completion."""

from collections.abc import Sequence, Set
from itertools import pairwise

from transformers import PreTrainedTokenizerBase


__all__ = ["TOKEN_CLASSES", "token_classes", "token_text"]

_OF_TEXT = ("word start", "word continuation", "number", "punctuation", "whitespace")
TOKEN_CLASSES = ("first token", *_OF_TEXT, "end of text", "other")


def token_text(token: int, before: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a token adds to the text after the token `before`, white space included.

    Decoded alone, it would lose its space in some tokenizers (SentencePiece), or not be a character yet (bytes).
    """
    alone, both, new = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in ([before], [before, token], [token])
    )
    return both[len(alone) :] if both.startswith(alone) else new


def token_classes(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: Set[int]
) -> list[str]:
    """The class of each token of a completion, one of `TOKEN_CLASSES`. The first in this list that fits:

    - first token: the completion's first token, whatever it is.
    - end of text: one of `ends`.
    - other: a special token, or one without text of its own, such as a part of a character.
    - whitespace: only blanks and line breaks.
    - word start: has a letter, and begins with a blank or comes after anything but a letter, a digit or an apostrophe.
    - word continuation: has a letter otherwise.
    - number: has a digit and no letter.
    - punctuation: any other text, including symbols.
    """
    special = set(tokenizer.all_special_ids)
    classes, text_before = [], ""
    for place, (before, token) in enumerate(pairwise([prompt_ids[-1], *completion_ids])):
        text = token_text(token, before, tokenizer)
        if place == 0:
            classes.append("first token")
        elif token in ends:
            classes.append("end of text")
        elif token in special or not text.replace("\N{REPLACEMENT CHARACTER}", ""):
            classes.append("other")
        else:
            classes.append(_class_of(text, text_before))
        text_before = text or text_before
    return classes


def _class_of(text: str, before: str) -> str:
    if text.isspace():
        return "whitespace"
    if any(map(str.isalpha, text)):
        inside = before[-1:].isalnum() or before[-1:] in ("'", "\N{RIGHT SINGLE QUOTATION MARK}")
        return "word continuation" if inside and not text[0].isspace() else "word start"
    return "number" if any(map(str.isdigit, text)) else "punctuation"
