"""The texts of a conversation, as the tokenizer's chat template writes them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from .._trl import remove_none_values
from .rows import is_blank, joined_text, shortened


__all__ = ["RewrittenPromptError", "conversation_texts"]

_OURS = ("add_generation_prompt", "continue_final_message", "tokenize", "tools")  # what the trainers say themselves


class RewrittenPromptError(ValueError):
    """The chat template writes a prompt differently once an answer follows it."""


def conversation_texts(
    prompts: Sequence[list[dict[str, Any]]],
    completion: str | list[dict[str, Any]] | None,
    row: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase,
) -> tuple[list[str], str | None]:
    """The text of each prompt, and of the answer after the first one.

    Args:
        prompts: The row's own prompt, and others of the same form, such as a primed one.
        completion: The answer, or `None`. A text is the content of one assistant message.
        row: May have `tools` and `chat_template_kwargs`. If its `prompt` ends with an assistant message (a prefill),
            the answer continues that. The last of `messages` is a turn of its own.

    Raises:
        RewrittenPromptError: if the template writes the prompt differently once the answer follows it.
        ValueError: if there is no template, if it fails, or if it writes nothing of the answer.
    """
    if processing_class.chat_template is None:
        raise ValueError(
            "The data holds conversations, but the tokenizer has no chat template. Use an instruction-tuned model's "
            "tokenizer, set `chat_template_path`, or give the prompts as texts."
        )
    template = _Template(processing_class, row)
    prompts = [_as_texts(prompt) for prompt in prompts]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    completion = completion and _as_texts(completion)
    continues = row.get("messages") is None and prompts[0][-1]["role"] == "assistant"
    if continues:
        _check_prefill(prompts[0][-1], completion)
    ending = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
    texts = [template.render(prompt, **ending) for prompt in prompts]
    if completion is None:
        return texts, None

    before, turns = prompts[0], completion
    if continues:
        content = before[-1].get("content", "") + completion[0].get("content", "")
        before, turns = before[:-1], [{**before[-1], **completion[0], "content": content}, *completion[1:]]
    whole = template.render([*before, *turns])
    if not whole.startswith(texts[0]):
        end = len(texts[0])
        raise RewrittenPromptError(
            "The chat template writes a prompt differently once an answer follows it, so that training on the data's "
            f"answers would not match generation. The prompt ends in {texts[0][-60:]!r}, the conversation has "
            f"{whole[max(end - 60, 0) : end]!r} there. Use a template that keeps prompts as they are (TRL ships "
            "patched ones), or let a model write the answers (`lmbda=1.0`; `response_source='teacher'` or 'student')."
        )
    written = whole[len(texts[0]) :]
    _check_calls(template, before, turns, whole)
    if not is_blank(completion[-1:]) and not _says(completion[-1], written):
        prefill = prompts[0][-1].get("content", "") if continues and len(turns) == 1 else ""
        if template.writes_the_same([*before, *turns[:-1], {"role": "assistant", "content": prefill}], whole):
            raise ValueError(
                f"The chat template writes nothing of the answer {shortened(completion[-1])}, so that only the end of "
                "text would be trained on. Use a template that writes it (`chat_template_path`), or change the data."
            )
    return texts, _without_what_follows(written, completion[-1], processing_class.eos_token)


def _as_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is one text, or missing."""
    return [{**m, "content": joined_text(m["content"])} if "content" in m else m for m in messages]


def _check_prefill(last: Mapping[str, Any], completion: list[dict[str, Any]] | None) -> None:
    if last.get("tool_calls"):
        raise ValueError(
            "A row's `prompt` ends with an assistant message that calls a tool, and such a message cannot be "
            "continued. Add the tool's result (a message with the role 'tool'), or move the call into `completion`."
        )
    if completion is not None and completion[0]["role"] != "assistant":
        raise ValueError(
            "A row's `prompt` ends with an assistant message, which the answer continues, but the first message of "
            f"its `completion` has the role {completion[0]['role']!r}. It must be an assistant message. For whole "
            "turns put the conversation into `messages`."
        )


class _Template:
    """A chat template with one row's arguments."""

    def __init__(self, processing_class: PreTrainedTokenizerBase, row: Mapping[str, Any]):
        tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
        try:
            tools = json.loads(tools) if isinstance(tools, str) else tools  # data sets may keep them as JSON
        except json.JSONDecodeError as error:
            raise ValueError(f"A row's `tools` are {shortened(tools)}, which is not JSON: {error}.") from error
        if not isinstance(tools or [], list):
            raise ValueError(
                f"A row's `tools` are {shortened(tools)}; they must be a list of JSON schemas, or JSON of one."
            )
        if not isinstance(more, Mapping):
            raise ValueError(f"A row's `chat_template_kwargs` are {shortened(more)}; they must be a dict.")
        more = remove_none_values(dict(more))
        for name in more.keys() & _OURS:
            raise ValueError(
                f"A row's `chat_template_kwargs` hold {name!r}, which follows from the row's other columns. Take it "
                "out."
            )
        self.processing_class = processing_class
        self.kwargs = {**more, "tools": remove_none_values(tools) if tools else None, "tokenize": False}

    def render(self, messages: list[dict[str, Any]], **ending: bool) -> str:
        """The conversation's text, or an error with the roles and the template's own message."""
        filled = [{"content": "", **message} for message in messages]
        last = max((i for i, message in enumerate(filled) if message["content"].strip()), default=len(filled) - 1)
        last_text = filled[last]["content"].strip()
        failure: Exception | None = None
        try:
            text = self.processing_class.apply_chat_template(messages, **self.kwargs, **ending)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"The chat template is not valid Jinja: {error.message} (line {error.lineno}). Correct the file of "
                "`chat_template_path`, or `tokenizer.chat_template`."
            ) from error
        except Exception as error:  # whatever a template does with a row's values
            failure, text = error, self._attempt(filled, **ending)  # some templates cannot do without a content
            if text is not None:
                return text
        else:
            changed = [*filled[:last], {**filled[last], "content": "x"}, *filled[last + 1 :]]
            if last_text in text or text != self._attempt(changed, **ending):
                return text
        # Templates of multimodal models may know contents as lists of parts only, and write nothing of a text
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in filled]
        in_parts = self._attempt(parts, **ending)
        if in_parts is not None and last_text in in_parts and "'type': 'text'" not in in_parts:
            return in_parts
        if failure is None:
            return text
        roles = [message["role"] for message in messages]
        said = str(failure) if isinstance(failure, jinja2.TemplateError) else f"{type(failure).__name__}: {failure}"
        raise ValueError(
            f"The chat template refuses a conversation with the roles {roles}: {said}. Change the data"
            + (" (this template may have no system role)" if "system" in roles else "")
            + ", or use another template (`chat_template_path`)."
        ) from failure

    def _attempt(self, messages: list[dict[str, Any]], **ending: bool) -> str | None:
        try:
            return self.processing_class.apply_chat_template(messages, **self.kwargs, **ending)
        except Exception:  # is reported by `render`
            return None

    def writes_the_same(self, messages: list[dict[str, Any]], whole: str) -> bool:
        try:
            return self.render(messages) == whole
        except ValueError:
            return False


def _check_calls(template: _Template, before: list[dict[str, Any]], turns: list[dict[str, Any]], whole: str) -> None:
    """Reject an answer with a tool call that the template omits. The student would learn to stop instead."""
    for index, message in enumerate(turns):
        calls = list(message.get("tool_calls") or [])
        for which, call in enumerate(calls):
            rest = {"content": "", **message, "tool_calls": calls[:which] + calls[which + 1 :]}
            if not rest["tool_calls"]:
                del rest["tool_calls"]
            if template.writes_the_same([*before, *turns[:index], rest, *turns[index + 1 :]], whole):
                raise ValueError(
                    f"The chat template ignores `tool_calls`: it writes nothing of the answer's {shortened(call)}. "
                    "Use a template that writes tool calls (`chat_template_path`), or write the call into the "
                    "answer's `content`."
                )


def _says(message: Mapping[str, Any], text: str) -> bool:
    """Whether the text has a message's content, and it has no more to say."""
    content = message.get("content", "").strip()
    return bool(content) and content in text and not message.get("tool_calls")


def _without_what_follows(text: str, last: Mapping[str, Any], eos_token: str | None) -> str:
    """The text up to the end of text that the template writes. One that the answer itself quotes does not count."""
    if eos_token is None or not _says(last, text):
        return text
    content = last["content"].strip()
    end = text.rfind(eos_token, text.rfind(content) + len(content))
    return text if end < 0 else text[: end + len(eos_token)]
