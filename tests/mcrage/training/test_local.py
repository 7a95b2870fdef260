import copy

import numpy as np
import pandas as pd
import pytest
import torch

from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.data.transform import EncodedTable, TableTransform
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.training.local import Averaged, TrainingConfig, train_steps

SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 1, "nullable": False},
            {"name": "ward", "kind": "categorical", "categories": ["x", "y"], "nullable": False},
            {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
        ]
    }
)
TRANSFORM = TableTransform(SCHEMA)


def table(rows: int = 64, *, seed: int = 0, rare: float = 0.5) -> EncodedTable:
    """The lab follows the ward, and the label follows both, more strongly the ward that ``rare`` of the rows have."""
    draw = torch.Generator().manual_seed(seed)
    codes = (torch.rand(rows, 1, generator=draw) < rare).long()
    numeric = torch.where(codes == 1, 1.0, -1.0).double()
    labels = (torch.rand(rows, 1, generator=draw) < 0.2 + 0.6 * codes).long()
    return EncodedTable(numeric, codes, labels, TRANSFORM.covariates(numeric, codes))


def network() -> RowNetwork:
    return RowNetwork(TRANSFORM, width=16, depth=1, generator=torch.Generator().manual_seed(0))


def train(module: RowNetwork, *, steps: range = range(40), **settings: float) -> list[float]:
    config = TrainingConfig(**({"total_steps": 100, "batch_size": 32} | settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    diffusion = TabularDiffusion(TRANSFORM.layout)
    return list(train_steps(module, diffusion, table(), config=config, steps=steps, generator=generator))


def flat(module: RowNetwork) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_training_lowers_the_loss() -> None:
    losses = train(network(), steps=range(100))
    # the rest is what cannot be known of a row from its noisy self
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:10])


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second = network(), network()
    train(first)
    train(second)
    assert torch.equal(flat(first), flat(second))


def test_a_proximal_term_holds_parameters_near_where_they_came_from() -> None:
    start = flat(network())
    moved = {}
    for mu in (0.0, 1.0, 100.0):
        module = network()
        train(module, proximal_mu=mu)
        moved[mu] = float((flat(module) - start).norm())
    assert moved[0.0] > moved[1.0] > moved[100.0]


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    config = TrainingConfig(total_steps=1000, warmup_steps=100)
    rates = [config.rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.9, abs=0.02)
    assert rates[1000] == 0.0
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)


def test_a_batch_larger_than_the_table_repeats_rows() -> None:
    config = TrainingConfig(total_steps=2, batch_size=100)
    generator = torch.Generator().manual_seed(0)
    losses = train_steps(
        network(), TabularDiffusion(TRANSFORM.layout), table(7), config=config, steps=range(2), generator=generator
    )
    assert len(list(losses)) == 2


def test_the_average_follows_a_constant_and_forgets_the_start() -> None:
    module = network()
    average = Averaged(module, decay=0.9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(3.0)
    for _ in range(200):
        average.update(module)
    average.copy_to(module)
    assert torch.allclose(flat(module), torch.full_like(flat(module), 3.0), atol=1e-4)


def test_sites_of_different_mix_agree_on_the_label_model_of_their_pooled_rows() -> None:
    sites = [table(400, seed=seed, rare=rare) for seed, rare in ((1, 0.03), (2, 0.5), (3, 0.9))]
    pooled = EncodedTable(*(torch.cat(part) for part in zip(*(vars(site).values() for site in sites), strict=True)))
    federated, rounds, local_steps = network(), 60, 20
    config = TrainingConfig(total_steps=rounds * local_steps, batch_size=100, label_learning_rate=0.03)
    diffusion = TabularDiffusion(TRANSFORM.layout)
    for number in range(rounds):
        updates = []
        for site in sites:
            own, generator = copy.deepcopy(federated), torch.Generator().manual_seed(number)
            steps = range(number * local_steps, (number + 1) * local_steps)
            list(train_steps(own, diffusion, site, config=config, steps=steps, generator=generator))
            updates.append(list(own.parameters()))
        with torch.no_grad():
            for parameter, of_sites in zip(federated.parameters(), zip(*updates, strict=True), strict=True):
                parameter.copy_(torch.stack(of_sites).mean(0))
    assert federated.label is not None
    odds = federated.label(pooled.codes, pooled.covariates).detach()
    for level, rows in enumerate((pooled.codes[:, 0] == 0, pooled.codes[:, 0] == 1)):
        share = pooled.attributes[rows, 0].float().mean()
        # the only two kinds of row: the maximum likelihood of the pooled rows gives each its share of the label
        assert float(torch.sigmoid(odds[rows].mean())) == pytest.approx(float(share), abs=0.03), level


def test_a_wide_table_does_not_make_the_label_model_diverge() -> None:
    columns = [{"name": f"c{i}", "kind": "boolean", "nullable": False} for i in range(400)]
    target = {"name": "died", "kind": "boolean", "role": "target", "nullable": False}
    transform = TableTransform(TableSchema.parse({"columns": [*columns, target]}))
    draw = torch.Generator().manual_seed(0)
    same = torch.randint(0, 2, (64, 1), generator=draw).expand(64, 400).contiguous()  # the steepest case: all alike
    labels, nothing = torch.randint(0, 2, (64, 1), generator=draw), torch.zeros(64, 0)
    rows = EncodedTable(nothing.double(), same, labels, nothing)
    module = RowNetwork(transform, width=8, depth=1, generator=draw)
    config = TrainingConfig(total_steps=400, batch_size=64, label_learning_rate=1.0)
    list(train_steps(module, TabularDiffusion(transform.layout), rows, config=config, steps=range(400), generator=draw))
    assert module.label is not None
    assert float(module.label.loss(rows).mean().detach()) < 0.7


CROSSED = TableSchema.parse(
    {
        "columns": [
            {"name": "a", "kind": "boolean", "nullable": False},
            {"name": "b", "kind": "boolean", "nullable": False},
            {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
        ]
    }
)


def crossed(rows: int) -> pd.DataFrame:
    """The label is likely where just one of the two is true: no additive model can tell."""
    draw = np.random.default_rng(0)
    a, b = draw.random((2, rows)) < 0.5
    died = draw.random(rows) < np.where(a != b, 0.8, 0.2)
    return pd.DataFrame({n: pd.array(v, dtype="boolean") for n, v in (("a", a), ("b", b), ("died", died))})


@pytest.mark.parametrize(("rows", "learns"), [(40_000, True), (20_000, False)])
def test_the_label_of_many_rows_may_depend_on_two_columns_together(rows: int, learns: bool) -> None:
    """With fewer rows the label model stays a logistic regression, which ranks new patients better then."""
    people = crossed(rows)
    transform = TableTransform(CROSSED, Marginals.of(people, CROSSED))
    draw = torch.Generator().manual_seed(0)
    module = RowNetwork(transform, width=8, depth=1, generator=draw)
    encoded = transform.encode(people, generator=np.random.default_rng(0))
    config = TrainingConfig(total_steps=600, batch_size=256)
    list(
        train_steps(
            module, TabularDiffusion(transform.layout), encoded, config=config, steps=range(600), generator=draw
        )
    )
    assert module.label is not None
    odds = module.label(encoded.codes, encoded.covariates).detach()
    alone = odds[encoded.codes[:, 0] != encoded.codes[:, 1]].mean() - odds.mean()
    assert (float(alone) > 1.0) == learns
    assert (float(alone) < 0.1) != learns
