"""Errors: one tree, and lines that a person can act on."""

import pytest

from mcrage import errors
from mcrage.errors import DataError, McrageError, Problem


def test_every_error_is_a_mcrage_error() -> None:
    raised = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, Exception)]
    assert McrageError in raised
    assert DataError in raised
    assert all(issubclass(error, McrageError) for error in raised)
    assert all(error.__name__ in (errors.__doc__ or "") for error in raised)


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (
            Problem(code="E306", column="age", rows=17, total=5210, rule="outside 0 to 120", remedy="Correct them."),
            "E306 column 'age': 17 of 5,210 rows outside 0 to 120. Correct them.",
        ),
        (
            Problem(code="E201", column="age", rule="is missing", remedy="Export it."),
            "E201 column 'age': is missing. Export it.",
        ),
        (
            Problem(code="E106", rule="the file is empty", remedy="Export it again."),
            "E106 the file is empty. Export it again.",
        ),
    ],
)
def test_a_problem_is_one_line(problem: Problem, line: str) -> None:
    assert str(problem) == line


def test_a_data_error_shows_every_problem_on_a_line_with_its_file() -> None:
    problems = [
        Problem(code="E106", rule="empty", remedy="Fill it."),
        Problem(code="E107", rule="bare", remedy="Dress it."),
    ]
    assert str(DataError(problems)) == "E106 empty. Fill it.\nE107 bare. Dress it."
    named = DataError(problems, source="site.csv")
    assert str(named) == "site.csv: E106 empty. Fill it.\nsite.csv: E107 bare. Dress it."
    assert named.problems == tuple(problems)
