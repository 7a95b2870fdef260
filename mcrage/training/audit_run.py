"""An audit of the training itself: its own code, on made-up records, with canaries among them.

Nothing of the training is replaced. The network has one more linear layer, whose weights and biases are the canaries'
coordinates; a canary's loss pulls at its own coordinate alone, with a gradient of five clipping norms. What the
optimiser is given, which is what everybody may see, is read off at the coordinates before each step.

Shape: m canaries; the layer has one input and m/2 outputs, the first m/2 coordinates are its biases, the others its
weights. A batch of B patients with K draws each gives B·K rows, the draws of a patient one after the other.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mcrage import rng
from mcrage.data.schema import Column, TableSchema
from mcrage.data.transform import EncodedTable, TableTransform
from mcrage.diffusion.denoiser import MLPDenoiser
from mcrage.diffusion.label import LabelModel
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.errors import ConfigError, LedgerError
from mcrage.privacy.accounting import default_delta
from mcrage.privacy.audit import AuditReport, Seen, judge
from mcrage.privacy.bounds import Included
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import derive
from mcrage.privacy.ledger import Limits, PrivacyLedger
from mcrage.privacy.masking import MaskKey, opened
from mcrage.privacy.noise import GaussianNoise
from mcrage.privacy.sampling import KeyedDraws, Patients
from mcrage.privacy.shared import SharedNoise, as_words
from mcrage.training.optimisers import Optimisers, TrainingConfig
from mcrage.training.private import DPSGDConfig, PatientRows, RoundKeys, train_privately
from mcrage.training.shared import descend, noisy_sum, num_gradients

_STRENGTH = 5.0  # of a canary's gradient, in clipping norms: clipping has something to do


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How large an audit is.

    Attributes:
        canaries: Even, so that half of them are biases.
        records: Made-up records beside them.
        noise_multiplier, sample_rate, max_grad_norm: Of the training; see
            :class:`~mcrage.training.private.DPSGDConfig`.
        draws: Of each patient in a step; even, so that a canary can pull at a weight and leave the bias alone.
        rounds, steps_per_round: Length of the training; each round is a charge of its own.
        width, depth: Of the network.
        sites: How many share the noise (:mod:`mcrage.privacy.shared`); the records and canaries are at the first of
            them, and what is seen is the opened sum. 1 for noise of a site's own.
        colluders: How many of them tell what noise they added: it is taken off again.
        seed: Of records, coins and noise: they protect nobody here.
    """

    canaries: int = 1000
    records: int = 1000
    noise_multiplier: float = 3.0
    sample_rate: float = 0.128
    max_grad_norm: float = 1.0
    draws: int = 4
    rounds: int = 4
    steps_per_round: int = 200
    width: int = 128
    depth: int = 1
    sites: int = 1
    colluders: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("canaries", "draws"):
            if (value := getattr(self, name)) < 2 or value % 2:
                raise ConfigError(f"{name} must be even and at least 2, got {value}")
        for name in ("records", "rounds", "steps_per_round"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.sites != 1 and not 1 <= self.colluders < self.sites:
            raise ConfigError(f"of {self.sites} sites 1 to all but one may collude, got {self.colluders}")

    @property
    def shared(self) -> SharedNoise | None:
        """The noise, where it is shared."""
        if self.sites == 1:
            return None
        return SharedNoise(
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            sites=self.sites,
            colluders=self.colluders,
        )

    def event(self, steps: int) -> PrivacyEvent:
        """What this many steps are to the ledger."""
        own = 0.0 if self.shared is None else self.shared.own_multiplier
        return replace(self.privacy.event(steps), own_noise=own)

    @property
    def privacy(self) -> DPSGDConfig:
        """What the guarantee of the training rests on."""
        return DPSGDConfig(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            max_grad_norm=self.max_grad_norm,
            draws=self.draws,
            patients=self.records + self.canaries // 2,
        )


def audit(config: AuditConfig, *, ledger: PrivacyLedger) -> AuditReport:
    """Trains with canaries, round by round, each charged to the ledger first, and compares what was seen with it.

    Args:
        config: How large.
        ledger: An empty one, which the audit alone uses.

    Raises:
        LedgerError: If the ledger is not empty: it may be a hospital's.
    """
    if ledger.rows:
        raise LedgerError("an audit needs an empty ledger of its own; this one has charges")
    secret = rng.stream(config.seed, "audit", "secret").bytes(32)
    included = rng.stream(config.seed, "audit", "coins").random(config.canaries) < 0.5
    site = _Site.of(config, included, spreading=derive(secret, "spreading"))
    privacy, delta = config.privacy, default_delta(config.privacy.patients)
    limits = Limits(delta=delta, epsilon_total=None, epsilon_run=None)
    total = config.rounds * config.steps_per_round
    observer = _Observer(site.network.denoiser.canaries, privacy)
    hook = register_optimizer_step_pre_hook(observer)
    try:
        for number in range(config.rounds):
            steps = range(number * config.steps_per_round, (number + 1) * config.steps_per_round)
            release = hashlib.sha256(f"audit, round {number}".encode()).digest()
            ledger.charge(
                [config.event(len(steps))],
                key=release.hex(),
                run="audit",
                task="train",
                dataset=f"seed {config.seed}",
                limits=limits,
            )
            if config.shared is not None:
                _train_together(site, config, secret=secret, release=release, steps=steps)
                continue
            train_privately(
                site.network,
                site.diffusion,
                site.rows,
                config=TrainingConfig(total_steps=total),
                privacy=privacy,
                keys=RoundKeys.of(secret, release),
                steps=steps,
            )
    finally:
        hook.remove()
    return judge(observer.seen(site, included), ledger.events, delta=delta)


def _train_together(site: "_Site", config: AuditConfig, *, secret: bytes, release: bytes, steps: range) -> None:
    """Steps with shared noise; the other sites have no patients, and the last ones tell what noise they added."""
    shared, size = config.shared, num_gradients(site.network)
    assert shared is not None
    moved = Optimisers(site.network, TrainingConfig(total_steps=config.rounds * config.steps_per_round))
    keys = {f"site-{number:03d}": MaskKey(derive(secret, number), b"audit") for number in range(config.sites)}
    peers = {name: key.public for name, key in keys.items()}
    for step in steps:
        asked = derive(secret, "step", release, step)
        sent, told = [], np.zeros(size, dtype=np.int64)
        for number, (name, key) in enumerate(keys.items()):
            noise = derive(asked, "noise", number)
            if number:
                part = shared.share(torch.zeros(size), GaussianNoise(noise))
            else:
                part = noisy_sum(
                    site.network,
                    site.diffusion,
                    site.rows,
                    privacy=config.privacy,
                    shared=shared,
                    keys=RoundKeys(derive(asked, "sampling"), noise),
                    step=step,
                )
            if number >= config.sites - config.colluders:
                told += part
            sent.append(as_words(part) + key.mask(size, site=name, peers=peers, context=asked))
        seen = shared.value((opened(sent) - told).astype(np.int32))
        descend(moved, seen / (config.sample_rate * config.privacy.patients), step=step)


class _Observer:
    """Adds up what the optimiser is given at the canaries' coordinates.

    Called by torch before any optimiser's step; those of other parameters do not count.
    """

    def __init__(self, layer: nn.Linear, privacy: DPSGDConfig) -> None:
        self._layer = layer
        self._unit = privacy.max_grad_norm / (privacy.sample_rate * privacy.patients)
        self._sums = torch.zeros(2 * layer.out_features, dtype=torch.float64)
        self._squares = torch.zeros_like(self._sums)
        self._steps = 0

    def __call__(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        moved = {values.untyped_storage().data_ptr() for group in optimiser.param_groups for values in group["params"]}
        bias, weight = self._layer.bias, self._layer.weight
        if bias.untyped_storage().data_ptr() not in moved:
            return
        assert bias.grad is not None
        assert weight.grad is not None
        given = torch.cat([bias.grad, weight.grad[:, 0]]).double() / self._unit
        self._sums += given
        self._squares += given**2
        self._steps += 1

    def seen(self, site: "_Site", included: Included) -> Seen:
        """Everything until now."""
        return Seen(
            scores=self._sums.numpy(),
            squares=self._squares.numpy(),
            included=included,
            steps=self._steps,
            patients=len(site.rows.patients),
            turns=site.diffusion.turns,
        )


@dataclass(frozen=True)
class _Site:
    """Records, canaries that take part, and a network that has a coordinate for every canary."""

    network: "_Network"
    diffusion: "_Diffusion"
    rows: PatientRows

    @classmethod
    def of(cls, config: AuditConfig, included: Included, *, spreading: bytes) -> "_Site":
        present = np.flatnonzero(included)
        table = made_up_records(config.records + len(present), seed=config.seed)
        patients, transform = Patients(table, SCHEMA), TableTransform(SCHEMA)
        draws = KeyedDraws(spreading, patients.row_names())
        jitter = draws.uniform(draws.everyone, 0, size=transform.layout.num_numeric).double().numpy() - 0.5
        encoded = transform.encode_spread(table, jitter.T)
        canary = torch.cat([torch.full((config.records,), -1), torch.from_numpy(present)])
        rows = PatientRows(_Rows(**vars(encoded), canary=canary), patients)
        return cls(_Network(transform, config), _Diffusion(transform, config), rows)


@dataclass(frozen=True)
class _Rows(EncodedTable):
    """Encoded rows, and the number of the canary that each is, −1 for a record."""

    canary: Int[Tensor, " rows"]

    def rows(self, index: Int[Tensor, " batch"]) -> "_Rows":
        return _Rows(*(part.index_select(0, index) for part in vars(self).values()))


class _Denoiser(MLPDenoiser):
    """The denoiser, with the canaries' layer among its parameters."""

    def __init__(self, transform: TableTransform, config: AuditConfig, generator: torch.Generator) -> None:
        super().__init__(transform.layout, width=config.width, depth=config.depth, generator=generator)
        self.canaries = nn.Linear(1, config.canaries // 2)
        for parameter in self.canaries.parameters():
            nn.init.zeros_(parameter)

    def pull(self, canary: Int[Tensor, " rows"], strength: float) -> Float[Tensor, " rows"]:
        """A loss whose gradient, averaged over a canary's draws, is ``strength`` at its coordinate and 0 elsewhere.

        A weight's draws alternate between the inputs 1 and −1 with slopes of the same sign, which cancel at the bias.
        """
        half = self.canaries.out_features
        side = 1.0 - 2.0 * (torch.arange(len(canary)) % 2)
        inputs = torch.where(canary >= half, side, 0.0)
        slope = strength * torch.where(canary >= half, side, (canary >= 0).float())
        outputs = self.canaries(inputs[:, None])
        picked = outputs.gather(1, canary.clamp(min=0)[:, None] % half)
        return slope * picked[:, 0]


class _Label(LabelModel):
    """The label model, to which canaries say nothing."""

    def loss(self, batch: EncodedTable) -> Float[Tensor, " rows"]:
        return super().loss(batch) * _is_record(batch)


class _Network(RowNetwork):
    denoiser: _Denoiser

    def __init__(self, transform: TableTransform, config: AuditConfig) -> None:
        generator = rng.torch_stream(config.seed, "audit", "initialise")
        super().__init__(transform, width=config.width, depth=config.depth, generator=generator)
        self.denoiser = _Denoiser(transform, config, generator)
        self.label = _Label(
            transform.layout, log_prior=transform.log_prior(), label_log_odds=transform.label_log_odds()
        )


class _Diffusion(TabularDiffusion):
    """The diffusion's loss of records, the pull of canaries, and a count of both."""

    def __init__(self, transform: TableTransform, config: AuditConfig) -> None:
        super().__init__(transform.layout, log_prior=transform.log_prior())
        self._draws, self._strength = config.draws, _STRENGTH * config.max_grad_norm
        self.turns = 0

    def loss_at(self, denoiser: Any, batch: EncodedTable, **given: Any) -> Float[Tensor, " batch"]:
        assert isinstance(batch, _Rows)
        self.turns += len(batch) // self._draws
        losses = super().loss_at(denoiser, batch, **given)
        return losses * _is_record(batch) + denoiser.pull(batch.canary, self._strength)


def _is_record(batch: EncodedTable) -> Float[Tensor, " rows"]:
    assert isinstance(batch, _Rows)
    return (batch.canary < 0).float()


_LABS, _CODES = 9, 4
SCHEMA = TableSchema(
    name="audit",
    columns=(
        Column(name="sex", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False),
        Column(name="age", kind="integer", minimum=18, maximum=100),
        *(Column(name=f"lab {i}", kind="continuous", minimum=0, maximum=10, decimals=1) for i in range(_LABS)),
        *(Column(name=f"code {i}", kind="categorical", categories=("a", "b", "c")) for i in range(_CODES)),
        Column(name="ill", kind="boolean", role="target", nullable=False),
    ),
)
"""The data dictionary of the made-up records; every row is a patient of its own."""


def made_up_records(number: int, *, seed: int) -> pd.DataFrame:
    """Rows whose columns depend on one another through a hidden severity."""
    draw = rng.stream(seed, "audit", "records")
    severity = draw.normal(size=number)
    labs = (5 + severity[:, None] + draw.normal(size=(number, _LABS))).clip(0, 10).round(1)
    codes = draw.integers(0, 3, size=(number, _CODES))
    return pd.DataFrame(
        {
            "sex": pd.Categorical.from_codes(draw.integers(0, 2, number), categories=["F", "M"]),
            "age": pd.array(draw.integers(18, 101, number), dtype="Int64"),
            **{f"lab {i}": labs[:, i] for i in range(_LABS)},
            **{f"code {i}": pd.Categorical.from_codes(codes[:, i], categories=["a", "b", "c"]) for i in range(_CODES)},
            "ill": pd.array(draw.random(number) < 1 / (1 + np.exp(-severity)), dtype="boolean"),
        }
    )
