"""Heart failure clinical records (doi 10.24432/C5Z89R): 299 patients of one hospital in Faisalabad, 2015."""

from mcrage.data.schema import Column, TableSchema
from simulations.datasets.files import SourceFile, content
from simulations.datasets.table import PublicTable, texts, typed

_SOURCE = SourceFile(
    dataset="heart-failure",
    name="heart_failure_clinical_records_dataset.csv",
    sha256="9c73cea7468ff5d517801ec050fe9993da5912fce4b56f296f8df3b38dd75912",
    address="https://archive.ics.uci.edu/static/public/519/heart+failure+clinical+records.zip",
    page="https://archive.ics.uci.edu/dataset/519/",
)

SCHEMA = TableSchema(
    name="heart-failure",
    columns=(
        # Two ages are given in thirds of a year.
        Column(
            name="age", kind="continuous", role="sensitive", unit="years", minimum=18, maximum=110, bins=(60, 75),
            decimals=3, nullable=False,
        ),
        Column(name="anaemia", kind="boolean"),
        Column(
            name="creatinine_phosphokinase", kind="integer", unit="U/L", minimum=0, maximum=20_000, scale="log",
        ),
        Column(name="diabetes", kind="boolean"),
        Column(name="ejection_fraction", kind="integer", unit="%", minimum=5, maximum=90),
        Column(name="high_blood_pressure", kind="boolean"),
        Column(
            name="platelets", kind="continuous", unit="1/mL", minimum=1_000, maximum=1_500_000, decimals=2,
            description="the publisher's unit is kiloplatelets per mL; the numbers are per microlitre",
        ),
        Column(
            name="serum_creatinine", kind="continuous", unit="mg/dL", minimum=0.1, maximum=25, decimals=2, scale="log",
        ),
        Column(name="serum_sodium", kind="integer", unit="mmol/L", minimum=90, maximum=190),
        Column(name="sex", kind="categorical", role="sensitive", categories=("female", "male"), nullable=False),
        Column(name="smoking", kind="boolean"),
        # Follow-up ends at death: its length tells the outcome.
        Column(name="time", kind="integer", role="ignored", unit="days", minimum=0, maximum=366),
        Column(name="DEATH_EVENT", kind="boolean", role="target", categories=("0", "1"), nullable=False),
    ),
)  # fmt: skip


def load() -> PublicTable:
    """All 299 patients, without the length of follow-up."""
    cells = texts(content(_SOURCE)).replace({"sex": {"0": "female", "1": "male"}})
    return PublicTable(
        name="heart-failure",
        schema=SCHEMA,
        table=typed(cells, SCHEMA),
        licence="CC BY 4.0",
        credit="Chicco and Jurman, BMC Medical Informatics and Decision Making 2020, 20, 16",
    )
