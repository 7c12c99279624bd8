"""What of a text is the model's own answer: not its thoughts, not the next turn, not a new question that it went on with."""

import re


__all__ = ["own_part"]

_TURN_END = re.compile(
    r"</s>|<s>|\[/?INST\]|<(?:end|start)_of_turn>|<eos>|<\|(?:im_start|im_end|eot_id|end_of_text|endoftext|end|start_header_id|user|assistant)\|>"
)
# Where a model goes on with a new question
_QUESTION = re.compile(
    r"^[ \t>]{0,4}(?:#{1,6} {0,2})?(?:\*\*)?(?:(?:Next |New |Another )?(?:Question|Problem|Exercise|Instruction|Input|User|Human)\b"
    r"(?: {0,2}#?[0-9]{1,4})?(?:\*\*)? {0,2}(?:[:.]|$)|Q ?[0-9]{0,4} ?:)",
    re.IGNORECASE | re.MULTILINE,
)
_GOODBYE = re.compile(r"\b(?:let me know|i hope (?:this|that|it)|feel free to|if you have any)\b", re.IGNORECASE)
# An answer: a box, a marker, a statement, an equation's result, or a line that says no more than a number and its unit
_ANSWER = re.compile(
    r"\\f?boxed\s?\{[^{}\n]{0,60}[0-9]|####[^\n#]{0,20}[0-9]|\banswer\b[^.\n0-9]{0,40}(?:is|was|be|equals|[:=])[^.\n0-9]{0,40}[0-9]"
    r"|[=≈]\s?[-$€£*~ ]{0,4}[0-9]"
    r"|^[\s$€£*_#(-]{0,12}[0-9][0-9.,]{0,20}%?[*_]{0,2}(?: [^\W\d]{1,20}){0,4}[.*_!)]{0,4}[ \t]{0,4}$",
    re.IGNORECASE | re.MULTILINE,
)

_CONCLUSION = re.compile(r"\\f?boxed\s?\{|\banswer (?:is|was)\b", re.IGNORECASE)


def own_part(text: str) -> str:
    """An answer without what does not belong to it.

    Thoughts end with the last `</think>`; a turn at its mark, where a number stands before it. At a new question ("Question:"), and
    at polite last words, the text is cut where an answer stands before, or none behind: models also restate their question.
    """
    behind = text.rpartition("</think>")[2]
    text = behind if behind.strip() else text
    digit = re.search("[0-9]", text)
    if digit is None:
        return text
    turn = _TURN_END.search(text, digit.end())
    if turn:
        text = text[: turn.start()]
    for pattern in (_QUESTION, _GOODBYE):
        first = pattern.search(text, digit.end())
        if first is None:
            continue
        answer = _ANSWER.search(text)
        if answer and answer.start() >= first.start():
            first = pattern.search(text, answer.end())
        if first and not (pattern is _GOODBYE and _CONCLUSION.search(text, first.end())):
            text = text[: first.start()]
    return text
