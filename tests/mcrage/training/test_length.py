import pytest

from mcrage.training.length import PASSES, default_batch_size, default_learning_rate, default_steps, opening


@pytest.mark.parametrize(("rows", "batch_size"), [(30_000, 256), (60_000, 256), (120_000, 512)])
def test_large_tables_are_passed_equally_often(rows: int, batch_size: int) -> None:
    assert abs(default_steps(rows, batch_size) * batch_size / rows - PASSES) < 0.5


def test_small_tables_are_passed_more_often_by_smaller_steps() -> None:
    assert [default_steps(rows, default_batch_size(rows)) for rows in (10, 1000, 4000, 1_000_000)] == [
        60,
        150,
        300,
        4000,
    ]
    rates = [default_learning_rate(rows) for rows in (10, 1000, 4000, 25_000, 1_000_000)]
    assert rates == pytest.approx([1e-3, 1e-3, 2e-3, 5e-3, 5e-3])


def test_the_length_of_a_training_is_said_with_its_reason() -> None:
    assert opening(1234, 21_060, is_default=True) == (
        "training 1,234 steps (the default for 21,060 rows; steps changes it)"
    )
    assert opening(50, 21_060, is_default=False) == "training 50 steps (as asked)"
