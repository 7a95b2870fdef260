"""The coordinator's side as a Flower ServerApp: settings in, a trained model and its record out."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from mcrage.config import RunConfig
from mcrage.render.card import model_card
from server.measures import fairness_rows
from server.rounds import FederationResult, RoundRecord, run_federation

_LOG = logging.getLogger("mcrage.server")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation and writes ``model/``, ``metrics.jsonl`` and ``run.json`` to the run's folder."""
    _show_log()
    config = RunConfig.parse(context.run_config)
    started = time.monotonic()

    def keep(result: FederationResult) -> None:
        save_result(result, config, seconds=time.monotonic() - started)

    run_federation(grid, config, progress=_say, keep=keep)
    _LOG.info("model, metrics and record are in %s", Path(config.places.out_dir).resolve())


def save_result(result: FederationResult, config: RunConfig, *, seconds: float) -> None:
    """Writes the model directory, ``run.json``, and ``fairness.json`` where sites measured the model with noise."""
    out_dir = Path(config.places.out_dir)
    result.model.save(out_dir / "model")
    write_card(result, out_dir / "model", dp=config.privacy.dp)
    run = {
        "config": config.to_flat(),
        "seconds": round(seconds, 3),
        "sites": sorted(result.site_counts),
        "absent": dict(result.absent),
        "privacy": {site: json.loads(account.to_json()) for site, account in result.accounts.items()},
        "rounds": [asdict(record) for record in result.history],
    }
    if any(record.scores for record in result.history):
        rows = fairness_rows(result.history, result.model.schema_, config)
        (out_dir / "fairness.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out_dir / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def write_card(result: FederationResult, folder: Path, *, dp: bool, audit: str = "") -> None:
    """Writes ``card.md`` beside a model: what it is, and what can be said about the patients' privacy."""
    text = model_card(
        result.model,
        sites=sorted(result.site_counts),
        rounds=len(result.history),
        accounts=result.accounts,
        dp=dp,
        audit=audit,
    )
    (folder / "card.md").write_text(text, encoding="utf-8")


def _show_log() -> None:
    # Only this program's lines: at the root logger, Flower's HTTP client would write one per upload of the log.
    logger = logging.getLogger("mcrage")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


def _say(record: RoundRecord) -> None:
    loss = f", loss {record.mean_loss:.4f}" if record.losses else ""
    _LOG.info("round %d: %d sites%s, %.1f s", record.server_round, len(record.sites), loss, record.seconds)
