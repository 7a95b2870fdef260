"""Diabetes 130-US hospitals 1999-2008 (doi 10.24432/C5230J): in-patient stays of people with diabetes.

Eight numeric and 31 categorical columns. Left out of the publisher's 50: the encounter number, ``weight`` (97 %
missing), ``examide`` and ``citoglipton`` (constant), and the six drugs that hardly anybody took (13 of 101,766 stays or
fewer); ``patient_nbr`` is the patient id. Codes for "not available" count as missing, discharge and admission codes of
a few patients fall into ``other``, the 72 specialties into the eleven largest and ``other``, and diagnoses into the
nine groups of Strack et al. (2014, table 2). Stays that end in death or hospice care are dropped: nobody is readmitted
after them.
"""

import numpy as np

from mcrage.data.schema import Column, TableSchema
from simulations.datasets.files import SourceFile, content
from simulations.datasets.table import PublicTable, texts, typed

_SOURCE = SourceFile(
    dataset="diabetes130",
    name="diabetic_data.csv",
    sha256="0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97",
    address="https://archive.ics.uci.edu/static/public/296/diabetes+130-us+hospitals+for+years+1999-2008.zip",
    page="https://archive.ics.uci.edu/dataset/296/",
)
_DEATH_OR_HOSPICE = ("11", "13", "14", "19", "20", "21")
_MISSING = ("", "?")
_DOSES = ("No", "Down", "Steady", "Up")
_DRUGS = (
    "metformin", "repaglinide", "nateglinide", "chlorpropamide", "glimepiride", "glipizide", "glyburide", "tolbutamide",
    "pioglitazone", "rosiglitazone", "acarbose", "miglitol", "tolazamide", "insulin", "glyburide-metformin",
)  # fmt: skip
_SPECIALTIES = (
    "InternalMedicine", "Emergency/Trauma", "Family/GeneralPractice", "Cardiology", "Surgery-General", "Nephrology",
    "Orthopedics", "Orthopedics-Reconstructive", "Radiologist", "Pulmonology", "Psychiatry",
)  # fmt: skip
_PAYERS = (
    "BC", "CH", "CM", "CP", "DM", "FR", "HM", "MC", "MD", "MP", "OG", "OT", "PO", "SI", "SP", "UN", "WC",
)  # fmt: skip
_DIAGNOSES = (
    "circulatory", "respiratory", "digestive", "diabetes", "injury", "musculoskeletal", "genitourinary", "neoplasms",
    "other",
)  # fmt: skip
# Three-digit ICD-9 codes of each group: inclusive ranges (Strack et al., 2014, table 2).
_ICD9 = {
    "circulatory": ((390, 459), (785, 785)),
    "respiratory": ((460, 519), (786, 786)),
    "digestive": ((520, 579), (787, 787)),
    "diabetes": ((250, 250),),
    "injury": ((800, 999),),
    "musculoskeletal": ((710, 739),),
    "genitourinary": ((580, 629), (788, 788)),
    "neoplasms": ((140, 239),),
}


def _count(name: str, low: int, high: int, *, skewed: bool = False) -> Column:
    return Column(
        name=name, kind="integer", minimum=low, maximum=high, scale="log" if skewed else "linear", nullable=False
    )


def _coded(name: str, levels: tuple[str, ...], missing: tuple[str, ...] = (), *, other: str | None = None) -> Column:
    return Column(
        name=name,
        kind="categorical",
        categories=levels,
        missing_codes=missing or ("",),
        nullable=bool(missing),
        other=other,
    )


SCHEMA = TableSchema(
    name="diabetes130",
    columns=(
        Column(name="patient_nbr", kind="text", role="patient_id", nullable=False),
        Column(
            name="race", kind="categorical", role="sensitive", missing_codes=_MISSING,
            categories=("AfricanAmerican", "Asian", "Caucasian", "Hispanic", "Other"),
        ),
        Column(
            name="gender", kind="categorical", role="sensitive", missing_codes=("", "Unknown/Invalid"),
            categories=("Female", "Male"),
        ),
        Column(
            name="age", kind="ordinal", unit="years", nullable=False,
            categories=tuple(f"[{low}-{low + 10})" for low in range(0, 100, 10)),
        ),
        _coded("admission_type_id", ("1", "2", "3", "4", "7"), ("", "5", "6", "8")),
        _coded(
            "discharge_disposition_id", ("1", "2", "3", "4", "5", "6", "7", "8", "15", "22", "23", "28"),
            ("", "18", "25", "26"), other="other",
        ),
        _coded(
            "admission_source_id", ("1", "2", "3", "4", "5", "6", "7"), ("", "9", "15", "17", "20", "21"),
            other="other",
        ),
        _coded("payer_code", _PAYERS, _MISSING),
        _coded("medical_specialty", (*_SPECIALTIES, "other"), _MISSING),
        _count("time_in_hospital", 1, 14),
        _count("num_lab_procedures", 0, 150),
        _count("num_procedures", 0, 10),
        _count("num_medications", 0, 100),
        _count("number_outpatient", 0, 100, skewed=True),
        _count("number_emergency", 0, 100, skewed=True),
        _count("number_inpatient", 0, 50, skewed=True),
        _count("number_diagnoses", 1, 20),
        _coded("diag_1", _DIAGNOSES, _MISSING),
        _coded("diag_2", _DIAGNOSES, _MISSING),
        _coded("diag_3", _DIAGNOSES, _MISSING),
        # "None" is a level: not measured.
        _coded("max_glu_serum", ("None", "Norm", ">200", ">300")),
        _coded("A1Cresult", ("None", "Norm", ">7", ">8")),
        *(_coded(drug, ("No", "Steady") if drug == "tolbutamide" else _DOSES) for drug in _DRUGS),
        _coded("change", ("No", "Ch")),
        _coded("diabetesMed", ("No", "Yes")),
        Column(name="readmitted", kind="boolean", role="target", categories=("no", "yes"), nullable=False),
    ),
)  # fmt: skip


def load(*, one_per_patient: bool = True, within_30_days: bool = False) -> PublicTable:
    """Stays that end alive.

    Args:
        one_per_patient: First stay of each patient only (69,973), as in Strack et al.; else all stays (99,343).
        within_30_days: Whether the target is readmission within 30 days (9 % of patients) or, by default, at any time
            (41 %).
    """
    stays = texts(content(_SOURCE))
    if one_per_patient:
        first = stays["encounter_id"].astype("int64").groupby(stays["patient_nbr"]).idxmin()
        stays = stays.loc[np.sort(first.to_numpy())]
    stays = stays[~stays["discharge_disposition_id"].isin(_DEATH_OR_HOSPICE)].reset_index(drop=True)
    for name in ("diag_1", "diag_2", "diag_3"):
        codes = {code: diagnosis_group(code) for code in stays[name].unique()}
        stays[name] = stays[name].map(codes)
    known = [*_SPECIALTIES, "?"]
    stays["medical_specialty"] = stays["medical_specialty"].where(stays["medical_specialty"].isin(known), "other")
    events = ["<30"] if within_30_days else ["<30", ">30"]
    stays["readmitted"] = np.where(stays["readmitted"].isin(events), "yes", "no")
    return PublicTable(
        name="diabetes130",
        schema=SCHEMA,
        table=typed(stays, SCHEMA),
        licence="CC BY 4.0",
        credit="Strack et al., BioMed Research International 2014, 781670",
    )


def diagnosis_group(code: str) -> str:
    """Group of an ICD-9 code; ``?`` stays."""
    if code == "?":
        return code
    if not code[0].isdigit():
        return "other"
    number = int(float(code))
    for group, ranges in _ICD9.items():
        if any(low <= number <= high for low, high in ranges):
            return group
    return "other"
