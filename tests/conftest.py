"""A tiny federation on disk, for the tests of client, server and simulations."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

from mcrage.config import RunConfig, Scalar
from mcrage.data.schema import TableSchema

# The same examples in every run: what lands does not depend on luck.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

TINY: dict[str, Scalar] = {
    "num-server-rounds": 3,
    "local-steps": 3,
    "batch-size": 32,
    "width": 16,
    "depth": 1,
    "quorum-retries": 1,
    "quorum-wait-seconds": 0.0,
}


@pytest.fixture(scope="session")
def tiny_schema() -> TableSchema:
    """A data dictionary with a column of most kinds."""
    return TableSchema.parse(
        {
            "name": "tiny",
            "columns": [
                {"name": "patient", "kind": "text", "role": "patient_id", "nullable": False},
                {
                    "name": "sex",
                    "kind": "categorical",
                    "role": "sensitive",
                    "categories": ["F", "M"],
                    "nullable": False,
                },
                {"name": "age", "kind": "integer", "minimum": 18, "maximum": 100},
                {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 10, "decimals": 1},
                {"name": "ill", "kind": "boolean", "role": "target", "nullable": False},
            ],
        }
    )


@pytest.fixture(scope="session")
def site_dir(tmp_path_factory: pytest.TempPathFactory, tiny_schema: TableSchema) -> Path:
    """A folder of three pretend hospitals with 120 patients each. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("sites")
    tiny_schema.save(folder / "schema.json")
    for number in range(1, 4):
        draw = np.random.default_rng([0, number])
        age = draw.integers(18, 100, 120)
        lab = (age / 20 + draw.normal(0, 1, 120)).clip(0, 10).round(1)
        table = pd.DataFrame(
            {
                "patient": [f"p{number}-{row}" for row in range(120)],
                "sex": draw.choice(["F", "M"], 120, p=[0.3, 0.7]),
                "age": age,
                "lab": lab,
                "ill": draw.random(120) < 1 / (1 + np.exp(3 - lab)),
            }
        )
        table.to_csv(folder / f"site-{number:02d}.csv", index=False)
    return folder


@pytest.fixture
def tiny_config(site_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes the settings of a run over the tiny sites that takes about a tenth of a second a round."""

    def make(**changes: Scalar) -> RunConfig:
        places: dict[str, Scalar] = {"site-dir": str(site_dir), "out-dir": str(tmp_path / "out")}
        return RunConfig.parse(TINY | places | {name.replace("_", "-"): value for name, value in changes.items()})

    return make
