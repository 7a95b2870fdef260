"""``mcrage budget``: what was done to a site's data, what that cost, and what a budget buys.

Reads and makes the ledger of a site (:mod:`mcrage.privacy.ledger`); nothing here touches patients' data.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcrage.errors import ConfigError

if TYPE_CHECKING:
    from mcrage.privacy.accounting import PlannedTraining
    from mcrage.privacy.ledger import Charge, PrivacyLedger

app = typer.Typer(
    help="Keep and read the record of what was done to a site's data.", no_args_is_help=True, rich_markup_mode=None
)

LedgerFile = Annotated[Path, typer.Argument(metavar="LEDGER", help="The ledger, on a local disk.")]
WitnessFile = Annotated[Path, typer.Option("--witness", help="Its witness, in another folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("init")
def init(ledger: LedgerFile, *, witness: WitnessFile) -> None:
    """Make an empty ledger; what is there already is never replaced."""
    from mcrage.privacy.ledger import PrivacyLedger

    PrivacyLedger.create(ledger, witness=witness).close()
    typer.echo(f"{ledger}: an empty ledger; keep it for as long as the data are kept")


@app.command("show")
def show(
    ledger: LedgerFile,
    *,
    witness: WitnessFile,
    delta: Annotated[float, typer.Option(help="The delta of every epsilon.")] = 1e-5,
    as_json: AsJson = False,
) -> None:
    """Show what was spent, on what, per run and since when."""
    from mcrage.privacy.ledger import PrivacyLedger

    with PrivacyLedger.open(ledger, witness=witness) as opened:
        content = _spent(opened, delta)
    typer.echo(json.dumps(content, indent=1) if as_json else _in_lines(ledger, content))


def _spent(ledger: "PrivacyLedger", delta: float) -> dict[str, Any]:
    from importlib.metadata import version

    from mcrage.privacy.accounting import epsilon_bound, epsilons

    rows = ledger.rows
    by_run: dict[str, list[Charge]] = {}
    for row in rows:
        by_run.setdefault(row.run, []).append(row)
    groups = [list(rows), *by_run.values()]
    protected = [[event for row in group for event in row.protected] for group in groups]
    total, *of_runs = epsilons(protected, delta=delta)
    runs = [
        {"run": run, "epsilon": epsilon, **_summary(charges)}
        for (run, charges), epsilon in zip(by_run.items(), of_runs, strict=True)
    ]
    return {
        "since": ledger.since.isoformat(),
        "delta": delta,
        "epsilon": total,
        "epsilon_renyi_bound": epsilon_bound(protected[0], delta=delta),
        "accountant": f"privacy loss distributions, dp-accounting {version('dp-accounting')}",
        "head": ledger.head,
        **_summary(rows),
        "runs": runs,
    }


def _summary(rows: "list[Charge] | tuple[Charge, ...]") -> dict[str, Any]:
    from mcrage.privacy.accounting import merge

    merged = merge([event for row in rows for event in row.events])
    return {
        "charges": len(rows),
        "unprotected": sum(len(row.events) - len(row.protected) for row in rows),
        "events": [event.to_dict() for event in merged if event.mechanism != "unprotected"],
    }


def _in_lines(path: Path, content: dict[str, Any]) -> str:
    lines = [f"{path}: {content['charges']:,} charges since {content['since'][:16].replace('T', ' ')} UTC"]
    for run in content["runs"]:
        lines.append(f"run {run['run']}: epsilon {run['epsilon']:.2f} by itself, {run['charges']:,} charges")
        lines += [f"  {_event_in_words(event)}" for event in run["events"]]
        if run["unprotected"]:
            lines.append(f"  {run['unprotected']:,} releases without noise")
    lines.append(
        f"epsilon {content['epsilon']:.2f} at delta {content['delta']:g} in all, for one patient with all rows "
        f"({content['accountant']}; the Rényi bound is {content['epsilon_renyi_bound']:.2f})"
    )
    if content["unprotected"]:
        lines.append(f"no epsilon covers the {content['unprotected']:,} releases without noise")
    return "\n".join(lines)


def _event_in_words(event: dict[str, Any]) -> str:
    noise, steps = event["noise_multiplier"], event["steps"]
    shared = f" shared, own share {event['own_noise']:.3g}" if event.get("own_noise") else ""
    if event["mechanism"] == "dp-sgd":
        return f"{steps:,} steps of dp-sgd, noise multiplier {noise:g}{shared}, sample rate {event['sample_rate']:g}"
    return f"{steps:,} counts with {event['mechanism']} noise {noise:g}{shared}"


@app.command("plan")
def plan_training(  # noqa: PLR0913 — one per option
    *,
    patients: Annotated[int, typer.Option(min=1, help="The number of patients that the site declares.")],
    epsilon: Annotated[float, typer.Option(help="What training and --also may cost together.")],
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of a training.")] = None,
    schema_file: Annotated[
        Path | None,
        typer.Option("--schema", help="Plan the tables of generator=marginal for this data dictionary, no training."),
    ] = None,
    delta: Annotated[float | None, typer.Option(help="By default from the number of patients.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another release that is planned, the JSON of an event; any number of them."),
    ] = None,
    sites: Annotated[int, typer.Option(min=2, help="Hospitals that train together, each of so many patients.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show how much noise an epsilon takes, by batches and steps or by tables of counts; reads no data.

    After a plan in words stands what rows of such a run came to where that was measured.
    """
    from mcrage.privacy.accounting import default_delta, plan
    from mcrage.privacy.events import PrivacyEvent

    events = [PrivacyEvent.from_json(text) for text in also or []]
    at_most = default_delta(patients) if delta is None else delta
    if schema_file is not None:
        lines = _tables_plan(schema_file, patients=patients, epsilon=epsilon, delta=at_most, as_json=as_json)
        if not as_json:
            lines += _prospects("marginal", patients=patients, sites=sites, epsilon=epsilon, delta=at_most)
        typer.echo("\n".join(lines))
        return
    if rounds is None:
        raise ConfigError("--rounds: how many the training has; or --schema, to plan tables of counts")
    choices = plan(patients=patients, epsilon=epsilon, delta=at_most, num_rounds=rounds, also=events)
    if as_json:
        content = {"delta": at_most, "choices": [asdict(choice) for choice in choices]}
        typer.echo(json.dumps(content, indent=1))
        return
    typer.echo(f"epsilon {epsilon:g} at delta {at_most:g} for {patients:,} patients and {rounds:,} rounds")
    typer.echo(_as_table(choices, patients=patients, rounds=rounds))
    typer.echo("noise: of the mean gradient, per coordinate, over the clipping norm; little of it is good")
    typer.echo("*: of so many steps, the smallest batches with at most 10 % more noise than the least")
    typer.echo("\n".join(_prospects("cddpm", patients=patients, sites=sites, epsilon=epsilon, delta=at_most)))


def _prospects(generator: str, *, patients: int, sites: int, epsilon: float, delta: float) -> list[str]:
    """What rows are worth, by where the noise is added."""
    from mcrage.prospects import Prospect, signal

    lines = [f"{sites:,} hospitals of {patients:,} training patients, with noise of their own and with shared noise:"]
    for noises in (sites, 1):
        at = signal(patients=patients * sites, epsilon=epsilon, delta=delta, noises=noises)
        lines.append(str(Prospect.of(generator, at)))
    return lines


def _tables_plan(path: Path, *, patients: int, epsilon: float, delta: float, as_json: bool) -> list[str]:
    """Noise of each question of the marginal generator, where every site adds all of it."""
    from mcrage.data.schema import TableSchema
    from mcrage.marginal.budget import Budget, precision
    from mcrage.marginal.estimation import num_tables
    from mcrage.privacy import accounting

    tables = {share: number for share, number in num_tables(TableSchema.load(path)).items() if number}
    events = Budget(precision=precision(epsilon=epsilon, delta=delta)).events(tables)
    cost = accounting.epsilon(events, delta=delta)
    if as_json:
        rows = [{"question": name, **event.to_dict()} for name, event in zip(tables, events, strict=True)]
        return [json.dumps({"delta": delta, "epsilon": cost, "questions": rows}, indent=1)]
    shown = [
        f"{name:<10}  {event.steps:>6,}  {event.noise_multiplier:>15.3g}  {event.noise_multiplier / patients:>15.2%}"
        for name, event in zip(tables, events, strict=True)
    ]
    return [
        f"epsilon {cost:.2f} at delta {delta:g} for {patients:,} patients; sites that share the noise add less each",
        "question    tables  noise on a cell  of the patients",
        *shown,
    ]


def _as_table(choices: "tuple[PlannedTraining, ...]", *, patients: int, rounds: int) -> str:
    lines = ["steps/round  sample rate  patients/step  noise multiplier    noise"]
    for choice in choices:
        mark = " *" if choice.is_advised else ""
        lines.append(
            f"{choice.steps // rounds:>11,}  {choice.sample_rate:>11g}  {choice.sample_rate * patients:>13,.0f}  "
            f"{choice.noise_multiplier:>16g}  {choice.noise:>#7.2g}{mark}"
        )
    return "\n".join(lines)


@app.command("verify")
def verify(ledger: LedgerFile, *, witness: WitnessFile) -> None:
    """Check every row of a ledger, and that it is as new as its witness."""
    from mcrage.privacy.ledger import PrivacyLedger

    with PrivacyLedger.open(ledger, witness=witness) as opened:
        typer.echo(f"{ledger}: {len(opened.rows):,} charges, all as they were made; head {opened.head[:16]}")
