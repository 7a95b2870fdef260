"""A tiny experiment from files to report: what it writes, that it can be repeated, killed and resumed."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from mcrage import CDDPM, MarginalGenerator
from mcrage.data.groups import MINIMUM_CELL
from mcrage.errors import CheckpointError, ConfigError
from mcrage.evaluation.report import ALL, ARMS, RunResults
from mcrage.generator import load_generator
from simulations.experiment import check_study, run_experiment
from simulations.findings import EVERYBODY_ELSE
from simulations.settings import ExperimentConfig, Places, parse_config
from simulations.sites import Hospitals, read_sites, write_sites
from simulations.study import Study, own_study

SETTINGS = {
    "num_server_rounds": 2,
    "local_steps": 3,
    "batch_size": 32,
    "width": 16,
    "depth": 1,
    "modelled_rows": 400,
    "target_multiple": 1.0,
    "minority_floor": 20,
    "fidelity_every": 1,
    "num_replicates": 20,
}


@pytest.fixture(scope="module")
def study(site_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Three hospitals of 120 patients; the third one's also serve as the test set that all share."""
    folder = tmp_path_factory.mktemp("study")
    hospitals = read_sites(site_dir)
    hospitals = Hospitals(hospitals.schema, hospitals.tables, hospitals.tables["site-03"])
    return Study(
        dataset="tiny",
        hospitals=hospitals,
        files=write_sites(folder, hospitals),
        schema_path=folder / "schema.json",
        minority_groups=("sex=F",),
    )


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return parse_config(SETTINGS)


@pytest.fixture(scope="module")
def out(study: Study, config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("out")
    run_experiment(study, config, Places(out=folder, num_workers=1, verbose=False))
    return folder


def test_an_experiment_compares_all_arms_at_every_hospital_and_over_all(out: Path, study: Study) -> None:
    results = RunResults.read(out / "results.json")
    assert set(results.arms) == set(ARMS)
    assert results.sites == tuple(study.hospitals.tables)
    found = {(row.site, row.arm, row.model) for row in results.rows if row.group == ALL and row.metric == "auroc"}
    assert len(found) == 4 * len(ARMS) * 2
    assert all(row.value is not None for row in results.rows if row.group == ALL and row.metric == "auroc")


def test_the_headline_is_about_the_common_test_set_and_the_own_rows_stand_beside_it(out: Path, study: Study) -> None:
    common, own = (RunResults.read(out / name) for name in ("results.json", "results-own.json"))
    assert (common.run.test_set, own.run.test_set) == ("common", "own")
    names = {"site": "site-01", "group": ALL, "arm": "local", "model": "logistic_regression"}
    of_common, of_own = common.score(**names), own.score(**names)
    assert of_common is not None
    assert of_own is not None
    assert of_common.n == 120
    assert of_own.n is not None
    assert of_own.n < 120


def test_every_hospital_takes_its_rows_from_one_pool(out: Path, study: Study) -> None:
    pool = pd.read_parquet(out / "synthetic.parquet")
    assert list(pool) == [column.name for column in study.schema.modelled]
    assert len(pd.read_csv(out / "synthetic.csv")) == len(pool)
    sizes = [size for size in RunResults.read(out / "results.json").group_sizes if size.group == "all"]
    assert [size.site for size in sizes] == [ALL, *study.hospitals.tables]
    assert all(size.synthetic is not None and 0 < size.synthetic <= len(pool) for size in sizes[1:])


def test_the_saved_model_is_the_one_that_made_the_pool(out: Path) -> None:
    assert set(CDDPM.load(out / "model").sample(10)["sex"].astype(str)) <= {"F", "M"}


def test_history_has_loss_and_fidelity_of_every_round(out: Path) -> None:
    history = RunResults.read(out / "results.json").history
    assert [at.round for at in history] == [1, 2]
    assert all(at.loss is not None and at.loss > 0 for at in history)
    assert all(at.fidelity is not None and 0 < at.fidelity <= 1 for at in history)


def test_distributions_are_of_the_minority_and_of_everybody_else_without_small_counts(out: Path) -> None:
    marginals = RunResults.read(out / "results.json").marginals
    assert {marginal.group for marginal in marginals} == {"sex=F", EVERYBODY_ELSE}
    for marginal in marginals:
        hidden = [made for made in marginal.real if made is None]
        assert len(hidden) == len([made for made in marginal.synthetic if made is None])
        assert not [count for count in marginal.real if count is not None and 0 < count < MINIMUM_CELL]


def test_the_report_shows_the_run(out: Path) -> None:
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "sex=F" in text
    assert "site-03" in text


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    out: Path, study: Study, config: ExperimentConfig, tmp_path: Path
) -> None:
    run_experiment(study, config, Places(out=tmp_path / "again", num_workers=2, verbose=False))
    assert (tmp_path / "again/synthetic.csv").read_bytes() == (out / "synthetic.csv").read_bytes()
    documents = [json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "again")]
    for part in ("rows", "gap_closed", "verdicts", "group_sizes", "marginals", "history"):
        assert documents[0][part] == documents[1][part], part
    other = parse_config(SETTINGS | {"seed": 1, "local_models": False})
    run_experiment(study, other, Places(out=tmp_path / "other", num_workers=1, verbose=False))
    assert (tmp_path / "other/synthetic.csv").read_bytes() != (out / "synthetic.csv").read_bytes()


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_bytes_and_no_other_run_is(
    out: Path, study: Study, config: ExperimentConfig, tmp_path: Path, copied: Path
) -> None:
    for name in ("results.json", "scores/site-02.npz", "local/site-03/model.json"):
        (copied / name).unlink()
    before = (copied / "scores/site-01.npz").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="unfinished run"):
        run_experiment(study, config, Places(out=copied, verbose=False))
    other = parse_config(SETTINGS | {"target_multiple": 2.0})
    with pytest.raises(CheckpointError, match="other settings"):
        run_experiment(study, other, Places(out=copied, resume=True, verbose=False))
    results = run_experiment(study, config, Places(out=copied, resume=True, num_workers=1, verbose=False))
    assert (copied / "scores/site-01.npz").stat().st_mtime_ns == before
    assert (copied / "synthetic.csv").read_bytes() == (out / "synthetic.csv").read_bytes()
    whole = RunResults.read(out / "results.json")
    assert (results.rows, results.history) == (whole.rows, whole.history)


@pytest.fixture
def copied(out: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to damage."""
    return Path(shutil.copytree(out, tmp_path / "copied"))


def test_own_files_are_read_where_they_are_and_named_by_their_site(study: Study, tmp_path: Path) -> None:
    own = own_study(study.schema_path, study.files)
    assert list(own.hospitals.tables) == list(study.hospitals.tables)
    assert own.hospitals.test is None
    assert [Path(str(node["data-path"])) for node in own.node_configs(tmp_path)] == [
        path.resolve() for path in study.files
    ]


def test_two_files_of_one_hospital_and_a_single_hospital_are_refused(study: Study) -> None:
    with pytest.raises(ConfigError, match="two files are of the hospital 'site-01'"):
        own_study(study.schema_path, [study.files[0], study.files[0]])
    with pytest.raises(ConfigError, match="at least 2 hospitals"):
        check_study(own_study(study.schema_path, study.files[:1]))


def test_settings_are_one_flat_mapping_and_every_wrong_one_is_named() -> None:
    config = parse_config({"target-multiple": 2.0, "local-steps": 7, "seed": 3})
    assert (config.target_multiple, config.federation.local_steps, config.seed) == (2.0, 7, 3)
    assert parse_config(config.to_flat()) == config
    with pytest.raises(ConfigError, match="target_multiples: there is no such setting"):
        parse_config({"target_multiples": 2.0})
    with pytest.raises(ConfigError, match="target_multiple"):
        parse_config({"target_multiple": -1.0})


def test_a_private_run_states_its_guarantee_and_says_what_it_does_not_cover(study: Study, tmp_path: Path) -> None:
    private = {"dp": True, "dp_noise_multiplier": 1.5, "dp_sample_rate": 0.2, "dp_score_epsilon": 0.5}
    places = Places(out=tmp_path / "run", num_workers=1, verbose=False)
    results = run_experiment(study, parse_config(SETTINGS | private), places)
    (privacy,) = results.privacy
    assert privacy.site == ", ".join(results.run.sites)
    assert privacy.epsilon is not None
    assert 1 < privacy.epsilon == privacy.epsilon_run < 20
    assert [round_.loss for round_ in results.history] == [None, None]
    card = (places.out / "model" / "card.md").read_text(encoding="utf-8")
    page = (places.out / "report.html").read_text(encoding="utf-8")
    for text in (card, page):
        assert privacy.statement in text.replace("&#39;", "'")
        assert "No privacy claim" not in text
    assert "of the model and its rows, not of this report" in page


def test_what_the_model_gives_away_stands_in_results_card_and_report(out: Path) -> None:
    results = RunResults.read(out / "results.json")
    everyone = {row.attack: row.auc for row in results.attacks if row.subset == "everyone"}
    assert {"loss", "density ratio"} <= {attack for attack, auc in everyone.items() if auc is not None}
    assert all(low <= value <= high for value, low, high in filter(None, everyone.values()))
    assert "Membership attacks by patient" in (out / "model" / "card.md").read_text(encoding="utf-8")
    assert "Who was in the training?" in (out / "report.html").read_text(encoding="utf-8")


def test_a_run_without_privacy_says_nothing_of_it(out: Path) -> None:
    for name in ("model/card.md", "report.html"):
        text = (out / name).read_text(encoding="utf-8")
        assert "No privacy claim is made" in text
        assert not re.search("differential(ly)? priva", text)


@pytest.mark.slow
def test_an_experiment_with_the_marginal_generator_has_the_same_parts_and_goes_on(study: Study, tmp_path: Path) -> None:
    counted = {"generator": "marginal", "dp": True, "dp_epsilon": 20.0, "dp_noise": "shared", "dp_noise_seed": 3}
    settings = parse_config(SETTINGS | counted | {"local_models": False})
    run_experiment(study, settings, Places(out=tmp_path, num_workers=1, verbose=False))
    assert isinstance(load_generator(tmp_path / "model"), MarginalGenerator)
    assert "the model is no network: it has no loss" in (tmp_path / "model" / "card.md").read_text(encoding="utf-8")
    first = (tmp_path / "synthetic.csv").read_bytes()
    (tmp_path / "results.json").unlink()
    run_experiment(study, settings, Places(out=tmp_path, num_workers=1, verbose=False, resume=True))
    assert (tmp_path / "synthetic.csv").read_bytes() == first
    assert (tmp_path / "report.html").exists()
