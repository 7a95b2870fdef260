"""Whether what the process with the data works on is as it has to be: policy, ledger, secret, table and audit log.

A part of the doctor (:mod:`client.check`).
"""

import os
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from client import journal
from client.findings import Line
from client.places import JOURNAL, LEDGER, POLICY, SECRET, WITNESS
from client.settings import SiteSettings
from mcrage.config import FederationConfig
from mcrage.data.reader import inspect_table
from mcrage.data.schema import TableSchema
from mcrage.errors import LedgerError, PrivacyError, RefusedError
from mcrage.privacy.accounting import epsilon
from mcrage.privacy.keyed import read_secret
from mcrage.privacy.ledger import Charge, PrivacyLedger

if TYPE_CHECKING:  # what needs torch is imported by the checks: that it is missing has to be told as well
    from client.policy import SitePolicy


def allowed(settings: SiteSettings) -> "SitePolicy":
    """The policy of the private folder.

    Raises:
        RefusedError: If it is missing, or not as it has to be.
    """
    from client.policy import SitePolicy

    return SitePolicy.load(settings.site.private / POLICY)


def policy_lines(settings: SiteSettings) -> Iterator[Line]:
    """Whether there is a valid policy, and where it protects nobody.

    Raises:
        RefusedError: If there is none.
    """
    path = settings.site.private / POLICY
    rules = allowed(settings).privacy
    if rules.required:
        yield "ok", f"'{path}': what leaves has to be differentially private", ""
    else:
        text = f"'{path}' asks for no privacy: exact numbers and models with traces of patients may leave"
        yield "note", text, "Set required = true in [privacy], unless that is meant."
    if rules.allow_simulated_noise:
        text = f"'{path}' allows noise that the server can take away again, which protects nobody"
        yield "note", text, "Set allow_simulated_noise = false in [privacy]."


def _charges(settings: SiteSettings) -> tuple[Charge, ...]:
    with PrivacyLedger.open(settings.site.private / LEDGER, witness=settings.site.private / WITNESS) as ledger:
        return ledger.rows


def ledger_lines(settings: SiteSettings) -> Iterator[Line]:
    """Whether the ledger is whole and its witness agrees, and what was spent.

    Raises:
        LedgerError: If it cannot be used.
    """
    ledger, witness = settings.site.private / LEDGER, settings.site.private / WITNESS
    if not (os.path.lexists(ledger) or os.path.lexists(witness)):
        remedy = "Bring both back from backups; a site that never took part makes them with 'python -m client enroll'."
        yield "problem", f"'{ledger}' and '{witness}' are missing", remedy
        return
    rows = _charges(settings)
    yield "ok", f"'{ledger}': {len(rows):,} charges, none altered or missing, as its witness says", ""
    if ledger.stat().st_dev == witness.stat().st_dev:
        text = f"'{witness}' is on the file system of the ledger: what takes one takes both"
        yield "note", text, f"Mount another disk at '{witness.parent}'."
    if any(len(row.protected) < len(row.events) for row in rows):
        yield "note", "there were runs without noise: nothing can be stated about the privacy of the patients", ""
    try:
        policy = allowed(settings)
    except RefusedError:
        return  # said of the policy
    spent = epsilon([event for row in rows for event in row.protected], delta=policy.delta)
    total = policy.privacy.max_epsilon_total
    text = f"epsilon {spent:.2f} of {total:g} is spent at delta {policy.delta:.2g}, {max(0, total - spent):.2f} is left"
    yield "ok" if spent < total else "note", text, ""


def secret_lines(settings: SiteSettings) -> Iterator[Line]:
    """Whether the secret of the noise is there.

    Raises:
        PrivacyError: If it is not, or not as it has to be.
    """
    path = settings.site.private / SECRET
    if not os.path.lexists(path):
        raise PrivacyError(f"'{path}' is missing")
    read_secret(path)
    yield "ok", f"'{path}' is there, and this user's alone", ""


def table_lines(settings: SiteSettings) -> Iterator[Line]:
    """Whether the table follows the data dictionary, and what training on it takes.

    Raises:
        SchemaError: If there is no valid data dictionary.
    """
    from mcrage.data.transform import TableTransform
    from mcrage.diffusion.network import ModelConfig
    from mcrage.memory import GIGABYTE, free_bytes, training_bytes
    from mcrage.privacy.sampling import Patients

    path, schema = settings.site.data, TableSchema.load(settings.site.schema_file)
    report = inspect_table(path, schema)
    for each in report.problems:
        yield "problem", f"{path}: {each}".removesuffix(f". {each.remedy}"), each.remedy
    for each in report.notes:
        yield "note", f"{path}: {each}".removesuffix(f". {each.remedy}"), each.remedy
    if report.table is None:
        return
    yield "ok", f"'{path}': {len(report.table.columns)} columns, all as the data dictionary says", ""
    usual = FederationConfig()
    size, layout = ModelConfig(width=usual.width, depth=usual.depth), TableTransform(schema).layout
    needed = training_bytes(layout, size, rows=len(report.table), batch_size=usual.batch_size)
    free = min((each for each in (free_bytes(), int(settings.daemon.max_memory_gb * 2**30)) if each), default=needed)
    text = f"training a model of the usual size takes about {needed / GIGABYTE:.1f} GB of {free / GIGABYTE:.1f} GB"
    yield "ok" if needed <= free else "note", text, "" if needed <= free else "Give the machine more memory."
    try:
        policy = allowed(settings)
    except RefusedError:
        return  # said of the policy
    kept = min(max(usual.test_fraction, policy.data.min_test_fraction), policy.data.max_test_fraction)
    patients, declared = len(Patients(report.table, schema)) * (1 - kept), policy.privacy.declared_patients
    if declared and abs(declared - patients) > patients / 5:
        text = (
            f"the policy's declared_patients differs by more than a fifth from the table's, less {kept:.0%} for tests"
        )
        yield "note", text, "Correct it before the first run; every update is divided by it."


def log_lines(settings: SiteSettings) -> Iterator[Line]:
    """Whether the audit log is whole, and the ledger as new as the log saw it.

    Raises:
        PrivacyError: If the log cannot be read.
    """
    path = settings.site.private / JOURNAL
    if not os.path.lexists(path):
        yield "ok", f"'{path}' begins when the daemon first runs", ""
        return
    verdict = journal.verify(path)
    if verdict.problems:
        text = f"'{path}' has {len(verdict.problems)} problems, the first one {verdict.problems[0]}"
        yield "problem", text, f"Keep it as it is; 'python -m client audit verify {settings.file}' tells all of them."
    else:
        yield "ok", f"'{path}': {verdict.lines:,} entries, none altered or missing", ""
    seen = [(each["ledger_rows"], each.get("ledger_head")) for each in journal.read(path) if _tells_of_ledger(each)]
    number, head = max(seen, key=itemgetter(0), default=(0, ""))
    try:
        rows = _charges(settings)
    except LedgerError:
        return  # said of the ledger
    if number > len(rows):
        text = f"the ledger has {len(rows):,} charges where the log saw {number:,}: it is an old backup"
        yield "problem", text, "Bring back the newest copies of ledger and witness; run nothing before."
    elif number and rows[number - 1].hash != head:
        text = f"charge {number:,} of the ledger is another one than the log saw: it is another ledger"
        yield "problem", text, "Bring back this site's own ledger and witness; run nothing before."


def _tells_of_ledger(entry: Mapping[str, Any]) -> bool:
    return entry.get("event") in ("instruction", "reply") and type(entry.get("ledger_rows")) is int
