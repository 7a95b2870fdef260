"""``mcrage audit``: what a trained model gives away about the patients that it was trained on, measured.

Figures and never a verdict: no attack that finds nothing shows that there is nothing to find. ``mcrage audit run`` is
about the program and not about a model: does a private training do what its ledger says?
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcrage.errors import ConfigError, DataError, SchemaError

if TYPE_CHECKING:
    import pandas as pd

    from mcrage.cddpm import CDDPM
    from mcrage.data.schema import TableSchema
    from mcrage.evaluation.membership import Consistency, MembershipReport
    from mcrage.generator import Generator

app = typer.Typer(
    help="Attack a model, or check a private training against its ledger.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("run")
def run(  # noqa: PLR0913 — one per option
    *,
    canaries: Annotated[int, typer.Option(min=40, help="Made-up patients whose coins are guessed; even.")] = 1000,
    records: Annotated[int, typer.Option(min=1, help="Made-up records beside them.")] = 1000,
    noise_multiplier: Annotated[float, typer.Option(help="Noise over the clipping norm.")] = 3.0,
    sample_rate: Annotated[float, typer.Option(help="Probability that a patient is in a step's batch.")] = 0.128,
    draws: Annotated[int, typer.Option(min=2, help="Noise levels per patient and step; even.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each charged to the ledger by itself.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round.")] = 200,
    sites: Annotated[int, typer.Option(min=1, help="Sites that share the noise; 1 for noise of a site's own.")] = 1,
    colluders: Annotated[int, typer.Option(min=1, help="Sites that tell what noise they added.")] = 1,
    seed: Annotated[int, typer.Option(help="Root of all randomness.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train privately on made-up records with canaries and compare with the ledger; exit code 1 if they differ."""
    from tempfile import TemporaryDirectory

    from mcrage.privacy.ledger import PrivacyLedger
    from mcrage.training.audit_run import AuditConfig, audit

    config = AuditConfig(
        canaries=canaries,
        records=records,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        draws=draws,
        rounds=rounds,
        steps_per_round=steps,
        sites=sites,
        colluders=colluders,
        seed=seed,
    )
    _say(f"training with {canaries:,} canaries and {records:,} made-up records for {rounds * steps:,} steps")
    with (
        TemporaryDirectory() as first,
        TemporaryDirectory() as second,
        PrivacyLedger.create(Path(first, "ledger.sqlite"), witness=Path(second, "witness.json")) as ledger,
    ):
        report = audit(config, ledger=ledger)
    typer.echo(json.dumps(report.as_dict(), indent=1) if as_json else report.text())
    if report.failed:
        raise typer.Exit(1)


@app.command("attacks")
def attacks(  # noqa: PLR0913 — one per option
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a trained model.")],
    *,
    members: Annotated[Path, typer.Option(help="Rows that it was trained on, CSV or Parquet.")],
    others: Annotated[Path, typer.Option(help="Rows of other patients of the same population; 100 or more.")],
    schema_file: Annotated[Path, typer.Option("--schema", help="The schema, a JSON file.")],
    reference: Annotated[
        Path | None, typer.Option(help="Rows of yet other patients: a second model is trained on them to compare with.")
    ] = None,
    synthetic: Annotated[Path | None, typer.Option(help="Rows that the model generated; by default it does.")] = None,
    sampled: Annotated[
        int | None, typer.Option(min=20, help="Rows to generate; by default as many as members. More attack better.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The epsilon that is claimed for the model.")] = None,
    delta: Annotated[float | None, typer.Option(help="The delta that goes with it.")] = None,
    seed: Annotated[int, typer.Option(help="Root of all randomness.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Also put the figures into the model's card.md.")] = False,
) -> None:
    """Ask of patients' rows whether the model was trained on them, in six ways."""
    from mcrage.data.schema import TableSchema
    from mcrage.evaluation.membership import membership_report
    from mcrage.generator import load_generator
    from mcrage.render.attacks import attacks_table
    from mcrage.render.card import write_audit

    _check_options(synthetic, sampled, epsilon, delta)
    schema, model = TableSchema.load(schema_file), load_generator(model_dir)
    if differences := model.schema_.diff(schema):
        raise SchemaError("\n".join(f"{schema_file}: not the model's schema: {line}" for line in differences))
    tables = {"members": _read(members, schema), "others": _read(others, schema)}
    reference_rows = None if reference is None else _read(reference, schema)
    report = membership_report(
        model,
        _generated(model, synthetic, rows=sampled or len(tables["members"]), seed=seed),
        **tables,
        schema=schema,
        reference_rows=reference_rows,
        reference=_reference_model(model, reference_rows, seed=seed),
        random_state=seed,
    )
    claim = _claim(report, epsilon, delta)
    if as_json:
        typer.echo(json.dumps(report.as_dict() | {"claim": None if claim is None else claim.as_dict()}, indent=1))
    else:
        typer.echo(attacks_table(report, claim), nl=False)
    if card:
        write_audit(model_dir, attacks_table(report, claim))


def _check_options(synthetic: Path | None, sampled: int | None, epsilon: float | None, delta: float | None) -> None:
    if (epsilon is None) != (delta is None):
        raise ConfigError("--epsilon and --delta make a claim together: give both or neither")
    if epsilon is not None and delta is not None and not (epsilon > 0 and 0 <= delta < 1):
        raise ConfigError(f"--epsilon must be above 0 and --delta from 0 to below 1, got {epsilon:g} and {delta:g}")
    if synthetic is not None and sampled is not None:
        raise ConfigError("--sampled is for rows that the model generates; with --synthetic it does not")


def _claim(report: "MembershipReport", epsilon: float | None, delta: float | None) -> "Consistency | None":
    from mcrage.evaluation.membership import consistency

    return None if epsilon is None or delta is None else consistency(report, epsilon=epsilon, delta=delta)


def _read(path: Path, schema: "TableSchema") -> "pd.DataFrame":
    from mcrage.data.reader import inspect_table

    report = inspect_table(path, schema)
    if report.table is None:
        raise DataError(report.problems, source=str(path))
    for note in report.notes:
        _say(f"{path}: note {note}")
    return report.table


def _generated(model: "Generator", path: Path | None, *, rows: int, seed: int) -> "pd.DataFrame":
    """Generated rows from a file, which has the modelled columns only, or else from the model."""
    if path is not None:
        return _read(path, model.schema_.model_copy(update={"columns": model.schema_.modelled, "rules": ()}))
    _say(f"sampling {rows:,} rows")
    return model.sample(rows, random_state=seed)


def _reference_model(model: "Generator", rows: "pd.DataFrame | None", *, seed: int) -> "CDDPM | None":
    """A network with the same settings that was trained on other rows; None without such rows, or for no network."""
    from mcrage import rng
    from mcrage.cddpm import CDDPM

    if rows is None or not isinstance(model, CDDPM):
        return None
    _say(f"training a reference model on {len(rows):,} rows")
    settings: dict[str, Any] = model.get_params() | {"random_state": rng.derive(seed, "reference"), "verbose": 1}
    return CDDPM(**settings).fit(rows, model.schema_)


def _say(text: str) -> None:
    typer.echo(text, err=True)
