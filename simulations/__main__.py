"""``python -m simulations``: pretend hospitals, and what a federation does for them.

Results go to files and a summary to stdout, progress and problems to stderr, a line each. Exit codes: 0 done, 1 the
run failed, 2 usage or bad input.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcrage.errors import ConfigError, FederationError, McrageError

if TYPE_CHECKING:
    from simulations.settings import ExperimentConfig, Places
    from simulations.study import Study

app = typer.Typer(
    help="Pretend hospitals: experiments with the whole system on one machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="Folder for everything that is written.")]
Dataset = Annotated[str, typer.Option(help="Name of the data set; cohort is simulated and needs no download.")]
Seed = Annotated[int, typer.Option(min=0, help="Root of all randomness.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds of the federation.")]
LocalSteps = Annotated[int | None, typer.Option(min=1, help="Training steps at each hospital per round.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any other setting, such as target_multiple=2 or strategy=fedprox."
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes for the evaluation.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in the folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the settings and what would be done, and stop.")]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; errors become one line per problem on stderr and exit code 2, or 1 for a failed run."""
    try:
        app(arguments)
    except McrageError as error:
        typer.echo(str(error), err=True)
        sys.exit(1 if isinstance(error, FederationError) else 2)
    except Exception as error:
        if os.environ.get("MCRAGE_DEBUG"):
            raise
        # The text of an unforeseen error may hold a cell of a patient's row.
        typer.echo(f"unexpected {type(error).__name__}; set MCRAGE_DEBUG=1 to see where", err=True)
        sys.exit(1)


@app.command("demo")
def demo(  # noqa: PLR0913 — one per option
    *,
    out: Out = Path("runs/demo"),
    dataset: Dataset = "cohort",
    seed: Seed = 0,
    rounds: Rounds = None,
    local_steps: LocalSteps = None,
    settings: Settings = None,
    sites: Annotated[int | None, typer.Option(min=2, help="Hospitals of the simulated cohort.")] = None,
    patients: Annotated[int | None, typer.Option(min=20, help="Patients of each.")] = None,
    workers: Workers = 2,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """The main job: hospitals, a federated model, synthetic rows, and who they help."""
    from simulations.cohort import CohortConfig
    from simulations.settings import Places
    from simulations.study import written_study

    config = _config(seed, rounds=rounds, local_steps=local_steps, settings=settings)
    size = {"num_sites": sites, "patients_per_site": patients}
    cohort = CohortConfig(**{name: value for name, value in size.items() if value is not None})
    places = Places(out=out, resume=resume, num_workers=workers)
    if dry_run:
        _print_plan(config, places, dataset=dataset)
        return
    _run(written_study(dataset, out / "sites", seed=seed, cohort=cohort), config, places)


@app.command("run")
def run(  # noqa: PLR0913 — one per option
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="CSV or Parquet files, one per hospital.")],
    *,
    schema: Annotated[Path, typer.Option(help="The data dictionary that they share, a JSON file.")],
    out: Out = Path("runs/own"),
    minority: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=LEVEL", help="Group that the headline is about; by default those under a quarter."
        ),
    ] = None,
    seed: Seed = 0,
    rounds: Rounds = None,
    local_steps: LocalSteps = None,
    settings: Settings = None,
    workers: Workers = 2,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """The same with your own files, one per hospital, each tested on patients that it held out."""
    from simulations.experiment import check_study
    from simulations.settings import Places
    from simulations.study import own_study

    config = _config(seed, rounds=rounds, local_steps=local_steps, settings=settings)
    places = Places(out=out, resume=resume, num_workers=workers)
    study = own_study(schema, files, minority_groups=minority or [])
    check_study(study)
    if dry_run:
        _print_plan(config, places, dataset=study.dataset, study=study)
        return
    _run(study, config, places)


@app.command("compare")
def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file such as those in simulations/configs.")],
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything; by default runs/ and the file's name.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Experiments at the same time.")] = 2,
    dry_run: DryRun = False,
) -> None:
    """One experiment with several seeds; seeds that are done are not run again."""
    from simulations.compare import Comparison, run_comparison, table_of

    comparison = Comparison.load(config)
    out = out or Path("runs") / config.stem
    if dry_run:
        _print_settings(comparison.config(comparison.seeds[0]).to_flat())
        typer.echo(f"{comparison.dataset}: seeds {', '.join(map(str, comparison.seeds))}; results in {out}")
        _print_privacy(comparison.config(comparison.seeds[0]), comparison.dataset)
        return
    typer.echo(table_of(run_comparison(comparison, out, num_workers=workers)))
    typer.echo(out / "summary.json")


@app.command("privacy-budget")
def privacy_budget(  # noqa: PLR0913 — one per option
    *,
    out: Out = Path("runs/privacy-budget"),
    dataset: Dataset = "cohort",
    sites: Annotated[int | None, typer.Option(min=2, help="Hospitals; by default those of the data set.")] = None,
    patients: Annotated[int | None, typer.Option(min=20, help="Patients of each.")] = None,
    epsilon: Annotated[list[str], typer.Option(help="Epsilons, with commas or one by one; inf is no noise.")] = [  # noqa: B006
        "1,3,8,inf"
    ],
    noise: Annotated[
        str, typer.Option(help="Where it is added: local, shared, or both with a comma.")
    ] = "local,shared",
    generator: Annotated[str, typer.Option(help="cddpm, marginal, or both with a comma.")] = "cddpm,marginal",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas; each draws hospitals of its own.")] = "0",
    rounds: Rounds = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any other setting; shared.width=64 is for cells with shared noise only."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells at the same time.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in a folder that has cells.")] = False,
    dry_run: DryRun = False,
) -> None:
    """What each epsilon costs each group, by generator and by where the noise is added."""
    from simulations.privacy_budget.cells import Sweep, numbers, parse_settings, whole_numbers
    from simulations.privacy_budget.plan import plan_lines
    from simulations.privacy_budget.report import PAGE, TABLE, write_report
    from simulations.privacy_budget.run import run_sweep

    sweep = Sweep(
        dataset=dataset,
        sites=sites,
        patients=patients,
        seeds=whole_numbers(seeds, option="--seeds"),
        generators=tuple(generator.split(",")),
        noises=tuple(noise.split(",")),
        epsilons=numbers(epsilon, option="--epsilon"),
        given=parse_settings(settings or [], rounds=rounds),
    )
    if dry_run:
        for line in plan_lines(sweep):
            typer.echo(line)
        return
    typer.echo(write_report(run_sweep(sweep, out, resume=resume, num_workers=workers), out))
    for name in (PAGE, TABLE):
        typer.echo(out / name)


@app.command("sites")
def sites(
    *,
    out: Annotated[Path, typer.Option(help="Folder for schema.json and one site-*.csv per hospital.")],
    dataset: Dataset = "cohort",
    seed: Seed = 0,
) -> None:
    """Only write the hospitals' files, for 'flwr run .' and for looking at."""
    from simulations.study import written_study

    for path in written_study(dataset, out, seed=seed).files:
        typer.echo(path)


@app.command("flower")
def flower(
    *,
    out: Out = Path("runs/flower"),
    dataset: Dataset = "cohort",
    seed: Seed = 0,
    rounds: Rounds = None,
    local_steps: LocalSteps = None,
    settings: Settings = None,
    resume: Resume = False,
) -> None:
    """Train in Flower's own simulation, as 'flwr run .' does, with an exit code that tells a failed run."""
    from mcrage.config import PlacesConfig, RunConfig
    from simulations.flower import flwr_run
    from simulations.study import written_study

    config = _config(seed, rounds=rounds, local_steps=local_steps, settings=settings)
    study = written_study(dataset, out / "sites", seed=seed)
    places = PlacesConfig(site_dir=str(out / "sites"), out_dir=str(out), resume=resume)
    run_config = RunConfig(federation=config.federation, privacy=config.privacy, places=places)
    if code := flwr_run(Path(__file__).parents[1], run_config, num_sites=len(study.files)):
        raise typer.Exit(code)
    typer.echo(out / "model")


@app.command(
    "paper", context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
)
def paper(context: typer.Context) -> None:
    """The experiment of the MCRAGE paper, as printed and done right; 'paper --help' lists its options."""
    from simulations.paper import main as paper_main

    paper_main(context.args)


def _config(
    seed: int, *, rounds: int | None, local_steps: int | None, settings: list[str] | None
) -> "ExperimentConfig":
    from simulations.settings import parse_config

    given: dict[str, Any] = {"seed": seed}
    for text in settings or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes KEY=VALUE, got '{text}'")
        given[key] = _scalar(value)
    for key, number in (("num_server_rounds", rounds), ("local_steps", local_steps)):
        if number is not None:
            given[key] = number
    return parse_config(given)


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _run(study: "Study", config: "ExperimentConfig", places: "Places") -> None:
    from mcrage.render.text import summary_table
    from simulations.experiment import MODEL, SYNTHETIC, run_experiment
    from simulations.results import REPORT, RESULTS

    results = run_experiment(study, config, places)
    typer.echo(summary_table(results))
    took = f"{results.run.seconds:.0f} s, at most {results.run.peak_memory_mb / 1024:.1f} GB of memory"
    typer.echo(f"{took}; engine: {results.run.engine}")
    for name in (REPORT, RESULTS, SYNTHETIC, MODEL):
        typer.echo(places.out / name)


def _print_settings(settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        typer.echo(f"{key} = {value}")


def _print_plan(config: "ExperimentConfig", places: "Places", *, dataset: str, study: "Study | None" = None) -> None:
    _print_settings(config.to_flat())
    for site, table in study.hospitals.tables.items() if study else ():
        typer.echo(f"hospital {site}: {len(table):,} rows")
    done = f"{config.federation.total_steps:,} training steps at each hospital"
    if config.federation.generator == "marginal":
        done = f"at most {config.federation.rounds} questions for tables of counts"
    typer.echo(f"{dataset}: {done}, then the evaluation; results in {places.out}")
    _print_privacy(config, dataset, study)


def _print_privacy(config: "ExperimentConfig", dataset: str, study: "Study | None" = None) -> None:
    if not config.privacy.dp:
        typer.echo("privacy: none is claimed; hospitals release model parameters, histograms and counts of at least 11")
        return
    from mcrage.config import RunConfig
    from server.budget import plan_lines, prospect
    from simulations.study import hospitals_of

    hospitals = study.hospitals if study else hospitals_of(dataset, seed=config.seed)
    run = RunConfig(federation=config.federation, privacy=config.privacy)
    for line in plan_lines(run, hospitals.schema):
        typer.echo(line)
    patients = hospitals.training_patients(config.federation.test_fraction)
    typer.echo(prospect(run, hospitals.schema, patients=patients, sites=len(hospitals.tables)))


if __name__ == "__main__":
    main()
