import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.data.transform import TableTransform
from mcrage.errors import DataError, SamplingError

SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "age", "kind": "integer", "role": "sensitive", "minimum": 18, "maximum": 95, "bins": [45, 65]},
            {"name": "race", "kind": "categorical", "categories": ["a", "b", "c"], "role": "sensitive"},
            {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 500, "decimals": 1, "scale": "log"},
            {"name": "temp", "kind": "continuous", "minimum": 30, "maximum": 45, "nullable": False},
            {"name": "visits", "kind": "integer", "minimum": 0, "maximum": 9, "dtype": "int64", "nullable": False},
            {"name": "cost", "kind": "integer", "minimum": 0, "maximum": 90000, "scale": "log", "dtype": "float64"},
            {"name": "grade", "kind": "ordinal", "categories": ["low", "mid", "high"]},
            {"name": "ward", "kind": "categorical", "categories": ["x", "y"], "other": "OTHER", "dtype": "str"},
            {"name": "code", "kind": "categorical", "categories": ["3", "7"], "dtype": "Int64"},
            {"name": "smoker", "kind": "boolean"},
            {"name": "icu", "kind": "boolean", "dtype": "bool", "nullable": False},
            {"name": "seen", "kind": "date", "minimum": "2019-01-01", "maximum": "2022-12-31"},
            {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
        ]
    }
)


def make_table(rows: int, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)

    def holes(values: object) -> pd.Series:
        series = pd.Series(values)
        return series.mask(draw.random(rows) < 0.2)

    days = np.datetime64("2019-01-01", "s") + draw.integers(0, 1400, rows).astype("timedelta64[D]")
    return pd.DataFrame(
        {
            "age": holes(pd.array(draw.integers(18, 96, rows), dtype="Int64")),
            "race": holes(pd.Categorical.from_codes(draw.integers(0, 3, rows), categories=["a", "b", "c"])),
            "lab": holes(draw.gamma(2, 20, rows).round(1).clip(0, 500)),
            "temp": draw.normal(37, 1, rows),
            "visits": draw.integers(0, 10, rows),
            "cost": holes(draw.integers(0, 90001, rows).astype(float)),
            "grade": holes(
                pd.Categorical.from_codes(draw.integers(0, 3, rows), categories=["low", "mid", "high"], ordered=True)
            ),
            "ward": holes(pd.Series(np.array(["x", "y", "OTHER"])[draw.integers(0, 3, rows)], dtype="str")),
            "code": holes(pd.array(draw.choice([3, 7], rows), dtype="Int64")),
            "smoker": holes(pd.array(draw.random(rows) < 0.5, dtype="boolean")),
            "icu": draw.random(rows) < 0.5,
            "seen": holes(days),
            "died": pd.array(draw.random(rows) < 0.3, dtype="boolean"),
        }
    )


@pytest.fixture(params=["bounds alone", "released histograms"])
def transform(request: pytest.FixtureRequest) -> TableTransform:
    marginals = Marginals.of(make_table(400, seed=9), SCHEMA) if request.param == "released histograms" else None
    return TableTransform(SCHEMA, marginals)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), released=st.booleans())
def test_a_table_of_thirteen_dtypes_comes_back_as_it_went_in(seed: int, released: bool) -> None:
    table = make_table(30, seed)
    marginals = Marginals.of(make_table(400, seed=9), SCHEMA) if released else None
    transform = TableTransform(SCHEMA, marginals)
    encoded = transform.encode(table, generator=np.random.default_rng(seed))
    back = transform.decode(encoded.numeric, encoded.codes, encoded.attributes[:, -1])
    # temp has no decimals: exact up to float32; beyond the 1e-4 quantiles it moves to the edge
    pd.testing.assert_series_equal(back.pop("temp"), table.pop("temp"), atol=0.5)
    pd.testing.assert_frame_equal(back, table)


def test_released_histograms_make_every_number_nearly_standard_normal() -> None:
    table = make_table(20_000)
    transform = TableTransform(SCHEMA, Marginals.of(table, SCHEMA))
    encoded = transform.encode(table, generator=np.random.default_rng(0))
    for position, coding in enumerate(transform.codings):
        there = torch.tensor(table[coding.column.name].notna().to_list())
        z = encoded.numeric[there, position]
        # standard errors at 16,000 rows are .008 and .006; five of them
        assert abs(float(z.mean())) < 0.04, coding.column.name
        assert abs(float(z.std()) - 1) < 0.05, coding.column.name


def test_bounds_alone_do_not_make_a_skewed_number_standard_normal() -> None:
    table = make_table(20_000)
    encoded = TableTransform(SCHEMA).encode(table, generator=np.random.default_rng(0))
    position = [coding.column.name for coding in TableTransform(SCHEMA).codings].index("cost")
    there = torch.tensor(table["cost"].notna().to_list())
    assert abs(float(encoded.numeric[there, position].mean())) > 0.04


def test_encoding_a_row_does_not_depend_on_other_rows(transform: TableTransform) -> None:
    table = make_table(50)
    whole = transform.encode(table, generator=np.random.default_rng(1))
    part = transform.encode(table.iloc[:20], generator=np.random.default_rng(1))
    assert torch.equal(whole.codes[:20], part.codes)
    assert torch.equal(whole.attributes[:20], part.attributes)


def test_values_outside_the_bounds_come_back_at_the_bound(transform: TableTransform) -> None:
    table = make_table(10).assign(lab=1e6, cost=-5.0)
    encoded = transform.encode(table, generator=np.random.default_rng(0))
    back = transform.decode(encoded.numeric, encoded.codes, encoded.attributes[:, -1])
    assert (back["lab"] == 500).all()
    assert (back["cost"] == 0).all()


def test_any_model_number_decodes_inside_the_schema(transform: TableTransform) -> None:
    layout = transform.layout
    z = torch.linspace(-9, 9, 50)[:, None].expand(50, layout.num_numeric)
    zeros = torch.zeros(50, len(layout.block_sizes) + 1, dtype=torch.int64)
    back = transform.decode(z, zeros[:, 1:], zeros[:, 0])
    assert back["lab"].between(0, 500).all()
    assert back["age"].between(18, 95).all()
    assert back["seen"].between("2019-01-01", "2022-12-31").all()


def test_a_condition_on_a_bin_becomes_the_range_of_its_values(transform: TableTransform) -> None:
    constraint = transform.constrain(3, {"age": "45 to 64", "died": True})
    names = [coding.column.name for coding in transform.codings]
    low, high = constraint.low[0, names.index("age")], constraint.high[0, names.index("age")]
    ages = pd.array([44, 45, 64, 65], dtype="Int64")
    table = make_table(4).assign(age=ages)
    for seed in range(20):
        z = transform.encode(table, generator=np.random.default_rng(seed)).numeric[:, names.index("age")]
        inside = (z >= low - 1e-6) & (z <= high + 1e-6)
        assert inside.tolist() == [False, True, True, False]


def test_open_conditions_constrain_nothing(transform: TableTransform) -> None:
    constraint = transform.constrain(2, None)
    assert (constraint.codes == -1).all()
    assert (constraint.attributes == -1).all()
    assert torch.isinf(constraint.low).all()


def test_a_condition_can_ask_for_a_missing_value(transform: TableTransform) -> None:
    constraint = transform.constrain(1, {"race": "missing", "age": "missing"})
    named = {
        (b.column.name, b.only_missing): int(c) for b, c in zip(transform.blocks, constraint.codes[0], strict=True)
    }
    assert named["race", False] == 3
    assert named["age", True] == 1


def test_a_table_of_conditions_is_row_by_row_and_missing_is_open(transform: TableTransform) -> None:
    asked = pd.DataFrame({"race": ["a", None, "c"], "died": [True, False, None], "age": [50, None, 20]})
    attributes = transform.constrain(3, asked).attributes
    assert attributes.tolist() == [[1, 0, 1], [-1, -1, 0], [0, 2, -1]]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"lab": 3}, "rows cannot be asked for by lab; they can by age, race, died"),
        ({"race": "z"}, "column 'race' has no level 'z'; it has a, b, c, missing"),
        (pd.DataFrame({"race": ["a"]}), "asked for 2 rows with conditions for 1"),
    ],
)
def test_impossible_conditions_say_what_is_possible(
    transform: TableTransform, conditions: object, message: str
) -> None:
    with pytest.raises(SamplingError, match=message):
        transform.constrain(2, conditions)  # type: ignore[arg-type]


def test_a_table_that_does_not_follow_the_schema_is_refused_with_every_problem() -> None:
    table = make_table(20).drop(columns="lab").assign(grade="PHI_CANARY", died=pd.array([None] * 20, dtype="boolean"))
    with pytest.raises(DataError) as caught:
        TableTransform(SCHEMA).encode(table, generator=np.random.default_rng(0))
    assert [problem.column for problem in caught.value.problems] == ["lab", "grade", "died"]
    assert "PHI_CANARY" not in str(caught.value)
