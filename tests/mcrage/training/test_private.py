"""Private training as a whole: what it releases, what one patient does to it, and what it leaves behind."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mcrage.data.schema import TableSchema
from mcrage.data.transform import EncodedTable, TableTransform
from mcrage.diffusion.label import LabelModel
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.errors import PrivacyError
from mcrage.privacy.noise import INFLATION, lattice_spacing
from mcrage.privacy.sampling import KeyedDraws, Patients
from mcrage.training.local import train_steps
from mcrage.training.optimisers import TrainingConfig
from mcrage.training.private import DPSGDConfig, PatientGradients, PatientRows, RoundKeys, train_privately

SECRET = bytes(range(32))
KEYS = RoundKeys.of(SECRET, b"first release")
OTHER_KEYS = RoundKeys.of(SECRET, b"second release")
CONFIG = TrainingConfig(total_steps=1000, learning_rate=1e-3)
PRIVACY = DPSGDConfig(noise_multiplier=1.0, sample_rate=0.2, max_grad_norm=1.0, draws=2, patients=50)
NOBODY = replace(PRIVACY, sample_rate=1e-9)
EXTREME = [float("nan"), float("inf"), -float("inf"), 1e20, 3e38, -3e38, 1e-38, 6.0, 0.0]

Rows = Callable[..., pd.DataFrame]


class Clinic:
    """Makes what a training needs."""

    def __init__(self, schema: TableSchema, rows: Rows) -> None:
        self.schema, self._rows = schema, rows
        self.transform = TableTransform(schema)
        self.diffusion = TabularDiffusion(self.transform.layout)

    def table(self, patients: int, *, seed: int = 0, rows_each: int = 1) -> pd.DataFrame:
        table = self._rows(patients * rows_each, seed)
        return table.assign(patient=[f"p{seed}-{row // rows_each}" for row in range(len(table))])

    def rows(self, table: pd.DataFrame) -> PatientRows:
        return PatientRows(
            self.transform.encode(table, generator=np.random.default_rng(0)), Patients(table, self.schema)
        )

    def network(self, *, width: int = 16, label: str = "additive") -> RowNetwork:
        draw = torch.Generator().manual_seed(0)
        network = RowNetwork(self.transform, width=width, depth=1, generator=draw)
        if label == "interactions":
            prior, layout = self.transform.log_prior(), self.transform.layout
            network.label = LabelModel(layout, log_prior=prior, label_log_odds=0.0, hidden=8, generator=draw)
        return network

    def train(
        self,
        network: RowNetwork,
        rows: PatientRows,
        *,
        privacy: DPSGDConfig = PRIVACY,
        keys: RoundKeys = KEYS,
        steps: range = range(5),
        config: TrainingConfig = CONFIG,
    ) -> RowNetwork:
        train_privately(network, self.diffusion, rows, config=config, privacy=privacy, keys=keys, steps=steps)
        return network

    def clipped_sum(
        self, network: RowNetwork, rows: PatientRows, *, privacy: DPSGDConfig, key: bytes, step: int = 0
    ) -> torch.Tensor:
        """What a step adds up before the noise; float64."""
        network.zero_grad()
        gradients = PatientGradients(network, self.diffusion, rows, privacy=privacy, key=key)
        try:
            gradients.add(step)
        finally:
            gradients.close()
        given = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        return torch.cat(given).double() if given else torch.zeros(1).double()


@pytest.fixture(scope="module")
def clinic(clinic_schema: TableSchema, clinic_rows: Rows) -> Clinic:
    return Clinic(clinic_schema, clinic_rows)


def stacked(*tables: EncodedTable) -> EncodedTable:
    return EncodedTable(*(torch.cat(parts) for parts in zip(*(vars(t).values() for t in tables), strict=True)))


def flat(network: RowNetwork) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def gradient(network: RowNetwork) -> torch.Tensor:
    """What the optimisers were given last."""
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


@contextmanager
def steps_of(network: RowNetwork) -> Iterator[list[torch.Tensor]]:
    """Collects what the optimisers are given at each step; with three of them, the last one's call sees it all."""
    seen: list[torch.Tensor] = []
    hook = register_optimizer_step_pre_hook(lambda *_: seen.append(gradient(network).clone()))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("draws", [1, 8, 32])
def test_one_more_patient_moves_the_sum_by_at_most_the_clipping_norm(clinic: Clinic, draws: int) -> None:
    privacy = replace(PRIVACY, draws=draws, sample_rate=0.5)
    table, draw = clinic.table(6), np.random.default_rng(draws)
    ordinary, network, moved = clinic.rows(table), clinic.network(), []
    for number in range(100):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.uniform_(-1, 1, generator=torch.Generator().manual_seed(number)).mul_(10.0 ** (number % 4))
        own = clinic.table(1, seed=number + 1, rows_each=(1, 2, 50)[number % 3])
        encoded = hostile(clinic.rows(own).encoded, draw) if number % 2 else clinic.rows(own).encoded
        more = PatientRows(
            stacked(ordinary.encoded, encoded), Patients(pd.concat([table, own], ignore_index=True), clinic.schema)
        )
        key = key_that_draws(more.patients, 6, rate=privacy.sample_rate)
        with_, without = (
            clinic.clipped_sum(network, rows, privacy=privacy, key=key).clone() for rows in (more, ordinary)
        )
        assert torch.isfinite(with_).all()
        moved.append(float((with_ - without).norm()))
    assert max(moved) <= 1 + 1e-5
    assert sum(size > 0.99 for size in moved) > 30, "many of them had to be clipped"


def hostile(encoded: EncodedTable, draw: np.random.Generator) -> EncodedTable:
    numeric = encoded.numeric.clone()
    numeric[draw.integers(len(numeric)), draw.integers(numeric.shape[1])] = draw.choice(EXTREME)
    return EncodedTable(numeric, encoded.codes, encoded.attributes, encoded.covariates)


def key_that_draws(patients: Patients, number: int, *, rate: float) -> bytes:
    """A key with which this patient takes part in step 0."""
    keys = (bytes([first]) * 32 for first in range(256))
    return next(key for key in keys if number in KeyedDraws(key, patients.names).included(0, sample_rate=rate))


def test_without_noise_an_update_is_the_sum_over_the_declared_size_of_a_batch(clinic: Clinic) -> None:
    privacy, rows = replace(PRIVACY, noise_multiplier=0.0), clinic.rows(clinic.table(80))
    network = clinic.network()
    expected = clinic.clipped_sum(copy.deepcopy(network), rows, privacy=privacy, key=KEYS.sampling)
    clinic.train(network, rows, privacy=privacy, steps=range(1))
    assert float(expected.norm()) > 1
    assert torch.allclose(gradient(network).double(), expected / (0.2 * 50), rtol=1e-6, atol=1e-9)


def test_updates_are_scaled_by_the_declared_patients_and_never_by_a_count(clinic: Clinic) -> None:
    """Nobody is drawn: whatever differs would be a number of rows or patients."""
    tables = [clinic.table(3), clinic.table(40), clinic.table(7, rows_each=5)]
    first, *others = [flat(clinic.train(clinic.network(), clinic.rows(table), privacy=NOBODY)) for table in tables]
    assert all(torch.equal(first, other) for other in others)
    declared = replace(NOBODY, patients=51)
    assert not torch.equal(first, flat(clinic.train(clinic.network(), clinic.rows(tables[0]), privacy=declared)))


def test_empty_batches_are_steps_like_any_other(clinic: Clinic) -> None:
    network, start = clinic.network(), flat(clinic.network())
    with steps_of(network) as seen:
        clinic.train(network, clinic.rows(clinic.table(20)), privacy=NOBODY, steps=range(20))
    noises = torch.stack(seen[1::2])
    assert len(noises) == 20
    assert all(torch.isfinite(noise).all() and (noise != 0).all() for noise in noises)
    assert len(torch.unique(noises, dim=0)) == 20
    assert torch.isfinite(flat(network)).all()
    assert (flat(network) != start).all()


def test_an_empty_batch_adds_nothing_but_noise(clinic: Clinic) -> None:
    rows = clinic.rows(clinic.table(20))
    assert not clinic.clipped_sum(clinic.network(), rows, privacy=NOBODY, key=KEYS.sampling).any()
    assert clinic.clipped_sum(clinic.network(), rows, privacy=PRIVACY, key=KEYS.sampling).any()


@pytest.mark.parametrize("label", ["additive", "interactions"])
def test_every_trainable_parameter_gets_noise_of_the_stated_deviation(clinic: Clinic, label: str) -> None:
    """Empty batches: what the optimisers are given is the noise alone, over the declared size of a batch."""
    privacy, steps = replace(NOBODY, noise_multiplier=3.0, max_grad_norm=0.5), 1000
    network = clinic.network(label=label)
    with steps_of(network) as seen:
        clinic.train(network, clinic.rows(clinic.table(5)), privacy=privacy, steps=range(steps))
    noise = torch.stack(seen[:: len(seen) // steps]).double() * (1e-9 * 50) / (3.0 * 0.5 * INFLATION)
    assert len(noise) == steps
    named = dict(network.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]
    assert {"denoiser.inputs.bias", "label.weights.weight", "label.weights.bias"} <= set(named)
    for name, part in zip(named, torch.split(noise, sizes, dim=1), strict=True):
        values = part.flatten().numpy()
        assert abs(values.std() - 1) < max(0.01, 4 / (2 * len(values)) ** 0.5), name
        assert abs(values.mean()) < 4 / len(values) ** 0.5, name
        assert stats.kstest(values, "norm").pvalue > 1e-4, name
    assert not abs(1.05 * noise.std() - 1) < 0.01, "5 % more or less would be seen"
    now, then = noise[:-1].flatten().numpy(), noise[1:].flatten().numpy()
    assert abs(np.corrcoef(now, then)[0, 1]) < 4 / len(now) ** 0.5


def test_what_the_optimisers_are_given_lies_on_the_lattice(clinic: Clinic) -> None:
    privacy = replace(PRIVACY, sample_rate=0.25, patients=64)  # both are powers of two, so that dividing is exact
    network = clinic.train(clinic.network(), clinic.rows(clinic.table(64)), privacy=privacy, steps=range(1))
    multiples = gradient(network).double() * 16 / lattice_spacing(1.0)
    assert torch.equal(multiples, multiples.round())


def test_the_same_keys_give_the_same_bytes(clinic: Clinic) -> None:
    rows, privacy = clinic.rows(clinic.table(50)), PRIVACY
    first, second = (flat(clinic.train(clinic.network(), rows, privacy=privacy)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(1)  # noqa: TID251
    np.random.seed(1)  # noqa: TID251, NPY002
    assert torch.equal(first, flat(clinic.train(clinic.network(), rows, privacy=privacy)))


def test_another_release_has_unrelated_noise_and_other_patients(clinic: Clinic) -> None:
    rows, network = clinic.rows(clinic.table(50)), clinic.network(width=128)
    noises = [
        gradient(clinic.train(copy.deepcopy(network), rows, privacy=NOBODY, keys=keys, steps=range(1)))
        for keys in (KEYS, OTHER_KEYS)
    ]
    assert len(noises[0]) > 20_000
    assert abs(np.corrcoef(torch.stack(noises).numpy())[0, 1]) < 0.02
    same = gradient(clinic.train(copy.deepcopy(network), rows, privacy=NOBODY, keys=KEYS, steps=range(1)))
    assert np.corrcoef(torch.stack([noises[0], same]).numpy())[0, 1] > 0.98
    sums = [clinic.clipped_sum(network, rows, privacy=PRIVACY, key=keys.sampling) for keys in (KEYS, OTHER_KEYS)]
    assert not torch.equal(*sums)


def test_the_keys_of_a_release_differ_from_each_other_and_from_those_of_any_other() -> None:
    keys = {key for release in (b"", b"a", b"b") for key in vars(RoundKeys.of(SECRET, release)).values()}
    keys |= set(vars(RoundKeys.of(bytes(32), b"a")).values())
    assert len(keys) == 8


def test_a_step_in_parts_gives_the_sum_of_the_whole(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, privacy = clinic.rows(clinic.table(512)), replace(PRIVACY, sample_rate=1.0, draws=1)
    network = clinic.network()
    whole = clinic.clipped_sum(network, rows, privacy=privacy, key=KEYS.sampling)
    monkeypatch.setattr("mcrage.training.private._KEPT_AT_ONCE", 20_000)
    parts = clinic.clipped_sum(network, rows, privacy=privacy, key=KEYS.sampling)
    assert 0 < float((parts - whole).norm() / whole.norm()) <= 1e-6


def test_the_order_of_rows_changes_nothing_but_rounding(clinic: Clinic) -> None:
    table, order = clinic.table(60), np.random.default_rng(0).permutation(60)
    rows = clinic.rows(table)
    shuffled = PatientRows(rows.encoded.rows(torch.from_numpy(order)), Patients(table.iloc[order], clinic.schema))
    ours, others = (
        clinic.clipped_sum(clinic.network(), given, privacy=PRIVACY, key=KEYS.sampling) for given in (rows, shuffled)
    )
    assert float((ours - others).norm() / ours.norm()) < 1e-6


def test_buffers_stay_as_they_are(clinic: Clinic) -> None:
    network = clinic.network(label="interactions")
    modules = torch.nn.ModuleList([network, clinic.diffusion])
    before = {name: buffer.clone() for name, buffer in modules.named_buffers()}
    constants = {id(module): set(vars(module)) for module in modules.modules()}
    clinic.train(network, clinic.rows(clinic.table(50)))
    after = dict(modules.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert constants == {id(module): set(vars(module)) for module in modules.modules()}


@pytest.mark.parametrize("label", ["additive", "interactions"])
def test_a_private_training_leaves_no_trace_on_the_network(clinic: Clinic, label: str) -> None:
    network, rows = clinic.network(label=label), clinic.rows(clinic.table(50))
    expected, untouched = flat(ordinary_training(clinic, copy.deepcopy(network), rows)), copy.deepcopy(network)
    gradients = PatientGradients(network, clinic.diffusion, rows, privacy=PRIVACY, key=KEYS.sampling)
    gradients.add(0)
    gradients.close()
    for module, before in zip(network.modules(), untouched.modules(), strict=True):
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        assert not any(getattr(module, hook) for hook in hooks)
        assert set(vars(module)) == set(vars(before))
    assert not any(vars(parameter) for parameter in network.parameters())
    assert network.label is not None
    assert not network.label.through_layers
    assert torch.equal(flat(ordinary_training(clinic, network, rows)), expected)


def ordinary_training(clinic: Clinic, network: RowNetwork, rows: PatientRows) -> RowNetwork:
    config = replace(CONFIG, batch_size=16)
    draw = torch.Generator().manual_seed(3)
    list(train_steps(network, clinic.diffusion, rows.encoded, config=config, steps=range(10), generator=draw))
    return network


def test_a_refused_network_is_left_as_it_was(clinic: Clinic) -> None:
    network, rows = clinic.network(), clinic.rows(clinic.table(5))
    network.add_module("norm", torch.nn.LayerNorm(3))
    with pytest.raises(PrivacyError, match=r"norm\.weight"):
        clinic.train(network, rows)
    assert network.label is not None
    assert not network.label.through_layers
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())


def test_bfloat16_and_a_proximal_term_are_refused(clinic: Clinic) -> None:
    rows = clinic.rows(clinic.table(5))
    network = clinic.network()
    network.denoiser.in_bfloat16 = True
    with pytest.raises(PrivacyError, match="bfloat16"):
        clinic.train(network, rows)
    with pytest.raises(PrivacyError, match="proximal"):
        clinic.train(clinic.network(), rows, config=replace(CONFIG, proximal_mu=0.1))


def test_it_learns(clinic: Clinic) -> None:
    """Little noise over many patients: the loss falls as it does without privacy."""
    rows, network = clinic.rows(clinic.table(400)), clinic.network(width=32)
    privacy = DPSGDConfig(noise_multiplier=0.5, sample_rate=0.25, max_grad_norm=1.0, draws=1, patients=400)
    config = TrainingConfig(total_steps=300, learning_rate=5e-3, warmup_steps=10)
    before = mean_loss(clinic, network, rows)
    clinic.train(network, rows, privacy=privacy, steps=range(300), config=config)
    assert mean_loss(clinic, network, rows) < 0.8 * before


def mean_loss(clinic: Clinic, network: RowNetwork, rows: PatientRows) -> float:
    with torch.no_grad():
        return float(clinic.diffusion.loss(network.denoiser, rows.encoded, torch.Generator().manual_seed(0)).mean())


def test_the_event_is_what_the_steps_cost() -> None:
    event = PRIVACY.event(7)
    assert (event.mechanism, event.noise_multiplier, event.sample_rate, event.steps) == ("dp-sgd", 1.0, 0.2, 7)
