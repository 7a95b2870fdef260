"""Public data sets by name, as tables and as pretend hospitals."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mcrage import rng
from mcrage.data.groups import group_labels
from mcrage.errors import ConfigError
from simulations import partition
from simulations.datasets import diabetes130, eicu_demo, heart_disease, heart_failure, patient_treatment
from simulations.datasets.files import DatasetUnavailableError
from simulations.datasets.table import PublicTable
from simulations.sites import Hospitals

__all__ = ["DatasetUnavailableError", "PublicTable", "deal", "hospitals", "load", "names"]

_LOADERS = {
    "heart-disease": heart_disease.load,
    "diabetes130": diabetes130.load,
    "eicu-demo": eicu_demo.load,
    "heart-failure": heart_failure.load,
    "patient-treatment": patient_treatment.load,
}


@dataclass(frozen=True, kw_only=True)
class _Deal:
    """How a data set without hospitals is dealt to pretend ones.

    Attributes:
        by: Columns whose mix differs between hospitals.
        alpha: Concentration of the mixes around the overall one: the smaller, the more they differ.
        num_sites, patients_per_site: Default number and size of hospitals.
        test_rows: Most rows of the common test set; 0 for none.
    """

    by: tuple[str, ...]
    alpha: float
    num_sites: int
    patients_per_site: int
    test_rows: int = 0


_DEALS = {
    "diabetes130": _Deal(by=("race",), alpha=20.0, num_sites=10, patients_per_site=1000, test_rows=30_000),
    "heart-failure": _Deal(by=("sex",), alpha=10.0, num_sites=3, patients_per_site=99),
    "patient-treatment": _Deal(by=("AGE", "SEX"), alpha=10.0, num_sites=5, patients_per_site=600, test_rows=1_400),
}


def names() -> tuple[str, ...]:
    """Names of the data sets."""
    return tuple(_LOADERS)


def load(name: str) -> PublicTable:
    """A data set as one table; one row per patient where it has several stays of a patient and no hospitals.

    Raises:
        ConfigError: If there is no data set of this name.
        DatasetUnavailableError: If it is not here and cannot be fetched.
    """
    if name not in _LOADERS:
        raise ConfigError(f"there is no data set '{name}'; there are {', '.join(names())}")
    return _LOADERS[name]()


def hospitals(
    name: str, *, seed: int = 0, num_sites: int | None = None, patients_per_site: int | None = None
) -> Hospitals:
    """A data set as hospitals; :func:`load` and then :func:`deal`."""
    return deal(load(name), seed=seed, num_sites=num_sites, patients_per_site=patients_per_site)


def deal(
    public: PublicTable, *, seed: int = 0, num_sites: int | None = None, patients_per_site: int | None = None
) -> Hospitals:
    """A data set's own hospitals where it has them, pretend ones of different case mix elsewhere.

    Args:
        public: The data set, with one row per patient where it has no hospitals.
        seed: Deals patients to pretend hospitals.
        num_sites, patients_per_site: Number and size of pretend hospitals; None takes the data set's default.

    Raises:
        ConfigError: If a data set with real hospitals is to be dealt, or has too few patients.
    """
    if public.schema.site is not None:
        if num_sites is not None or patients_per_site is not None:
            raise ConfigError(f"'{public.name}' has hospitals of its own; leave num_sites and patients_per_site out")
        rows = partition.by_column(public.table[public.schema.site.name])
        return Hospitals(public.schema, {site: _take(public, part) for site, part in rows.items()})
    patient_id = public.schema.patient_id
    if patient_id is not None and public.table[patient_id.name].duplicated().any():
        raise ConfigError(
            f"'{public.name}' has several rows of a patient; deal one per patient, or split it by patient"
        )
    rules = _DEALS[public.name]
    sizes = [patients_per_site or rules.patients_per_site] * (num_sites or rules.num_sites)
    columns = tuple(public.schema.column(column) for column in rules.by)
    groups = group_labels(public.table, columns).agg(", ".join, axis=1)
    parts = partition.dirichlet_mix(groups, sizes, alpha=rules.alpha, generator=rng.stream(seed, "deal", public.name))
    tables = {f"site-{number:02d}": _take(public, part) for number, part in enumerate(parts, start=1)}
    rest = np.setdiff1d(np.arange(len(public.table)), np.concatenate(parts))
    drawn = rng.stream(seed, "deal", public.name, "test").permutation(rest)[: rules.test_rows]
    return Hospitals(public.schema, tables, _take(public, np.sort(drawn)) if len(drawn) else None)


def _take(public: PublicTable, rows: partition.Rows) -> pd.DataFrame:
    return public.table.iloc[rows].reset_index(drop=True)
