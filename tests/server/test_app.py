import importlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp import ServerApp

from client.app import app as client_app
from mcrage.cddpm import CDDPM
from mcrage.config import RunConfig
from mcrage.errors import ConfigError
from server.app import app
from server.rounds import run_federation
from simulations.grid import InProcessGrid, make_context


@pytest.fixture(autouse=True)
def quiet_logger() -> Iterator[None]:
    logger = logging.getLogger("mcrage")
    before = (list(logger.handlers), logger.level)
    yield
    logger.handlers, logger.level = before


def test_flower_finds_the_app() -> None:
    assert isinstance(importlib.import_module("server.app").app, ServerApp)


def test_the_app_leaves_a_model_metrics_and_a_record(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config()
    app(InProcessGrid.of_folder(client_app, 3, config), make_context(config))
    out_dir = tmp_path / "out"
    names = [".lock", "checkpoints", "metrics.jsonl", "model", "run.json", "status.json"]
    assert sorted(path.name for path in out_dir.iterdir()) == names
    assert json.loads((out_dir / "status.json").read_text())["state"] == "done"
    record = json.loads((out_dir / "run.json").read_text())
    assert record["config"] == config.to_flat()
    assert record["sites"] == ["site-01", "site-02", "site-03"]
    assert [entry["server_round"] for entry in record["rounds"]] == [1, 2, 3]
    again = tiny_config(out_dir=str(tmp_path / "again"))
    model = run_federation(InProcessGrid.of_folder(client_app, 3, again), again).model
    saved = CDDPM.load(out_dir / "model").parameters()
    for name, array in model.parameters().items():
        np.testing.assert_array_equal(saved[name], array)


def test_a_run_whose_result_cannot_be_kept_has_failed(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(num_server_rounds=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").write_text("in the way")
    with pytest.raises(FileExistsError):
        app(InProcessGrid.of_folder(client_app, 3, config), make_context(config))
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["server_round"], status["error"][:15]) == ("failed", 1, "FileExistsError")


def test_settings_that_are_wrong_stop_the_app_before_any_site_is_asked(tiny_config: Callable[..., RunConfig]) -> None:
    context = make_context(tiny_config())
    context.run_config["num-server-rounds"] = "three"
    with pytest.raises(ConfigError, match="num-server-rounds"):
        app(InProcessGrid(client_app, [], tiny_config()), context)
