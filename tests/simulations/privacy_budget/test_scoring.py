"""Figures by group over hospitals: of whom they are, and which groups are too small to have any."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mcrage.data.schema import TableSchema
from mcrage.evaluation.downstream import events, train_and_score
from simulations.arms import SiteTables
from simulations.privacy_budget.scoring import ACTED_ON, LEAST, Scorer
from simulations.sites import Hospitals, read_sites
from simulations.study import Study


@pytest.fixture(scope="module")
def sites(site_dir: Path) -> list[SiteTables]:
    tables = read_sites(site_dir).tables
    return [SiteTables(site=site, train=table[:60], test=table[60:]) for site, table in tables.items()]


def scorer_of(sites: list[SiteTables], schema: TableSchema, test: pd.DataFrame | None) -> Scorer:
    hospitals = Hospitals(schema, {tables.site: tables.train for tables in sites}, test)
    study = Study(dataset="tiny", hospitals=hospitals, files=[Path()] * len(sites), schema_path=Path())
    return Scorer(study, sites, seed=0)


def found(scorer: Scorer, train: pd.DataFrame | None = None) -> dict[tuple[str, str], float]:
    values = scorer.values(lambda tables: tables.train if train is None else train)
    return {(each.group, each.metric): each.value for each in values}


def test_figures_are_means_over_hospitals_of_the_common_test_set(
    sites: list[SiteTables], tiny_schema: TableSchema
) -> None:
    test = pd.concat([tables.test for tables in sites], ignore_index=True)
    values = found(scorer_of(sites, tiny_schema, test))
    by_hand = []
    for tables in sites:
        scores = train_and_score(tables.train, test, tiny_schema, model="logistic_regression").scores
        by_hand.append([roc_auc_score(events(test, tiny_schema)[part], scores[part]) for part in _parts(test)])
    for place, group in enumerate(("all", "sex=F", "sex=M")):
        assert values[group, "auroc"] == pytest.approx(np.mean(by_hand, axis=0)[place])
    assert values["sex", "auroc_gap"] == pytest.approx(abs(values["sex=F", "auroc"] - values["sex=M", "auroc"]))


def _parts(test: pd.DataFrame) -> list[np.ndarray]:
    is_female = (test["sex"] == "F").to_numpy()
    return [np.ones(len(test), dtype=bool), is_female, ~is_female]


def test_a_true_positive_rate_does_not_depend_on_the_level_of_the_scores(
    sites: list[SiteTables], tiny_schema: TableSchema
) -> None:
    test = pd.concat([tables.test for tables in sites], ignore_index=True)
    scorer = scorer_of(sites, tiny_schema, test)
    train = sites[0].train
    event = events(train, tiny_schema)
    many = pd.concat([train, *[train[event]] * 4], ignore_index=True)  # another prevalence, nearly the same ranks
    plain, shifted = found(scorer, train), found(scorer, many)
    assert shifted["all", "tpr"] == pytest.approx(plain["all", "tpr"], abs=0.1)
    assert plain["all", "tpr"] <= ACTED_ON / events(test, tiny_schema).mean() + 0.01


def test_a_group_with_few_test_patients_of_either_outcome_has_no_figures(
    sites: list[SiteTables], tiny_schema: TableSchema
) -> None:
    test = pd.concat([tables.test for tables in sites], ignore_index=True)
    event, is_female = events(test, tiny_schema), (test["sex"] == "F").to_numpy()
    enough = np.flatnonzero(event & is_female)[:LEAST]
    for kept, shown in ((enough, True), (enough[:-1], False)):
        part = test.iloc[np.sort(np.concatenate([kept, np.flatnonzero(~event | ~is_female)]))].reset_index(drop=True)
        values = found(scorer_of(sites, tiny_schema, part))
        assert (("sex=F", "auroc") in values) == shown
        assert (("sex", "auroc_gap") in values) == shown
        assert ("sex=M", "auroc") in values


def test_without_a_common_test_set_each_hospital_is_tested_on_its_own(
    sites: list[SiteTables], tiny_schema: TableSchema
) -> None:
    values = found(scorer_of(sites, tiny_schema, None))
    pairs = ranked = 0.0
    for tables in sites:
        scores = train_and_score(tables.train, tables.test, tiny_schema, model="logistic_regression").scores
        event = events(tables.test, tiny_schema)
        pairs += event.sum() * (~event).sum()
        ranked += roc_auc_score(event, scores) * event.sum() * (~event).sum()
    assert values["all", "auroc"] == pytest.approx(ranked / pairs)


def test_a_hospital_whose_rows_are_of_one_class_counts_nowhere(
    sites: list[SiteTables], tiny_schema: TableSchema
) -> None:
    one = sites[0].train[~events(sites[0].train, tiny_schema)].reset_index(drop=True)
    left = [SiteTables(site=sites[0].site, train=one, test=sites[0].test), *sites[1:]]
    test = sites[2].test.reset_index(drop=True)
    with_it, without = (found(scorer_of(part, tiny_schema, test)) for part in (left, sites[1:]))
    assert with_it == pytest.approx(without)


def test_sizes_are_shares_of_all_training_rows_and_test_patients_counted_once(
    sites: list[SiteTables], tiny_schema: TableSchema
) -> None:
    test = sites[2].test.reset_index(drop=True)
    sizes = {(each.group, each.metric): each.value for each in scorer_of(sites, tiny_schema, test).sizes()}
    assert sizes["all", "test_rows"] == len(test)
    assert sizes["all", "train_share"] == 1
    assert sizes["sex=F", "train_share"] + sizes["sex=M", "train_share"] == pytest.approx(1)
