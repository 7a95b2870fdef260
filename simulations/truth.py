"""The truth of the simulated cohort: its data dictionary, who carries which marker, and what each finding does.

Numbers are rounded from the literature cited beside them; the cohort is a test bench, not a source of clinical
knowledge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage import rng
from mcrage.data.schema import Column, TableSchema

Floats = NDArray[np.float64]

MINORITY = "Black"
RACES = ("White", "Hispanic", "Asian", MINORITY)
INSURANCES = ("Medicare", "Medicaid", "Private", "Uninsured")
SKIN_TONES = tuple(str(tone) for tone in range(1, 11))
TARGET = "deteriorated"

SCHEMA = TableSchema(
    name="simulated-cohort",
    columns=(
        Column(name="patient_id", kind="text", role="patient_id", nullable=False),
        Column(name="hospital", kind="text", role="site", nullable=False),
        Column(name="admitted", kind="date", minimum="2019-01-01", maximum="2024-12-31", nullable=False),
        Column(
            name="age", kind="integer", role="sensitive", unit="years", minimum=18, maximum=100,
            bins=(45, 65, 80), nullable=False,
        ),
        Column(name="sex", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False),
        Column(name="race", kind="categorical", role="sensitive", categories=RACES, nullable=False),
        Column(name="insurance", kind="categorical", categories=INSURANCES),
        Column(
            name="frailty", kind="ordinal", categories=tuple(str(score) for score in range(1, 10)),
            missing_codes=("", "NA", "not assessed"), description="Clinical Frailty Scale, 1 (very fit) to 9",
        ),
        Column(
            name="skin_tone", kind="ordinal", categories=SKIN_TONES,
            description="Monk Skin Tone scale, 1 lightest to 10 darkest, noted where a pulse oximeter is fitted",
        ),
        Column(name="spo2", kind="integer", unit="%", minimum=60, maximum=100, description="pulse oximetry"),
        Column(name="respiratory_rate", kind="integer", unit="1/min", minimum=6, maximum=60),
        Column(name="lactate", kind="continuous", unit="mmol/L", minimum=0.2, maximum=20, decimals=1, scale="log"),
        Column(name="creatinine", kind="continuous", unit="mg/dL", minimum=0.3, maximum=15, decimals=2, scale="log"),
        Column(
            name="neutrophils", kind="continuous", unit="10^9/L", minimum=0.1, maximum=60, decimals=1, scale="log",
        ),
        Column(
            name="apol1_alleles", kind="ordinal", categories=("0", "1", "2"),
            missing_codes=("", "NA", "not genotyped"), description="number of APOL1 risk alleles (G1 or G2)",
        ),
        Column(name="duffy_null", kind="boolean", description="Fy(a-b-) red cells (ACKR1)"),
        Column(name="g6pd", kind="continuous", unit="U/g Hb", minimum=0, maximum=16, decimals=1),
        Column(name=TARGET, kind="boolean", role="target", categories=("no", "yes"), nullable=False),
    ),
)  # fmt: skip
"""The cohort's data dictionary, public bounds included."""

# Carrier frequencies by race. APOL1: the risk alleles rose in West Africa, where they protect from trypanosomes
# (Genovese 2010); about a quarter of African Americans with kidney disease carry two (Parsa 2013), hence .5; a few
# Hispanic patients have West African ancestry. Duffy-null: two in three African Americans (Reich 2009). G6PD: share of
# deficient X chromosomes, 12 % of African American and 4 % of Asian men (Chinevere 2006).
APOL1 = {"White": 0.0, "Hispanic": 0.04, "Asian": 0.0, MINORITY: 0.50}
DUFFY_NULL = {"White": 0.001, "Hispanic": 0.04, "Asian": 0.0, MINORITY: 0.65}
G6PD_DEFICIENT = {"White": 0.002, "Hispanic": 0.01, "Asian": 0.03, MINORITY: 0.12}

LAST_LIGHT_TONE = 6
"""Oximeters were calibrated on light skin; up to this tone their error is small (Sjoding 2020)."""


@dataclass(frozen=True)
class Effect:
    """What one unit of a finding adds to the log-odds of deterioration.

    Attributes:
        log_odds: In most patients.
        in_minority: Factor of it in Black patients.
    """

    log_odds: float
    in_minority: float = 1.0


@dataclass(frozen=True)
class Truth:
    """How the outcome depends on a row, and who carries the markers.

    Attributes:
        effects: By finding; see :func:`findings` for their units.
        apol1, duffy_null, g6pd_deficient: Carrier frequencies by race.
        prevalence: Share of patients who deteriorate at an average hospital.
    """

    effects: Mapping[str, Effect]
    apol1: Mapping[str, float]
    duffy_null: Mapping[str, float]
    g6pd_deficient: Mapping[str, float]
    prevalence: float = 0.22


PUBLISHED = Truth(
    effects=MappingProxyType({
        # Ten years of age. Kidney disease of Black patients is more often of one cause (APOL1) than of age itself.
        "age": Effect(0.25, 0.6),
        # Men with infections fare slightly worse at every age.
        "male": Effect(0.15),
        # One point of the frailty scale (Rockwood 2005). It was made for older people and says less about younger ones,
        # as most Black patients here are.
        "frailty": Effect(0.25, 0.7),
        # One point of saturation below 96 %. In dark skin the reading carries more error, so each point says less.
        "desaturation": Effect(0.14, 0.6),
        # Five breaths a minute; counted by a nurse, whatever the skin.
        "tachypnoea": Effect(0.35),
        # A doubling of lactate.
        "lactate": Effect(0.55),
        # A doubling of creatinine. It reads higher at the same filtration in Black patients (Levey 1999) and
        # depends more on what is not filtration.
        "creatinine": Effect(0.60, 0.6),
        # A doubling of neutrophils.
        "neutrophils": Effect(0.35, 1.3),
        # No or public insurance: admitted later in the course.
        "uninsured": Effect(0.30),
        "medicaid": Effect(0.15),
        # A calendar year: sepsis mortality has fallen slowly.
        "year": Effect(-0.06),
        # Two APOL1 risk alleles, a recessive trait: the kidney collapses under interferon in infections (collapsing
        # glomerulopathy; odds ratios of 17 for focal sclerosis and 29 for HIV nephropathy: Kopp 2011).
        "apol1_high_risk": Effect(2.0),
        # One tone above the last light one: the oximeter hides hypoxaemia, and oxygen, steroids and transfer come
        # late (Sjoding 2020, Fawzy 2022).
        "dark_tone": Effect(0.40),
        # Duffy-null: the same neutrophil count is a greater rise above the patient's own normal, and red cells clear
        # fewer chemokines (worse acute lung injury: Kangelaris 2012).
        "duffy_null": Effect(0.70),
        # One tenth of normal G6PD activity lost below 70 %: haemolysis under the oxidative stress of infection and of
        # its drugs, and haem injures the kidney.
        "g6pd_lost": Effect(0.30),
    }),
    apol1=MappingProxyType(APOL1),
    duffy_null=MappingProxyType(DUFFY_NULL),
    g6pd_deficient=MappingProxyType(G6PD_DEFICIENT),
)  # fmt: skip
MARKERS = ("apol1_high_risk", "dark_tone", "duffy_null", "g6pd_lost")
"""Findings that hardly occur outside the minority."""


def redrawn(rule_seed: int) -> Truth:
    """Another plausible truth: effects within ±35 %, the minority's factors and the carrier frequencies anew."""
    draw = rng.stream(rule_seed, "cohort", "rule")
    effects = {}
    for name, effect in PUBLISHED.effects.items():
        factor = 1.0 if name in MARKERS else draw.uniform(0.2, 1.4)
        effects[name] = Effect(effect.log_odds * draw.uniform(0.65, 1.35), factor)
    apol1, duffy_null, g6pd_deficient = (
        {race: share * scale for race, share in carriers.items()}
        for carriers, scale in zip((APOL1, DUFFY_NULL, G6PD_DEFICIENT), draw.uniform(0.8, 1.25, size=3), strict=True)
    )
    return Truth(
        effects=effects,
        apol1=apol1,
        duffy_null=duffy_null,
        g6pd_deficient=g6pd_deficient,
        prevalence=draw.uniform(0.17, 0.28),
    )


def findings(table: pd.DataFrame) -> dict[str, Floats]:
    """What the risk depends on, from a table as charted; a missing cell is unremarkable and gives 0."""
    number = {name: floats(table[name]) for name in ("age", "spo2", "respiratory_rate", "g6pd", "frailty")}
    doublings = {name: np.log2(floats(table[name])) for name in ("lactate", "creatinine", "neutrophils")}
    years = (table["admitted"] - pd.Timestamp("2022-01-01")).dt.days.to_numpy(dtype=np.float64) / 365.25
    raw = {
        "age": (number["age"] - 65) / 10,
        "male": matches(table["sex"], "M"),
        "frailty": number["frailty"] - 4,
        "desaturation": 96 - number["spo2"],
        "tachypnoea": (number["respiratory_rate"] - 20) / 5,
        "lactate": doublings["lactate"] - np.log2(1.5),
        "creatinine": doublings["creatinine"] - np.log2(2.0),
        "neutrophils": doublings["neutrophils"] - np.log2(8.0),
        "uninsured": matches(table["insurance"], "Uninsured"),
        "medicaid": matches(table["insurance"], "Medicaid"),
        "year": years,
        "apol1_high_risk": matches(table["apol1_alleles"], "2"),
        "dark_tone": np.maximum(floats(table["skin_tone"]) - LAST_LIGHT_TONE, 0),
        "duffy_null": matches(table["duffy_null"], True),
        # Normal activity is about 8.5 U/g Hb; above 70 % of it nobody haemolyses.
        "g6pd_lost": np.maximum(7 - 10 * number["g6pd"] / 8.5, 0),
    }
    return {name: np.nan_to_num(values) for name, values in raw.items()}


def floats(values: "pd.Series[Any]") -> Floats:
    """A column of numbers, or of levels written as numbers, as float64 with NaN for missing."""
    numeric = pd.to_numeric(values.astype(object))
    return np.asarray(numeric.to_numpy(dtype=np.float64, na_value=np.nan), dtype=np.float64)


def matches(values: "pd.Series[Any]", level: object) -> Floats:
    """1 where a cell is this level, 0 where it is another or missing."""
    return np.asarray(values.astype(object) == level, dtype=np.float64)
