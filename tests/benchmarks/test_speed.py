import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import speed
from benchmarks.machine import NO_BF16, describe
from mcrage import CDDPM
from simulations.datasets import diabetes130

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_the_ratios_to_the_bare_loop_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MCRAGE_DATA", raising=False)
    options = ["--repeats", "3", "--steps", "20", "--rows", "600", "--sample-rows", "500"]
    command = [sys.executable, "-m", "benchmarks.speed", *options]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)

    first, *_ = done.stdout.splitlines()
    assert first.startswith("processor ")
    assert "torch " in first
    assert "simulated rows" in first
    table = [row.strip("| ").split(" | ") for row in done.stdout.splitlines() if row.startswith("|")]
    assert table[0] == ["what", "rows/CPU-s", "its matrix products alone, rows/CPU-s", "ratio", "memory MB"]
    precisions = 1 if describe()["bf16"] == NO_BF16 else 2
    assert len(table) == 2 + 2 * precisions, "training and sampling"
    for _, rate, bare_rate, ratio, _ in table[2:]:
        assert 0 < float(ratio) <= 1.2
        assert float(rate) / float(bare_rate) == pytest.approx(float(ratio), rel=1), "the ratio is that of the rates"


def test_every_product_of_a_training_step_is_recorded() -> None:
    table = speed.simulated(100, diabetes130.SCHEMA)
    with speed.recorded() as products:
        model = CDDPM(width=32, depth=2, steps=3, batch_size=64).fit(table, diabetes130.SCHEMA)

    layers = {id(layer): layer for layer in model.network_.denoiser.modules() if isinstance(layer, nn.Linear)}
    assert {product.layer for product in products} == set(layers)
    for product in products:
        layer = layers[product.layer]
        assert (product.fan_in, product.fan_out) == (layer.in_features, layer.out_features)
        assert product.rows == 64
        assert product.for_weights
    assert any(not product.for_inputs for product in products), "the first layer's inputs are data"
    assert any(product.for_inputs for product in products)


def test_nothing_is_recorded_after_the_recording_and_sampling_needs_no_gradients() -> None:
    table = speed.simulated(100, diabetes130.SCHEMA)
    with speed.recorded() as during:
        pass
    model = CDDPM(width=32, depth=2, steps=1, batch_size=64).fit(table, diabetes130.SCHEMA)
    assert during == []
    with speed.recorded() as products:
        model.sample(50)
    assert products
    assert not any(product.for_inputs or product.for_weights for product in products)


def test_the_bare_loop_does_the_forward_products_always_and_the_others_where_they_are_needed() -> None:
    done = {
        (for_inputs, for_weights): matrix_products(
            [speed.Product(1, 8, 5, 3, torch.float32, for_inputs, for_weights)] * 2
        )
        for for_inputs in (False, True)
        for for_weights in (False, True)
    }
    assert done == {(False, False): 2, (True, False): 4, (False, True): 4, (True, True): 6}


def matrix_products(products: list[speed.Product]) -> int:
    """Matrix products that torch does in the loop."""
    loop = speed.bare_loop(products)
    with torch.profiler.profile() as profile:
        loop()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::mm")


def test_a_layer_that_hides_its_products_is_an_error_and_not_a_better_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    table = speed.simulated(100, diabetes130.SCHEMA)
    forward = nn.Linear.__call__

    def hidden(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if layer.out_features == speed.CDDPM().width and layer.in_features == layer.out_features:
            return nn.functional.linear(x, layer.weight, layer.bias)
        return forward(layer, x)

    monkeypatch.setattr(nn.Linear, "__call__", hidden, raising=False)
    with pytest.raises(SystemExit, match="are not called as modules"):
        speed.training(table, diabetes130.SCHEMA, "float32", steps=1, repeats=1)


def test_simulated_rows_have_the_shape_of_diabetes_130() -> None:
    table = speed.simulated(2000, diabetes130.SCHEMA)
    numeric = [column.name for column in diabetes130.SCHEMA.modelled if column.is_numeric]
    assert (len(table), len(table.columns), len(numeric)) == (2000, 39, 8)
    for column in diabetes130.SCHEMA.modelled:
        if not column.is_numeric:
            assert table[column.name].nunique() >= min(len(column.levels), 6)
