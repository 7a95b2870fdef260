"""MarginalGenerator: rows from noisy counts of few columns at a time.

Example::

    model = MarginalGenerator(random_state=0).fit(table, schema, epsilon=1.0, key=os.urandom(32))
    rows = model.sample(500, conditions={"race": "Black", "readmitted": "yes"})
    model.save("model")
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mcrage import rng
from mcrage.data.conditions import asked_levels
from mcrage.data.crossing import Axis, check_axes
from mcrage.data.groups import Group, GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.repair import follow_rules
from mcrage.data.schema import TableSchema
from mcrage.data.transform import check_table
from mcrage.errors import CheckpointError, ConfigError, McrageError, NotFittedError, PrivacyError, SamplingError
from mcrage.marginal.budget import Budget, Shares, precision
from mcrage.marginal.drawing import draw_rows
from mcrage.marginal.estimation import Source, estimate
from mcrage.marginal.grids import Grid
from mcrage.marginal.model import ColumnModel, MarginalModel
from mcrage.marginal.source import LocalSource
from mcrage.privacy import accounting
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import derive
from mcrage.storage import StoredModel

FORMAT = 1
_NO_KEY = bytes(32)  # picks one row per patient where nothing is kept secret


class MarginalGenerator:
    """A generator of rows whose columns depend on group, label and one other column each.

    It is made from counts alone, and so needs far fewer patients per epsilon than a network does. It knows no
    dependence of three columns, and inside a cell of its tables none at all.

    Args:
        shares: Of the privacy budget; by default those that were best in ``benchmarks/marginal.py``.
        random_state: Seed of sampling. Noise never comes from it.

    Attributes:
        schema_: The data dictionary, once fitted.
        model_: What was estimated.
        events_: What was released of the table, for a ledger; empty for a model of sums of sites.
        epsilon_: What that costs; infinite for exact counts.
        repairs_: What the schema's rules did to the rows that were sampled last.
    """

    in_words = "model of counts of few columns at a time"

    def __init__(self, *, shares: Shares | None = None, random_state: int = 0) -> None:
        self.shares = shares or Shares()
        self.random_state = random_state
        self.events_: tuple[PrivacyEvent, ...] = ()
        self.epsilon_ = math.inf

    def fit(
        self,
        table: pd.DataFrame,
        schema: TableSchema,
        *,
        epsilon: float | None = None,
        delta: float = 1e-5,
        key: bytes | None = None,
    ) -> "MarginalGenerator":
        """Estimates the model of one table.

        *Guarantee*: with a finite epsilon the model, and whatever is sampled from it, is (ε, δ)-differentially private
        for a patient with all rows (neighbours: one patient more or less); :attr:`events_` cover it. That a table does
        not follow the schema is told with exact numbers of rows, to whoever calls this.

        Args:
            table: Rows with the schema's columns; more columns are ignored. Each patient counts with one row.
            schema: The data dictionary.
            epsilon: Of the whole model; None or infinite for exact counts, which protect nobody.
            delta: Of the whole model, far below one in the number of patients.
            key: 32 bytes that nobody else knows, from which the noise follows; needed for a finite epsilon. The same
                key, table and settings give the same model; another table's noise is unrelated.

        Raises:
            DataError: If the table does not follow the schema; with every problem.
            ConfigError: If the table has no rows although counts are exact, or ``epsilon`` is out of range.
            PrivacyError: If a key is missing or of another length, or ``delta`` is out of range.
        """
        limit = math.inf if epsilon is None else epsilon
        budget = Budget(precision=precision(epsilon=limit, delta=delta), shares=self.shares)
        if key is None and not math.isinf(limit):
            raise PrivacyError("a model with noise needs a key of 32 bytes: os.urandom(32), kept secret")
        check_table(table, schema)
        if math.isinf(limit) and not len(table):
            raise ConfigError("the table has no rows; at least one is needed")
        own_key = derive(_NO_KEY if key is None else key, "marginal generator", _digest(table, schema))
        source = LocalSource(table, schema, epsilon=limit, delta=delta, key=own_key)
        self.estimate(schema, source, budget)
        self.events_ = source.events
        self.epsilon_ = accounting.epsilon(source.events, delta=delta)
        return self

    def estimate(self, schema: TableSchema, source: Source, budget: Budget) -> "MarginalGenerator":
        """Estimates the model of whatever a source counts, such as sums of several sites' noisy counts.

        Args:
            schema: The data dictionary.
            source: Answers with counts; what its noise protects is up to it.
            budget: From which the noise of each release follows.
        """
        self.schema_ = schema
        self.model_ = estimate(schema, source, budget)
        self.events_ = ()
        self.epsilon_ = math.inf
        return self

    def sample(
        self,
        n: int,
        conditions: Mapping[str, object] | pd.DataFrame | None = None,
        *,
        random_state: int | None = None,
    ) -> pd.DataFrame:
        """Generated rows with the schema's modelled columns, order and dtypes.

        Args:
            n: Number of rows.
            conditions: Level per attribute (sensitive features and target), or a table with one row of levels per
                row to generate (missing = open). Levels of a numeric feature are its bins, or a value inside one.
            random_state: Seed; the model's own if None.

        Raises:
            NotFittedError: Before :meth:`fit`.
            SamplingError: If a condition names no attribute or no level of it, or the schema's rules forbid it.
        """
        self._require_fitted()
        if n < 0:
            raise SamplingError(f"asked for {n} rows; at least 0 are possible")
        asked = asked_levels(n, conditions, self.schema_)
        seed = self.random_state if random_state is None else random_state
        generator = rng.stream(seed, "sample")
        rows, self.repairs_ = follow_rules(
            draw_rows(self.model_, asked, self.schema_, generator),
            self.schema_,
            asked,
            lambda numbers: draw_rows(self.model_, asked[numbers], self.schema_, generator),
        )
        return rows

    def group_counts(self) -> GroupCounts:
        """Rows of each group, as the released counts tell them; those of 1 to 10 are suppressed.

        Raises:
            NotFittedError: Before :meth:`fit`.
        """
        self._require_fitted()
        rows = float(np.median([cells.sum() for cells in self.model_.marginals.values()]))
        columns, groups = self.schema_.attributes, self.model_.groups
        return GroupCounts(
            {
                Group(tuple((c.name, c.group_levels[level]) for c, level in zip(columns, place, strict=True))): round(
                    rows * float(groups[place])
                )
                for place in np.ndindex(groups.shape)
            }
        ).suppress()

    def save(self, directory: str | Path) -> None:
        """Writes ``model.safetensors`` and ``model.json``; no pickle, and nothing of the key."""
        self._require_fitted()
        columns = self.model_.columns
        description = {
            "generator": "marginal",
            "format": FORMAT,
            "schema": json.loads(self.schema_.to_json()),
            "marginals": self.model_.marginals.to_wire(),
            "columns": [
                {"name": each.grid.column.name, "merged": each.grid.merged, "parent": each.parent} for each in columns
            ],
            "events": [asdict(event) for event in self.events_],
            "epsilon": None if math.isinf(self.epsilon_) else self.epsilon_,
        }
        arrays = {"groups": self.model_.groups} | {each.grid.column.name: each.shares for each in columns}
        named = {f"shares.{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
        settings = {"shares": asdict(self.shares), "random_state": self.random_state}
        StoredModel(json.dumps(description), settings, named, {}).write(Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> "MarginalGenerator":
        """The model that :meth:`save` wrote.

        Raises:
            CheckpointError: If a file is missing, damaged or not of this format.
        """
        stored = StoredModel.read(Path(directory))
        try:
            content: dict[str, Any] = json.loads(stored.description)
            if content["format"] != FORMAT:
                raise CheckpointError(f"{directory}: format {content['format']}; this version reads format {FORMAT}")
            model = cls(shares=Shares(**stored.settings["shares"]), random_state=int(stored.settings["random_state"]))
            model.schema_ = schema = TableSchema.parse(content["schema"])
            marginals = Marginals.from_wire(content["marginals"], schema)
            columns = _columns(content["columns"], stored, schema, marginals)
            model.model_ = MarginalModel(marginals, stored.parameters["shares.groups"], columns)
            model.model_.check(schema)
            model.events_ = tuple(PrivacyEvent(**event) for event in content["events"])
            model.epsilon_ = math.inf if content["epsilon"] is None else float(content["epsilon"])
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, McrageError) as error:
            raise CheckpointError(f"{directory}: not a model of this version ({type(error).__name__})") from None
        return model

    def _require_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise NotFittedError("the model has no counts yet: call fit, or load a saved one")


def _columns(
    content: Sequence[Mapping[str, Any]], stored: StoredModel, schema: TableSchema, marginals: Marginals
) -> tuple[ColumnModel, ...]:
    columns = []
    for each in content:
        merged = tuple(each["merged"])
        check_axes([(Axis(each["name"], merged),)], schema)
        grid = Grid.of(schema.column(each["name"]), merged, marginals[each["name"]])
        columns.append(ColumnModel(grid, each["parent"], stored.parameters[f"shares.{each['name']}"]))
    return tuple(columns)


def _digest(table: pd.DataFrame, schema: TableSchema) -> bytes:
    """Of all that counts depend on: other rows must have other noise."""
    names = [column.name for column in (*schema.modelled, schema.patient_id) if column is not None]
    text = table[[name for name in names if name in table]].to_csv(index=False)
    return hashlib.sha256(text.encode()).digest()
