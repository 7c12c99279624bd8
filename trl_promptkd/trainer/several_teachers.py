"""Several teachers in one run: the column `teacher` of a row names the one that teaches it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import IterableDataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.by_teacher import Priming
from ..data.priming import resolve_priming
from ..models.forward import is_sharded
from ..models.joined_logits import JoinedLogits
from .datasets import View
from .primed_teacher import LiveTeacher, primed_teacher


__all__ = ["SeveralTeachers", "priming_by_name", "teacher_and_rows", "teachers_of_run"]

_KINDS = (FileNotFoundError, ConnectionError, TimeoutError, OSError, TypeError, ValueError)

logger = logging.get_logger(__name__)


def priming_by_name(priming: Any, teacher_model: Any, teacher_cache: Any, teacher_server: Any) -> Priming:
    """The run's priming text. If there are several teachers, each one's by its name.

    Args:
        priming: The trainer's: one text for all teachers, or a `dict` by their names.
        teacher_model, teacher_cache, teacher_server: The trainer's.

    Raises:
        TypeError, ValueError: if a teacher has no name, or a name stands for two.
    """
    given = {"teacher_model": teacher_model, "teacher_cache": teacher_cache, "teacher_server": teacher_server}
    if not any(isinstance(value, Mapping) for value in given.values()):
        if isinstance(priming, Mapping):
            raise ValueError(
                f"`priming` is a dict with the keys {list(priming)}, but there is one teacher. Name the teacher for "
                "each of them, such as `teacher_model={'a': model, 'b': model}` (it is loaded once), or pass one "
                "priming text."
            )
        return resolve_priming(priming)
    names = _names(given)
    if not isinstance(priming, Mapping):
        return dict.fromkeys(names, resolve_priming(priming))
    if set(priming) != set(names):
        raise ValueError(
            f"`priming` has the keys {list(priming)}, but the teachers are {names}. Give each of them its priming, "
            "None if it sees the plain prompt."
        )
    return {name: resolve_priming(priming[name]) for name in names}


def _names(given: Mapping[str, Any]) -> list[str]:
    """The teachers' names, from the trainer's arguments. A teacher's number in batches is its place among them."""
    several = [argument for argument, value in given.items() if isinstance(value, Mapping)]
    names: list[Any] = []
    for argument, value in given.items():
        if value is None:
            continue
        if argument not in several:
            raise ValueError(
                f"`{argument}` is one teacher, but `{several[0]}` is a dict of teachers by name. Give it a "
                f"name too: `{argument}={{'name': ...}}`."
            )
        for name, teacher in value.items():
            if not isinstance(name, str) or not name.strip():
                raise TypeError(f"`{argument}` has the key {name!r}; it must be a teacher's name, a text.")
            if teacher is None and argument != "teacher_model":
                raise ValueError(f"`{argument}[{name!r}]` is None. Pass what it stands for, or omit it.")
            if argument == "teacher_cache" and name in names:
                raise ValueError(
                    f"The teacher {name!r} stands in `teacher_model` and in `teacher_cache`; name it in one of them."
                )
            if argument == "teacher_server" and name not in (given["teacher_model"] or {}):
                raise ValueError(
                    f"The teacher {name!r} stands in `teacher_server`, but not in `teacher_model`. Write the name or "
                    "the folder of the weights that are served there: their output head is loaded here."
                )
            if argument != "teacher_server":
                names.append(name)
    if not names:
        raise ValueError(f"`{several[0]}` is an empty dict. Pass a teacher for each name in the rows.")
    return names


def teachers_of_run(
    teacher_model: Any,
    teacher_cache: Any,
    teacher_server: Any,
    args: Any,
    tokenizes: bool,
    processing_class: PreTrainedTokenizerBase,
    priming: Priming,
) -> Any:
    """The teacher of a run, or its [`SeveralTeachers`], before any weights are loaded.

    Args:
        teacher_model, teacher_cache, teacher_server, args, tokenizes, processing_class: As for [`primed_teacher`].
            The first three may be `dict`s.
        priming: What [`priming_by_name`] returned.

    Raises:
        ValueError: for a teacher that cannot serve this run.
    """
    if not isinstance(priming, Mapping):
        return primed_teacher(teacher_model, teacher_cache, teacher_server, args, tokenizes, processing_class, priming)
    if args.teacher_answers_url is not None:
        raise ValueError(
            f"`teacher_answers_url` is set, but there are several teachers ({', '.join(map(repr, priming))}), and an "
            "API is one. Omit it; or let the API write its answers in a run of its own, and train on them as data."
        )
    if not tokenizes:
        raise ValueError(
            "Several teachers need rows that the trainer prepares, but `data_collator` is set. Omit `data_collator`."
        )
    models, caches, servers = teacher_model or {}, teacher_cache or {}, teacher_server or {}
    sharing: dict[Any, list[str]] = {}  # names that share a model, which is held once
    for name in priming:
        model = models.get(name)
        key = name if name in caches else (model if isinstance(model, str) else id(model), servers.get(name))
        sharing.setdefault(key, []).append(name)
    teachers: dict[str, Any] = {}
    for names in sharing.values():
        first, seen = names[0], [priming[name] for name in names]
        text = next((template for template in seen if template is not None), None)
        with _error_naming(first):
            settings = (args, tokenizes, processing_class, text)
            teacher = primed_teacher(models.get(first), caches.get(first), servers.get(first), *settings)
        teachers |= dict.fromkeys(names, teacher)
    return SeveralTeachers({name: teachers[name] for name in priming}, priming)


def teacher_and_rows(trainer: Any, name: str | None) -> tuple[Any, Any]:
    """A run's teacher and its training rows. With several teachers, the one called `name` and the rows that name it.

    Raises:
        ValueError: if there is no teacher of that name.
    """
    teachers = trainer.teacher.teachers if isinstance(trainer.teacher, SeveralTeachers) else {}
    if not teachers and name is None:
        return trainer.teacher, trainer.train_dataset
    if name not in teachers:
        there = f"the teachers are {', '.join(map(repr, teachers))}" if teachers else "there is one teacher; omit it"
        raise ValueError(f"`teacher` is {name!r}; {there}.")
    rows = trainer.train_dataset
    if not isinstance(rows, IterableDataset):
        rows = rows.select([row for row, one in enumerate(rows["teacher"]) if one == name])
    return teachers[name], rows


@contextmanager
def _error_naming(name: str) -> Iterator[None]:
    try:
        yield
    except _KINDS as error:
        kind = next(kind for kind in _KINDS if isinstance(error, kind))  # some of their subclasses take no text
        raise kind(f"Teacher {name!r}: {error}") from error


class SeveralTeachers:
    """
    Teachers by name, each of which teaches the rows that name it. It has the methods of a single teacher.

    Args:
        teachers (`Mapping`): The teachers by name. Batches number them in this order in `teachers`. A model under two
            names is one teacher.
        priming (`Mapping`): The priming text of each, by the same names.
    """

    def __init__(self, teachers: Mapping[str, Any], priming: Mapping[str, Any]):
        self.teachers, self.priming, self.names = dict(teachers), priming, list(teachers)
        groups: dict[int, list[str]] = {}
        for name, teacher in self.teachers.items():
            groups.setdefault(id(teacher), []).append(name)
        self.groups = [(names, self.teachers[names[0]]) for names in groups.values()]
        self.own_start = {name for name, one in teachers.items() if isinstance(one, LiveTeacher) and one.given is None}
        """Names of teachers that are the student's own start."""
        self.cache = {name: one.cache for name, one in self.teachers.items() if one.cache is not None} or None

    @property
    def model(self) -> dict[str, Any]:
        """Models on their devices, by name. `None` for a cache, a server and the student below its adapter."""
        return {name: teacher.model for name, teacher in self.teachers.items()}

    def find(self, dataset: Any, name: str) -> Any:
        """Tokenized rows, as `find` of each row's teacher returns them, in their order."""
        if isinstance(dataset, IterableDataset):
            for _, teacher in self.groups:
                teacher.find(dataset, name)
            return dataset
        asked = set(dataset["teacher"])
        idle = [one for one in self.names if one not in asked]
        if name == "train_dataset" and idle:
            logger.warning(
                f"No row of `{name}` names the teacher{'s' if len(idle) > 1 else ''} {', '.join(map(repr, idle))}. "
                "Omit teachers that are not needed: each takes memory. Or check the column `teacher`."
            )
        return self._of_each(dataset, name, "find")

    def load(self, trainer: Any) -> list[Any]:
        """All models. Completions end with the end of text of any of them."""
        self.trainer = trainer
        return [teacher.load(trainer) for _, teacher in self.groups]

    @property
    def vocabulary(self) -> int:
        """The number of ids that all of them have, padding included."""
        known = [teacher.vocabulary for _, teacher in self.groups]
        return min(one if isinstance(one, int) else one.config.get_text_config().vocab_size for one in known)

    def views(self) -> list[View]:
        """The rows that each model sees."""
        return [
            view._replace(role=f"teacher {names[0]!r}", teachers=names)
            for names, teacher in self.groups
            for view in teacher.views()
        ]

    def place(self) -> None:
        """Put all of them on their devices."""
        for _, teacher in self.groups:
            teacher.place()

    def answered(self, dataset: Any, name: str) -> Any:
        """With `response_source="teacher"`, a data set with each teacher's answers to its rows."""
        return dataset if isinstance(dataset, IterableDataset) else self._of_each(dataset, name, "answered")

    def expect(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Announce a window's micro-batches before they are trained on. Each teacher gets its own rows."""
        for names, teacher in self.groups:
            own = [self._rows(batch, names) for batch in batches]
            teacher.expect([batch for batch in own if len(batch["labels"])])

    @torch.no_grad()
    def at_completions(self, student: nn.Module, inputs: dict[str, Tensor]) -> JoinedLogits:
        """Each teacher's output at the completion tokens of its rows, in the batch's order."""
        rows = (inputs["labels"][:, 1:] != -100).nonzero()[:, 0]
        asked = inputs["teachers"][rows]
        parts = {}
        for names, teacher in self.groups:
            own = self._own(inputs, names, teacher)
            if own is not None:
                places = self._naming(asked, names).nonzero()[:, 0]
                parts[f"teacher {names[0]!r}"] = (places, teacher.at_completions(student, own))
        return JoinedLogits(parts)

    def plain_log_prob(self, inputs: dict[str, Tensor]) -> Tensor:
        """Sum of the completions' log-probabilities without the priming text, over each teacher's rows. Of shape
        `(num_teachers,)`. NaN if a teacher has no such text, if it is not known, or if no row names the teacher."""
        plain = torch.full((len(self.names),), torch.nan, device=inputs["labels"].device)
        for number, name in enumerate(self.names):
            if self.priming[name] is None:
                continue
            own = self._own(inputs, [name], self.teachers[name])
            said = None if own is None else self.teachers[name].plain_log_prob(own)
            if said is not None:
                plain[number] = said
        return plain

    def _naming(self, teachers: Tensor, names: Sequence[str]) -> Tensor:
        """Where the numbers in `teachers` are those of `names`."""
        return torch.isin(teachers, torch.tensor([self.names.index(name) for name in names], device=teachers.device))

    def _rows(self, batch: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        wanted = self._naming(batch["teachers"], names)
        return {name: value[wanted] for name, value in batch.items()}

    def _own(self, inputs: dict[str, Tensor], names: Sequence[str], teacher: Any) -> dict[str, Tensor] | None:
        """A batch's rows that name one of `names`, or `None` if there are none. A model that all ranks must run
        together gets a row without completion then."""
        own = self._rows(inputs, names)
        if len(own["labels"]):
            return own
        running = self.trainer.model_wrapped if teacher.model is None else teacher.model
        if not isinstance(teacher, LiveTeacher) or not is_sharded(running):
            return None
        idle = {name: value[:1] for name, value in inputs.items()}
        return idle | {name: torch.full_like(idle[name], -100) for name in ("labels", "teacher_labels")}

    def _of_each(self, dataset: Any, name: str, method: str) -> Any:
        """What a method of each teacher makes of its rows, in their order."""
        asked, parts, order, is_new = list(dataset["teacher"]), [], [], False
        for names, teacher in self.groups:
            rows = [row for row, one in enumerate(asked) if one in names]
            if rows:
                own = dataset.select(rows)
                parts.append(getattr(teacher, method)(own, f"{name} (teacher {names[0]!r})"))
                is_new = is_new or parts[-1] is not own
                order += rows
        if not is_new:
            return dataset
        if any("cache_row" in part.column_names for part in parts):
            parts = [
                part if "cache_row" in part.column_names else part.add_column("cache_row", [-1] * len(part))
                for part in parts
            ]
        whole = concatenate_datasets([part.select_columns(sorted(part.column_names)) for part in parts])
        return whole.select(sorted(range(len(order)), key=order.__getitem__))
