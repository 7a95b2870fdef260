"""``report.html`` of a run: who took part, how training went, what holds for patients, for whom the model works.

The page has no script and loads nothing; its content security policy allows only its own style sheet. Sites name
themselves, and groups are named in a file of theirs: whatever stands in a run's folder is escaped, by Jinja in the page
and by ElementTree in the plots.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from pydantic import RootModel

from mcrage.config import FederationConfig, PrivacyConfig
from mcrage.errors import ConfigError
from mcrage.evaluation.private_metrics import METRICS
from mcrage.files import replace_file
from mcrage.privacy.statement import PrivacyAccount
from mcrage.render import html, plots
from mcrage.render.tables import Cell, Notes
from mcrage.render.text import METRIC_NAMES, interval, number, signed
from server.home import Home
from server.logs import files_of
from server.measures import THRESHOLD
from server.overview import Part, Record, RoundPart, duration, read_part
from server.proxy import bytes_by_site, counted_since
from server.rebalance import FOLDER, privacy_of

_TEMPLATES = Path(__file__).parent
_STYLE = """
.numbers.narrow { min-width: 0; width: auto; }
.numbers.narrow th, .numbers.narrow td { padding-right: 1.5rem; }
.numbers.narrow tbody th { max-width: 36rem; }
.numbers th.n, .numbers td.n { text-align: right; }
.numbers .name { white-space: nowrap; }
.scroll + .scroll { margin-top: 1.4rem; }
.statement { max-width: 60rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1.02rem; font-weight: 600; }
"""


class Measure(Part):
    """A row of ``fairness.json``; :func:`server.measures.fairness_rows` says what stands in it."""

    round: int
    site: str
    group: str
    against: str | None
    metric: str
    value: float | None
    low: float | None
    high: float | None
    reason: str


class _Fairness(RootModel[list[Measure]]):
    pass


class _DrawnGroup(Part):
    group: dict[str, str]
    asked: int
    made: int
    rejected: int


class _Drawn(Part):
    groups: list[_DrawnGroup]
    seed: int
    model_sha256: str
    privacy: list[str]


@dataclass(frozen=True, kw_only=True)
class SiteLine:
    """A site in the table of sites.

    Attributes:
        site: Its name.
        rounds: How many rounds it took part in.
        missed: Rounds that it missed, and why.
        came, went: Bytes from it and to it, in words; empty where there is no log.
    """

    site: str
    rounds: int
    missed: list[tuple[str, str]]
    came: str
    went: str


@dataclass(frozen=True, kw_only=True)
class FairnessTable:
    """What one site measured.

    Attributes:
        site: Its name.
        groups: Cells by metric, by group.
        gaps: Cells by metric, by group and the group that it is compared with.
        notes: Letters and the reasons why there is no value.
    """

    site: str
    groups: list[tuple[str, list[Cell]]]
    gaps: list[tuple[str, list[Cell]]]
    notes: list[tuple[str, str]]


def write_report(home: Home, run: str) -> Path:
    """Writes the page of a run that is done; returns where it is.

    Raises:
        ConfigError: If the run is not done, or a file of it is damaged.
        PrivacyError: If an account in its record is not whole, or its epsilon is not that of its events.
    """
    folder = home.run(run)
    if not folder.is_dir():
        raise ConfigError(f"there is no run {run}; 'status' shows all")
    record = read_part(folder / "run.json", Record)
    if record is None:
        raise ConfigError(f"run {run} is not done: it has no record yet; 'status' shows how far it is")
    log = home.proxy / "access.log"
    traffic, since = (bytes_by_site(log), counted_since(log)) if files_of(log) else ({}, None)
    page = render(run, record, folder=folder, traffic=traffic, since=since)
    path = folder / "report.html"
    try:
        replace_file(path, page.encode(), mode=0o644)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be written: {error.strerror}") from None
    return path


def render(
    run: str, record: Record, *, folder: Path, traffic: Mapping[str, tuple[int, int]], since: datetime | None
) -> str:
    """The text of the page.

    Args:
        run: Name of the run.
        record: Its ``run.json``.
        folder: Its folder, for what else there is.
        traffic: Bytes from each site and to it.
        since: From when on they were counted.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (html._TEMPLATES / "report.css").read_text(encoding="utf-8") + _STYLE
    fairness = read_part(folder / "fairness.json", _Fairness)
    drawn = read_part(folder / FOLDER / "report.json", _Drawn)
    changed, others = _settings(record.config)
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        style_hash=html._hash(style),
        run=run,
        record=record,
        num_rounds=len(record.rounds),
        took=duration(record.seconds),
        remarks=_remarks(record),
        sites=site_lines(record, traffic),
        has_traffic=bool(traffic),
        since=f"{since.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if since else "",
        absent=sorted(record.absent.items()),
        curves=_curves(record.rounds),
        statements=privacy_of(record, record.sites),
        ledgers=_ledgers(record.accounts.values()),
        fairness=fairness_tables(fairness.root if fairness else []),
        metrics=[METRIC_NAMES[name] for name in METRICS],
        measured_round=max((row.round for row in fairness.root), default=0) if fairness else 0,
        threshold=THRESHOLD,
        drawn=drawn,
        is_of_this_model=drawn is not None and drawn.model_sha256 == _digest(folder / "model" / "model.safetensors"),
        changed=changed,
        others=others,
    )


def site_lines(record: Record, traffic: Mapping[str, tuple[int, int]]) -> list[SiteLine]:
    """A line per site of the run."""
    names = {*record.sites, *(site for at in record.rounds for site in (*at.sites, *at.dropped))}
    lines = []
    for site in sorted(names):
        missed: dict[str, list[int]] = {}
        for at in record.rounds:
            if site not in at.sites:
                missed.setdefault(at.dropped.get(site, "it was not one of the sites"), []).append(at.server_round)
        came, went = map(_size, traffic[site]) if site in traffic else ("–", "–")
        took_part = sum(site in at.sites for at in record.rounds)
        reasons = [(f"round{'s' * (len(rounds) > 1)} {spans(rounds)}", reason) for reason, rounds in missed.items()]
        lines.append(SiteLine(site=site, rounds=took_part, missed=reasons, came=came, went=went))
    return lines


def spans(numbers: Sequence[int]) -> str:
    """Rising whole numbers in short: ``1–3, 7``."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def fairness_tables(rows: Sequence[Measure]) -> list[FairnessTable]:
    """What every site measured in the last round in which any did."""
    last = max((row.round for row in rows), default=0)
    by_site: dict[str, list[Measure]] = {}
    for row in rows:
        if row.round == last:
            by_site.setdefault(row.site, []).append(row)
    return [_fairness_table(site, of_site) for site, of_site in sorted(by_site.items())]


def _fairness_table(site: str, rows: Iterable[Measure]) -> FairnessTable:
    notes = Notes()
    groups: dict[str, dict[str, Cell]] = {}
    gaps: dict[str, dict[str, Cell]] = {}
    for row in rows:
        if row.against is None:
            groups.setdefault("everybody" if row.group == "all" else row.group, {})[row.metric] = _cell(row, notes)
        else:
            gaps.setdefault(f"{row.group} − {row.against}", {})[row.metric] = _cell(row, notes)
    groups_in_order, gaps_in_order = (
        [(name, [cells.get(metric, Cell(value="–")) for metric in METRICS]) for name, cells in table.items()]
        for table in (groups, gaps)
    )
    return FairnessTable(site=site, groups=groups_in_order, gaps=gaps_in_order, notes=notes.lines)


def _cell(row: Measure, notes: Notes) -> Cell:
    if row.value is None:
        return Cell(value="–", mark=notes.mark(row.reason.rpartition("insufficient: ")[2]))
    if row.against is None:
        return Cell(value=number(row.value), interval=interval(row.low, row.high))
    return Cell(value=signed(row.value), interval=interval(row.low, row.high, style="signed"))


def _remarks(record: Record) -> list[str]:
    """What one has to know first, a sentence each."""
    remarks = []
    losses = [(at.server_round, _mean(at.held_out)) for at in record.rounds if at.held_out]
    if len(losses) > 1:
        (first, before), (last, after) = losses[0], losses[-1]
        remarks.append(f"Held-out loss: {number(before)} after round {first}, {number(after)} after round {last}.")
    short = sum(1 for at in record.rounds if at.dropped)
    if short:
        remarks.append(f"In {short} of {len(record.rounds)} rounds at least one site was missing.")
    is_private = record.config.get("dp")
    remarks.append("What holds for patients stands under Privacy." if is_private else "No privacy claim is made.")
    return remarks


def _curves(rounds: Sequence[RoundPart]) -> list[html.Curve]:
    dropped = [
        (at.server_round, f"round {at.server_round}: without {', '.join(at.dropped)}") for at in rounds if at.dropped
    ]
    curves = []
    for title, of_round in (
        ("Held-out loss", {at.server_round: at.held_out for at in rounds}),
        ("Training loss", {at.server_round: at.losses for at in rounds}),
    ):
        points = [(server_round, _mean(losses)) for server_round, losses in of_round.items() if losses]
        if points:
            within = [mark for mark in dropped if points[0][0] <= mark[0] <= points[-1][0]]
            plot = plots.curve_by_round(points, label=f"{title} by round", dropped=within)
            curves.append(html.Curve(title=title, plot=plot))
    return curves


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _ledgers(accounts: Iterable[PrivacyAccount]) -> list[dict[str, Any]]:
    return [
        {
            "site": account.site,
            "since": account.since,
            "delta": f"{account.delta:g}",
            "run": _epsilon(account.epsilon_run),
            "total": _epsilon(account.epsilon),
            "events": "; ".join(event.in_words for event in account.events),
        }
        for account in accounts
    ]


def _epsilon(epsilon: float) -> str:
    return f"{epsilon:.2f}" if math.isfinite(epsilon) else "no bound"


def _settings(config: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Settings that are not the default, and the others; without those that only say where things are and how fast."""
    privacy = PrivacyConfig().model_dump(by_alias=True)
    defaults = FederationConfig().model_dump(by_alias=True) | (privacy if config.get("dp") else {"dp": False})
    known = [(name, config[name], config[name] != default) for name, default in defaults.items() if name in config]
    changed, others = ([(name, _word(value)) for name, value, is_new in known if is_new is of] for of in (True, False))
    return changed, others


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
