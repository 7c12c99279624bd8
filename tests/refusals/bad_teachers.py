"""Several teachers, and rows that name them."""

from functools import partial

from case import Case, call, primed
from tiny import answered_dataset, tiny_model

from trl_promptkd import PrimedDistillTrainer


TWO = {"math": "no/such-mathematician", "code": "no/such-programmer"}
ROW = {"prompt": "the cat", "completion": " sat"}
several = partial(primed, teacher_model=TWO)


def with_a_stream():
    rows = answered_dataset(4).add_column("teacher", ["math", "code"] * 2)
    primed(teacher_model=TWO, train_dataset=rows.to_iterable_dataset(), args={"response_source": "teacher"})


def with_the_student():
    student = tiny_model()
    primed(model=student, teacher_model={"math": student, "code": None})


CASES = [
    Case(
        "teachers by name, and an API",
        partial(several, args={"teacher_answers_url": "http://host:8000/v1", "response_source": "teacher"}),
        "there are several teachers ('math', 'code'), and an API is one | Omit it",
    ),
    Case(
        "teachers by name, and rows without a column `teacher`",
        several,
        "`train_dataset` has no `teacher` column | 'math', 'code' | ['completion', 'prompt'] | `dataset.add_column`",
    ),
    Case(
        "teachers by name, and a row that names another",
        partial(several, rows=[{**ROW, "teacher": "math"}, {**ROW, "teacher": "maths"}]),
        "Row 1 of `train_dataset` | `teacher` is 'maths' | 'math', 'code' | filter such rows out",
    ),
    Case(
        "teachers by name, and a row that names none",
        partial(several, rows=[{**ROW, "teacher": "math"}, {**ROW, "teacher": None}]),
        "Row 1 of `train_dataset` | `teacher` is None | 'math', 'code'",
    ),
    Case(
        "teachers by name, and numbers in the column `teacher`",
        partial(several, rows=[{**ROW, "teacher": 0}]),
        "Row 0 of `train_dataset` | `teacher` is 0 | Write one of these names",
    ),
    Case(
        "an empty `dict` of teachers",
        partial(primed, teacher_model={}),
        "`teacher_model` is an empty dict | a teacher for each name",
    ),
    call(
        PrimedDistillTrainer,
        "`teacher_model` has the key 1 | a teacher's name, a text",
        TypeError,
        teacher_model={1: "no/such-teacher"},
    ),
    call(
        PrimedDistillTrainer,
        "`teacher_model['math']` is a int | a name, a folder",
        TypeError,
        teacher_model={"math": 5},
    ),
    call(
        PrimedDistillTrainer,
        "'math' stands in `teacher_model` and in `teacher_cache` | name it in one of them",
        teacher_model={"math": "no/such-teacher"},
        teacher_cache={"math": "cache"},
    ),
    call(
        PrimedDistillTrainer,
        "`teacher_cache` is one teacher, but `teacher_model` is a dict | `teacher_cache={'name': ...}`",
        teacher_model={"math": "no/such-teacher"},
        teacher_cache="cache",
    ),
    call(
        PrimedDistillTrainer,
        "'code' stands in `teacher_server`, but not in `teacher_model` | the weights that are served there",
        teacher_model={"math": "no/such-teacher"},
        teacher_server={"code": "http://host:8000"},
    ),
    call(
        PrimedDistillTrainer,
        "`teacher_server` is one teacher, but `teacher_model` is a dict | `teacher_server={'name': ...}`",
        teacher_model=TWO,
        teacher_server="http://host:8000",
    ),
    call(
        PrimedDistillTrainer,
        "Teacher 'math': `teacher_server` is set, but `teacher_model` is None | the folder of the weights",
        teacher_model={"math": None},
        teacher_server={"math": "http://host:8000"},
    ),
    call(
        PrimedDistillTrainer,
        "`teacher_cache['code']` is None | Pass what it stands for",
        teacher_model={"math": "no/such-teacher"},
        teacher_cache={"code": None},
    ),
    call(
        PrimedDistillTrainer,
        "`priming` is a dict with the keys ['math', 'code'], but there is one teacher | it is loaded once",
        priming={"math": "teacher", "code": None},
    ),
    call(
        PrimedDistillTrainer,
        "`priming` has the keys ['math'], but the teachers are ['math', 'code'] | None if",
        teacher_model=TWO,
        priming={"math": "teacher"},
    ),
    Case(
        "teachers by name, and a `data_collator`",
        partial(several, data_collator=list),
        "Several teachers need rows that the trainer prepares | Omit `data_collator`",
    ),
    Case(
        "teachers by name, one of which is the student itself",
        with_the_student,
        "`teacher_model` is the very object that is trained | set `teacher_model=None`",
    ),
    Case(
        "teachers that write the answers to streamed rows",
        with_a_stream,
        "`train_dataset` is streamed | Load it without streaming",
    ),
]
