import pytest
from datasets import Dataset
from tiny import answered_dataset, tiny_tokenizer

from trl_promptkd import DataCollatorForPrimedDistillation, PrimingTemplate
from trl_promptkd.data.by_teacher import check_priming, priming_of, teacher_of
from trl_promptkd.data.primed import tokenize_primed_dataset


RED, GREEN = 23, 25
PRIMINGS = {"math": PrimingTemplate("red "), "code": PrimingTemplate("green {{ language }} "), "own": None}
ROWS = [
    {"prompt": "the cat", "completion": " sat", "teacher": "own", "language": "blue"},
    {"prompt": "the cat", "completion": " sat", "teacher": "math", "language": "blue"},
    {"prompt": "the cat", "completion": " sat", "teacher": "code", "language": "blue"},
]


def prepare(rows, **settings):
    return tokenize_primed_dataset(rows, "rows", tiny_tokenizer(), PRIMINGS, answers_needed="needed", **settings)


def test_each_row_has_its_teachers_text():
    assert [priming_of(row, PRIMINGS) for row in ROWS] == [None, PRIMINGS["math"], PRIMINGS["code"]]
    assert priming_of(ROWS[0], PRIMINGS["math"]) is PRIMINGS["math"]
    assert priming_of(ROWS[0], None) is None


@pytest.mark.parametrize("name", ["Math", "", None, 1, ["math"]])
def test_a_name_that_no_teacher_has_is_rejected(name):
    with pytest.raises(ValueError, match="the teachers are 'math', 'code', 'own'"):
        teacher_of({"teacher": name}, PRIMINGS)


def test_rows_keep_their_teacher_streamed_or_not_and_tokenized_again():
    rows = Dataset.from_list(ROWS)
    found = prepare(rows)
    assert [row["teacher"] for row in found] == ["own", "math", "code"]
    the, cat = found[0]["prompt_ids"]
    assert found["teacher_prompt_ids"][:] == [[the, cat], [RED, the, cat], [GREEN, 24, the, cat]]
    assert list(prepare(rows.to_iterable_dataset())) == found.to_list()
    assert prepare(found).to_list() == found.to_list()


def test_a_batch_has_the_numbers_of_its_rows_teachers():
    collator = DataCollatorForPrimedDistillation(tiny_tokenizer(), PRIMINGS)
    raw, prepared = collator(ROWS), collator(prepare(Dataset.from_list(ROWS)).to_list())
    for batch in (raw, prepared):
        assert batch["teachers"].tolist() == [2, 0, 1]
    assert raw["teacher_input_ids"].tolist() == prepared["teacher_input_ids"].tolist()
    assert "teachers" not in DataCollatorForPrimedDistillation(tiny_tokenizer(), "teacher")(ROWS)


def test_a_template_needs_its_columns_only_in_rows_of_its_teacher():
    without = Dataset.from_list(ROWS).remove_columns("language")
    check_priming(without.select([0, 1]), "rows", PRIMINGS)
    with pytest.raises(ValueError, match="uses 'language', which `rows` does not have"):
        check_priming(without, "rows", PRIMINGS)
    with pytest.raises(ValueError, match="uses 'language'"):  # a stream's teachers are not known
        check_priming(without.select([0, 1]).to_iterable_dataset(), "rows", PRIMINGS)
    with pytest.raises(ValueError, match="`rows` has no `teacher` column"):
        check_priming(answered_dataset(2), "rows", PRIMINGS)
