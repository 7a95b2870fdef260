"""The clipped sum: what one patient can do to it, and that it is what a loop over patients would give."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mcrage.data.schema import TableSchema
from mcrage.data.transform import EncodedTable, TableTransform
from mcrage.diffusion.label import LabelModel
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.errors import PrivacyError
from mcrage.privacy.dpsgd import ClippedSum, require_linear

ROOT = Path(__file__).parents[3]
COLUMNS = [
    {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 1},
    {"name": "dose", "kind": "continuous", "minimum": 0, "maximum": 1, "nullable": False},
    {
        "name": "age",
        "kind": "integer",
        "role": "sensitive",
        "minimum": 18,
        "maximum": 100,
        "bins": [65],
        "nullable": False,
    },
    {"name": "ward", "kind": "categorical", "categories": ["x", "y", "z"], "nullable": False},
    {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
]
LABEL_MODELS = ("none", "additive", "interactions")
HOSTILE = [float("nan"), float("inf"), -float("inf"), 1e20, -1e20, 3e38, -3e38, 1e-38, 1e19, -1e10, 1e5, 6.0, 1e-20]
BOUND = 1 + 1e-5


@dataclass(frozen=True)
class Batch:
    """Rows, and the random numbers of their loss."""

    rows: EncodedTable
    time: Tensor
    noise: Tensor
    attributes: Tensor

    def and_(self, other: "Batch") -> "Batch":
        both = zip((*vars(self.rows).values(), *self._drawn), (*vars(other.rows).values(), *other._drawn), strict=True)
        parts = [torch.cat(pair) for pair in both]
        return Batch(EncodedTable(*parts[:4]), *parts[4:])

    def part(self, place: slice) -> "Batch":
        rows = EncodedTable(*(column[place] for column in vars(self.rows).values()))
        return Batch(rows, *(column[place] for column in self._drawn))

    @property
    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.time, self.noise, self.attributes


class Model:
    """A network and the losses of its rows; ``weights`` replaces its parameters by uniform ones in ± that."""

    def __init__(
        self, *, label: str = "interactions", seed: int = 0, weights: float = 0.3, width: int = 8, depth: int = 2
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        transform = TableTransform(TableSchema.parse({"columns": COLUMNS[: 4 if label == "none" else 5]}))
        self.layout = layout = transform.layout
        self.diffusion = TabularDiffusion(layout)
        self.network = RowNetwork(transform, width=width, depth=depth, generator=draw)
        if label == "interactions":
            prior = transform.log_prior()
            self.network.label = LabelModel(layout, log_prior=prior, label_log_odds=0.5, hidden=4, generator=draw)
        if self.network.label is not None:
            self.network.label.through_layers = True
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.uniform_(-weights, weights, generator=draw)

    def rows(self, number: int, draw: torch.Generator) -> EncodedTable:
        """Ordinary rows, encoded."""
        codes, attributes = (
            torch.stack([torch.randint(size, (number,), generator=draw) for size in sizes], 1)
            for sizes in (self.layout.block_sizes, self.layout.attribute_sizes)
        )
        numeric = torch.randn(number, self.layout.num_numeric, generator=draw, dtype=torch.float64)
        covariates = torch.randn(number, self.layout.num_covariates, generator=draw)
        return EncodedTable(numeric, codes, attributes, covariates)

    def batch(self, rows: EncodedTable, draw: torch.Generator) -> Batch:
        time, noise = torch.rand(len(rows), generator=draw), torch.randn(len(rows), self.layout.width, generator=draw)
        return Batch(rows, time, noise, self.diffusion.drop_conditions(rows.attributes, draw))

    def losses(self, batch: Batch) -> Tensor:
        random = {"time": batch.time, "noise": batch.noise, "attributes": batch.attributes}
        losses = self.diffusion.loss_at(self.network.denoiser, batch.rows, **random)
        return losses if self.network.label is None else losses + self.network.label.loss(batch.rows)

    def clipped_sum(self, clipped: ClippedSum, batch: Batch, *, parts: int = 1) -> Tensor:
        """What all ``grad`` together hold after the batch, or its parts one after the other; float64."""
        for parameter in self.network.parameters():
            parameter.grad = None
        for start in range(0, len(batch.time), len(batch.time) // parts):
            clipped.add(self.losses(batch.part(slice(start, start + len(batch.time) // parts))))
        return torch.cat([p.grad.flatten() for p in self.network.parameters() if p.grad is not None]).double()

    def loop(self, batch: Batch, *, draws: int, clip: float) -> tuple[Tensor, Tensor]:
        """The clipped sum by an ordinary backward pass for each patient, and the patients' norms; float64."""
        parameters, sums, norms = list(self.network.parameters()), [], []
        for start in range(0, len(batch.time), draws):
            loss = self.losses(batch.part(slice(start, start + draws))).mean()
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]).double()
            norms.append(gradient.norm())
            sums.append(gradient * min(1.0, clip / float(norms[-1])))
        return torch.stack(sums).sum(0), torch.stack(norms)


def with_hostile_cells(rows: EncodedTable, draw: torch.Generator) -> EncodedTable:
    """The same rows, every other time with up to 5 cells replaced by extreme or impossible values."""
    numeric, covariates = rows.numeric.clone(), rows.covariates.clone()
    for _ in range(number(6, draw) * number(2, draw)):
        part = (numeric, covariates)[number(2, draw)]
        part.view(-1)[number(part.numel(), draw)] = HOSTILE[number(len(HOSTILE), draw)]
    return EncodedTable(numeric, rows.codes, rows.attributes, covariates)


def number(below: int, draw: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=draw))


class Unclipped(ClippedSum):
    """Forgets to clip."""

    def _factors(self) -> Tensor:
        return torch.ones_like(super()._factors())


class Careless(ClippedSum):
    """Lets gradients through that are not finite."""

    def _factors(self) -> Tensor:
        return (self.max_grad_norm / self.get_norm_sample()).clamp(max=1.0)


class Flattened(ClippedSum):
    """Clips every draw on its own."""

    def __init__(self, module: nn.Module, *, max_grad_norm: float, draws: int) -> None:
        super().__init__(module, max_grad_norm=max_grad_norm, draws=1)


def contributions(
    records: int, *, draws: int, clip: float = 1.0, kind: type[ClippedSum] = ClippedSum
) -> Iterator[tuple[float, bool]]:
    """How far one more patient moves the sum over three others, in clipping norms, and whether all stays finite.

    For one patient after the other, under changing weights. The patient has 1, 2 or 50 rows, of which each draw picks
    one.
    """
    draw = torch.Generator().manual_seed(draws)
    for seed in range(records // 50):
        label, weights = LABEL_MODELS[1 + seed % 2], (0.1, 1.0, 30.0, 1000.0)[seed // 2 % 4]
        model = Model(label=label, seed=seed, weights=weights, depth=1)
        clipped = kind(model.network, max_grad_norm=clip, draws=draws)
        others = model.batch(model.rows(3 * draws, draw), draw)
        without = model.clipped_sum(clipped, others)
        for _ in range(50):
            own = with_hostile_cells(model.rows((1, 2, 50)[number(3, draw)], draw), draw)
            picked = model.batch(own.rows(torch.randint(len(own), (draws,), generator=draw)), draw)
            together = model.clipped_sum(clipped, others.and_(picked))
            yield float((together - without).norm()) / clip, bool(torch.isfinite(together).all())


@pytest.mark.slow
@pytest.mark.parametrize(("draws", "records"), [(1, 6000), (8, 2000), (32, 2000)])
def test_no_patient_moves_the_sum_by_more_than_the_clipping_norm(draws: int, records: int) -> None:
    moved, finite = zip(*contributions(records, draws=draws), strict=True)
    assert len(moved) == records
    assert all(finite)
    assert max(moved) <= BOUND
    assert sum(size > 0.999 for size in moved) > records / 5, "many of them had to be clipped"
    assert sum(size == 0 for size in moved) > records / 20, "many of them were not finite"


@pytest.mark.parametrize("clip", [1e-3, 100.0])
def test_the_bound_holds_for_small_and_large_clipping_norms(clip: float) -> None:
    for draws in (1, 4):
        moved, finite = zip(*contributions(200, draws=draws, clip=clip), strict=True)
        assert all(finite)
        assert max(moved) <= BOUND


def test_patients_who_are_not_clipped_would_be_seen() -> None:
    assert max(moved for moved, _ in contributions(400, draws=1, kind=Unclipped)) > 10


def test_draws_that_are_clipped_one_by_one_would_be_seen() -> None:
    for draws in (8, 32):
        assert max(moved for moved, _ in contributions(100, draws=draws, kind=Flattened)) > 1.5
        aligned = one_patient_many_times(draws, Flattened)
        assert aligned == pytest.approx(draws, rel=1e-3), "up to as many clipping norms as there are draws"
        assert one_patient_many_times(draws, ClippedSum) <= BOUND


def one_patient_many_times(draws: int, kind: type[ClippedSum]) -> float:
    """What a patient contributes whose draws are all the same."""
    model = Model()
    draw = torch.Generator().manual_seed(0)
    batch = model.batch(model.rows(1, draw), draw)
    clipped = kind(model.network, max_grad_norm=0.1, draws=draws)
    same = batch
    for _ in range(draws - 1):
        same = same.and_(batch)
    return float(model.clipped_sum(clipped, same).norm()) / 0.1


def test_gradients_that_are_not_finite_and_not_zeroed_would_be_seen() -> None:
    assert not all(finite for _, finite in contributions(100, draws=1, kind=Careless))


def test_one_hostile_patient_leaves_the_others_contributions_as_they_are() -> None:
    model, draw = Model(), torch.Generator().manual_seed(0)
    others = model.batch(model.rows(6, draw), draw)
    clipped = ClippedSum(model.network, max_grad_norm=1.0)
    alone = model.clipped_sum(clipped, others)
    for value in (float("nan"), float("inf"), 3e38, -3e38):
        own = model.rows(1, draw)
        own.numeric.fill_(value)
        together = model.clipped_sum(clipped, others.and_(model.batch(own, draw)))
        assert float((together - alone).norm()) < 1e-6


class Products(nn.Module):
    """One layer, whose losses are sums of chosen multiples of its outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


@pytest.mark.parametrize("draws", [1, 2, 32])
def test_squares_that_float32_cannot_hold_do_not_hide_a_gradient(draws: int) -> None:
    """Inputs of 1e18 and gradients of 1e-23 make gradients of weights of 1e-5 each, 40,000 of them."""
    for size, slope in ((1.2e18, 2.2e-23), (2.2e-23, 1.2e18), (1e18, 1e-20), (1e18, 1e-40)):
        module = Products(192)
        clipped = ClippedSum(module, max_grad_norm=1e-3, draws=draws)
        seen = torch.full((draws, 192), size)
        clipped.add((module.layer(seen) * slope).sum(1))
        assert module.layer.weight.grad is not None
        assert float(module.layer.weight.grad.double().norm()) <= 1e-3 * BOUND


@pytest.mark.parametrize("draws", [2, 8, 32])
def test_draws_that_cancel_each_other_do_not_hide_a_gradient(draws: int) -> None:
    """A patient's draws pull a million times harder than the clipping norm, and their mean up to a hundred times."""
    draw, moved = torch.Generator().manual_seed(0), []
    for size in torch.logspace(-6, -3, 40).tolist():
        module = Products(32)
        clipped = ClippedSum(module, max_grad_norm=1.0, draws=draws)
        seen = torch.randn(1, 32, generator=draw).expand(draws, 32) * (1 + size * torch.randn(draws, 1, generator=draw))
        slopes = torch.randn(1, 32, generator=draw) * 1e5 * (-1.0) ** torch.arange(draws)[:, None]
        clipped.add((module.layer(seen) * slopes).sum(1))
        moved.append(float(sum(p.grad.double().square().sum() for p in module.parameters() if p.grad is not None)))
    assert 0 < max(moved) <= BOUND**2


@pytest.mark.parametrize("share", ["all", "some", "none"])
@pytest.mark.parametrize("label", LABEL_MODELS)
def test_the_sum_is_that_of_a_loop_over_patients(label: str, share: str) -> None:
    """24 batches of 6 patients each for every case, 216 in all."""
    for seed in range(24):
        model, draw, draws = Model(label=label, seed=seed), torch.Generator().manual_seed(seed), (1, 4)[seed % 2]
        batch = model.batch(model.rows(6 * draws, draw), draw)
        _, norms = model.loop(batch, draws=draws, clip=1.0)
        clip = {"all": 0.5 * norms.min(), "some": norms.median(), "none": 2 * norms.max()}[share]
        expected, _ = model.loop(batch, draws=draws, clip=float(clip))
        given = model.clipped_sum(ClippedSum(model.network, max_grad_norm=float(clip), draws=draws), batch)
        # where draws are averaged, norms are rounded up by a part of 10,000 of what the draws have one by one
        tolerance = 1e-3 if draws > 1 and share != "none" else 1e-5
        assert float((given - expected).abs().max() / expected.abs().max()) < tolerance
        assert float((given - expected).norm() / expected.norm()) < tolerance


def test_another_clipping_norm_or_one_patient_less_would_be_seen_in_the_sum() -> None:
    model, draw = Model(), torch.Generator().manual_seed(0)
    batch = model.batch(model.rows(6, draw), draw)
    wrongs = [model.loop(batch, draws=1, clip=0.5001)[0], model.loop(batch.part(slice(5)), draws=1, clip=0.5)[0]]
    given = model.clipped_sum(ClippedSum(model.network, max_grad_norm=0.5), batch)
    for wrong in wrongs:
        assert float((given - wrong).norm() / wrong.norm()) > 1e-5


@pytest.mark.parametrize("draws", [1, 2])
def test_a_batch_in_eight_parts_gives_the_sum_of_the_whole(draws: int) -> None:
    model, draw = Model(width=32), torch.Generator().manual_seed(0)
    batch = model.batch(model.rows(512 * draws, draw), draw)
    clipped = ClippedSum(model.network, max_grad_norm=0.3, draws=draws)
    whole = model.clipped_sum(clipped, batch)
    assert float((model.clipped_sum(clipped, batch, parts=8) - whole).norm() / whole.norm()) <= 1e-6


def test_sums_are_added_to_what_is_there() -> None:
    model, draw = Model(), torch.Generator().manual_seed(0)
    batch = model.batch(model.rows(6, draw), draw)
    clipped = ClippedSum(model.network, max_grad_norm=0.3)
    once = model.clipped_sum(clipped, batch)
    clipped.add(model.losses(batch))
    twice = torch.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None]).double()
    assert torch.allclose(twice, 2 * once, atol=1e-7)


class Embedded(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.other = layer


class Subclass(nn.Linear):
    """Its forward pass might do anything."""


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


OTHER_LAYERS: dict[str, nn.Module] = {
    "layer norm": nn.LayerNorm(3),
    "embedding": nn.Embedding(4, 3),
    "linear without bias": nn.Linear(3, 3, bias=False),
    "convolution": nn.Conv1d(1, 1, 3),
    "recurrent": nn.GRU(3, 3),
    "subclass": Subclass(3, 3),
    "bare parameter": Bare(),
}


@pytest.mark.parametrize("other", OTHER_LAYERS)
def test_a_layer_whose_gradients_per_patient_are_not_known_is_refused_by_name(other: str) -> None:
    for refused in (require_linear, lambda module: ClippedSum(module, max_grad_norm=1.0)):
        with pytest.raises(PrivacyError, match=r"not for .*other"):
            refused(Embedded(OTHER_LAYERS[other]))


def test_linear_layers_and_frozen_ones_of_any_kind_are_fine() -> None:
    require_linear(Embedded(nn.Sequential(nn.Linear(3, 3), nn.SiLU())))
    require_linear(Embedded(nn.LayerNorm(3).requires_grad_(False)))
    require_linear(nn.Linear(3, 3))


def test_a_layer_that_is_called_twice_is_an_error_and_not_a_wrong_norm() -> None:
    module = Products(4)
    clipped = ClippedSum(module, max_grad_norm=1.0)
    with pytest.raises(NotImplementedError):
        clipped.add(module.layer(module.layer(torch.ones(2, 4))).sum(1))


def test_a_network_that_is_not_in_training_is_an_error_and_not_an_empty_sum() -> None:
    model, draw = Model(), torch.Generator().manual_seed(0)
    clipped = ClippedSum(model.network.eval(), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="No activations"):
        clipped.add(model.losses(model.batch(model.rows(2, draw), draw)))


LOGGING = """
import logging
root = logging.getLogger()
before = [*root.handlers], root.level
import mcrage.privacy.dpsgd
assert ([*root.handlers], root.level) == before, (root.handlers, root.level)
"""


def test_importing_it_leaves_the_programs_log_alone() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4), nn.InstanceNorm1d(4)])
def test_a_layer_that_mixes_patients_is_refused_with_or_without_parameters(layer: nn.Module) -> None:
    with pytest.raises(PrivacyError, match="normalise by the batch"):
        require_linear(nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2)))
