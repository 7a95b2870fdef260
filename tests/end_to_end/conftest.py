"""Federations of real processes, all ended with the tests that use them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.policy import SitePolicy
from mcrage.errors import ConfigError
from server.proxy import find_nginx
from simulations.deployed import Federation


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
