import pytest
from bad_inputs import CASES, GROUPS, PAGE, cells_of, kind, page


TEXT = PAGE.read_text(encoding="utf-8")
CELLS = cells_of(TEXT)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_an_error_that_says_what_to_do(name, tmp_path):
    case = CASES[name]
    rest = message = case.message(tmp_path)
    for part in case.says.split(" | "):
        assert part in rest, message
        rest = rest.split(part, 1)[1]
    assert kind(case.cell(message)) == kind(CELLS[name]), "run `make errors`"
    if any(f"| {case.does}{end}" in TEXT for end in (" |", "<br>")):  # the first of its row
        assert case.cell(message) == CELLS[name], "run `make errors`"


def test_the_docs_have_each_case_and_no_other():
    """What is in the rows is compared by the cases themselves."""
    assert len(CASES) == sum(map(len, GROUPS.values()))
    assert list(CELLS) == list(CASES)
    assert page(CELLS) == TEXT


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (
            "`ValueError`: `seed` is -1; it must be at least 0.",
            "`ValueError`: `a` is 'b c'; it must be at least 0.",
            1,
        ),
        ("`TypeError`: `a` is 1, an int; it must be b.", "`TypeError`: `c` is None, a NoneType; it must be b.", 1),
        ("exit code 2: trl-promptkd: `--a` is 'b': no", "exit code 2: trl-promptkd: `--c` is 'd': no", 1),
        ("`ValueError`: `seed` is -1; it must be at least 0.", "`TypeError`: `seed` is -1; it must be at least 0.", 0),
        ("`ValueError`: `seed` is -1; it must be at least 0.", "`ValueError`: `seed` is -1; it must be above 0.", 0),
        ("`ValueError`: `a` is 0 with `b=1`: no.", "`ValueError`: `c` is 0 with `d=1`: no.", 0),
    ],
)
def test_rows_are_one_if_they_differ_only_in_the_field(one, other, alike):
    assert (kind(one) == kind(other)) == alike
