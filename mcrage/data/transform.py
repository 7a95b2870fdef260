"""DataFrame ↔ tensors, from the schema alone and, where sites released them, from one-way histograms.

Shape: a table of n rows becomes an :class:`EncodedTable`: ``numeric`` (n, N) of about unit variance in float64,
``codes`` (n, B) with one level per block, ``attributes`` (n, A) with the group level of each sensitive feature and of
the target, −1 where it is not given, and ``covariates`` (n, C) for the label model. A missing cell is a level of its
own, so that it is generated like any other value. The label is no part of the diffused row: it is an attribute only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mcrage.data.coding import NumericCoding, is_coded
from mcrage.data.conditions import asked_levels
from mcrage.data.covariates import Covariates
from mcrage.data.groups import bin_range, group_codes, numbers
from mcrage.data.marginals import Marginals, cell_codes, coded_levels
from mcrage.data.repair import rule_problems
from mcrage.data.schema import Column, TableSchema
from mcrage.data.series import level_series, numeric_series
from mcrage.errors import DataError, Problem


@dataclass(frozen=True)
class Block:
    """Levels of one categorical part of a row.

    Attributes:
        column: The column it belongs to.
        size: Number of levels.
        only_missing: Whether the block says just whether a numeric column is there (0) or missing (1).
    """

    column: Column
    size: int
    only_missing: bool


@dataclass(frozen=True)
class Layout:
    """How wide the parts of an encoded row are.

    Attributes:
        num_numeric: Number of numeric parts.
        block_sizes: Levels of each categorical block.
        attribute_sizes: Levels of each attribute that rows can be conditioned on.
        missing_block: For each numeric part the block that says whether it is missing; −1 if it never is.
        attribute_block: For each attribute the block whose levels are its own; −1 if there is none.
        num_covariates: Numbers that the label model sees.
        has_target: Whether there is a label; it is the last attribute.
    """

    num_numeric: int
    block_sizes: tuple[int, ...]
    attribute_sizes: tuple[int, ...]
    missing_block: tuple[int, ...]
    attribute_block: tuple[int, ...]
    num_covariates: int = 0
    has_target: bool = False

    @property
    def free_attributes(self) -> tuple[int, ...]:
        """Attributes that no block shows: the target, and numbers in bins."""
        return tuple(place for place, block in enumerate(self.attribute_block) if block < 0)

    @property
    def width(self) -> int:
        """Numbers in one diffused row: numerics, then every block one-hot."""
        return self.num_numeric + sum(self.block_sizes)


@dataclass(frozen=True)
class EncodedTable:
    """Rows as tensors; see the module's Shape block. The number of a missing cell is 0."""

    numeric: Float[Tensor, "rows num_numeric"]
    codes: Int[Tensor, "rows num_blocks"]
    attributes: Int[Tensor, "rows num_attributes"]
    covariates: Float[Tensor, "rows num_covariates"]

    def __len__(self) -> int:
        return self.codes.shape[0]

    def rows(self, index: Int[Tensor, " batch"]) -> "EncodedTable":
        """The rows of an index, repeats allowed."""
        return EncodedTable(*(part.index_select(0, index) for part in vars(self).values()))

    def to(self, device: str) -> "EncodedTable":
        """The same rows on a device."""
        return EncodedTable(*(part.to(device) for part in vars(self).values()))


@dataclass(frozen=True)
class Constraint:
    """What conditions say about encoded rows: exact levels of blocks and ranges of numerics.

    Attributes:
        attributes: Condition that the network sees, −1 where open.
        codes: Required level of each block, −1 where open.
        low, high: Bounds of each numeric part.
    """

    attributes: Int[Tensor, "rows num_attributes"]
    codes: Int[Tensor, "rows num_blocks"]
    low: Float[Tensor, "rows num_numeric"]
    high: Float[Tensor, "rows num_numeric"]

    def rows(self, index: slice | NDArray[np.int64]) -> "Constraint":
        """The constraint of some of the rows."""
        return Constraint(*(part[index] for part in vars(self).values()))

    def to(self, device: str) -> "Constraint":
        """The same constraint on a device."""
        return Constraint(*(part.to(device) for part in vars(self).values()))


class TableTransform:
    """The exact two-way map between a table and its encoding.

    Args:
        schema: The data dictionary.
        marginals: Histograms summed over sites; None encodes by bounds and scales alone.
    """

    def __init__(self, schema: TableSchema, marginals: Marginals | None = None) -> None:
        self.schema = schema
        self.marginals = marginals
        self.blocks: list[Block] = []
        self.codings: list[NumericCoding] = []
        missing_block: list[int] = []
        for column in schema.features:
            if is_coded(column):
                self.blocks.append(Block(column, len(coded_levels(column)) + column.nullable, only_missing=False))
                continue
            self.codings.append(NumericCoding(column, _density(column, marginals)))
            missing_block.append(len(self.blocks) if column.nullable else -1)
            if column.nullable:
                self.blocks.append(Block(column, 2, only_missing=True))
        self.covariates = Covariates(
            self.codings, missing=missing_block, ranked=_ranked(self.blocks), marginals=marginals
        )
        self.layout = Layout(
            num_numeric=len(self.codings),
            block_sizes=tuple(block.size for block in self.blocks),
            attribute_sizes=tuple(len(column.group_levels) for column in schema.attributes),
            missing_block=tuple(missing_block),
            attribute_block=tuple(_block_of(column, self.blocks) for column in schema.attributes),
            num_covariates=self.covariates.number,
            has_target=schema.has_target,
        )

    def encode(self, table: pd.DataFrame, *, generator: np.random.Generator) -> EncodedTable:
        """Tensors of a table.

        Args:
            table: Columns of the schema; others are ignored.
            generator: Spreads rounded values over their rounding interval.

        Raises:
            DataError: If a column of the schema is missing, or has cells that the schema does not allow.
        """
        return self.encode_spread(table, generator.uniform(-0.5, 0.5, size=(len(self.codings), len(table))))

    def encode_spread(self, table: pd.DataFrame, jitter: Float[np.ndarray, "num_numeric rows"]) -> EncodedTable:
        """Tensors of a table whose rounded values are spread by given numbers in (−0.5, 0.5).

        With numbers that are each row's own, a row's encoding depends on that row alone.

        Raises:
            DataError: If a column of the schema is missing, or has cells that the schema does not allow.
        """
        check_table(table, self.schema)
        rows = len(table)
        numeric = np.zeros((rows, len(self.codings)))
        for position, coding in enumerate(self.codings):
            values = numbers(table[coding.column.name], coding.column)
            missing = np.isnan(values)
            numeric[:, position] = coding.encode(np.where(missing, coding.column.low, values), jitter[position])
            numeric[missing, position] = 0.0
        codes = np.zeros((rows, len(self.blocks)), dtype=np.int64)
        for position, block in enumerate(self.blocks):
            values_ = table[block.column.name]
            codes[:, position] = values_.isna() if block.only_missing else cell_codes(values_, block.column)
        z, levels = torch.from_numpy(numeric), torch.from_numpy(codes)
        attributes = torch.from_numpy(group_codes(table, self.schema.attributes))
        return EncodedTable(z, levels, attributes, self.covariates(z, levels))

    def decode(
        self,
        numeric: Float[Tensor, "rows num_numeric"],
        codes: Int[Tensor, "rows num_blocks"],
        labels: Int[Tensor, " rows"],
    ) -> pd.DataFrame:
        """The table of encoded rows, with the schema's columns, order and dtypes.

        Args:
            numeric: Numeric parts.
            codes: Level of each block.
            labels: Level of the target; unused where there is none.
        """
        z, levels = numeric.double().numpy(), codes.numpy()
        by_name: dict[str, pd.Series] = {}
        missing = {
            block.column.name: levels[:, position] == (1 if block.only_missing else len(coded_levels(block.column)))
            for position, block in enumerate(self.blocks)
            if block.column.nullable
        }
        for position, coding in enumerate(self.codings):
            name = coding.column.name
            by_name[name] = numeric_series(coding.decode(z[:, position]), missing.get(name), coding.column)
        for position, block in enumerate(self.blocks):
            if not block.only_missing:
                name = block.column.name
                by_name[name] = level_series(levels[:, position], missing.get(name), block.column)
        if self.schema.has_target:
            by_name[self.schema.target.name] = level_series(labels.numpy(), None, self.schema.target)
        return pd.DataFrame({column.name: by_name[column.name] for column in self.schema.modelled})

    def constrain(self, rows: int, conditions: Mapping[str, object] | pd.DataFrame | None) -> Constraint:
        """What conditions say about ``rows`` encoded rows.

        Args:
            rows: Number of rows.
            conditions: Level per attribute, or a table of them (missing = open); bins by name or by a value inside.

        Raises:
            SamplingError: If a name is not an attribute, a level does not exist or the schema's rules forbid it.
        """
        asked = asked_levels(rows, conditions, self.schema)
        codes = np.full((rows, len(self.blocks)), -1, dtype=np.int64)
        low = np.full((rows, len(self.codings)), -np.inf, dtype=np.float32)
        high = np.full_like(low, np.inf)
        for place, column in enumerate(self.schema.attributes):
            given = asked[:, place]
            missing = column.nullable & (given == len(column.group_levels) - 1)
            for position, block in enumerate(self.blocks):
                if block.column.name == column.name and not (column.is_numeric and not block.only_missing):
                    level = np.where(missing, block.size - 1, 0 if block.only_missing else given)
                    codes[:, position] = np.where(given < 0, -1, level)
            for position, coding in enumerate(self.codings):
                if coding.column.name == column.name:
                    for code in np.unique(given[(given >= 0) & ~missing]):
                        ends = coding.bounds(*bin_range(column, int(code)))
                        low[given == code, position], high[given == code, position] = ends
        parts = (torch.from_numpy(part) for part in (asked, codes, low, high))
        return Constraint(*parts)

    def log_prior(self) -> Float[Tensor, " levels"]:
        """Log share of each level of each block, from the histograms; equal shares where there are none."""
        parts = [_prior(block, self.marginals) for block in self.blocks]
        return torch.from_numpy(np.log(np.concatenate([np.zeros(0), *parts]))).float()

    def released_rows(self) -> int:
        """Rows that the histograms count; 0 where there are none."""
        if self.marginals is None:
            return 0
        return int(max(self.marginals[column.name].sum() for column in self.schema.modelled))

    def label_log_odds(self) -> float:
        """Log odds of the label's second level over all rows, from the histograms; 0 where there are none."""
        rows = np.zeros(2) if self.marginals is None else self.marginals[self.schema.target.name][:2]
        return float(np.log((rows[1] + 1.0) / (rows[0] + 1.0)))


def check_table(table: pd.DataFrame, schema: TableSchema) -> None:
    """Raises a DataError with every problem unless the table's modelled columns follow the schema."""
    problems = []
    for column in schema.modelled:
        if column.name not in table.columns:
            problems.append(Problem(code="E201", column=column.name, rule="is missing", remedy="Add the column."))
            continue
        values = table[column.name]
        bad = int(values.isna().sum()) if not column.nullable else 0
        if bad:
            rule, remedy = "are missing where the schema allows none", 'Fill them or set "nullable": true.'
            problems.append(_problem("E206", column, bad, len(table), rule, remedy))
        if not column.is_numeric:
            unseen = int((cell_codes(values[values.notna()], column) == len(column.levels)).sum())
            if unseen:
                rule, remedy = "have a category that the schema lacks", 'Add it to "categories" or set "other".'
                problems.append(_problem("E509", column, unseen, len(table), rule, remedy))
    if problems := problems or rule_problems(table, schema):
        raise DataError(problems)


def _block_of(attribute: Column, blocks: Sequence[Block]) -> int:
    same = (place for place, block in enumerate(blocks) if block.column is attribute and not attribute.is_numeric)
    return next(same, -1)


def _ranked(blocks: Sequence[Block]) -> list[tuple[int, Column, int]]:
    """Blocks whose levels have an order, with the number of levels without *missing*."""
    return [
        (position, block.column, len(coded_levels(block.column)))
        for position, block in enumerate(blocks)
        if not block.only_missing and (block.column.is_numeric or block.column.kind == "ordinal")
    ]


def _prior(block: Block, marginals: Marginals | None) -> NDArray[np.float64]:
    if marginals is None:
        return np.full(block.size, 1.0 / block.size)
    cells = marginals[block.column.name]
    rows = np.array([cells[:-1].sum(), cells[-1]]) if block.only_missing else cells[: block.size]
    return (rows + 1.0) / (rows.sum() + block.size)


def _problem(code: str, column: Column, rows: int, total: int, rule: str, remedy: str) -> Problem:
    return Problem(code=code, column=column.name, rows=rows, total=total, rule=rule, remedy=remedy)


def _density(column: Column, marginals: Marginals | None) -> NDArray[np.float64] | None:
    if marginals is None or marginals[column.name][:-1].sum() == 0:
        return None
    return marginals[column.name][:-1]
