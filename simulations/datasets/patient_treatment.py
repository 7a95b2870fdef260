"""EHR data set for patient treatment (doi 10.17632/7kv3rctx7m.1): blood counts of one hospital, used by MCRAGE."""

from mcrage.data.schema import Column, TableSchema
from simulations.datasets.files import SourceFile, content
from simulations.datasets.table import PublicTable, texts, typed

_SOURCE = SourceFile(
    dataset="patient-treatment",
    name="data-ori.csv",
    sha256="0d6ffd1c86e0106ba5c5c4f109fed88ee83d62f10d490cff93ba539383989144",
    page="https://data.mendeley.com/datasets/7kv3rctx7m/1",
)

SCHEMA = TableSchema(
    name="patient-treatment",
    columns=(
        Column(name="HAEMATOCRIT", kind="continuous", unit="%", minimum=5, maximum=80, decimals=1),
        Column(name="HAEMOGLOBINS", kind="continuous", unit="g/dL", minimum=1, maximum=25, decimals=1),
        Column(name="ERYTHROCYTE", kind="continuous", unit="10^12/L", minimum=0.5, maximum=10, decimals=2),
        Column(name="LEUCOCYTE", kind="continuous", unit="10^9/L", minimum=0.1, maximum=500, decimals=1, scale="log"),
        Column(name="THROMBOCYTE", kind="integer", unit="10^9/L", minimum=1, maximum=3000, scale="log"),
        Column(name="MCH", kind="continuous", unit="pg", minimum=10, maximum=60, decimals=1),
        Column(name="MCHC", kind="continuous", unit="g/dL", minimum=20, maximum=45, decimals=1),
        Column(name="MCV", kind="continuous", unit="fL", minimum=40, maximum=150, decimals=1),
        Column(
            name="AGE", kind="integer", role="sensitive", unit="years", minimum=0, maximum=110, bins=(18, 45, 65),
            nullable=False,
        ),
        Column(name="SEX", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False),
        Column(
            name="SOURCE", kind="categorical", role="target", categories=("out", "in"), nullable=False,
            description="treated as an out-patient or an in-patient",
        ),
    ),
)  # fmt: skip


def load() -> PublicTable:
    """All 4,412 patients, in the publisher's order."""
    return PublicTable(
        name="patient-treatment",
        schema=SCHEMA,
        table=typed(texts(content(_SOURCE)), SCHEMA),
        licence="CC BY 4.0 (the archive's default)",
        credit="Sadikin, EHR Dataset for Patient Treatment Classification, Mendeley Data, 2020",
    )
