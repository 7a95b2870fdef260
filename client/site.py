"""One hospital: its table, its data dictionary, and the three things it does when asked.

A hospital names its files itself, in its node configuration: ``site``, ``data-path``, ``schema-path``, ``private-dir``
(see :mod:`client.protection`) and, if it likes, ``num-threads``. Nothing that the server sends can make it read another
file. Flower's simulation gives a node only its number, so a pretend hospital takes the file of that rank in the run
configuration's ``site-dir``, and a private folder beside it.

Whatever is asked goes the same way: the schema, the policy, the model, the ledger, and only then the table.
"""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from client import tables
from client.places import SECRET
from client.policy import Instruction
from client.pretend import pretend_private_folder
from client.protection import Protection, Release, instruction_digest
from mcrage import __version__, rng
from mcrage.cddpm import CDDPM
from mcrage.config import SITE_NAME, RunConfig, Scalar
from mcrage.data.crossing import Axes, exact_counts, from_json
from mcrage.data.groups import MINIMUM_CELL, Group, GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import ConfigError, MessageError, ParameterError, RefusedError
from mcrage.messages import (
    AccountInstruction,
    CountInstruction,
    DescribeInstruction,
    EvaluateInstruction,
    SiteAccount,
    SiteCounts,
    SiteDescription,
    SiteLoss,
    SiteScores,
    SiteSum,
    SiteUpdate,
    SumInstruction,
    TrainInstruction,
)
from mcrage.privacy import counts
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import read_secret
from mcrage.privacy.pairs import noisy_tables, tables_event
from mcrage.privacy.shared import SharedNoise, as_words
from mcrage.privacy.shared_counts import SharedCounts
from mcrage.refusals import OF_FAULT
from mcrage.signing import signed
from mcrage.training.local import TrainingConfig, train_steps
from mcrage.training.private import DPSGDConfig, PatientRows, RoundKeys, train_privately
from mcrage.training.shared import noisy_sum
from mcrage.wire import Wire


@dataclass(frozen=True)
class Site:
    """Where a hospital's files are.

    Attributes:
        name: Lower-case letters, digits, ``-`` and ``_``; at most 64.
        data_path: Its table.
        schema_path: Its data dictionary.
        private_dir: Its policy, ledger and secret.
        num_threads: Threads of torch.
    """

    name: str
    data_path: Path
    schema_path: Path
    private_dir: Path
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
        raise ConfigError("the node configuration names no site: set site, data-path, schema-path and private-dir")

    def __post_init__(self) -> None:
        if not re.fullmatch(SITE_NAME, self.name):
            raise ConfigError(f"site name {self.name!r}: expected a-z, 0-9, - and _, at most 64, no - or _ first")

    def describe(self, instruction: DescribeInstruction) -> SiteDescription:
        """What the server may know about the training rows before training."""
        schema = self._schema(instruction)
        group_counts, marginals = self._described(instruction, schema)
        return SiteDescription(
            site=self.name,
            schema_fingerprint=schema.fingerprint,
            schema_text=schema.to_json(),
            group_counts=group_counts,
            marginals=marginals,
            versions=_versions(),
            mask_key=self._protection.offer(instruction.run, dataset=self._dataset) if instruction.shares_noise else "",
        )

    def train(self, instruction: TrainInstruction) -> SiteUpdate:
        """Takes the asked steps from the parameters that came, with an optimiser that starts anew each round."""
        torch.set_num_threads(self.num_threads)
        schema = self._schema(instruction)
        model = _model(instruction, schema)
        config = TrainingConfig(
            batch_size=instruction.batch_size,
            learning_rate=instruction.learning_rate,
            warmup_steps=instruction.warmup_steps,
            total_steps=instruction.total_steps,
            proximal_mu=instruction.proximal_mu,
        )
        loss = (self._train_privately if instruction.dp else self._train)(instruction, model, config)
        return SiteUpdate(server_round=instruction.server_round, loss=loss, parameters=model.parameters())

    def sum(self, instruction: SumInstruction) -> SiteSum:
        """The site's part of a step that several sites take together, noisy and under a mask."""
        torch.set_num_threads(self.num_threads)
        schema = self._schema(instruction)
        model = _model(instruction, schema)
        own = self._protection.mask_key(instruction.run, dataset=self._dataset)
        peers = self._protection.peers(instruction, own)
        shared = SharedNoise(
            noise_multiplier=instruction.noise_multiplier,
            max_grad_norm=instruction.max_grad_norm,
            sites=len(peers),
            colluders=instruction.colluders,
        )
        privacy = _dpsgd(instruction, patients=0)  # the server divides
        event = replace(privacy.event(1), own_noise=shared.own_multiplier)
        key = self._key(instruction.test_fraction)
        release = self._protection.charge(instruction, [event], dataset=self._dataset)
        encoded, patients = tables.encoded_by_row(key, instruction.description, release.spreading)
        steps = noisy_sum(
            model.network_,
            model.diffusion_,
            PatientRows(encoded, patients),
            privacy=privacy,
            shared=shared,
            keys=RoundKeys(release.key("sampling"), release.key("noise")),
            step=instruction.server_round - 1,
        )
        mask = own.mask(len(steps), site=self.name, peers=peers, context=instruction_digest(instruction))
        return SiteSum(server_round=instruction.server_round, words=as_words(steps) + mask)

    def count(self, instruction: CountInstruction) -> SiteCounts | SiteSum:
        """Tables of counts of the training patients: as they are, noisy, or as a part of a sum under a mask."""
        schema = self._schema(instruction)
        asked = from_json(instruction.tables)
        if instruction.peers:
            return self._masked_counts(instruction, schema, asked)
        events = [tables_event(schema, asked, noise=instruction.noise)] if instruction.dp else []
        people, release = self._people(instruction, schema, events)
        if instruction.dp:
            key = release.key("tables")
            cells = noisy_tables(people, schema, asked, noise=instruction.noise, key=key).counts.values
        else:
            cells = exact_counts(people, asked, schema)
        return SiteCounts(server_round=instruction.server_round, counts=cells.astype(np.float64))

    def _masked_counts(self, instruction: CountInstruction, schema: TableSchema, asked: Sequence[Axes]) -> SiteSum:
        own = self._protection.mask_key(instruction.run, dataset=self._dataset)
        peers = self._protection.peers(instruction, own)
        shared = SharedCounts(noise=instruction.noise, sites=len(peers), colluders=instruction.colluders)
        event = shared.event(tables_event(schema, asked, noise=instruction.noise))
        people, release = self._people(instruction, schema, [event])
        cells = shared.share(exact_counts(people, asked, schema), key=release.key("tables"))
        mask = own.mask(len(cells), site=self.name, peers=peers, context=instruction_digest(instruction))
        return SiteSum(server_round=instruction.server_round, words=as_words(cells) + mask)

    def _people(
        self, instruction: CountInstruction, schema: TableSchema, events: Sequence[PrivacyEvent]
    ) -> tuple[pd.DataFrame, Release]:
        """A row of each training patient, the same in all questions, once their release is charged."""
        key = self._key(instruction.test_fraction)
        release = self._protection.charge(instruction, events, dataset=self._dataset)
        _, train, _ = tables.split(key)
        return train.iloc[counts.patient_rows(train, schema, key=release.spreading)], release

    def evaluate(self, instruction: EvaluateInstruction) -> SiteLoss | SiteScores:
        """Loss on the test rows, or under privacy noisy counts of what the label model says of the test patients.

        The loss has the same draws in every round, so that rounds can be compared.
        """
        torch.set_num_threads(self.num_threads)
        schema = self._schema(instruction)
        model = _model(instruction, schema)
        events = [counts.scores_event(schema, epsilon=instruction.score_epsilon)] if instruction.dp else []
        key = self._key(instruction.test_fraction)
        release = self._protection.charge(instruction, events, dataset=self._dataset)
        _, _, test = tables.split(key)
        if instruction.dp:
            noisy = counts.noisy_scores(
                test,
                schema,
                model.event_probabilities(test),
                epsilon=instruction.score_epsilon,
                key=release.key("scores"),
            )
            return SiteScores(server_round=instruction.server_round, counts=noisy.histogram.astype(np.float64))
        loss = model.loss(test, random_state=rng.derive(instruction.seed, "evaluate", self.name))
        return SiteLoss(server_round=instruction.server_round, loss=loss)

    def account(self, instruction: AccountInstruction) -> SiteAccount:
        """What the ledger says; it reads no row."""
        return SiteAccount(account=self._protection.account(instruction.run))

    def sign(self, wire: Wire, instruction: str) -> Wire:
        """The reply to an instruction with the site's signature.

        Raises:
            PrivacyError: If the site has no secret that it could sign with.
        """
        return signed(wire, site=self.name, instruction=instruction, secret=read_secret(self.private_dir / SECRET))

    def _described(self, instruction: DescribeInstruction, schema: TableSchema) -> tuple[GroupCounts, Marginals | None]:
        """What a description tells of the training rows, once that is charged; of none where nothing is asked for."""
        if not instruction.counts and not instruction.marginals:
            return GroupCounts({}), None
        events = []
        if instruction.dp and instruction.counts:
            events.append(counts.group_counts_event(schema, epsilon=instruction.count_epsilon))
        if instruction.dp and instruction.marginals:
            events.append(counts.marginals_event(schema, noise=instruction.histogram_noise))
        key = self._key(instruction.test_fraction)
        release = self._protection.charge(instruction, events, dataset=self._dataset)
        _, train, _ = tables.split(key)
        return (
            self._group_counts(train, schema, instruction, release) if instruction.counts else GroupCounts({}),
            self._marginals(train, schema, instruction, release) if instruction.marginals else None,
        )

    def _group_counts(
        self, train: pd.DataFrame, schema: TableSchema, instruction: DescribeInstruction, release: Release
    ) -> GroupCounts:
        minimum = self._protection.policy.data.minimum_cell
        if not instruction.dp:
            return releasable_counts(train, schema.attributes, minimum=minimum)
        key, epsilon = release.key("counts"), instruction.count_epsilon
        return counts.noisy_group_counts(train, schema, epsilon=epsilon, key=key).suppress(minimum)

    def _marginals(
        self, train: pd.DataFrame, schema: TableSchema, instruction: DescribeInstruction, release: Release
    ) -> Marginals:
        minimum = self._protection.policy.data.minimum_cell
        if not instruction.dp:
            return Marginals.of(train, schema, minimum=minimum)
        key, noise = release.key("histograms"), instruction.histogram_noise
        return counts.noisy_columns(train, schema, noise=noise, key=key, minimum=minimum)

    def _train(self, instruction: TrainInstruction, model: CDDPM, config: TrainingConfig) -> float | None:
        self._protection.charge(instruction, [], dataset=self._dataset)
        encoded = tables.encoded(self._key(instruction.test_fraction), instruction.description, instruction.seed)
        losses = train_steps(
            model.network_,
            model.diffusion_,
            encoded,
            config=config,
            steps=_steps(instruction),
            generator=rng.torch_stream(instruction.seed, "train", self.name, instruction.server_round),
        )
        loss = float(np.mean(list(losses)))
        return loss if self._protection.policy.data.release_loss else None

    def _train_privately(self, instruction: TrainInstruction, model: CDDPM, config: TrainingConfig) -> None:
        privacy = _dpsgd(instruction, patients=self._protection.policy.privacy.declared_patients)
        event = privacy.event(instruction.local_steps)
        key = self._key(instruction.test_fraction)
        release = self._protection.charge(instruction, [event], dataset=self._dataset)
        encoded, patients = tables.encoded_by_row(key, instruction.description, release.spreading)
        train_privately(
            model.network_,
            model.diffusion_,
            PatientRows(encoded, patients),
            config=config,
            privacy=privacy,
            keys=RoundKeys(release.key("sampling"), release.key("noise")),
            steps=_steps(instruction),
        )

    def _schema(self, instruction: Instruction) -> TableSchema:
        """The data dictionary, once the policy has allowed the instruction."""
        schema = TableSchema.load(self.schema_path)
        self._protection.check(instruction, schema)
        return schema

    @property
    def _protection(self) -> Protection:
        return Protection(self.private_dir, self.name, self.num_threads)

    @property
    def _dataset(self) -> str:
        return tables.fingerprint(tables.stamp(self.data_path), tables.stamp(self.schema_path))

    def _key(self, test_fraction: float) -> tables.TableKey:
        """The files as they are before anything is charged; they have to be the same when they are read."""
        return tables.TableKey(self.name, tables.stamp(self.data_path), tables.stamp(self.schema_path), test_fraction)


def _model(instruction: TrainInstruction | SumInstruction | EvaluateInstruction, schema: TableSchema) -> CDDPM:
    """The model that came; whatever is wrong with it is known before a row is read."""
    try:
        model = tables.model(instruction.description)
    except MessageError as error:
        raise RefusedError(2203, str(error)) from None
    if model.schema_.fingerprint != schema.fingerprint:
        raise RefusedError(2204, "the model is for tables of another schema than this site's")
    try:
        model.load_parameters(instruction.parameters)
    except ParameterError as error:
        raise RefusedError(OF_FAULT[error.fault], str(error)) from None
    return model


def _dpsgd(instruction: TrainInstruction | SumInstruction, *, patients: int) -> DPSGDConfig:
    return DPSGDConfig(
        noise_multiplier=instruction.noise_multiplier,
        sample_rate=instruction.sample_rate,
        max_grad_norm=instruction.max_grad_norm,
        draws=instruction.draws,
        patients=patients,
    )


def _steps(instruction: TrainInstruction) -> range:
    return range(instruction.first_step, instruction.first_step + instruction.local_steps)


def releasable_counts(table: pd.DataFrame, columns: tuple[Column, ...], *, minimum: int = MINIMUM_CELL) -> GroupCounts:
    """Rows per group, without those that could give a count from 1 to below ``minimum`` away.

    Small groups are hidden, and with them further groups, smallest first, until within every level of every attribute
    and in the whole table the hidden rows are none or at least as many: otherwise a known total would give them away.
    """
    exact = GroupCounts.of(table, columns)
    hidden = {group for group, count in exact.items() if count < minimum}
    while further := _gives_away(exact, hidden, minimum):
        hidden.add(further)
    return GroupCounts({group: count for group, count in exact.items() if group not in hidden}, suppressed=hidden)


def _gives_away(exact: GroupCounts, hidden: set[Group], minimum: int) -> Group | None:
    margins: list[tuple[tuple[str, str], ...]] = [
        (),
        *((pair,) for pair in dict.fromkeys(p for g in exact for p in g.levels)),
    ]
    for margin in margins:
        inside = [group for group in exact if set(margin) <= set(group.levels)]
        rows = sum(exact[group] for group in inside if group in hidden)
        shown = [group for group in inside if group not in hidden]
        if 0 < rows < minimum and shown:
            return min(shown, key=lambda group: (exact[group], str(group)))
    return None


def _deployed(node_config: Mapping[str, Scalar]) -> Site:
    keys = ("data-path", "schema-path", "private-dir")
    missing = [key for key in keys if not isinstance(node_config.get(key), str)]
    num_threads = node_config.get("num-threads", 1)
    if missing:
        raise ConfigError(f"the node configuration lacks {', '.join(missing)}: give paths on this machine")
    if type(num_threads) is not int or num_threads < 1:
        raise ConfigError(f"num-threads: expected a whole number of at least 1, it is {num_threads!r}")
    data_path, schema_path, private_dir = (Path(str(node_config[key])) for key in keys)
    return Site(str(node_config["site"]), data_path, schema_path, private_dir, num_threads)


def _simulated(node_config: Mapping[str, Scalar], config: RunConfig) -> Site:
    folder = Path(config.places.site_dir)
    if not config.places.site_dir or not folder.is_dir():
        raise ConfigError("site-dir: expected the folder of the pretend hospitals' files (an absolute path)")
    files = sorted(folder.glob("site-*.csv"), key=lambda path: (len(path.name), path.name))
    if node_config.get("num-partitions") != len(files):
        nodes = node_config.get("num-partitions")
        raise ConfigError(f"site-dir has {len(files)} tables for {nodes} nodes: run with num-supernodes={len(files)}")
    data_path = files[int(node_config["partition-id"])]
    private_dir = pretend_private_folder(folder, data_path.stem, data_path)
    return Site(data_path.stem, data_path, folder / "schema.json", private_dir, config.execution.num_threads)


def _versions() -> dict[str, str]:
    return {
        "mcrage": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pandas": pd.__version__,
        "torch": torch.__version__,
    }
