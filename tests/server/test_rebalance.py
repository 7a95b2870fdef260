import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.app import app
from mcrage.config import RunConfig
from mcrage.data.groups import Group, GroupCounts
from mcrage.data.schema import TableSchema
from mcrage.errors import CheckpointError, ConfigError, PrivacyError
from mcrage.render.card import NO_PRIVACY
from server.app import save_result
from server.home import CoordinatorSettings, Home, write_json
from server.overview import Record, read_part
from server.rebalance import make_plan, privacy_of, rebalance
from server.rounds import run_federation
from simulations.grid import InProcessGrid

FORMULA, BELL = '=HYPERLINK("x")', "bell\x07\x1b[2J"
SCHEMA = TableSchema.parse(
    {
        "name": "hostile",
        "columns": [
            {"name": "patient", "kind": "text", "role": "patient_id", "nullable": False},
            {
                "name": "race",
                "kind": "categorical",
                "role": "sensitive",
                "categories": [FORMULA, BELL],
                "nullable": False,
            },
            {"name": "age", "kind": "integer", "minimum": 18, "maximum": 100},
            {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 10, "decimals": 1},
            {"name": "ill", "kind": "boolean", "role": "target", "nullable": False},
        ],
    }
)


def write_sites(folder: Path) -> Path:
    folder.mkdir()
    SCHEMA.save(folder / "schema.json")
    for number in range(1, 4):
        draw = np.random.default_rng([0, number])
        age = draw.integers(18, 100, 120)
        table = {
            "patient": [f"p{number}-{row}" for row in range(120)],
            "race": draw.choice([FORMULA, BELL], 120, p=[0.3, 0.7]),
            "age": age,
            "lab": (age / 20 + draw.normal(0, 1, 120)).clip(0, 10).round(1),
            "ill": draw.random(120) < 0.3,
        }
        pd.DataFrame(table).to_csv(folder / f"site-{number:02d}.csv", index=False)
    return folder


def finished(home: Home, name: str, sites: Path, **settings: Any) -> Path:
    """The folder of a run that is done."""
    places = {"site-dir": str(sites), "out-dir": str(home.run(name)), "run-name": name}
    size = {"num-server-rounds": 2, "local-steps": 2, "batch-size": 32, "width": 16, "depth": 1, "quorum-retries": 0}
    config = RunConfig.parse(places | size | {key.replace("_", "-"): value for key, value in settings.items()})
    save_result(run_federation(InProcessGrid.of_folder(app, 3, config), config), config, seconds=1.0)
    return home.run(name)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    home = Home.create(folder / "home", CoordinatorSettings(names=("fed.example.org",)))
    return finished(home, "plain", write_sites(folder / "sites"))


@pytest.fixture
def run(plain_run: Path, tmp_path: Path) -> Path:
    """A copy to work on."""
    return Path(shutil.copytree(plain_run, tmp_path / "plain"))


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "synthetic").iterdir()}


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "synthetic" / "synthetic.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_parity_gives_every_group_as_many_rows_as_the_largest(run: Path) -> None:
    lines = rebalance(run, rows=0, seed=0, force=False)
    plan, report = (json.loads(contents(run)[name]) for name in ("plan.json", "report.json"))
    assert len({line["counted"] + line["to_make"] for line in plan["groups"]}) == 1
    made = Counter((row["race"].removeprefix("'"), row["ill"]) for row in rows_of(run))
    for line in report["groups"]:
        assert line["made"] == line["asked"] == made[line["group"]["race"], line["group"]["ill"]]
        assert line["rejected"] == 0
    assert len(report["groups"]) == 4
    assert report["rows"] == plan["rows"] == sum(made.values()) > 0
    assert lines[-1] == f"{run / 'synthetic'}: {report['rows']} rows, their plan and a report"
    shown = next(line for line in report["groups"] if line["group"] == {"race": FORMULA, "ill": "True"})
    assert any(line.split() == [f"race={FORMULA},", "ill=True", *[str(shown["asked"])] * 2, "0"] for line in lines)


def test_the_report_says_what_the_rows_are_from(run: Path) -> None:
    rebalance(run, rows=40, seed=7, force=False)
    report = json.loads(contents(run)["report.json"])
    assert report["model_sha256"] == json.loads((run / "model" / "model.json").read_text())["sha256"]
    assert report["seed"] == 7
    assert report["privacy"] == [NO_PRIVACY]
    assert list(report["sites"]) == ["site-01", "site-02", "site-03"]
    released: Counter[str] = Counter()
    for site in report["sites"].values():
        for line in site["counts"]:
            released[str(line["group"])] += line["rows"]
        assert len(site["counts"]) + len(site["suppressed"]) == 4
    plan = json.loads(contents(run)["plan.json"])
    assert {str(line["group"]): line["counted"] for line in plan["groups"]} == {
        str(line["group"]): released[str(line["group"])] or 5 for line in plan["groups"]
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_rows(run: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        rebalance(run, rows=60, seed=seed, force=True)
        found.append(contents(run))
    assert found[0] == found[1]
    assert found[1]["synthetic.csv"] != found[2]["synthetic.csv"]
    assert found[1]["plan.json"] == found[2]["plan.json"]


def test_cells_that_a_spreadsheet_would_run_are_inert_and_no_line_steers_a_terminal(run: Path) -> None:
    lines = rebalance(run, rows=60, seed=0, force=False)
    assert {row["race"] for row in rows_of(run)} == {f"'{FORMULA}", BELL}
    assert all(line.isprintable() for line in lines)


def test_what_is_there_is_replaced_only_if_asked_and_then_as_a_whole(run: Path) -> None:
    rebalance(run, rows=30, seed=0, force=False)
    (run / "synthetic" / "notes.txt").write_text("mine")
    before = contents(run)
    with pytest.raises(ConfigError, match="is there already; give --force"):
        rebalance(run, rows=10, seed=0, force=False)
    assert contents(run) == before
    rebalance(run, rows=10, seed=0, force=True)
    assert sorted(contents(run)) == ["plan.json", "report.json", "synthetic.csv"]
    assert len(rows_of(run)) == 10
    assert not list(run.glob(".synthetic*"))


def test_what_cannot_be_written_leaves_what_was_there(run: Path) -> None:
    rebalance(run, rows=30, seed=0, force=False)
    before = contents(run)
    (run / ".synthetic").write_text("in the way of the draft")
    with pytest.raises(ConfigError, match="cannot be written"):
        rebalance(run, rows=10, seed=0, force=True)
    assert contents(run) == before


def test_the_draft_of_a_process_that_was_killed_is_cleared_away(run: Path) -> None:
    (run / ".synthetic").mkdir()
    (run / ".synthetic" / "synthetic.csv").write_text("half")
    rebalance(run, rows=10, seed=0, force=False)
    assert len(rows_of(run)) == 10
    assert not (run / ".synthetic").exists()


def test_nobody_else_on_the_machine_may_look_at_the_rows(run: Path) -> None:
    rebalance(run, rows=10, seed=0, force=False)
    assert (run / "synthetic").stat().st_mode & 0o777 == 0o700


def test_without_a_model_there_is_one_clear_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^there is no run other; 'status' shows all$"):
        rebalance(tmp_path / "other", rows=0, seed=0, force=False)
    shutil.rmtree(run / "model")
    with pytest.raises(ConfigError, match=r"^run plain has no model: it is not finished; [^\n]*$"):
        rebalance(run, rows=0, seed=0, force=False)
    assert not (run / "synthetic").exists()


def test_a_damaged_model_or_checkpoint_is_one_line(run: Path) -> None:
    for state in (run / "checkpoints").glob("round-*/state.json"):
        state.write_text("{")
    with pytest.raises(CheckpointError, match=r"^[^\n]*checkpoints[^\n]*$"):
        rebalance(run, rows=0, seed=0, force=False)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        rebalance(run, rows=0, seed=0, force=False)
    (run / "model" / "model.safetensors").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"^[^\n]*checksum[^\n]*$"):
        rebalance(run, rows=0, seed=0, force=False)


def counts(**rows: int) -> GroupCounts:
    """Rows by group; ``F_yes=3`` are three of sex=F, ill=yes, and 0 stands for a count that may not be shown."""
    groups = {name: Group.of(sex=name[0], ill=name[2:]) for name in rows}
    shown = {groups[name]: count for name, count in rows.items() if count}
    return GroupCounts(shown, suppressed=[groups[name] for name, count in rows.items() if not count])


def small_schema(*rules: str) -> TableSchema:
    sex = {"name": "sex", "kind": "categorical", "role": "sensitive", "categories": ["F", "M"], "nullable": False}
    ill = {"name": "ill", "kind": "categorical", "role": "target", "categories": ["no", "yes"], "positive": "yes"}
    columns = [sex, ill | {"nullable": False}]
    return TableSchema.parse({"name": "small", "columns": columns, **({"rules": list(rules)} if rules else {})})


def test_a_group_that_may_not_be_shown_counts_as_five_and_one_that_nobody_has_shown_is_not_made() -> None:
    plan = make_plan(counts(F_yes=20, M_no=50, M_yes=0), small_schema(), rows=0)
    assert dict(plan) == {
        Group.of(sex="F", ill="yes"): 30,
        Group.of(sex="M", ill="no"): 0,
        Group.of(sex="M", ill="yes"): 45,
    }


def test_a_group_that_only_noise_can_have_shown_is_not_asked_for() -> None:
    schema = small_schema("if sex = M then ill = no")
    plan = make_plan(counts(F_yes=20, M_no=50, M_yes=60), schema, rows=0)
    assert dict(plan) == {Group.of(sex="F", ill="yes"): 30, Group.of(sex="M", ill="no"): 0}


def test_at_parity_there_is_nothing_to_make_but_a_total_gives_equal_shares() -> None:
    same = counts(F_yes=20, M_no=20, M_yes=20)
    with pytest.raises(ConfigError, match="--rows makes some of each"):
        make_plan(same, small_schema(), rows=0)
    assert sorted(make_plan(same, small_schema(), rows=10).values()) == [3, 3, 4]
    with pytest.raises(ConfigError, match="no site has shown a group"):
        make_plan(GroupCounts({}), small_schema(), rows=10)


@given(
    rows=st.integers(1, 10**7),
    sizes=st.lists(st.integers(0, 10**6).map(lambda size: size if size > 10 else 0), min_size=4, max_size=4),
)
def test_a_total_is_met_exactly_and_in_the_proportions_of_parity(rows: int, sizes: list[int]) -> None:
    released = counts(**dict(zip(("F_no", "F_yes", "M_no", "M_yes"), sizes, strict=True)))
    plan = make_plan(released, small_schema(), rows=rows)
    assert plan.total == rows
    largest = max([*released.values(), 5])
    wanted = {group: largest - (released.get(group) or 5) for group in plan}
    total = sum(wanted.values())
    for group, made in plan.items():
        exact = rows * wanted[group] / total if total else rows / len(plan)
        assert abs(made - exact) < 1 + 1e-6


def test_of_a_private_run_the_rows_carry_the_statement_of_its_ledgers(
    site_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("private")
    home = Home.create(folder / "home", CoordinatorSettings(names=("fed.example.org",)))
    sites = Path(shutil.copytree(site_dir, folder / "sites", ignore=shutil.ignore_patterns("private")))
    run = finished(home, "private", sites, dp=True, dp_noise_multiplier=1.0, dp_sample_rate=0.2)
    rebalance(run, rows=20, seed=0, force=False)
    (statement,) = json.loads(contents(run)["report.json"])["privacy"]
    assert statement in (run / "model" / "card.md").read_text()
    assert "-differential privacy at patient level" in statement

    names = ["site-01", "site-02", "site-03"]
    record = json.loads((run / "run.json").read_text())
    silent = Record.model_validate(record | {"privacy": {}})
    assert privacy_of(silent, names) == [
        "No guarantee can be stated for the patients of site-01, site-02, site-03: no account came.",
        "So nothing is claimed of the model as a whole.",
    ]
    assert "no record" in privacy_of(None, names)[0]
    record["privacy"]["site-01"]["epsilon"] = 0.1
    write_json(run / "run.json", record)
    with pytest.raises(PrivacyError, match=r"site-01: its events cost"):
        privacy_of(read_part(run / "run.json", Record), names)
