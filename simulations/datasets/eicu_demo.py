"""eICU-CRD demo 2.0.1 (doi 10.13026/4mxk-na84): intensive-care stays at 186 US hospitals, 2014 and 2015.

The 186 hospitals have 10 to 40 stays each, so the region is the site. The worst values of the first day (the APACHE IV
inputs) are the features, death in hospital is the target. ODbL 1.0: a published database derived from this one stays
under it.
"""

import pandas as pd

from mcrage.data.schema import Column, TableSchema
from simulations.datasets.files import SourceFile, content
from simulations.datasets.table import PublicTable, texts, typed

_PAGE = "https://physionet.org/content/eicu-crd-demo/2.0.1/"
_CHECKSUMS = {
    "patient": "2ba8fc9b193cb26b74188362ab76f7a4b69a5094ac62a080595fa844d7f0f3a0",
    "apacheApsVar": "be3eca4352c898c1e6c8f3482a9e1d81229614db7f3e8ac8d35523dd592e8107",
    "hospital": "19512f8e5c0625d3bf398b6583877f7e72692f5dedb83dee2e6e8214abbe58ec",
}
_REGIONS = ("Midwest", "Northeast", "South", "West", "Unstated")
_UNITS = ("CCU-CTICU", "CSICU", "CTICU", "Cardiac ICU", "MICU", "Med-Surg ICU", "Neuro ICU", "SICU")
_SOURCES = (
    "Acute Care/Floor", "Chest Pain Center", "Direct Admit", "Emergency Department", "Floor", "ICU", "ICU to SDU",
    "Operating Room", "Other Hospital", "Other ICU", "PACU", "Recovery Room", "Step-Down Unit (SDU)",
)  # fmt: skip
_ETHNICITIES = ("African American", "Asian", "Caucasian", "Hispanic", "Native American", "Other/Unknown")
_MISSING = ("", "-1")
"""The APACHE tables write -1 for what was not measured."""


def _yes_no(name: str, description: str) -> Column:
    return Column(name=name, kind="boolean", missing_codes=_MISSING, description=description)


def _score(name: str, highest: int) -> Column:
    levels = tuple(str(score) for score in range(1, highest + 1))
    return Column(
        name=name, kind="ordinal", categories=levels, missing_codes=_MISSING, description="Glasgow Coma Scale"
    )


def _measured(name: str, unit: str, low: float, high: float, *, skewed: bool = False) -> Column:
    return Column(
        name=name,
        kind="continuous",
        unit=unit,
        minimum=low,
        maximum=high,
        decimals=4,
        scale="log" if skewed else "linear",
        missing_codes=_MISSING,
    )


SCHEMA = TableSchema(
    name="eicu-demo",
    columns=(
        Column(name="uniquepid", kind="text", role="patient_id", nullable=False),
        Column(name="region", kind="categorical", role="site", categories=_REGIONS, nullable=False),
        Column(
            name="age", kind="integer", role="sensitive", unit="years", minimum=0, maximum=90, bins=(45, 65, 80),
            description="90 stands for all ages above 89",
        ),
        Column(name="gender", kind="categorical", role="sensitive", categories=("Female", "Male")),
        Column(name="ethnicity", kind="categorical", role="sensitive", categories=_ETHNICITIES),
        Column(name="unittype", kind="categorical", categories=_UNITS),
        Column(name="unitadmitsource", kind="categorical", categories=_SOURCES, other="Other"),
        _yes_no("intubated", "at the time of the worst blood gas"),
        _yes_no("vent", "ventilated at the time of the worst respiratory rate"),
        _yes_no("dialysis", "before admission"),
        _yes_no("meds", "coma score not possible because of sedation"),
        _score("eyes", 4),
        _score("motor", 6),
        _score("verbal", 5),
        _measured("urine", "mL/day", 0, 50_000, skewed=True),
        _measured("wbc", "10^9/L", 0, 500, skewed=True),
        _measured("temperature", "°C", 15, 45),
        _measured("respiratoryrate", "1/min", 0, 120),
        _measured("sodium", "mmol/L", 80, 220),
        _measured("heartrate", "1/min", 0, 300),
        _measured("meanbp", "mmHg", 0, 300),
        _measured("ph", "", 6, 8),
        _measured("hematocrit", "%", 3, 75),
        _measured("creatinine", "mg/dL", 0, 50, skewed=True),
        _measured("albumin", "g/dL", 0, 9),
        _measured("pao2", "mmHg", 10, 800, skewed=True),
        _measured("pco2", "mmHg", 3, 250, skewed=True),
        _measured("bun", "mg/dL", 0, 400, skewed=True),
        _measured("glucose", "mg/dL", 0, 3000, skewed=True),
        _measured("bilirubin", "mg/dL", 0, 100, skewed=True),
        _measured("fio2", "%", 20, 100),
        Column(
            name="hospitaldischargestatus", kind="categorical", role="target", categories=("Alive", "Expired"),
            nullable=False,
        ),
    ),
)  # fmt: skip


def load() -> PublicTable:
    """Stays with first-day values and a known outcome; a patient may have several."""
    patient, values, hospital = (_texts(name) for name in _CHECKSUMS)
    stays = patient.merge(values, on="patientunitstayid").merge(hospital, on="hospitalid", how="left")
    stays = stays[stays["hospitaldischargestatus"] != ""].reset_index(drop=True)
    stays["region"] = stays["region"].replace({"": "Unstated"})
    stays["age"] = stays["age"].replace({"> 89": "90"})
    return PublicTable(
        name="eicu-demo",
        schema=SCHEMA,
        table=typed(stays, SCHEMA),
        licence="ODbL 1.0",
        credit="Johnson, Pollard, Badawi, Raffa (2021), PhysioNet; Goldberger et al., Circulation 2000, 101, e215",
    )


def _texts(name: str) -> pd.DataFrame:
    source = SourceFile(
        dataset="eicu-demo",
        name=f"{name}.csv",
        sha256=_CHECKSUMS[name],
        address=f"https://physionet.org/files/eicu-crd-demo/2.0.1/{name}.csv.gz",
        page=_PAGE,
    )
    return texts(content(source))
