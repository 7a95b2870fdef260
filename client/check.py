"""The doctor of a hospital's installation: looks at all that the daemon needs; says what is wrong, where, what to do.

Every check runs, whatever the others found. No line holds a cell of the table, a key or a password; of an error that
nobody foresaw it has the type alone. Nothing is changed, but for a witness that had fallen behind its ledger.
"""

import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mcrage
from client import journal
from client.bundles import Approvals, Bundle
from client.places import JOURNAL, LEDGER, POLICY, SECRET, WITNESS
from client.reach import Level, Line, certificate_lines, key_lines, server_lines
from client.settings import SiteSettings
from mcrage.config import FederationConfig
from mcrage.data.reader import inspect_table
from mcrage.data.schema import TableSchema
from mcrage.errors import LedgerError, McrageError, PrivacyError, RefusedError, SchemaError
from mcrage.privacy.accounting import epsilon
from mcrage.privacy.keyed import read_secret
from mcrage.privacy.ledger import Charge, PrivacyLedger

if TYPE_CHECKING:  # what needs torch is imported by the checks: that it is missing has to be told as well
    from client.policy import SitePolicy

_LOW_DISK, _LITTLE_DISK = 2 * 10**8, 10**9
_ASK, _INSTALL = "Show this line to the coordinator.", "Install the versions that constraints.txt names."


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        area: What was looked at, such as ``keys``.
        level: ``problem`` where the daemon cannot work, or not safely; ``note`` what somebody should know; else ``ok``.
        text: What is so, and where.
        remedy: What to do; every problem has one.
    """

    area: str
    level: Level
    text: str
    remedy: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether something has to be put right."""
        return self.level == "problem"

    def __str__(self) -> str:
        return f"{self.level:<8}{self.area}: {self.text}" + (f". {self.remedy}" if self.remedy else "")


def examine(settings: SiteSettings, *, offline: bool) -> list[Finding]:
    """All that was found, in the order of the checks.

    Args:
        settings: Of the site.
        offline: Whether the server is not asked.
    """
    if os.name != "posix":
        text = f"this is {sys.platform}, where the rights of files are not those that the daemon relies on"
        return [Finding("system", "problem", text, "Run the daemon on Linux.")]
    found = [each for area, check, remedy in _CHECKS for each in _contained(area, partial(check, settings), remedy)]
    if not offline:
        are_keys_right = not any(each.is_problem and each.area in ("files", "keys") for each in found)
        ask = partial(server_lines, settings, are_keys_right=are_keys_right)
        found += _contained("server", ask, _ASK)
    return found


def _contained(area: str, check: Callable[[], Iterator[Line]], remedy: str) -> Iterator[Finding]:
    """What a check finds, and a problem for each line of what it raises; ``remedy`` is for those."""
    try:
        for line in check():
            yield Finding(area, *line)
    except McrageError as error:
        for text in str(error).splitlines():
            yield Finding(area, "problem", text, remedy)
    except ImportError as error:
        yield Finding(area, "problem", f"a library is missing or of another version ({type(error).__name__})", _INSTALL)
    except Exception as error:  # noqa: BLE001  # its text may hold a cell, and the other checks still have to run
        yield Finding(area, "problem", f"this check failed unexpectedly ({type(error).__name__})", _ASK)


def _versions(_settings: SiteSettings) -> Iterator[Line]:
    from client.node import require_flower

    installed = {"python": platform.python_version(), "mcrage": mcrage.__version__}
    for name in ("flwr", "torch", "opacus"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            yield "problem", f"{name} is not installed", _INSTALL
    require_flower()
    yield "ok", ", ".join(f"{name} {number}" for name, number in installed.items()), ""


class _Right(NamedTuple):
    """How a file or folder has to be.

    Attributes:
        path: Of it.
        forbidden: Bits of the mode that it must not have.
        chmod: What takes them away.
        remedy: What to do where it is missing.
        is_own: Whether it has to be this user's, and no link; others may be root's, and links.
        is_folder: Whether it is a folder.
        least_bytes: Of a file.
    """

    path: Path
    forbidden: int
    chmod: str
    remedy: str
    is_own: bool = True
    is_folder: bool = False
    least_bytes: int = 1

    def fault(self) -> tuple[str, str] | None:
        """What is wrong first of all, and what to do."""
        try:
            status = self.path.lstat() if self.is_own and not self.is_folder else self.path.stat()
        except OSError as error:
            return f"cannot be used: {error.strerror}", self.remedy
        mode, owners = stat.S_IMODE(status.st_mode), {os.getuid()} | (set() if self.is_own else {0})
        is_kind = stat.S_ISDIR if self.is_folder else stat.S_ISREG
        faults = (
            (
                not is_kind(status.st_mode),
                "is a link, or no file or folder",
                "Put there what the link leads to.",
            ),
            (
                status.st_uid not in owners,
                f"belongs to user {status.st_uid}, and this is run by user {os.getuid()}",
                "Run it as the user who runs the daemon, or give that user what it needs (chown).",
            ),
            (mode & self.forbidden, f"is open to others (mode {mode:04o})", f"Run 'chmod {self.chmod} {self.path}'."),
            (status.st_size < self.least_bytes, f"has less than {self.least_bytes} bytes", f"Remove it; {self.remedy}"),
        )
        return next(((text, remedy) for is_so, text, remedy in faults if is_so), None)


def _files(settings: SiteSettings) -> Iterator[Line]:
    server, daemon = settings.server, settings.daemon
    enrol = f"'python -m client enroll {settings.file}' makes it; if it was lost, bring it back from a backup."
    rights = [
        _Right(settings.file, 0o022, "go-w", "Write it anew.", is_own=False),
        _Right(server.key.parent, 0o027, "750", enrol, is_folder=True),
        _Right(server.key, 0o177, "600", enrol),
        _Right(server.node_key, 0o177, "600", enrol),
        _Right(server.certificate, 0o022, "go-w", "Put there what the coordinator sent back.", is_own=False),
        _Right(server.ca, 0o022, "go-w", "Put there the federation's ca.crt, from the coordinator.", is_own=False),
        _Right(daemon.secret, 0o137, "640", enrol, least_bytes=32),
        _Right(settings.site.private, 0o077, "700", enrol, is_folder=True),
    ]
    faults = [(right.path, fault) for right in rights if (fault := right.fault())]
    for path, (text, remedy) in faults:
        yield "problem", f"'{path}' {text}", remedy
    if not faults:
        yield "ok", f"{len(rights)} files and folders are there, with the rights that they need", ""


def _approvals(settings: SiteSettings) -> Iterator[Line]:
    approvals = Approvals(settings.daemon.approved)
    listed = approvals.listed()
    if not listed:
        yield "note", "none: nothing can run here until 'python -m client approve'", "The coordinator has the bundle."
        return
    digest, at, by = listed[-1]
    differences = Bundle(digest, approvals.last_files()).differences()
    if differences:
        text = f"the newest approved bundle and the code installed here differ in {len(differences)} files"
        remedy = "Install the version of that bundle, or approve the bundle of this version."
        yield "problem", f"{text}, the first one {differences[0]}", remedy
    else:
        text = f"{len(listed)} bundles; the newest, {digest[:12]}, {at[:10]} by {by!r}, is the code installed here"
        yield "ok", text, ""


def _allowed(settings: SiteSettings) -> "SitePolicy":
    from client.policy import SitePolicy

    return SitePolicy.load(settings.site.private / POLICY)


def _policy(settings: SiteSettings) -> Iterator[Line]:
    path = settings.site.private / POLICY
    rules = _allowed(settings).privacy
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


def _ledger(settings: SiteSettings) -> Iterator[Line]:
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
        policy = _allowed(settings)
    except RefusedError:
        return  # said of the policy
    spent = epsilon([event for row in rows for event in row.protected], delta=policy.delta)
    total = policy.privacy.max_epsilon_total
    text = f"epsilon {spent:.2f} of {total:g} is spent at delta {policy.delta:.2g}, {max(0, total - spent):.2f} is left"
    yield "ok" if spent < total else "note", text, ""


def _secret(settings: SiteSettings) -> Iterator[Line]:
    path = settings.site.private / SECRET
    if not os.path.lexists(path):
        raise PrivacyError(f"'{path}' is missing")
    read_secret(path)
    yield "ok", f"'{path}' is there, and this user's alone", ""


def _table(settings: SiteSettings) -> Iterator[Line]:
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
        policy = _allowed(settings)
    except RefusedError:
        return  # said of the policy
    kept = min(max(usual.test_fraction, policy.data.min_test_fraction), policy.data.max_test_fraction)
    patients, declared = len(Patients(report.table, schema)) * (1 - kept), policy.privacy.declared_patients
    if declared and abs(declared - patients) > patients / 5:
        text = (
            f"the policy's declared_patients differs by more than a fifth from the table's, less {kept:.0%} for tests"
        )
        yield "note", text, "Correct it before the first run; every update is divided by it."


def _leaves(settings: SiteSettings) -> Iterator[Line]:
    try:
        schema = TableSchema.load(settings.site.schema_file)
        policy = _allowed(settings)
    except (SchemaError, RefusedError):
        yield "note", "nothing: it takes a valid policy and a valid data dictionary", ""
        return
    for text in _leaving(policy, schema):
        yield "note", text, ""


def _leaving(policy: "SitePolicy", schema: TableSchema) -> list[str]:
    """What may leave, in words for a data protection officer."""
    privacy, data = policy.privacy, policy.data
    may_be_exact, may_train = not privacy.required, "train" in data.tasks
    modelled = [column.name for column in schema.modelled]
    closed = [name for name in modelled if data.allowed_columns and name not in data.allowed_columns]
    always = "in every run: the data dictionary, versions of programs, what the ledger says, codes of errors"
    if closed:
        return [always, f"nothing else: the policy does not allow the column {', '.join(closed)}"]
    counts, histograms = (partial(_may_describe, policy, schema, marginals=each) for each in (False, True))
    has_loss = may_be_exact and data.release_loss and {"train", "evaluate"} & {*data.tasks}
    return [
        always,
        f"numbers of patients by group, none from 1 to {data.minimum_cell - 1}: "
        + _ways(f"epsilon at most {privacy.max_count_epsilon:g}", counts(dp=True), counts(dp=False)),
        "histograms of single columns: "
        + _ways(f"at least {privacy.min_histogram_noise:g} on each bar", histograms(dp=True), histograms(dp=False)),
        "parameters of the model: "
        + _ways(
            f"at least {privacy.min_noise_multiplier:g} times what one patient can change in a step",
            may_train and privacy.declared_patients > 0,
            may_train and may_be_exact,
        ),
        "mean losses: " + ("as they are" if has_loss else "never"),
        "scores of test patients, counted: "
        + _ways(f"epsilon at most {privacy.max_score_epsilon:g}", "evaluate" in data.tasks, False),
        f"with noise, all together: epsilon at most {privacy.max_epsilon_run:g} a run and "
        f"{privacy.max_epsilon_total:g} for ever, delta {policy.delta:.2g}, {privacy.max_releases:,} releases",
        f"{len(modelled)} columns are modelled: {', '.join(modelled[:20])}{', ...' if len(modelled) > 20 else ''}",
    ]


def _ways(noise: str, has_noise: bool, is_exact: bool) -> str:
    return " or ".join([f"with noise ({noise})"] * has_noise + ["as they are"] * is_exact) or "never"


def _may_describe(policy: "SitePolicy", schema: TableSchema, *, marginals: bool, dp: bool) -> bool:
    """Whether the policy, which is asked itself, allows counts or histograms."""
    from mcrage.messages import DescribeInstruction

    asked = {"run": "0" * 64, "test_fraction": policy.data.min_test_fraction, "marginals": marginals, "dp": dp}
    rules = policy.privacy
    noise = {"histogram_noise": rules.min_histogram_noise} if marginals else {}
    protected = {"delta": policy.delta, "count_epsilon": rules.max_count_epsilon} | noise if dp else {}
    try:
        policy.check(DescribeInstruction.model_validate(asked | protected), schema)
    except RefusedError:
        return False
    return True


def _disk(settings: SiteSettings) -> Iterator[Line]:
    private = settings.site.private
    folder = next(folder for folder in (private, *private.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    level: Level = "ok" if free >= _LITTLE_DISK else "note" if free >= _LOW_DISK else "problem"
    yield level, f"{free / 10**9:.1f} GB are free at '{folder}'", "" if level == "ok" else "Make room there."


def _log(settings: SiteSettings) -> Iterator[Line]:
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


_CHECKS: tuple[tuple[str, Callable[[SiteSettings], Iterator[Line]], str], ...] = (
    ("versions", _versions, _INSTALL),
    ("files", _files, _ASK),
    ("keys", key_lines, "Bring both keys back from one backup, or enrol anew."),
    (
        "keys",
        certificate_lines,
        "Ask the coordinator for a new one; certificate and ca.crt have to be of one federation.",
    ),
    ("approvals", _approvals, "Run 'chmod go-w' on it, or remove it and approve the bundle anew."),
    ("policy", _policy, "Correct it, or run 'chmod go-w' on it; until then everything is refused."),
    ("ledger", _ledger, "Nothing can be answered before; bring back the newest copy and never make a new one."),
    ("secret", _secret, "Bring it back from a backup; never make a new one beside the old ledger."),
    ("table", _table, "Correct the data dictionary, or get it from the coordinator."),
    ("leaves", _leaves, _ASK),
    ("disk", _disk, _ASK),
    ("log", _log, "Keep it as it is, and find out who changed it."),
)
