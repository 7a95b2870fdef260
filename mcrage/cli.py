"""The ``mcrage`` command: the library's verbs on a person's own files, without any federation.

Results go to files or to stdout, progress and problems to stderr, a line each. Exit codes: 0 done, 1 the schemas
differ (``schema diff``) or a defect of the program, 2 usage or bad input, 3 refused on privacy grounds.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcrage import audit_cli, budget, pki_cli
from mcrage.errors import ConfigError, DataError, McrageError, PrivacyError, Problem

if TYPE_CHECKING:
    import pandas as pd

    from mcrage.data.schema import TableSchema

_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
app = typer.Typer(help="Records for minority groups from a model that all hospitals trained.", **_SETTINGS)
schema_app = typer.Typer(help="Draft, check and compare data dictionaries.", **_SETTINGS)
app.add_typer(schema_app, name="schema")
app.add_typer(budget.app, name="budget")
app.add_typer(audit_cli.app, name="audit")
app.add_typer(pki_cli.app, name="pki")

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="CSV or Parquet files, one per hospital.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")]


def main() -> None:
    """Runs the command; errors become one line per problem on stderr and exit code 2 or 3."""
    try:
        app()
    except McrageError as error:
        _say(str(error))
        sys.exit(3 if isinstance(error, PrivacyError) else 2)
    except Exception as error:
        if os.environ.get("MCRAGE_DEBUG"):
            raise
        # The text of an unforeseen error may hold a cell of a patient's row.
        _say(f"unexpected {type(error).__name__}; set MCRAGE_DEBUG=1 to see where")
        sys.exit(1)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _version(asked: bool) -> None:
    if asked:
        from mcrage import __version__

        typer.echo(f"mcrage {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@schema_app.command("infer")
def schema_infer(
    files: Files,
    *,
    out: Annotated[Path, typer.Option(help="Where the schema goes, a JSON file.")],
    target: Annotated[str | None, typer.Option(help="Column with the outcome, two levels.")] = None,
    sensitive: Annotated[str, typer.Option(help="Columns that define the groups, parted by commas.")] = "",
    patient_id: Annotated[str | None, typer.Option(help="Column that names the patient.")] = None,
    site: Annotated[str | None, typer.Option(help="Column that names the hospital.")] = None,
    force: Force = False,
) -> None:
    """Draft a schema from files, for people to review before it is shared."""
    from mcrage.data.infer import draft_schema

    _refuse_to_replace(out, force=force)
    names = [name.strip() for name in sensitive.split(",") if name.strip()]
    schema = draft_schema(files, target=target, sensitive=names, patient_id=patient_id, site=site, name=out.stem)
    _write_text(out, schema.to_json() + "\n")
    for column in schema.columns:
        if column.to_review:
            _say(f"column '{column.name}' ({column.kind}, {column.role}): to review: {', '.join(column.to_review)}")
    typer.echo(f"{out}: {len(schema.columns)} columns; review what is named above, then empty its to_review")


@schema_app.command("check")
def schema_check(
    schema_file: Annotated[Path, typer.Argument(metavar="SCHEMA", help="The schema, a JSON file.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE...]", help="Tables to check against it.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a schema, and tables against it: every problem is one line, and makes the exit code 2."""
    from mcrage.data.reader import inspect_table
    from mcrage.data.schema import TableSchema

    schema = TableSchema.load(schema_file)
    reports = {str(path): inspect_table(path, schema) for path in files or []}
    if as_json:
        tables = [
            {"file": path, "problems": _plain(report.problems), "notes": _plain(report.notes)}
            for path, report in reports.items()
        ]
        to_review = {column.name: column.to_review for column in schema.columns if column.to_review}
        typer.echo(json.dumps({"fingerprint": schema.fingerprint, "to_review": to_review, "files": tables}, indent=1))
    else:
        _print_check(schema_file, schema)
        for path, report in reports.items():
            for problem in report.problems:
                _say(f"{path}: {problem}")
            for note in report.notes:
                _say(f"{path}: note {note}")
            if report.table is not None:
                typer.echo(f"{path}: {len(report.table):,} rows follow the schema")
    if any(report.problems for report in reports.values()):
        raise typer.Exit(2)


def _plain(problems: tuple[Problem, ...]) -> list[dict[str, Any]]:
    return [asdict(problem) for problem in problems]


def _print_check(path: Path, schema: "TableSchema") -> None:
    if to_review := [column.name for column in schema.columns if column.to_review]:
        _say(f"{path}: note: drafted from data and not reviewed yet: {', '.join(to_review)}")
    typer.echo(f"{path}: {len(schema.columns)} columns, fingerprint {schema.fingerprint[:16]}")


@schema_app.command("diff")
def schema_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A schema.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another schema.")],
) -> None:
    """Show what differs between two schemas; exit code 0 if nothing that matters does, else 1."""
    from mcrage.data.schema import TableSchema

    lines = TableSchema.load(first).diff(TableSchema.load(second))
    for line in lines:
        typer.echo(line)
    if lines:
        raise typer.Exit(1)


@app.command("fit")
def fit(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="A CSV or Parquet file.")],
    *,
    schema_file: Annotated[Path, typer.Option("--schema", help="The schema, a JSON file.")],
    out: Annotated[Path, typer.Option(help="Folder that the model goes to.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; by default from the number of rows.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Root of all randomness.")] = 0,
    force: Force = False,
) -> None:
    """Train a model on one table."""
    from mcrage.cddpm import CDDPM
    from mcrage.data.reader import inspect_table
    from mcrage.data.schema import TableSchema

    _refuse_to_replace(out, force=force)
    schema = TableSchema.load(schema_file)
    report = inspect_table(table, schema)
    if report.table is None:
        raise DataError(report.problems, source=str(table))
    for note in report.notes:
        _say(f"{table}: note {note}")
    model = CDDPM(steps=steps, random_state=seed, verbose=1).fit(report.table, schema)
    model.save(out)
    length = "" if steps else ", the default for so many; --steps changes it"
    typer.echo(f"{out}: trained on {len(report.table):,} rows for {model.steps_:,} steps{length}")


@app.command("sample")
def sample(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a trained model.")],
    *,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of rows.")],
    out: Annotated[Path, typer.Option(help="Where the rows go: .csv or .parquet.")],
    where: Annotated[list[str] | None, typer.Option(help="COLUMN=LEVEL; give it once per column.")] = None,
    seed: Annotated[int, typer.Option(help="Root of all randomness.")] = 0,
    force: Force = False,
) -> None:
    """Draw rows from a model, of one group if asked."""
    from mcrage.generator import load_generator

    if out.suffix.lower() not in (".csv", ".parquet"):
        raise ConfigError(f"'{out}' is neither .csv nor .parquet")
    _refuse_to_replace(out, force=force)
    conditions = _conditions(where or [])
    trained = load_generator(model)
    rows = trained.sample(n, _levels(conditions, trained.schema_), random_state=seed)
    for line in trained.repairs_.lines:
        _say(f"{out}: note {line}")
    write_rows(rows, out)
    typer.echo(f"{out}: {len(rows):,} rows")


def _conditions(texts: list[str]) -> dict[str, str]:
    conditions: dict[str, str] = {}
    for text in texts:
        column, equals, level = text.partition("=")
        if not equals or not column:
            raise ConfigError(f"--where takes COLUMN=LEVEL, got '{text}'")
        if column in conditions:
            raise ConfigError(f"--where names column '{column}' twice")
        conditions[column] = level
    return conditions


def _levels(conditions: dict[str, str], schema: "TableSchema") -> dict[str, object]:
    """The same conditions, with a number where a numeric column is given by a value and not by the name of a bin."""
    from mcrage.data.parsing import NUMBER

    return {
        name: float(level) if schema.column(name).is_numeric and NUMBER.fullmatch(level) else level
        for name, level in conditions.items()
    }


def write_rows(rows: "pd.DataFrame", path: Path) -> None:
    """Writes a table to CSV or Parquet; in CSV, a text that a spreadsheet would run as a formula gets a leading '."""
    try:
        if path.suffix.lower() == ".parquet":
            rows.to_parquet(path, index=False)
        else:
            # The line ends of RFC 4180: with others, a carriage return in a cell would not be quoted.
            _without_formulas(rows).to_csv(path, index=False, lineterminator="\r\n")
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be written: {error.strerror}") from None
    except ImportError:
        raise ConfigError("writing Parquet needs pyarrow: run pip install 'mcrage[data]'") from None


def _without_formulas(rows: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    def escape(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA_STARTS) else cell

    texts = [name for name in rows if not pd.api.types.is_numeric_dtype(rows[name])]
    return rows.assign(**{str(name): rows[name].astype(object).map(escape) for name in texts})


def _refuse_to_replace(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise ConfigError(f"'{path}' is there already; give --force to replace it")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    main()
