"""Federations of real processes, all ended with the tests that use them."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.app import app
from client.policy import SitePolicy
from mcrage.config import RunConfig
from mcrage.errors import ConfigError
from server.app import save_result
from server.home import read_json
from server.proxy import find_nginx
from server.rounds import run_federation
from simulations.deployed import Federation
from simulations.grid import InProcessGrid


@pytest.fixture(scope="module")
def new_federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Federation]]:
    """Makes federations, and ends all their processes."""
    try:
        find_nginx()
    except ConfigError as error:
        pytest.skip(str(error))
    made: list[Federation] = []

    def make(data: Path, *, num_sites: int, policy: SitePolicy) -> Federation:
        made.append(Federation(tmp_path_factory.mktemp("federation"), data, num_sites=num_sites, policy=policy))
        return made[-1]

    yield make
    for federation in made:
        federation.close()


@pytest.fixture(scope="session")
def in_one_process(site_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """SHA-256 of the model of the same run, uninterrupted and without any network."""

    def model(federation: Federation, run: str) -> str:
        asked = read_json(federation.home.run(run) / "settings.json")
        out = tmp_path_factory.mktemp("one-process")
        config = RunConfig.parse({**asked, "site-dir": str(site_dir), "out-dir": str(out)})
        grid = InProcessGrid.of_folder(app, len(federation.sites), config)
        save_result(run_federation(grid, config), config, seconds=0.0)
        return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()

    return model
