"""Thoughts are not part of an answer: they are cut off before it is scored."""

__all__ = ["without_thoughts"]


def without_thoughts(text: str) -> str:
    """A prediction without its `<think>...</think>` blocks.

    Text before a `</think>` that no `<think>` opens is a thought too: the chat template opened it in the prompt. So is
    the rest of a text whose `<think>` is never closed, as it was cut at `max_new_tokens`.
    """
    *closed, last = text.split("</think>")
    answer: list[str] = []
    for part in closed:
        before, opened, _ = part.partition("<think>")
        answer = [*answer, before] if opened else []
    return " ".join([*answer, last.partition("<think>")[0]])
