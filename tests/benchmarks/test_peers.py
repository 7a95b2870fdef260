import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import machine
from benchmarks.peers import environments
from benchmarks.peers.__main__ import Bench, RunFailedError, measured, summary
from benchmarks.peers.runners.harness import EpochBudget
from benchmarks.peers.tables import categories, exported, restored
from benchmarks.speed import simulated
from mcrage import TableSchema
from simulations.datasets import diabetes130

SCHEMA = diabetes130.SCHEMA
SMALL = TableSchema.parse(
    {
        "columns": [
            {"name": "age", "kind": "integer", "minimum": 0, "maximum": 99},
            {"name": "drug", "kind": "categorical", "categories": ["None", "1", "NA"], "missing_codes": ["?"]},
            {"name": "stage", "kind": "ordinal", "categories": ["I", "II"]},
            {"name": "died", "kind": "boolean", "role": "target", "categories": ["no", "yes"], "nullable": False},
        ]
    }
)
TABLE = pd.DataFrame(
    {
        "age": pd.array([1, None, 3], dtype="Int64"),
        "drug": pd.Categorical(["None", "1", None], categories=["None", "1", "NA"]),
        "stage": pd.Categorical([None, "II", "I"], categories=["I", "II"], ordered=True),
        "died": pd.array([True, False, True], dtype="boolean"),
    }
)


def through_a_file(rows: pd.DataFrame, schema: TableSchema) -> pd.DataFrame:
    texts = dict.fromkeys(categories(schema), object)
    return pd.read_csv(io.StringIO(rows.to_csv(index=False)), dtype=texts, keep_default_na=False, na_values=[""])


@pytest.mark.parametrize(("table", "schema"), [(TABLE, SMALL), (simulated(200, SCHEMA), SCHEMA)])
def test_rows_come_back_from_a_peers_file_as_they_went(table: pd.DataFrame, schema: TableSchema) -> None:
    back = restored(through_a_file(exported(table, schema), schema), schema)
    pd.testing.assert_frame_equal(back, table)
    changed = exported(table, schema).iloc[::-1].reset_index(drop=True)
    assert not restored(through_a_file(changed, schema), schema).equals(table)


def test_levels_that_a_peer_made_up_count_as_missing_and_its_numbers_are_rounded_as_the_schema_says() -> None:
    rows = exported(TABLE, SMALL).assign(drug=["None", "_RARE_", "1"], age=[1.4, 2.0, np.nan])
    back = restored(rows, SMALL)
    assert back["drug"].tolist()[::2] == ["None", "1"]
    assert back["drug"].isna().tolist() == [False, True, False]
    assert back["age"].tolist()[:2] == [1, 2]
    assert back["age"].isna().tolist() == [False, False, True]


def bench(cache: Path, rows: int) -> Bench:
    return Bench(cache, exported(simulated(rows, SCHEMA), SCHEMA), categories(SCHEMA), SCHEMA, rows=40)


@pytest.mark.slow
def test_a_peer_runs_in_its_own_process_and_says_what_it_took(tmp_path: Path) -> None:
    cost, rows = bench(tmp_path, 300).run("mcrage", budget=0, seed=0, steps=3)
    assert restored(rows, SCHEMA).dtypes.to_dict() == simulated(1, SCHEMA).dtypes.to_dict()
    assert len(rows) == cost["rows"] == 40
    assert cost["rows_trained"] == 3 * 256
    seconds = (cost["training_cpu_seconds"], cost["sampling_cpu_seconds"])
    assert all(second is not None and 0 < second < 60 for second in seconds)


@pytest.mark.slow
def test_a_process_that_fails_gives_its_last_line_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"^[^\n]*the table has no rows[^\n]*$"):
        bench(tmp_path, 0).run("mcrage", budget=0, seed=0, steps=3)


@pytest.mark.slow
def test_a_peer_that_cannot_be_installed_is_a_line_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(environments.REQUIREMENTS, "ctgan", (("--no-index", "ctgan==99.0"),))
    failed = measured(bench(tmp_path, 300), "ctgan", 45.0, 0, None, simulated(10, SCHEMA))
    assert "No matching distribution" in str(failed["failed"])
    assert not (tmp_path / "ctgan" / "ready").exists(), "an environment that is not complete is made anew"
    table = summary([{"peer": "other", "seed": 0, "all pairs": 0.9}, failed])
    assert "| other | 0 | 0.9 |" in table
    assert "ctgan: failed: " in table
    assert "| ctgan |" not in table


def test_the_reason_of_a_failure_is_one_line_also_where_the_process_was_ended() -> None:
    spoke = subprocess.run([sys.executable, "-c", "import no_such_module"], capture_output=True, text=True, check=False)
    assert environments.reason(spoke) == "ModuleNotFoundError: No module named 'no_such_module'"
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    ended = subprocess.run([sys.executable, "-c", killed], capture_output=True, text=True, check=False)
    assert environments.reason(ended) == "ended with status -9 and without a message"


def test_every_peer_is_pinned() -> None:
    assert {name: environments.pinned(name).count(".") for name in environments.REQUIREMENTS} == dict.fromkeys(
        environments.REQUIREMENTS, 2
    )
    loose = [pin for steps in environments.REQUIREMENTS.values() for step in steps for pin in step if "==" not in pin]
    assert loose == ["--no-deps"]


@pytest.mark.parametrize(("budget", "epochs"), [(0.23, 2), (0.28, 3)])
def test_training_stops_with_the_epoch_that_ends_nearest_to_the_budget(budget: float, epochs: int) -> None:
    epoch_budget = EpochBudget(budget)
    done = 0
    spent = False
    while not spent:
        burn(0.1)
        done += 1
        spent = epoch_budget.is_spent()
    assert done == epochs


def burn(seconds: float) -> None:
    """Uses this much CPU time."""
    end = machine.cpu_seconds() + seconds
    while machine.cpu_seconds() < end:
        pass


def test_memory_that_a_call_uses_for_a_while_is_seen() -> None:
    megabytes = 64
    total, added = machine.added_memory_mb(lambda: np.ones(megabytes * 2**20, dtype=np.uint8).sum())
    assert total == megabytes * 2**20
    if added is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert megabytes * 0.8 < added < megabytes * 1.5
    _, nothing = machine.added_memory_mb(lambda: None)
    assert nothing is not None
    assert nothing < megabytes * 0.2
