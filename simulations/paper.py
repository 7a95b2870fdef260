"""The MCRAGE experiment (arXiv 2310.18430) over several splits: as it was released, done right, and its baselines.

One hospital's blood counts (``patient-treatment``), 80 % to train and 20 % to test, ``SEX`` left out. In the training
part rows are deleted at random until in-patients are a minority; every remedy then starts from what is left, and a
random forest of the paper's size learns from it. The rows are those of one hospital, so no remedy can add
information: what F1 gains is a better place of the threshold, and the AUROC of the scores shows what that costs.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split

from client.app import app as client_app
from mcrage.cddpm import CDDPM
from mcrage.config import RunConfig
from mcrage.data.groups import GroupCounts
from mcrage.data.schema import Column, TableSchema
from mcrage.generator import Generator
from mcrage.progress import ProgressReport
from mcrage.rebalancing.baselines import ArmSpec, augmented, baseline_builders
from mcrage.rebalancing.plan import RebalancePlan
from mcrage.rebalancing.rebalancer import Rebalancer, make_pool
from mcrage.rng import derive, stream
from server.rounds import run_federation
from simulations import datasets
from simulations.grid import InProcessGrid
from simulations.paper_figures import Summary, format_table, summarise
from simulations.released import released_rows
from simulations.sites import Hospitals, write_sites

Floats = NDArray[np.float64]

DATASET = "patient-treatment"
KEPT = {"out": 0.9, "in": 0.1}
"""Probability that a training row of each class stays."""

FIRST_SPLIT = 1
"""``random_state`` of the first split, which is the paper's only one; the others count up from it."""


class PaperConfig(BaseModel):
    """What changes the result.

    Attributes:
        splits: Random splits into training and test part.
        seed: Root of every draw.
        epochs: Epochs of the released model; the paper's number is 1,000.
        width, steps: Layers and training steps of the CDDPM: small and few, because the minority has about 150 rows.
        target: Rows that each class is raised to in the arms with a target.
        num_hospitals: Pretend hospitals that the imbalanced rows are dealt to.
        num_server_rounds, local_steps: Length of the federated training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    splits: int = Field(default=10, ge=2)
    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=1000, ge=1)
    width: int = Field(default=64, ge=1)
    steps: int = Field(default=300, ge=1)
    target: int = Field(default=4000, ge=1)
    num_hospitals: int = Field(default=5, ge=2)
    num_server_rounds: int = Field(default=40, ge=1)
    local_steps: int = Field(default=15, ge=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One division of the table.

    Attributes:
        seed: Root of the draws that belong to it.
        schema: The data dictionary without ``SEX``.
        original: The training part.
        imbalanced: What deletion left of it.
        test: The test part, as it was.
    """

    seed: int
    schema: TableSchema
    original: pd.DataFrame
    imbalanced: pd.DataFrame
    test: pd.DataFrame

    @property
    def counts(self) -> GroupCounts:
        """Rows of each class in the imbalanced part."""
        return GroupCounts.of(self.imbalanced, self.schema.attributes)


command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main(arguments: Sequence[str]) -> None:
    """The command line: options in, the table to stdout, files to a folder."""
    command(list(arguments), prog_name="python -m simulations paper")


@command.command()
def paper(
    *,
    splits: Annotated[int, typer.Option(min=2, help="Random splits into training and test part.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Root of all randomness.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the released model; the paper has 1,000.")] = 1000,
    out: Annotated[Path, typer.Option(help="Folder for paper.json and paper.txt.")] = Path("runs/paper"),
) -> None:
    """The experiment of the MCRAGE paper, as released and done right, with its baselines."""
    table, schema = paper_table()
    config = PaperConfig(splits=splits, seed=seed, epochs=epochs)
    summaries = run_paper(table, schema, config=config, out=out, verbose=1)
    typer.echo(format_table(summaries, epochs=epochs))
    typer.echo(out / "paper.json")


def run_paper(
    table: pd.DataFrame, schema: TableSchema, *, config: PaperConfig, out: Path, verbose: int = 0
) -> list[Summary]:
    """All arms over all splits.

    Args:
        table: All rows.
        schema: Their data dictionary: numbers and the label.
        config: The settings.
        out: Folder for ``paper.json`` and ``paper.txt``.
        verbose: 1 reports each split on stderr.
    """
    scores: list[dict[str, dict[str, float]]] = []
    with ProgressReport("splits", config.splits, enabled=verbose > 0) as progress:
        for number in range(config.splits):
            split = draw_split(table, schema, number=FIRST_SPLIT + number, seed=config.seed)
            scores.append({arm: evaluate(spec, split) for arm, spec in training_sets(split, config).items()})
            progress.advance(f"F1 of the federated CDDPM {scores[-1]['federated_target']['f1']:.3f}")
    summaries = summarise(scores)
    out.mkdir(parents=True, exist_ok=True)
    content = {"config": config.model_dump(), "rows": [asdict(row) for row in summaries], "splits": scores}
    (out / "paper.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "paper.txt").write_text(format_table(summaries, epochs=config.epochs) + "\n", encoding="utf-8")
    return summaries


def paper_table() -> tuple[pd.DataFrame, TableSchema]:
    """The table with the paper's nine numbers and its label, and the data dictionary for it.

    Raises:
        DatasetUnavailableError: If the data set is not here and cannot be fetched.
    """
    public = datasets.load(DATASET)
    columns = tuple(_plain(column) for column in public.schema.columns if column.name != "SEX")
    schema = TableSchema(name="paper", columns=columns)
    return public.table[[column.name for column in columns]], schema


def draw_split(table: pd.DataFrame, schema: TableSchema, *, number: int, seed: int) -> Split:
    """80 % to train and 20 % to test; then training rows are deleted class by class, with the odds of :data:`KEPT`.

    Args:
        table: All rows.
        schema: The data dictionary.
        number: The division into training and test part, as scikit-learn's ``random_state``.
        seed: Root of all other draws.
    """
    train, test = train_test_split(table, train_size=0.8, shuffle=True, random_state=number)
    seed = derive(seed, "paper", number)
    kept = train[schema.target.name].astype(str).map(KEPT).to_numpy(dtype=np.float64)
    stays = stream(seed, "delete").random(len(train)) < kept
    original, imbalanced, test = (part.reset_index(drop=True) for part in (train, train[stays], test))
    return Split(seed=seed, schema=schema, original=original, imbalanced=imbalanced, test=test)


def training_sets(split: Split, config: PaperConfig) -> dict[str, ArmSpec]:
    """What each arm trains on, in the order of :data:`simulations.paper_figures.ARMS`."""
    rows, schema = split.imbalanced, split.schema
    baselines = baseline_builders(rows, schema, seed=split.seed)
    central = CDDPM(width=config.width, steps=config.steps, random_state=derive(split.seed, "central")).fit(
        rows, schema
    )
    arms = {
        "original": ArmSpec(table=split.original),
        "imbalanced": baselines["local"](),
        "oversampling": baselines["oversampling"](),
        "smote": baselines["smote"](),
        "class_weights": baselines["class_weights"](),
        "gaussian": augmented(rows, _as_rows(split, gaussian_rows(split)), schema),
        "released": augmented(rows, _as_rows(split, _released(split, config.epochs)), schema),
    }
    arms |= _synthetic_arms("central", central, split, target=config.target)
    return arms | _synthetic_arms("federated", federated_model(split, config), split, target=config.target)


def gaussian_rows(split: Split) -> Floats:
    """As many draws of the Gaussian with the minority's mean and covariance as parity takes."""
    minority, missing = _minority(split)
    draw = stream(split.seed, "gaussian")
    return draw.multivariate_normal(minority.mean(axis=0), np.cov(minority, rowvar=False), size=missing)


def federated_model(split: Split, config: PaperConfig) -> Generator:
    """A CDDPM trained by pretend hospitals that the imbalanced rows were dealt to at random."""
    order = stream(split.seed, "deal").permutation(len(split.imbalanced))
    parts = np.array_split(order, config.num_hospitals)
    tables = {f"site-{i:02d}": split.imbalanced.iloc[part] for i, part in enumerate(parts, start=1)}
    with tempfile.TemporaryDirectory() as folder:
        write_sites(Path(folder) / "sites", Hospitals(split.schema, tables))
        run = RunConfig.parse(
            {
                "site-dir": str(Path(folder) / "sites"),
                "out-dir": str(Path(folder) / "out"),
                "num-server-rounds": config.num_server_rounds,
                "local-steps": config.local_steps,
                "width": config.width,
                "min-sites": config.num_hospitals,
                "seed": derive(split.seed, "federation"),
                "test-fraction": 1e-9,  # the test part was set aside before the rows were dealt
                "evaluate-every": 0,
            }
        )
        return run_federation(InProcessGrid.of_folder(client_app, config.num_hospitals, run), run).model


def evaluate(spec: ArmSpec, split: Split) -> dict[str, float]:
    """The paper's forest on one training set, measured on the test part, by name of the metric."""
    forest = RandomForestClassifier(
        n_estimators=80,
        max_depth=3,
        min_samples_split=20,
        min_samples_leaf=10,
        random_state=derive(split.seed, "forest") % 2**32,
    )
    forest.fit(_numbers(spec.table, split.schema), _event(spec.table, split.schema), sample_weight=spec.weights)
    event = _event(split.test, split.schema)
    scores = forest.predict_proba(_numbers(split.test, split.schema))[:, 1]
    labels = scores > 0.5
    return {
        "accuracy": float(accuracy_score(event, labels)),
        "f1": float(f1_score(event, labels)),
        "auroc_labels": float(roc_auc_score(event, labels)),
        "auroc": float(roc_auc_score(event, scores)),
    }


def _synthetic_arms(name: str, model: Generator, split: Split, *, target: int) -> dict[str, ArmSpec]:
    """Arms at parity and at the target, both from one pool of the model's rows."""
    plans = {"parity": RebalancePlan.to_parity(split.counts)}
    plans["target"] = RebalancePlan.to_parity(split.counts, floor=target)
    pool = make_pool(model, split.schema, plans["target"], random_state=derive(split.seed, name, "rows"))
    rebalancer = Rebalancer.from_pool(pool.table, split.schema)
    arms = {}
    for rule, plan in plans.items():
        taken = rebalancer.take(plan, stream(split.seed, name, "take", rule)).table
        arms[f"{name}_{rule}"] = augmented(split.imbalanced, taken, split.schema)
    return arms


def _released(split: Split, epochs: int) -> Floats:
    _, missing = _minority(split)
    rows, event = _numbers(split.imbalanced, split.schema), _event(split.imbalanced, split.schema)
    return released_rows(rows, event, missing, epochs=epochs, seed=derive(split.seed, "released"))


def _minority(split: Split) -> tuple[Floats, int]:
    """Numbers of the minority's rows, and how many rows it lacks for parity."""
    event = _event(split.imbalanced, split.schema)
    return _numbers(split.imbalanced, split.schema)[event], int((~event).sum() - event.sum())


def _as_rows(split: Split, numbers: Floats) -> pd.DataFrame:
    """Numbers as rows of the minority, as they are: neither rounded nor moved into bounds."""
    target = split.schema.target
    made = pd.DataFrame(numbers, columns=_numeric_names(split.schema))
    return made.assign(**{target.name: pd.Categorical([target.positive_level] * len(made), categories=target.levels)})


def _numbers(table: pd.DataFrame, schema: TableSchema) -> Floats:
    return table[_numeric_names(schema)].to_numpy(dtype=np.float64)


def _event(table: pd.DataFrame, schema: TableSchema) -> NDArray[np.bool_]:
    return np.asarray(table[schema.target.name].astype(str) == schema.target.positive_level)


def _numeric_names(schema: TableSchema) -> list[str]:
    return [column.name for column in schema.features]


def _plain(column: Column) -> Column:
    """The column without a sensitive feature's role: the paper rebalances the label alone."""
    return column.model_copy(update={"role": "feature", "bins": ()}) if column.role == "sensitive" else column
