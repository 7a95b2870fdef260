"""A step that sites take together: the label model learns what it would by itself, beside a longer gradient."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.data.transform import TableTransform
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.privacy.sampling import Patients
from mcrage.privacy.shared import SharedNoise
from mcrage.training import shared
from mcrage.training.optimisers import Optimisers, TrainingConfig
from mcrage.training.private import DPSGDConfig, PatientRows, RoundKeys
from mcrage.training.shared import LABEL_LEARNING_RATE, descend, noisy_sum

Rows = Callable[..., pd.DataFrame]


class Together:
    """One site that stands for all, with next to no noise."""

    def __init__(self, table: pd.DataFrame, schema: TableSchema, *, max_grad_norm: float) -> None:
        transform = TableTransform(schema, Marginals.of(table, schema))
        self.network = RowNetwork(transform, width=8, depth=1, generator=torch.Generator().manual_seed(0))
        self.diffusion = TabularDiffusion(transform.layout, log_prior=transform.log_prior())
        self.encoded = transform.encode(table, generator=np.random.default_rng(0))
        self._rows = PatientRows(self.encoded, Patients(table, schema))
        self._norm = max_grad_norm

    def mean_gradient(self, step: int = 0) -> torch.Tensor:
        noise = SharedNoise(noise_multiplier=1e-3, max_grad_norm=self._norm, sites=2, colluders=1)
        patients = len(self._rows.patients)
        privacy = DPSGDConfig(
            noise_multiplier=1e-3, sample_rate=1.0, max_grad_norm=self._norm, draws=1, patients=patients
        )
        keys = RoundKeys.of(bytes(32), b"%d" % step)
        steps = noisy_sum(self.network, self.diffusion, self._rows, privacy=privacy, shared=noise, keys=keys, step=step)
        return noise.value(steps.astype(np.int32)) / patients

    def train(self, steps: int, *, rate: float) -> None:
        config = TrainingConfig(total_steps=steps, warmup_steps=5, label_learning_rate=rate)
        moved = Optimisers(self.network, config)
        for step in range(steps):
            descend(moved, self.mean_gradient(step), step=step)


def test_the_optimiser_sees_the_label_models_whole_gradient(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    together = Together(clinic_rows(200, 1), clinic_schema, max_grad_norm=1000.0)
    label = together.network.label
    assert label is not None
    expected = torch.cat(
        [part.flatten() for part in torch.autograd.grad(label.loss(together.encoded).mean(), [*label.parameters()])]
    )
    moved = Optimisers(together.network, TrainingConfig(total_steps=10))
    descend(moved, together.mean_gradient(), step=0)
    seen = moved.parts[1].gradient
    assert float(seen @ expected / (expected @ expected)) == pytest.approx(1.0, abs=0.1)


def test_the_label_models_gradient_leaves_the_denoiser_more_of_the_clipping_norm(
    clinic_schema: TableSchema, clinic_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, lengths = clinic_rows(200, 1), []
    for weight in (shared.LABEL_WEIGHT, 1.0):
        monkeypatch.setattr(shared, "LABEL_WEIGHT", weight)
        together = Together(table, clinic_schema, max_grad_norm=1.0)
        moved = Optimisers(together.network, TrainingConfig(total_steps=10))
        descend(moved, together.mean_gradient(), step=0)
        lengths.append(float(moved.denoiser.gradient.norm()))
    assert lengths[0] > 1.2 * lengths[1]


def test_few_steps_teach_the_label_model_more_at_its_own_rate(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    table, learned = clinic_rows(300, 1), []
    for rate in (LABEL_LEARNING_RATE, TrainingConfig(total_steps=1).label_learning_rate):
        together = Together(table, clinic_schema, max_grad_norm=1.0)
        label = together.network.label
        assert label is not None
        before = label.loss(together.encoded).mean().detach()
        together.train(60, rate=rate)
        learned.append(float(before - label.loss(together.encoded).mean().detach()))
    assert learned[0] > 2 * learned[1] > 0
