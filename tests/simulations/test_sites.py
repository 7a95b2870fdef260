"""Hospitals on disk: what is written is read back, byte for byte the same for the same hospitals."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mcrage.data.schema import Column, TableSchema
from mcrage.errors import ConfigError, SchemaError
from simulations.cohort import Cohort, CohortConfig
from simulations.sites import Hospitals, as_text, read_sites, write_sites


@pytest.fixture(scope="module")
def hospitals() -> Hospitals:
    return Cohort(CohortConfig(num_sites=3, patients_per_site=120, seed=4)).hospitals(test_patients=90)


def test_what_is_written_is_read_back_equal(hospitals: Hospitals, tmp_path: Path) -> None:
    paths = write_sites(tmp_path, hospitals)
    assert [path.name for path in paths] == ["site-01.csv", "site-02.csv", "site-03.csv"]
    again = read_sites(tmp_path)
    assert again.schema == hospitals.schema
    assert list(again.tables) == ["site-01", "site-02", "site-03"]
    for name, table in hospitals.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)
    assert hospitals.test is not None
    assert again.test is not None
    pd.testing.assert_frame_equal(again.test, hospitals.test)


def test_the_same_hospitals_give_the_same_bytes(hospitals: Hospitals, tmp_path: Path) -> None:
    same = Cohort(CohortConfig(num_sites=3, patients_per_site=120, seed=4)).hospitals(test_patients=90)
    write_sites(tmp_path / "a", hospitals)
    write_sites(tmp_path / "b", same)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["schema.json", "site-01.csv", "site-02.csv", "site-03.csv", "test.csv"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_kind_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    schema = TableSchema(
        columns=(
            Column(name="exact", kind="continuous", minimum=0, maximum=1),
            Column(name="rounded", kind="continuous", minimum=-5, maximum=5, decimals=2, missing_codes=("?",)),
            Column(name="large", kind="integer", minimum=0, maximum=2**60),
            Column(name="level", kind="categorical", categories=("None", "a, b", 'say "c"')),
            Column(name="order", kind="ordinal", categories=("low", "high")),
            Column(name="flag", kind="boolean", role="target", categories=("out", "in"), nullable=False),
            Column(name="day", kind="date", minimum="1900-01-01", maximum="2100-01-01", date_format="%d.%m.%Y"),
            Column(name="code", kind="text", role="patient_id"),
            Column(name="note", kind="text", role="ignored"),
        )
    )
    table = pd.DataFrame(
        {
            "exact": [0.1 + 0.2, np.nan, 1 / 3] * 20,
            "rounded": [1.25, -0.5, np.nan] * 20,
            "large": pd.array([2**53 + 1, None, 0] * 20, dtype="Int64"),
            "level": pd.Categorical(["None", "a, b", 'say "c"'] * 20, categories=["None", "a, b", 'say "c"']),
            "order": pd.Categorical(["low", None, "high"] * 20, categories=["low", "high"], ordered=True),
            "flag": pd.array([True, False, True] * 20, dtype="boolean"),
            "day": pd.Series(["1969-07-20", None, "2020-02-29"] * 20, dtype="datetime64[s]"),
            "code": pd.Series(["007", "8é", "9"] * 20, dtype="str"),
        }
    )
    write_sites(tmp_path, Hospitals(schema, {"somewhere": table}))
    again = read_sites(tmp_path)
    assert again.test is None
    pd.testing.assert_frame_equal(again.tables["site-01"], table)


def test_a_missing_cell_is_written_as_the_schemas_first_missing_code(hospitals: Hospitals) -> None:
    table = hospitals.tables["site-01"]
    text = as_text(table, hospitals.schema)
    assert (text["lactate"] == "").sum() == table["lactate"].isna().sum() > 0


def test_a_hospital_is_called_by_its_site_column(hospitals: Hospitals, tmp_path: Path) -> None:
    tables = {name: table.assign(hospital=f"St. {name}") for name, table in hospitals.tables.items()}
    write_sites(tmp_path, Hospitals(hospitals.schema, tables))
    assert list(read_sites(tmp_path).tables) == ["St. site-01", "St. site-02", "St. site-03"]


def test_hospitals_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    schema = TableSchema(columns=(Column(name="x", kind="continuous", minimum=0, maximum=200, decimals=0),))
    tables = {f"{number}": pd.DataFrame({"x": np.full(50, float(number))}) for number in range(1, 102)}
    write_sites(tmp_path, Hospitals(schema, tables))
    assert [table["x"].iloc[0] for table in read_sites(tmp_path).tables.values()] == list(range(1, 102))


def test_hospitals_of_two_runs_are_never_mixed(hospitals: Hospitals, tmp_path: Path) -> None:
    write_sites(tmp_path, hospitals)
    write_sites(tmp_path, hospitals)
    fewer = Hospitals(hospitals.schema, {"site-01": hospitals.tables["site-01"]})
    with pytest.raises(ConfigError, match=r"site-02\.csv, site-03\.csv"):
        write_sites(tmp_path, fewer)


def test_a_test_set_of_an_earlier_run_does_not_stay(hospitals: Hospitals, tmp_path: Path) -> None:
    write_sites(tmp_path, hospitals)
    write_sites(tmp_path, Hospitals(hospitals.schema, hospitals.tables))
    assert read_sites(tmp_path).test is None


def test_two_files_of_one_hospital_are_refused(hospitals: Hospitals, tmp_path: Path) -> None:
    table = hospitals.tables["site-01"]
    write_sites(tmp_path, Hospitals(hospitals.schema, {"one": table, "two": table}))
    with pytest.raises(ConfigError, match="hospital 'site-01'"):
        read_sites(tmp_path)


def test_a_folder_without_hospitals_says_so(hospitals: Hospitals, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"schema\.json"):
        read_sites(tmp_path)
    hospitals.schema.save(tmp_path / "schema.json")
    with pytest.raises(ConfigError, match="one file per hospital"):
        read_sites(tmp_path)
