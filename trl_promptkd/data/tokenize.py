"""From a row to the token ids of its prompt, of the primed prompt that only the teacher sees, and of its answer.

The user's own tokens are always kept, including special ones. Tokens that a tokenizer adds before a text are part of
the prompt. Those that it adds after a text are not, as an answer follows there. An answer ends with one end-of-text
token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .by_teacher import Priming, priming_of
from .chat_template import conversation_texts
from .priming import PrimingTemplate
from .rows import check_ids, check_text_only, is_blank, shortened, split_row


__all__ = ["tokenize_cut_row", "tokenize_primed_row", "tokenize_row"]

_CUT = "[cut here]"


def tokenize_row(
    row: Mapping[str, Any], processing_class: PreTrainedTokenizerBase, with_answer: bool = True
) -> dict[str, list[int]]:
    """Token ids of one row.

    Args:
        row: Has `messages` (the last one is the answer), or `prompt` and perhaps `completion`, each a text or a list
            of messages. A `prompt` that ends with an assistant message is continued. `tools` and
            `chat_template_kwargs` reach the chat template. Rows with `prompt_ids` are already tokenized, and their ids
            are used unchanged.
        processing_class: The tokenizer. Conversations need its chat template.
        with_answer: `False` reads only the prompt, for rows whose answer is not used.

    Returns:
        `{"prompt_ids": [...], "completion_ids": [...]}`. The answer ends with an end-of-text token. It is empty if the
        row has none.

    Raises:
        ValueError: if the row has none of these forms, if its chat template fails, if its prompt has no tokens, or if
            nothing of its answer would be trained on.
    """
    ids = tokenize_primed_row(row, processing_class, None, with_answer)
    return {"prompt_ids": ids["prompt_ids"], "completion_ids": ids["completion_ids"]}


def tokenize_cut_row(row: Mapping[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Like [`tokenize_row`], for an answer that is a text and was cut. Nothing follows its last word, not even an
    end-of-text token."""
    prompt, answer = split_row(row)
    if is_blank(answer, processing_class.eos_token):
        return {**tokenize_row(row, processing_class, with_answer=False), "completion_ids": []}
    before, prompts, text = [], [prompt], answer
    if isinstance(prompt, str):
        before = _ids_before(prompt, processing_class)
    else:
        prompts, written = conversation_texts([prompt], answer + _CUT, row, processing_class)
        text = written[: written.rindex(_CUT)] if written else ""  # what follows an answer is not always one token
    prompt_ids, completion_ids = _tokenize_texts(prompts, text, processing_class)
    return {"prompt_ids": [*before, *prompt_ids[0]], "completion_ids": completion_ids}


def tokenize_primed_row(
    row: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase,
    priming: Priming,
    with_answer: bool = True,
) -> dict[str, list[int]]:
    """Like [`tokenize_row`], with `teacher_prompt_ids`, the primed prompt. The answer has the same ids after both
    prompts.

    The template sees all columns of the row. If there is one for each of several teachers, the row's `teacher` selects
    it. With a template, an already tokenized row must have `teacher_prompt_ids`.
    """
    priming = priming_of(row, priming)
    if row.get("prompt_ids") is not None:
        ids = _tokenized_already(row, processing_class, priming, with_answer)
    else:
        ids = _tokenize(row, processing_class, priming, with_answer)
    if not ids["prompt_ids"] or not ids["teacher_prompt_ids"]:
        raise ValueError(
            "A row's prompt has no tokens, so that nothing comes before its answer's first one. Filter such rows out."
        )
    return ids


def _tokenized_already(
    row: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase,
    priming: PrimingTemplate | None,
    with_answer: bool,
) -> dict[str, list[int]]:
    check_text_only(row)
    ids: dict[str, Any] = {name: row.get(name) for name in ("prompt_ids", "teacher_prompt_ids", "completion_ids")}
    if not with_answer or ids["completion_ids"] is None:
        ids["completion_ids"] = []
    if ids["teacher_prompt_ids"] is None:
        ids["teacher_prompt_ids"] = ids["prompt_ids"]
        if priming is not None:
            raise ValueError(
                "The rows hold `prompt_ids` but no `teacher_prompt_ids`: a priming text cannot be put into a prompt "
                "that is tokenized already. Add `teacher_prompt_ids`, pass the rows as texts or messages, or set "
                "`priming=None`."
            )
    for name, values in ids.items():
        check_ids(name, values, processing_class)
    return ids


def _tokenize(
    row: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase,
    priming: PrimingTemplate | None,
    with_answer: bool,
) -> dict[str, list[int]]:
    prompt, completion = split_row(row, with_answer)
    if prompt is None:
        raise ValueError("A row has neither a prompt nor messages (both are missing or None). Filter such rows out.")
    prompts = [prompt] if priming is None else [prompt, priming.prime(row, with_answer)]
    if isinstance(prompt, str):
        # A chat template writes the special tokens itself
        before, text = _ids_before(prompt, processing_class), completion
    else:
        before = []
        prompts, text = conversation_texts(prompts, completion, row, processing_class)
    prompt_ids, completion_ids = _tokenize_texts(prompts, text, processing_class)
    if completion is not None:
        completion_ids = _with_one_end(completion_ids, completion, isinstance(prompt, str), processing_class)
    views = [[*before, *ids] for ids in prompt_ids]
    if priming is not None and views[0] == views[1] and priming.render(row).strip():
        raise ValueError(
            "The priming text does not reach the teacher: its prompt is the student's. The chat template seems to "
            f"drop a text at placement {priming.placement!r}. Use another placement."
        )
    return {"prompt_ids": views[0], "teacher_prompt_ids": views[-1], "completion_ids": completion_ids}


def _with_one_end(
    completion_ids: list[int], completion: Any, is_text: bool, processing_class: PreTrainedTokenizerBase
) -> list[int]:
    eos = processing_class.eos_token_id
    completion_ids = _without_blank_tail(completion_ids, processing_class, {eos} if is_text else None)
    if is_text and eos is not None and completion_ids[-1:] != [eos]:
        completion_ids = [*completion_ids, eos]
    if set(completion_ids) <= {eos} and not is_blank(completion, processing_class.eos_token):
        raise ValueError(
            f"The tokenizer writes nothing of the answer {shortened(completion)}, so that only the end of text would "
            "be trained on. Filter such rows out, or use the tokenizer that the data was made for."
        )
    return completion_ids


def _ids(text: str, processing_class: PreTrainedTokenizerBase) -> list[int]:
    return processing_class(text, add_special_tokens=False)["input_ids"]


def _decode(ids: list[int], processing_class: PreTrainedTokenizerBase) -> str:
    return processing_class.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _ids_before(prompt: str, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer itself adds before a text, such as a beginning-of-text token."""
    if not processing_class.num_special_tokens_to_add():
        return []
    for text in ("a", prompt):  # most tokenizers know the first, and it holds no special token
        bare, whole = _ids(text, processing_class), processing_class(text)["input_ids"]
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
    return []


def _tokenize_texts(
    prompts: Sequence[str], completion: str | None, processing_class: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[int]]:
    """Ids of the prompts and of the completion after each, without special tokens of the tokenizer's own.

    Prompt and completion are tokenized together, so that no token border is forced between them. A token that
    straddles the border belongs to the completion. They are tokenized separately if text would be lost, if no prompt
    would remain, or if the completion's ids would differ between the prompts.
    """
    alone = [_ids(prompt, processing_class) for prompt in prompts]
    if completion is None:
        return alone, []
    together = []
    for ids, prompt in zip(alone, prompts, strict=True):
        together.append(_cut_at_border(ids, _ids(prompt + completion, processing_class), processing_class))
    first = together[0]
    if first is not None and all(pair is not None and pair[1] == first[1] for pair in together):
        return [pair[0] for pair in together if pair is not None], first[1]
    return alone, _ids_after(alone, prompts[0], completion, processing_class)


def _cut_at_border(
    prompt_ids: list[int], whole: list[int], processing_class: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]] | None:
    """The ids of prompt and completion together, cut before the first one that is not wholly the prompt's.

    `None` if they must be tokenized separately. Texts are compared, as some tokenizers omit white space in offsets.
    """
    unknown = processing_class.unk_token_id
    if unknown is not None and prompt_ids[-1:] == [unknown]:
        return None  # what follows may have become part of it
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    text = _decode(prompt_ids, processing_class)
    cut = next(i for i, (own, id_) in enumerate(zip([*prompt_ids, None], [*whole, -1], strict=False)) if own != id_)
    for end in range(cut + 1, len(whole) + 1):
        start = _decode(whole[:end], processing_class)
        if text.startswith(start):
            cut = end
        elif len(start) > len(text):
            break
    left = _decode(whole[:cut], processing_class)
    swallowed = cut == 0 or (text.strip() and not left.strip())
    if swallowed or cut == len(whole) or (left != text and whole[cut] == unknown):
        return None
    return whole[:cut], whole[cut:]


def _ids_after(
    prompts_ids: Sequence[list[int]], prompt: str, completion: str, processing_class: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of a completion alone that continue the prompts' text.

    They lack the space that some tokenizers put before a text.
    """
    alone = _ids(completion, processing_class)
    candidates = [(alone, completion)]
    for anchor in ("\n", "a", ".", prompt[:1]):  # texts before it, until one does not merge with it
        before, whole = _ids(anchor, processing_class), _ids(anchor + completion, processing_class)
        if whole[: len(before)] == before and processing_class.unk_token_id not in before:
            text = _decode(whole, processing_class)[len(_decode(before, processing_class)) :]
            candidates.append((whole[len(before) :], text))
    for candidate, text in candidates:
        joined = [_decode([*ids, *candidate], processing_class) for ids in prompts_ids]
        if joined == [_decode(ids, processing_class) + text for ids in prompts_ids]:
            return candidate
    return alone  # texts cannot be compared, as with tokenizers that do not write white space


def _without_blank_tail(
    ids: list[int], processing_class: PreTrainedTokenizerBase, ends: set[int | None] | None = None
) -> list[int]:
    """The ids without white space after the last token that ends a turn. That space is never generated.

    Args:
        ends: The ids of such tokens. `None` for all special ones, as some turns do not end with end of text (Gemma).
    """
    if not ids or processing_class.decode(ids[-1:]).strip():
        return ids
    if ends is None:
        ends = {index for index, token in processing_class.added_tokens_decoder.items() if token.special}
    end = max((i + 1 for i, token in enumerate(ids) if token in ends), default=0)
    return ids[:end] if end and not processing_class.decode(ids[end:]).strip() else ids
