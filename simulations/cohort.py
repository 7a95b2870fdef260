"""A simulated cohort of several hospitals whose truth is known: the data set that every demonstration starts from.

The patients are adults with chronic kidney disease who are admitted with an acute infection; the target is
deterioration within seven days (intensive care, new dialysis or death). Black patients are about 3 % of each hospital,
and what drives their risk is partly different:

* markers that hardly occur in anybody else carry much of it: two APOL1 risk alleles, the Duffy-null phenotype,
  G6PD deficiency, and skin so dark that a pulse oximeter reads too high;
* what drives the risk of everybody else says less about theirs (creatinine, oxygen saturation, age, frailty).

About 21 such patients at a hospital do not teach this; those of all hospitals together do.

The outcome is drawn from the row *as charted*: a result that nobody ordered counts as unremarkable. So
:meth:`Cohort.true_risk` is exact for every row, missing cells included, and no model can rank better than it does.
Hospitals differ in case mix and in what they chart, never in the rule. Numbers are rounded from the literature cited
beside them; the cohort is a test bench, not a source of clinical knowledge.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from mcrage import rng
from mcrage.data.groups import Group
from mcrage.data.schema import Column
from mcrage.errors import ConfigError
from simulations.sites import Hospitals
from simulations.truth import (
    LAST_LIGHT_TONE,
    MINORITY,
    PUBLISHED,
    RACES,
    SCHEMA,
    TARGET,
    Floats,
    Truth,
    findings,
    floats,
    matches,
    redrawn,
)

# Share of the other patients by race: about the adults of the Upper Midwest and of northern New England, where Black
# patients are a few in a hundred at every hospital (US Census 2020).
OTHER_RACES = {"White": 0.80, "Hispanic": 0.12, "Asian": 0.08}

# Years by which the mean age differs from White patients'. Chronic kidney disease starts about ten years earlier in
# Black and some years earlier in Hispanic adults (USRDS 2022).
AGE_SHIFT = {"White": 0.0, "Hispanic": -6.0, "Asian": -2.0, MINORITY: -10.0}

# Weights of Monk skin tones 1 to 10 (self-reported race against tone: Monk 2023; all races overlap).
TONES = {
    "White": (0.15, 0.35, 0.30, 0.15, 0.05, 0, 0, 0, 0, 0),
    "Asian": (0.02, 0.15, 0.35, 0.33, 0.13, 0.02, 0, 0, 0, 0),
    "Hispanic": (0.01, 0.09, 0.25, 0.35, 0.24, 0.05, 0.01, 0, 0, 0),
    MINORITY: (0, 0, 0, 0.02, 0.10, 0.18, 0.24, 0.22, 0.15, 0.09),
}
# Points of SpO2 that an oximeter reads too high per tone above the last light one: two to three points in the darkest
# skin (Sjoding 2020, Fawzy 2022).
SPO2_BIAS_PER_TONE = 0.5

# Factor of the neutrophil count in Duffy-null patients: healthy adults have 2.8 instead of 4.2 (Reich 2009).
DUFFY_NEUTROPHILS = 0.67

# Mean charting rates. Vital signs are nearly complete, lactate is ordered on suspicion, frailty is scored by the
# geriatric team, genotypes come from the hospital's pre-emptive panel and stand or lack together.
CHARTED = {
    "insurance": 0.97, "frailty": 0.85, "skin_tone": 0.90, "spo2": 0.98, "respiratory_rate": 0.96,
    "lactate": 0.75, "creatinine": 0.97, "neutrophils": 0.95, "panel": 0.88,
}  # fmt: skip
PANEL = ("apol1_alleles", "duffy_null", "g6pd")

# Factor of the charting rate in Black patients: fewer are enrolled in genotyping programmes, and they wait longer, so
# that early orders such as lactate are missed more often.
CHARTED_IN_MINORITY = {"lactate": 0.80, "panel": 0.92, "frailty": 0.92}


@dataclass(frozen=True, kw_only=True)
class CohortConfig:
    """Size and seeds of a cohort.

    Attributes:
        num_sites: Number of hospitals.
        patients_per_site: Patients of each.
        minority_share: Mean share of Black patients; hospitals vary by a third around it.
        encounters_per_patient: Mean number of admissions of a patient, a row each; 1 gives every patient one.
        seed: Draws the hospitals and their patients.
        rule_seed: Draws another truth: effects, the minority's rule and carrier frequencies, within plausible ranges.
            None keeps the published one.
    """

    num_sites: int = 8
    patients_per_site: int = 700
    minority_share: float = 0.03
    encounters_per_patient: float = 1.0
    seed: int = 0
    rule_seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "num_sites": (1, 10_000), "patients_per_site": (1, 10_000_000),
            "minority_share": (0.0, 0.5), "encounters_per_patient": (1.0, 100.0),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low:,} to {high:,}, not {getattr(self, name):,}")


@dataclass(frozen=True)
class _Hospital:
    """Case mix and charting of one hospital."""

    name: str
    races: Mapping[str, float]
    age: float
    severity: float
    uninsured: float
    charted: Mapping[str, float]


class Cohort:
    """Hospitals, their tables and the truth behind them.

    Rows of one hospital depend on its number and the seed alone: adding a hospital changes no other's.

    Attributes:
        config: Size and seeds.
        schema: The data dictionary.
        truth: How the outcome depends on a row.
        site_names: ``site-01`` and so on.
    """

    def __init__(self, config: CohortConfig | None = None) -> None:
        self.config = config or CohortConfig()
        self.schema = SCHEMA
        self.truth = PUBLISHED if self.config.rule_seed is None else redrawn(self.config.rule_seed)
        self.site_names = tuple(f"site-{site + 1:02d}" for site in range(self.config.num_sites))
        self._intercept = 0.0  # the first rows are drawn to find it
        self._intercept = self._calibrated()

    def site_table(self, site: int) -> pd.DataFrame:
        """The table of one hospital, numbered from 0: one row per admission."""
        draw = rng.stream(self.config.seed, "cohort", "site", site)
        return self._rows(self.config.patients_per_site, self._hospital(site), draw, prefix=f"s{site + 1:02d}")

    def fresh(
        self, num_patients: int, *, site: int | None = None, races: Mapping[str, float] | None = None
    ) -> pd.DataFrame:
        """New patients of the same truth, for testing: none of them is in a site's table, and each call draws the same.

        Args:
            num_patients: Number of patients.
            site: The hospital they come from; None takes equally many from each.
            races: Shares by race instead of the hospitals' own, such as ``{"Black": 0.5, "White": 0.5}``.
        """
        sites = range(self.config.num_sites) if site is None else [site]
        shares = [len(part) for part in np.array_split(np.arange(num_patients), len(sites))]
        tables = []
        for number, share in zip(sites, shares, strict=True):
            hospital = self._hospital(number)
            if races is not None:
                hospital = replace(hospital, races={race: races.get(race, 0.0) for race in RACES})
            draw = rng.stream(self.config.seed, "cohort", "fresh", number)
            tables.append(self._rows(share, hospital, draw, prefix=f"t{number + 1:02d}"))
        return pd.concat(tables, ignore_index=True)

    def true_risk(self, table: pd.DataFrame) -> Floats:
        """Probability of deterioration of every row, exactly; shape (rows,)."""
        minority = matches(table["race"], MINORITY)
        log_odds = np.full(len(table), self._intercept)
        for name, values in findings(table).items():
            effect = self.truth.effects[name]
            log_odds += effect.log_odds * np.where(minority == 1, effect.in_minority, 1.0) * values
        risk: Floats = 1 / (1 + np.exp(-log_odds))
        return risk

    def coefficients(self, *, minority: bool) -> dict[str, float]:
        """Log odds per unit of each finding in the minority, or in everybody else; the intercept first."""
        effects = self.truth.effects.items()
        return {"intercept": self._intercept} | {
            name: effect.log_odds * (effect.in_minority if minority else 1.0) for name, effect in effects
        }

    def best_auroc(self, table: pd.DataFrame) -> dict[str, float]:
        """AUROC of the true risk on a table, by race and for all: no model can be expected to rank better.

        Groups in which everybody has the same outcome are left out.
        """
        outcome, risk = table[TARGET].to_numpy(dtype=bool), self.true_risk(table)
        groups = {"all": np.ones(len(table), dtype=bool)}
        groups |= {str(Group.of(race=race)): (table["race"] == race).to_numpy() for race in RACES}
        return {
            name: float(roc_auc_score(outcome[rows], risk[rows]))
            for name, rows in groups.items()
            if np.unique(outcome[rows]).size == 2
        }

    def hospitals(self, *, test_patients: int = 20_000, test_races: Mapping[str, float] | None = None) -> Hospitals:
        """All hospitals with a common test set of fresh patients, ready for :func:`simulations.sites.write_sites`.

        Args:
            test_patients: Size of the test set; 0 for none.
            test_races: Its shares by race; None for the hospitals' own.
        """
        tables = {name: self.site_table(site) for site, name in enumerate(self.site_names)}
        test = self.fresh(test_patients, races=test_races) if test_patients else None
        return Hospitals(self.schema, tables, test)

    def _hospital(self, site: int) -> _Hospital:
        draw = rng.stream(self.config.seed, "cohort", "hospital", site)
        minority = self.config.minority_share * draw.uniform(2 / 3, 4 / 3)
        # Concentration 20: shares of Hispanic patients from a few to thirty per cent, as between neighbouring towns.
        others = draw.dirichlet([20 * share for share in OTHER_RACES.values()]) * (1 - minority)
        # Concentration 30: a site's charting rate is a few points off the mean rate.
        charted = {name: draw.beta(30 * rate, 30 * (1 - rate)) for name, rate in CHARTED.items()}
        return _Hospital(
            name=f"site-{site + 1:02d}",
            races=dict(zip(OTHER_RACES, others, strict=True)) | {MINORITY: minority},
            age=draw.normal(68, 3),
            severity=draw.normal(0, 0.25),
            uninsured=draw.uniform(0.03, 0.15),
            charted=charted,
        )

    def _calibrated(self) -> float:
        """Intercept that gives the truth's prevalence at an average hospital, by bisection."""
        minority = {MINORITY: self.config.minority_share}
        races = {race: share * (1 - self.config.minority_share) for race, share in OTHER_RACES.items()} | minority
        average = _Hospital(name="average", races=races, age=68, severity=0, uninsured=0.09, charted=CHARTED)
        table = self._rows(20_000, average, rng.stream(0, "cohort", "average"), prefix="a")
        risk = self.true_risk(table)
        log_odds = np.log(risk / (1 - risk))
        low, high = -20.0, 20.0
        for _ in range(50):
            middle = (low + high) / 2
            too_many = np.mean(1 / (1 + np.exp(-log_odds - middle))) > self.truth.prevalence
            low, high = (low, middle) if too_many else (middle, high)
        return low

    def _rows(self, num_patients: int, hospital: _Hospital, draw: np.random.Generator, *, prefix: str) -> pd.DataFrame:
        people = _people(num_patients, hospital, self.truth, draw)
        people.insert(0, "patient_id", [f"{prefix}-{number:06d}" for number in range(num_patients)])
        visits = 1 + draw.poisson(self.config.encounters_per_patient - 1, size=num_patients)
        rows = _admitted(people.loc[np.repeat(people.index, visits)].reset_index(drop=True), hospital, draw)
        rows["hospital"] = hospital.name
        rows[TARGET] = False
        charted = _typed(_as_charted(rows, hospital, draw))
        charted[TARGET] = pd.array(draw.random(len(charted)) < self.true_risk(charted), dtype="boolean")
        return charted


def _people(count: int, hospital: _Hospital, truth: Truth, draw: np.random.Generator) -> pd.DataFrame:
    """What stays the same from one admission of a patient to the next."""
    shares = np.array([hospital.races[race] for race in RACES])
    race = draw.choice(RACES, size=count, p=shares / shares.sum())
    male = draw.random(count) < 0.54
    age = np.clip(np.round(draw.normal(hospital.age + _by(race, AGE_SHIFT), 13)), 18, 100)
    tones = np.cumsum([TONES[name] for name in RACES], axis=1)[[RACES.index(name) for name in race]]
    deficient = _by(race, truth.g6pd_deficient)
    # One X chromosome in men, two in women, of whom each cell uses one: heterozygous women are in between.
    copies = np.where(male, draw.binomial(1, deficient), draw.binomial(2, deficient) / 2)
    return pd.DataFrame(
        {
            "age": age,
            "sex": np.where(male, "M", "F"),
            "race": race,
            "insurance": _insurance(age, race, hospital, draw),
            "frailty": np.clip(np.round(draw.normal(4 + 0.05 * (age - 65), 1.4)), 1, 9),
            "skin_tone": 1 + (draw.random(count)[:, None] > tones[:, :-1]).sum(axis=1),
            "apol1_alleles": draw.binomial(2, _by(race, truth.apol1)),
            "duffy_null": draw.random(count) < _by(race, truth.duffy_null),
            # Deficient cells keep about 15 % of the normal activity (A- variant, WHO class III).
            "g6pd": draw.normal(8.7, 0.9, count) * (1 - 0.85 * copies),
        }
    )


def _insurance(age: Floats, race: NDArray[np.str_], hospital: _Hospital, draw: np.random.Generator) -> NDArray[np.str_]:
    """Medicare from 65 on; below it, uninsured and Medicaid are about twice as common in Black and Hispanic adults."""
    factor = np.where(np.isin(race, [MINORITY, "Hispanic"]), 2.0, 1.0)
    uniform = draw.random(len(age))
    uninsured, medicaid = hospital.uninsured * factor, 0.15 * factor
    under_65 = np.select([uniform < uninsured, uniform < uninsured + medicaid], ["Uninsured", "Medicaid"], "Private")
    return np.where((age >= 65) & (uniform < 0.93), "Medicare", under_65)


def _admitted(people: pd.DataFrame, hospital: _Hospital, draw: np.random.Generator) -> pd.DataFrame:
    """Findings at admission; ``severity`` of the infection, about standard normal, moves all of them together."""
    rows, count = people.copy(), len(people)
    admitted = SCHEMA.column("admitted")
    severity = draw.normal(hospital.severity, 1, count)
    rows["admitted"] = pd.to_datetime(draw.integers(int(admitted.low), int(admitted.high) + 1, count), unit="D")
    bias = SPO2_BIAS_PER_TONE * np.maximum(rows["skin_tone"] - LAST_LIGHT_TONE, 0)
    rows["spo2"] = draw.normal(95 - 1.5 * severity, 2) + bias
    rows["respiratory_rate"] = draw.normal(20 + 3 * severity, 3)
    rows["lactate"] = np.exp(draw.normal(np.log(1.5) + 0.3 * severity, 0.40))
    # Greater muscle mass of men and, as creatinine-based equations assumed, of Black patients.
    muscle = 0.15 * (rows["sex"] == "M") + 0.12 * (rows["race"] == MINORITY)
    rows["creatinine"] = np.exp(draw.normal(np.log(1.8) + 0.1 * severity + muscle, 0.45))
    usual = np.log(8.0) + 0.2 * severity + np.log(DUFFY_NEUTROPHILS) * rows["duffy_null"]
    rows["neutrophils"] = np.exp(draw.normal(usual, 0.40))
    return rows


def _as_charted(rows: pd.DataFrame, hospital: _Hospital, draw: np.random.Generator) -> pd.DataFrame:
    """The same rows without what nobody ordered or noted."""
    minority = (rows["race"] == MINORITY).to_numpy()
    charted = rows.copy()
    for name, rate in hospital.charted.items():
        rates = np.where(minority, rate * CHARTED_IN_MINORITY.get(name, 1.0), rate)
        absent = draw.random(len(rows)) >= rates
        for column in PANEL if name == "panel" else (name,):
            charted[column] = charted[column].astype(object).mask(absent)
    return charted


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows in the schema's order and dtypes, rounded and kept within its bounds as an information system does."""
    return pd.DataFrame({column.name: _typed_column(rows[column.name], column) for column in SCHEMA.columns})


def _typed_column(values: "pd.Series[Any]", column: Column) -> "pd.Series[Any]":
    dtype: Any = column.pandas_dtype
    if column.kind in ("continuous", "integer"):
        rounded = floats(values).round(column.decimals or 0)
        return pd.Series(np.clip(rounded, column.low, column.high), index=values.index).astype(dtype)
    if column.kind in ("categorical", "ordinal"):
        whole = column.kind == "ordinal"
        texts = values.map(lambda value: str(int(value)) if whole else str(value), na_action="ignore")
        return texts.astype(pd.CategoricalDtype([*column.categories], ordered=whole))
    return values.astype(dtype)


def _by(race: NDArray[np.str_], table: Mapping[str, float]) -> Floats:
    return np.array([table[name] for name in race], dtype=np.float64)
