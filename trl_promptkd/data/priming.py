"""Priming: a text that the teacher sees in addition to a row's question.

The student learns to answer the bare question from what the teacher says after the text. Texts are Jinja templates
over the row's columns, rendered in Jinja's own immutable sandbox, as transformers renders chat templates. A template
is trusted like a chat template. It reaches no Python internals and changes no row, but nothing bounds its work.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..files import read_text
from .rows import joined_text, split_row


__all__ = ["PRIMING_TEMPLATES", "PrimingTemplate", "resolve_priming"]

_PLACEMENTS = ("prefix", "suffix", "system")
_MAX_LENGTH = 1_000_000  # characters of one rendered text: more is a mistake


def _written(value: Any) -> Any:
    """What `{{ value }}` writes. Data sets fill missing values with None, which no text should contain."""
    if value is None:
        raise ValueError(
            "a value that it writes is None, with which data sets fill missing values; filter such rows out, or write "
            "{{ column or '' }}"
        )
    return value


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as chat templates write it, not escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


_SANDBOX = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_written
)
_SANDBOX.filters["tojson"] = _to_json


@lru_cache(maxsize=64)
def _compiled(text: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A template, and the names of the columns that it uses."""
    variables = find_undeclared_variables(_SANDBOX.parse(text)) - set(_SANDBOX.globals)
    return _SANDBOX.from_string(text), frozenset(variables)


@dataclass(frozen=True)
class PrimingTemplate:
    """
    A text that the teacher sees in addition to a row's question, and the student does not.

    Args:
        text (`str`):
            A Jinja template. A row's columns are its variables, and `reference_answer` is the row's answer as a text.
            White space is kept, so a prefix needs a space or a line break at its end.
        placement (`str`, *optional*, defaults to `"prefix"`):
            `"prefix"` puts the text directly before the question, `"suffix"` directly after it. `"system"` makes it
            the system message, or appends it to the row's own. In a conversation the question is the last user
            message. In a row of plain texts it is the whole prompt, and `"system"` is an error.

    Raises:
        ValueError: if the placement is another one, or the text is not a valid template.

    Example:

    ```python
    >>> template = PrimingTemplate("Think of {{ topic }}. ")
    >>> template.prime({"prompt": "How far is it?", "topic": "the moon"})
    'Think of the moon. How far is it?'
    ```
    """

    text: str
    placement: str = "prefix"

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise TypeError(f"`text` of a PrimingTemplate is a {type(self.text).__name__}; it must be a string.")
        if self.placement not in _PLACEMENTS:
            raise ValueError(
                f"`placement` is {self.placement!r}; it must be one of {', '.join(map(repr, _PLACEMENTS))}."
            )
        if not self.text.strip():
            raise ValueError(
                f"`text` of a PrimingTemplate is {self.text!r}, which says nothing. For a teacher that sees what the "
                "student sees set `priming=None`."
            )
        try:
            _compiled(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"The priming text is not a valid Jinja template: {error.message} (line {error.lineno}). Text that "
                "contains '{{' or '{%' literally goes between {% raw %} and {% endraw %}."
            ) from error

    @classmethod
    def from_file(cls, path: str | Path, placement: str = "prefix") -> "PrimingTemplate":
        """Read the template from a UTF-8 file. A line break at its end stays."""
        return cls(read_text(str(path), "the priming text"), placement)

    def check_columns(self, columns: Collection[str], name: str) -> None:
        """Reject a template that uses columns which a data set does not have. Messages call it `name`."""
        known = set(columns)
        if known & {"messages", "completion"}:
            known.add("reference_answer")
        unknown = sorted(_compiled(self.text)[1] - known)
        if unknown:
            answer = ", and `reference_answer` is the row's answer" if "reference_answer" in known else ""
            raise ValueError(
                f"The priming template uses {', '.join(map(repr, unknown))}, which `{name}` does not have. Its "
                f"columns are {sorted(columns)}{answer}. Rename or add a column, or change the template."
            )

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for one row.

        Raises:
            ValueError: for anything that goes wrong in the template, such as an unknown variable.
        """
        self.check_columns(list(row), "the row")
        template, names = _compiled(self.text)
        variables = dict(row)
        if "reference_answer" in names - set(row):
            variables["reference_answer"] = _reference_answer(row)
        text = ""
        try:
            for part in template.generate(variables):
                text += part
                if len(text) > _MAX_LENGTH:
                    raise ValueError(f"it makes more than {_MAX_LENGTH} characters")
        except jinja2.exceptions.SecurityError as error:
            raise ValueError(f"The priming template does what its sandbox does not allow: {error}.") from error
        except Exception as error:  # whatever a template does with the values of a row
            raise ValueError(
                f"The priming template failed on a row with the columns {sorted(row)}: {type(error).__name__}: "
                f"{str(error)[:500]}."
            ) from error
        return text

    def prime(self, row: Mapping[str, Any], with_answer: bool = True) -> str | list[dict[str, Any]]:
        """The prompt that the teacher sees for a row, in the row's own form: a text, or a list of messages.

        Args:
            row: Has `messages`, or `prompt` and perhaps `completion`. It is not changed.
            with_answer: `False` skips the check of the row's answer, for answers that are not used.

        Raises:
            ValueError: if there is no user message to prime, or no conversation for a system message.
        """
        text = self.render(row)
        prompt, _ = split_row(row, with_answer)
        if isinstance(prompt, str):
            if self.placement == "system":
                raise ValueError(
                    "`placement='system'` needs conversations, but the row's prompt is a plain text. Use 'prefix' or "
                    "'suffix', or make the prompt a list of messages."
                )
            return text + prompt if self.placement == "prefix" else prompt + text
        messages = [dict(message) for message in prompt or []]
        roles = [message["role"] for message in messages]
        if self.placement == "system":
            if roles[:1] == ["system"]:
                return [_with_text(messages[0], after=f"\n\n{text}"), *messages[1:]]
            return [{"role": "system", "content": text}, *messages]
        if "user" not in roles:
            raise ValueError(
                f"There is no user message to prime; the row's roles are {roles}. Use `placement='system'`."
            )
        question = len(roles) - 1 - roles[::-1].index("user")
        before, after = (text, "") if self.placement == "prefix" else ("", text)
        messages[question] = _with_text(messages[question], before, after)
        return messages


def _with_text(message: dict[str, Any], before: str = "", after: str = "") -> dict[str, Any]:
    content = message.get("content")
    if content is None:
        raise ValueError(
            f"The {message['role']} message of a row has no content that a priming text could stand beside."
        )
    if isinstance(content, str):
        return {**message, "content": before + content + after}
    parts = [{"type": "text", "text": before}, *content, {"type": "text", "text": after}]
    return {**message, "content": [part for part in parts if part["text"]]}


def _reference_answer(row: Mapping[str, Any]) -> str:
    _, completion = split_row(row)
    answer = joined_text(completion[-1].get("content") if isinstance(completion, list) else completion)
    if not answer:
        raise ValueError("The priming template shows the teacher the row's answer, but a row has none.")
    return answer


PRIMING_TEMPLATES = {
    # The texts of the paper (arXiv 2412.17846), word for word; they stand before the question
    "teacher": PrimingTemplate(
        "As a teacher, guide your student through solving the question below. Provide a clear, simple explanation "
        "for someone unfamiliar with the problem. "
    ),
    "ground_truth": PrimingTemplate(  # despite its name it holds no gold answer
        "As a smart language model, provide a detailed answer that is clear and feasible for smaller models to "
        "understand and learn from without losing too much detail. "
    ),
    "confidence": PrimingTemplate(
        "(At the end of the question) Briefly double-check that your answer is correct once done. "
    ),
    # Ours: privileged context
    "reference_answer": PrimingTemplate(
        "Here is a correct answer to the question below, for your eyes only:\n\n{{ reference_answer }}\n\nAnswer "
        "the question in your own words, step by step, as if you had not seen it. Question: "
    ),
}


def resolve_priming(priming: str | PrimingTemplate | None) -> PrimingTemplate | None:
    """The template of a name in [`PRIMING_TEMPLATES`]. A template or `None` is returned unchanged."""
    if priming is None or isinstance(priming, PrimingTemplate):
        return priming
    if not isinstance(priming, str):
        raise TypeError(f"`priming` is a {type(priming).__name__}; it must be a name, a PrimingTemplate or None.")
    if priming not in PRIMING_TEMPLATES:
        raise ValueError(
            f"`priming` is {priming!r}; the names are {', '.join(map(repr, PRIMING_TEMPLATES))}. For a text of your "
            "own pass `PrimingTemplate(text)`, for one in a file `PrimingTemplate.from_file(path)`."
        )
    return PRIMING_TEMPLATES[priming]
