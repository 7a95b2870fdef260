from mcrage.training.length import PASSES, default_steps, opening


def test_the_default_passes_equally_often_over_tables_of_any_size_but_the_smallest_and_the_largest() -> None:
    for rows in (2000, 5000, 20_000):
        for batch_size in (128, 256):
            assert abs(default_steps(rows, batch_size) * batch_size / rows - PASSES) < 0.5
    assert (default_steps(10), default_steps(1_000_000)) == (60, 4000)


def test_the_length_of_a_training_is_said_with_its_reason() -> None:
    assert opening(1234, 21_060, is_default=True) == (
        "training 1,234 steps (the default for 21,060 rows; steps changes it)"
    )
    assert opening(50, 21_060, is_default=False) == "training 50 steps (as asked)"
