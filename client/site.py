"""One hospital: its table, its data dictionary, and the three things it does when asked.

A hospital names its files itself, in its node configuration: ``site``, ``data-path``, ``schema-path`` and, if it
likes, ``num-threads``. Nothing that the server sends can make it read another file. Flower's simulation gives a node
only its number, so a pretend hospital takes the file of that rank in the run configuration's ``site-dir``.
"""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mcrage import rng
from mcrage.cddpm import CDDPM
from mcrage.config import RunConfig, Scalar
from mcrage.data.groups import MINIMUM_CELL, Group, GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.reader import read_table
from mcrage.data.schema import Column, TableSchema
from mcrage.data.split import split_by_patient
from mcrage.data.transform import EncodedTable
from mcrage.errors import ConfigError, SchemaError
from mcrage.messages import (
    SITE_NAME,
    DescribeInstruction,
    EvaluateInstruction,
    SiteDescription,
    SiteLoss,
    SiteUpdate,
    TrainInstruction,
)
from mcrage.training.local import TrainingConfig

_KEPT_IN_MEMORY = 128


@dataclass(frozen=True)
class Site:
    """Where a hospital's files are.

    Attributes:
        name: Lower-case letters, digits, ``-`` and ``_``; at most 64.
        data_path: Its table.
        schema_path: Its data dictionary.
        num_threads: Threads of torch.
    """

    name: str
    data_path: Path
    schema_path: Path
    num_threads: int = 1

    @classmethod
    def of(cls, node_config: Mapping[str, Scalar], run_config: Mapping[str, Scalar]) -> "Site":
        """The site that a node configuration describes.

        Raises:
            ConfigError: If a path is missing, or a name is not allowed.
        """
        if "site" in node_config:
            return _deployed(node_config)
        if "partition-id" in node_config:
            return _simulated(node_config, RunConfig.parse(run_config))
        raise ConfigError("the node configuration names no site: set site, data-path and schema-path")

    def __post_init__(self) -> None:
        if not re.fullmatch(SITE_NAME, self.name):
            raise ConfigError(f"site name {self.name!r}: expected a-z, 0-9, - and _, at most 64, no - or _ first")

    def describe(self, instruction: DescribeInstruction) -> SiteDescription:
        """What the server may know about the training rows before training."""
        schema, train, _ = self._tables(instruction.test_fraction)
        return SiteDescription(
            site=self.name,
            schema_fingerprint=schema.fingerprint,
            schema_text=schema.to_json(),
            group_counts=releasable_counts(train, schema.attributes),
            marginals=Marginals.of(train, schema) if instruction.marginals else None,
            versions=_versions(),
        )

    def train(self, instruction: TrainInstruction) -> SiteUpdate:
        """Takes the asked steps from the parameters that came, with an optimiser that starts anew each round."""
        torch.set_num_threads(self.num_threads)
        model = self._model(instruction)
        encoded = _encoded(self._key(instruction.test_fraction), instruction.description, instruction.seed)
        update = model.train_locally(
            encoded,
            steps=range(instruction.first_step, instruction.first_step + instruction.local_steps),
            config=TrainingConfig(
                batch_size=instruction.batch_size,
                learning_rate=instruction.learning_rate,
                warmup_steps=instruction.warmup_steps,
                total_steps=instruction.total_steps,
                proximal_mu=instruction.proximal_mu,
            ),
            generator=rng.torch_stream(instruction.seed, "train", self.name, instruction.server_round),
        )
        return SiteUpdate(server_round=instruction.server_round, loss=update.loss, parameters=update.parameters)

    def evaluate(self, instruction: EvaluateInstruction) -> SiteLoss:
        """Loss on the test rows; the same draws in every round, so that rounds can be compared."""
        torch.set_num_threads(self.num_threads)
        model = self._model(instruction)
        _, _, test = self._tables(instruction.test_fraction)
        loss = model.loss(test, random_state=rng.derive(instruction.seed, "evaluate", self.name))
        return SiteLoss(server_round=instruction.server_round, loss=loss)

    def _model(self, instruction: TrainInstruction | EvaluateInstruction) -> CDDPM:
        schema, _, _ = self._tables(instruction.test_fraction)
        model = _model(instruction.description)
        if model.schema_.fingerprint != schema.fingerprint:
            raise SchemaError("the model is for tables of another schema than this site's")
        model.load_parameters(instruction.parameters)
        return model

    def _tables(self, test_fraction: float) -> tuple[TableSchema, pd.DataFrame, pd.DataFrame]:
        return _tables(self._key(test_fraction))

    def _key(self, test_fraction: float) -> "_TableKey":
        return _TableKey(self.name, _stamp(self.data_path), _stamp(self.schema_path), test_fraction)


def releasable_counts(table: pd.DataFrame, columns: tuple[Column, ...]) -> GroupCounts:
    """Rows per group, without those that could give a count from 1 to 10 away.

    Small groups are hidden, and with them further groups, smallest first, until within every level of every attribute
    and in the whole table the hidden rows are none or at least 11: otherwise a known total would give them away.
    """
    exact = GroupCounts.of(table, columns)
    hidden = {group for group, count in exact.items() if count < MINIMUM_CELL}
    while further := _gives_away(exact, hidden):
        hidden.add(further)
    return GroupCounts({group: count for group, count in exact.items() if group not in hidden}, suppressed=hidden)


def _gives_away(exact: GroupCounts, hidden: set[Group]) -> Group | None:
    margins: list[tuple[tuple[str, str], ...]] = [
        (),
        *((pair,) for pair in dict.fromkeys(p for g in exact for p in g.levels)),
    ]
    for margin in margins:
        inside = [group for group in exact if set(margin) <= set(group.levels)]
        rows = sum(exact[group] for group in inside if group in hidden)
        shown = [group for group in inside if group not in hidden]
        if 0 < rows < MINIMUM_CELL and shown:
            return min(shown, key=lambda group: (exact[group], str(group)))
    return None


@dataclass(frozen=True)
class _Stamp:
    """A file as it was when it was read: another time or size is another file."""

    path: Path
    modified_ns: int
    size: int


@dataclass(frozen=True)
class _TableKey:
    site: str
    data: _Stamp
    schema: _Stamp
    test_fraction: float


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from None
    return _Stamp(path, status.st_mtime_ns, status.st_size)


# A simulation asks the same process hundreds of times: reading once per file saves more than training costs.
@lru_cache(maxsize=_KEPT_IN_MEMORY)
def _tables(key: _TableKey) -> tuple[TableSchema, pd.DataFrame, pd.DataFrame]:
    schema = TableSchema.load(key.schema.path)
    train, test = split_by_patient(read_table(key.data.path, schema), schema, test_fraction=key.test_fraction)
    return schema, train, test


@lru_cache(maxsize=_KEPT_IN_MEMORY)
def _encoded(key: _TableKey, description: str, seed: int) -> EncodedTable:
    _, train, _ = _tables(key)
    return _model(description).transform.encode(train, generator=rng.stream(seed, "encode", key.site))


@lru_cache(maxsize=1)
def _model(description: str) -> CDDPM:
    return CDDPM.from_description(description)


def _deployed(node_config: Mapping[str, Scalar]) -> Site:
    missing = [key for key in ("data-path", "schema-path") if not isinstance(node_config.get(key), str)]
    num_threads = node_config.get("num-threads", 1)
    if missing:
        raise ConfigError(f"the node configuration lacks {' and '.join(missing)}: give paths on this machine")
    if type(num_threads) is not int or num_threads < 1:
        raise ConfigError(f"num-threads: expected a whole number of at least 1, it is {num_threads!r}")
    data_path, schema_path = Path(str(node_config["data-path"])), Path(str(node_config["schema-path"]))
    return Site(str(node_config["site"]), data_path, schema_path, num_threads)


def _simulated(node_config: Mapping[str, Scalar], config: RunConfig) -> Site:
    folder = Path(config.places.site_dir)
    if not config.places.site_dir or not folder.is_dir():
        raise ConfigError("site-dir: expected the folder of the pretend hospitals' files (an absolute path)")
    files = sorted(folder.glob("site-*.csv"), key=lambda path: (len(path.name), path.name))
    if node_config.get("num-partitions") != len(files):
        nodes = node_config.get("num-partitions")
        raise ConfigError(f"site-dir has {len(files)} tables for {nodes} nodes: run with num-supernodes={len(files)}")
    data_path = files[int(node_config["partition-id"])]
    return Site(data_path.stem, data_path, folder / "schema.json", config.execution.num_threads)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pandas": pd.__version__,
        "torch": torch.__version__,
    }
