import pytest
from bad_inputs import CASES, GROUPS, PAGE, page


TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_an_error_that_says_what_to_do(name, tmp_path):
    case = CASES[name]
    rest = message = case.message(tmp_path)
    for part in case.says.split(" | "):
        assert part in rest, message
        rest = rest.split(part, 1)[1]
    assert case.row(message) in TEXT, "run `make errors`"


def test_the_docs_have_a_row_for_each_case_and_no_other():
    """What is in the rows is compared by the cases themselves."""
    assert len(CASES) == sum(map(len, GROUPS.values()))
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert page(dict(zip(CASES, rows, strict=True))) == TEXT
