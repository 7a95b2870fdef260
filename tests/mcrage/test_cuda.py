"""The same code on a GPU. Without one these tests are skipped by name; what can be checked without is in
``diffusion/test_tabular.py``: no tensor of a step is anywhere but where the model is."""

import numpy as np
import pandas as pd
import pytest
import torch

from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError

needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "ward", "kind": "categorical", "categories": ["a", "b"], "role": "sensitive", "nullable": False},
            {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 200, "decimals": 1},
            {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
        ]
    }
)


def wards(rows: int = 2000) -> pd.DataFrame:
    """The mean lab of ward b is 90, of ward a 60."""
    draw = np.random.default_rng(0)
    is_b = draw.random(rows) < 0.3
    lab = draw.normal(np.where(is_b, 90, 60), 10).clip(0, 200).round(1)
    return pd.DataFrame(
        {
            "ward": pd.Categorical.from_codes(is_b.astype(int), categories=["a", "b"]),
            "lab": np.where(draw.random(rows) < 0.1, np.nan, lab),
            "died": pd.array(draw.random(rows) < np.where(is_b, 0.6, 0.1), dtype="boolean"),
        }
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_device_learns_what_the_table_says(device: str, precision: str) -> None:
    model = CDDPM(width=32, depth=2, steps=1600, device=device, precision=precision, learning_rate=3e-3)
    model.fit(wards(), SCHEMA)
    rows = {ward: model.sample(1000, {"ward": ward}) for ward in "ab"}
    assert rows["a"]["lab"].mean() == pytest.approx(60, abs=3)
    assert rows["b"]["lab"].mean() == pytest.approx(90, abs=3)
    assert rows["b"]["died"].mean() > rows["a"]["died"].mean() + 0.3
    pd.testing.assert_frame_equal(rows["a"], model.sample(1000, {"ward": "a"}))
    assert all(parameter.dtype == np.float32 for parameter in model.parameters().values())


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no device '{device}' here; use 'cpu'"):
        CDDPM(device=device).fit(wards(50), SCHEMA)
