"""Rows that name their teacher, in a run with several: the column `teacher`, and the priming text that it selects."""

from collections.abc import Collection, Mapping
from typing import Any

from datasets import Dataset, IterableDataset, Value

from .priming import PrimingTemplate


__all__ = ["Priming", "check_priming", "priming_of", "teacher_of"]

# What the teacher sees besides the prompt; of several teachers, what each of them sees
Priming = PrimingTemplate | Mapping[str, PrimingTemplate | None] | None


def teacher_of(row: Mapping[str, Any], names: Collection[str]) -> str:
    """The name of a row's teacher.

    Raises:
        ValueError: if it is none of `names`.
    """
    name = row.get("teacher")
    if not isinstance(name, str) or name not in names:
        raise ValueError(
            f"its `teacher` is {name!r}; the teachers are {', '.join(map(repr, names))}. Write one of these names "
            "there, or filter such rows out."
        )
    return name


def priming_of(row: Mapping[str, Any], priming: Priming) -> PrimingTemplate | None:
    """The template for a row, or `None` if its teacher sees the plain prompt."""
    return priming[teacher_of(row, priming)] if isinstance(priming, Mapping) else priming


def check_priming(dataset: Dataset | IterableDataset, name: str, priming: Priming) -> None:
    """Reject a data set without the column `teacher` if there are several, or without columns that a template uses.

    Raises:
        ValueError: naming the column.
    """
    columns = list(next(iter(dataset)))
    templates = [priming] if isinstance(priming, PrimingTemplate) else []
    if isinstance(priming, Mapping):
        if "teacher" not in columns:
            raise ValueError(
                f"`{name}` has no `teacher` column, which says row by row which of {', '.join(map(repr, priming))} "
                f"teaches it; its columns are {sorted(columns)}. Add one, for example by `dataset.add_column`."
            )
        used = set(priming)
        if isinstance(dataset, Dataset) and isinstance(dataset.features.get("teacher"), Value):
            used &= set(dataset.with_format(None)["teacher"])  # a template need not fit rows of other teachers
        templates = [template for key, template in priming.items() if key in used and template is not None]
    if "teacher_prompt_ids" not in columns:
        for template in templates:
            template.check_columns(columns, name)
