import importlib

import mcrage

NAMES = [
    "CDDPM",
    "Column",
    "Group",
    "GroupCounts",
    "MarginalGenerator",
    "Marginals",
    "McrageError",
    "ModelConfig",
    "RebalancePlan",
    "TableSchema",
    "TableTransform",
    "TrainingConfig",
    "__version__",
    "read_table",
    "split_by_patient",
]


def test_the_public_names_are_these() -> None:
    assert list(mcrage.__all__) == NAMES


def test_every_public_name_can_be_had_and_is_documented() -> None:
    for name in mcrage.__all__:
        value = getattr(mcrage, name)
        if name != "__version__":
            assert value.__doc__, name
            assert getattr(importlib.import_module(value.__module__), name) is value


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(mcrage, "Manager")
