"""UCI Heart Disease (doi 10.24432/C52P4X): angiographies at four hospitals in three countries, 1981 to 1987."""

import pandas as pd

from mcrage.data.schema import Column, TableSchema
from simulations.datasets.files import SourceFile, content
from simulations.datasets.table import PublicTable, texts, typed

_ADDRESS = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/"
_PAGE = "https://archive.ics.uci.edu/dataset/45/heart+disease"
_CHECKSUMS = {
    "cleveland": "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
    "hungarian": "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
    "switzerland": "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
    "va": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
}
HOSPITALS = {
    "cleveland": "Cleveland",
    "hungarian": "Hungarian",
    "switzerland": "Switzerland",
    "va": "VA Long Beach",
}
_HEADER = [
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal",
    "num",
]  # fmt: skip
_MISSING = ("", "?")
# Cholesterol is 0 in every Swiss row and in 49 of VA Long Beach, pressure in one: not measured.
_MISSING_OR_ZERO = ("", "?", "0", "0.0")

SCHEMA = TableSchema(
    name="heart-disease",
    columns=(
        Column(name="hospital", kind="categorical", role="site", categories=(*HOSPITALS.values(),), nullable=False),
        Column(
            name="age", kind="integer", role="sensitive", unit="years", minimum=18, maximum=100, bins=(45, 60),
            nullable=False,
        ),
        Column(name="sex", kind="categorical", role="sensitive", categories=("female", "male"), nullable=False),
        Column(
            name="cp", kind="categorical", missing_codes=_MISSING,
            categories=("typical angina", "atypical angina", "non-anginal pain", "asymptomatic"),
            description="chest pain",
        ),
        Column(
            name="trestbps", kind="integer", unit="mmHg", minimum=50, maximum=260, missing_codes=_MISSING_OR_ZERO,
            description="resting blood pressure",
        ),
        Column(
            name="chol", kind="integer", unit="mg/dl", minimum=50, maximum=800, missing_codes=_MISSING_OR_ZERO,
            description="serum cholesterol",
        ),
        Column(
            name="fbs", kind="boolean", missing_codes=_MISSING, description="fasting blood sugar above 120 mg/dl",
        ),
        Column(
            name="restecg", kind="categorical", missing_codes=_MISSING,
            categories=("normal", "ST-T abnormality", "left ventricular hypertrophy"),
        ),
        Column(
            name="thalach", kind="integer", unit="1/min", minimum=40, maximum=220, missing_codes=_MISSING,
            description="maximum heart rate achieved",
        ),
        Column(name="exang", kind="boolean", missing_codes=_MISSING, description="exercise-induced angina"),
        Column(
            name="oldpeak", kind="continuous", unit="mm", minimum=-5, maximum=10, decimals=1, missing_codes=_MISSING,
            description="ST depression by exercise",
        ),
        Column(name="slope", kind="ordinal", categories=("up", "flat", "down"), missing_codes=_MISSING),
        Column(
            name="ca", kind="ordinal", categories=("0", "1", "2", "3"), missing_codes=_MISSING,
            description="major vessels coloured by fluoroscopy",
        ),
        Column(
            name="thal", kind="categorical", categories=("normal", "fixed defect", "reversible defect"),
            missing_codes=_MISSING, description="thallium scan",
        ),
        Column(
            name="diseased", kind="boolean", role="target", categories=("no", "yes"), nullable=False,
            description="a diameter narrowed by more than half (num of 1 to 4)",
        ),
    ),
)  # fmt: skip

_LEVELS = {
    "sex": {"0": "female", "1": "male"},
    "cp": dict(zip("1234", SCHEMA.column("cp").categories, strict=True)),
    "restecg": dict(zip("012", SCHEMA.column("restecg").categories, strict=True)),
    "slope": dict(zip("123", SCHEMA.column("slope").categories, strict=True)),
    "thal": dict(zip("367", SCHEMA.column("thal").categories, strict=True)),
    "num": {"0": "no", "1": "yes", "2": "yes", "3": "yes", "4": "yes"},
}


def load() -> PublicTable:
    """All 920 patients; the two exact duplicates stay, since nothing tells a double entry from a second patient."""
    parts = []
    for place, checksum in _CHECKSUMS.items():
        name = f"processed.{place}.data"
        source = SourceFile(dataset="heart-disease", name=name, sha256=checksum, address=_ADDRESS + name, page=_PAGE)
        cells = texts(content(source), header=_HEADER)
        # Cleveland writes codes as 1.0, the others as 1.
        cells = cells.apply(lambda column: column.str.removesuffix(".0"))
        parts.append(cells.replace(_LEVELS).rename(columns={"num": "diseased"}).assign(hospital=HOSPITALS[place]))
    return PublicTable(
        name="heart-disease",
        schema=SCHEMA,
        table=typed(pd.concat(parts, ignore_index=True), SCHEMA),
        licence="CC BY 4.0",
        credit="A. Janosi (Budapest), W. Steinbrunn (Zurich), M. Pfisterer (Basel), R. Detrano (Long Beach, Cleveland)",
    )
