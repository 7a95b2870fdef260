import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.pretend import pretend_private_folder
from client.protection import Protection
from client.site import Site, releasable_counts
from mcrage.cddpm import CDDPM
from mcrage.config import RunConfig, Scalar
from mcrage.data.groups import MINIMUM_CELL, GroupCounts
from mcrage.data.reader import read_table
from mcrage.data.schema import TableSchema
from mcrage.data.split import split_by_patient
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import ConfigError, LedgerError, RefusedError
from mcrage.messages import DescribeInstruction, EvaluateInstruction, TrainInstruction

RUN = "a" * 64
DESCRIBE = DescribeInstruction(run=RUN, test_fraction=0.3, marginals=True)


Deployed = Callable[..., Site]


@pytest.fixture
def deployed(tmp_path: Path) -> Deployed:
    """Makes a hospital of a table, a schema and a private folder of its own."""

    def make(data: Path, schema: Path, **more: Scalar) -> Site:
        paths = {"data-path": data, "schema-path": schema, "private-dir": tmp_path / "private" / "st-mary"}
        pretend_private_folder(tmp_path, "st-mary", data if data.exists() else schema)
        named: dict[str, Scalar] = {key: str(path) for key, path in paths.items()}
        return Site.of({"site": "st-mary"} | named | more, {})

    return make


@pytest.fixture
def hospital(deployed: Deployed, site_dir: Path) -> Site:
    return deployed(site_dir / "site-01.csv", site_dir / "schema.json")


def train_instruction(model: CDDPM, **changes: float) -> TrainInstruction:
    steps: dict[str, Any] = {
        "run": RUN,
        "server_round": 1,
        "first_step": 0,
        "local_steps": 3,
        "total_steps": 30,
        "batch_size": 16,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "proximal_mu": 0.0,
        "test_fraction": 0.3,
        "seed": 4,
    }
    return TrainInstruction(description=model.describe(), parameters=model.parameters(), **(steps | changes))


@pytest.fixture
def model(tiny_schema: TableSchema) -> CDDPM:
    return CDDPM.initialised(tiny_schema, None, config=ModelConfig(width=8, depth=1), random_state=0)


def test_a_hospital_is_what_its_own_configuration_says(deployed: Deployed, site_dir: Path) -> None:
    site = deployed(site_dir / "site-01.csv", site_dir / "schema.json", **{"num-threads": 2})
    assert (site.name, site.num_threads) == ("st-mary", 2)
    assert site.data_path == site_dir / "site-01.csv"


def test_a_hospital_takes_no_path_from_the_run(site_dir: Path) -> None:
    run_config = RunConfig.parse({"site-dir": "/elsewhere"}).to_flat()
    node_config: dict[str, Scalar] = {"site": "a", "partition-id": 1, "num-partitions": 3}
    with pytest.raises(ConfigError, match="data-path, schema-path, private-dir"):
        Site.of(node_config, run_config)
    paths = {
        "data-path": str(site_dir / "site-01.csv"),
        "schema-path": str(site_dir / "schema.json"),
        "private-dir": "p",
    }
    assert Site.of(node_config | paths, run_config).data_path == site_dir / "site-01.csv"


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({}, "names no site"),
        ({"site": "a", "data-path": "x"}, "lacks schema-path"),
        ({"site": "a", "data-path": 1, "schema-path": "x"}, "lacks data-path"),
        ({"site": "../a", "data-path": "x", "schema-path": "x", "private-dir": "x"}, "site name"),
        ({"site": "A", "data-path": "x", "schema-path": "x", "private-dir": "x"}, "site name"),
        ({"site": "a" * 65, "data-path": "x", "schema-path": "x", "private-dir": "x"}, "site name"),
        ({"site": "a", "data-path": "x", "schema-path": "x", "private-dir": "x", "num-threads": 0}, "num-threads"),
    ],
)
def test_a_configuration_that_is_not_enough_is_refused(node_config: dict[str, Scalar], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Site.of(node_config, {})


def test_a_pretend_hospital_takes_the_file_of_its_rank(site_dir: Path) -> None:
    run_config = RunConfig.parse({"site-dir": str(site_dir), "num-threads": 2}).to_flat()
    site = Site.of({"partition-id": 1, "num-partitions": 3}, run_config)
    assert (site.name, site.data_path, site.num_threads) == ("site-02", site_dir / "site-02.csv", 2)


def test_as_many_nodes_as_files_are_needed(site_dir: Path) -> None:
    run_config = RunConfig.parse({"site-dir": str(site_dir)}).to_flat()
    with pytest.raises(ConfigError, match="num-supernodes=3"):
        Site.of({"partition-id": 0, "num-partitions": 2}, run_config)


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_simulation_without_a_folder_says_so(folder: str) -> None:
    with pytest.raises(ConfigError, match="site-dir"):
        Site.of({"partition-id": 0, "num-partitions": 1}, {"site-dir": folder})


def test_the_description_is_of_the_training_part(hospital: Site, tiny_schema: TableSchema) -> None:
    description = hospital.describe(DESCRIBE)
    table = read_table(hospital.data_path, tiny_schema)
    train, _ = split_by_patient(table, tiny_schema, test_fraction=0.3)
    assert description.site == "st-mary"
    assert description.table_schema == tiny_schema
    shown = sum(description.group_counts.values())
    assert shown <= len(train) < len(table)
    assert description.marginals is not None
    assert description.marginals["sex"].sum() == pytest.approx(len(train))
    assert hospital.describe(DescribeInstruction(run=RUN, test_fraction=0.3, marginals=False)).marginals is None


def test_training_gives_new_parameters_and_the_same_ones_again(hospital: Site, model: CDDPM) -> None:
    first, again = (hospital.train(train_instruction(model)) for _ in range(2))
    other_round = hospital.train(train_instruction(model, server_round=2))
    for name, start in model.parameters().items():
        np.testing.assert_array_equal(first.parameters[name], again.parameters[name])
        assert first.parameters[name].dtype == np.float32
        assert start.shape == first.parameters[name].shape
    assert first.loss == again.loss != other_round.loss


def test_the_proximal_term_keeps_parameters_near_those_that_came(hospital: Site, model: CDDPM) -> None:
    def distance(proximal_mu: float) -> float:
        update = hospital.train(train_instruction(model, proximal_mu=proximal_mu, local_steps=20, learning_rate=0.05))
        return sum(
            float(np.square(update.parameters[name] - start).sum()) for name, start in model.parameters().items()
        )

    assert distance(100.0) < 0.8 * distance(0.0)


def test_the_loss_is_of_the_test_part_and_comparable_between_rounds(hospital: Site, model: CDDPM) -> None:
    def ask(server_round: int) -> EvaluateInstruction:
        description, parameters = model.describe(), model.parameters()
        return EvaluateInstruction(
            run=RUN,
            server_round=server_round,
            description=description,
            parameters=parameters,
            test_fraction=0.3,
            seed=4,
        )

    assert hospital.evaluate(ask(1)).loss == hospital.evaluate(ask(2)).loss


def test_a_model_of_another_schema_is_refused(hospital: Site, tiny_schema: TableSchema) -> None:
    content = tiny_schema.model_dump(mode="json")
    content["columns"][2]["maximum"] = 120
    stranger = CDDPM.initialised(TableSchema.parse(content), None, config=ModelConfig(width=8, depth=1))
    with pytest.raises(RefusedError, match="2204: the model is for tables of another schema"):
        hospital.train(train_instruction(stranger))


def test_a_file_that_changed_is_read_again(deployed: Deployed, site_dir: Path, tmp_path: Path) -> None:
    data = shutil.copy(site_dir / "site-01.csv", tmp_path / "site.csv")
    site = deployed(data, site_dir / "schema.json")
    before = site.describe(DESCRIBE)
    shutil.copy(site_dir / "site-02.csv", data)
    os.utime(data, ns=(1, 1))
    with pytest.raises(LedgerError, match="the table changed during the run"):
        site.describe(DESCRIBE)
    assert site.describe(DESCRIBE.model_copy(update={"run": "b" * 64})).to_wire().values != before.to_wire().values


def test_a_file_that_changes_between_charge_and_reading_is_refused(
    deployed: Deployed, site_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copy(site_dir / "site-01.csv", tmp_path / "site.csv"))
    site, charge = deployed(data, site_dir / "schema.json"), Protection.charge

    def exchange(*arguments: Any, **named: Any) -> Any:
        charged = charge(*arguments, **named)
        shutil.copy(site_dir / "site-02.csv", data)
        os.utime(data, ns=(1, 1))
        return charged

    monkeypatch.setattr(Protection, "charge", exchange)
    with pytest.raises(ConfigError, match="changed while it was read"):
        site.describe(DESCRIBE)


def test_a_file_that_is_not_there_is_the_setup_of_the_site(deployed: Deployed, site_dir: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        deployed(site_dir / "none.csv", site_dir / "schema.json").describe(DESCRIBE)


counts_of_four_groups = st.lists(st.integers(0, 40), min_size=6, max_size=6)


def table_of(counts: list[int]) -> tuple[pd.DataFrame, TableSchema]:
    columns = [
        {"name": "race", "kind": "categorical", "role": "sensitive", "categories": ["A", "B", "C"], "nullable": False},
        {"name": "ill", "kind": "boolean", "role": "target", "nullable": False},
    ]
    groups = [(race, ill) for race in "ABC" for ill in (False, True)]
    rows = [group for group, count in zip(groups, counts, strict=True) for _ in range(count)]
    return pd.DataFrame(rows, columns=["race", "ill"]), TableSchema.parse({"columns": columns})


@given(counts_of_four_groups)
def test_no_known_total_gives_a_small_count_away(counts: list[int]) -> None:
    table, schema = table_of(counts)
    exact = GroupCounts.of(table, schema.attributes)
    shown = releasable_counts(table, schema.attributes)
    assert all(count == exact[group] >= MINIMUM_CELL for group, count in shown.items())
    assert {*shown, *shown.suppressed} == set(exact)
    margins: list[tuple[str, str] | None] = [None, *(pair for group in exact for pair in group.levels)]
    for margin in margins:
        inside = [group for group in exact if margin is None or margin in group.levels]
        hidden = sum(exact[group] for group in inside if group not in shown)
        everything_is_hidden = all(group not in shown for group in inside)
        assert hidden == 0 or hidden >= MINIMUM_CELL or everything_is_hidden


def test_large_groups_are_shown_as_they_are() -> None:
    table, schema = table_of([20, 30, 11, 12, 40, 50])
    counts = releasable_counts(table, schema.attributes)
    assert sorted(counts.values()) == [11, 12, 20, 30, 40, 50]
    assert not counts.suppressed
