"""The coordinator's side as a Flower ServerApp: settings in, a trained model and its record out."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from mcrage.config import RunConfig
from server.rounds import FederationResult, RoundRecord, run_federation

_LOG = logging.getLogger("mcrage.server")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation and writes ``model/``, ``metrics.jsonl`` and ``run.json`` to the run's folder."""
    _show_log()
    config = RunConfig.parse(context.run_config)
    started = time.monotonic()
    result = run_federation(grid, config, progress=_say)
    save_result(result, config, seconds=time.monotonic() - started)
    _LOG.info("model, metrics and record are in %s", Path(config.places.out_dir).resolve())


def save_result(result: FederationResult, config: RunConfig, *, seconds: float) -> None:
    """Writes the model directory and ``run.json``."""
    out_dir = Path(config.places.out_dir)
    result.model.save(out_dir / "model")
    run = {
        "config": config.to_flat(),
        "seconds": round(seconds, 3),
        "sites": sorted(result.site_counts),
        "absent": dict(result.absent),
        "rounds": [asdict(record) for record in result.history],
    }
    (out_dir / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def _show_log() -> None:
    # Only this program's lines: at the root logger, Flower's HTTP client would write one per upload of the log.
    logger = logging.getLogger("mcrage")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


def _say(record: RoundRecord) -> None:
    losses = list(record.losses.values())
    mean = sum(losses) / len(losses)
    _LOG.info("round %d: %d sites, loss %.4f, %.1f s", record.server_round, len(losses), mean, record.seconds)
