import pytest
from bad_inputs import CASES, GROUPS, page
from paths import ROOT


PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
NAMED = {f"{title}-{case.name}": case for title, cases in GROUPS.items() for case in cases}


@pytest.mark.parametrize("name", NAMED)
def test_bad_input_gives_an_error_that_says_what_to_do(name, tmp_path):
    case = NAMED[name]
    message = case.message(tmp_path)
    assert case.says in message
    assert case.remedy in message.split(case.says, 1)[1]  # after what is wrong, what to do
    assert case.row(message) in PAGE, "run `make errors`"


def test_the_docs_have_a_row_for_each_case_and_no_other():
    """What is in the rows is compared by the cases themselves."""
    assert len(NAMED) == len(CASES)
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert page(dict(zip(NAMED, rows, strict=True))) == PAGE
