"""Rows of the groups that hospitals lack, drawn at the coordinator from a run's model: no patient's row is needed.

The plan is made from what the sites released about their groups, as the last checkpoint keeps it; of the marginal
generator, from its own table of groups, which is the sum of theirs. It brings every group
of sensitive features and label that any site has shown to the largest one
(:meth:`~mcrage.rebalancing.plan.RebalancePlan.to_parity`). A group that no site has shown is not made up, nor one that
the schema's rules forbid, which noise on counts can show. With a total, every group keeps its share of that plan, in
whole rows by largest remainders, so that the rows add up to the total; where all groups are at parity already they get
equal shares.

The same model, counts and seed give the same files, byte for byte, on machines of one kind.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mcrage.cli import write_rows
from mcrage.data.groups import Group, GroupCounts, level_code
from mcrage.data.repair import NO_REPAIRS, Repairs, forbidden
from mcrage.data.schema import TableSchema
from mcrage.errors import CheckpointError, ConfigError, MessageError
from mcrage.generator import Generator, load_generator
from mcrage.marginal.generator import MarginalGenerator
from mcrage.messages import counts_from_json
from mcrage.privacy.store import sync_folder
from mcrage.progress import ProgressReport
from mcrage.rebalancing.plan import RebalancePlan
from mcrage.rebalancing.rebalancer import Rebalanced, Rebalancer
from mcrage.render.card import privacy_lines
from mcrage.render.text import printable
from mcrage.rng import derive, stream
from server.checkpoints import CheckpointFolder
from server.overview import Record, read_part
from server.roster import total_counts

FOLDER = "synthetic"
"""Of a run: where the rows, the plan and the report go."""

NO_RECORD = "Nothing can be said about privacy: the run has no record (run.json) of what its sites' ledgers say."

_PIECE_ROWS = 4096


def rebalance(folder: Path, *, rows: int, seed: int, force: bool) -> list[str]:
    """Draws what the plan asks for; returns what was written and how many rows of which group.

    Args:
        folder: Of a run that has a model. ``synthetic/`` in it gets ``synthetic.csv``, ``plan.json`` and
            ``report.json``, all of them in one step.
        rows: Rows in all; 0 brings every group to parity.
        seed: Root of the drawing.
        force: Whether to replace what is there.

    Raises:
        ConfigError: If the run has no model yet, the output is there already, or there is nothing to make.
        CheckpointError: If model or checkpoints are damaged.
    """
    out = folder / FOLDER
    if not folder.is_dir():
        raise ConfigError(f"there is no run {folder.name}; 'status' shows all")
    if not (folder / "model" / "model.json").is_file():
        raise ConfigError(f"run {folder.name} has no model: it is not finished; 'status' shows how far it is")
    if out.exists() and not force:
        raise ConfigError(f"'{out}' is there already; give --force to replace it")
    model = load_generator(folder / "model")
    site_counts = _site_counts(folder, model.schema_)
    counts = model.group_counts() if isinstance(model, MarginalGenerator) else total_counts(site_counts)
    plan = make_plan(counts, model.schema_, rows=rows)
    made, drawn = _draw(model, plan, seed=seed)
    record = read_part(folder / "run.json", Record)
    report = _report(made, drawn, site_counts=site_counts) | {
        "seed": seed,
        "model_sha256": hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "privacy": privacy_of(record, sorted(site_counts)),
    }
    _write(out, made.table, {"plan.json": _plan(plan, rows=rows), "report.json": report})
    lines = [*str(made).splitlines(), *report["privacy"], f"{out}: {len(made.table):,} rows, their plan and a report"]
    return [printable(line) for line in lines]


def make_plan(counts: GroupCounts, schema: TableSchema, *, rows: int) -> RebalancePlan:
    """Rows to make per group: to parity, or with ``rows`` that many in all, in the same proportions.

    Args:
        counts: What all sites released, summed.
        schema: The data dictionary.
        rows: Rows in all; 0 for parity.

    Raises:
        ConfigError: If there is nothing to make.
    """
    if not schema.attributes:
        raise ConfigError("the schema has neither sensitive features nor a target: there are no groups to rebalance")
    groups = _possible(counts, schema)
    allowed = {group: counts[group] for group in groups if group in counts}
    parity = RebalancePlan.to_parity(GroupCounts(allowed, suppressed=counts.suppressed.intersection(groups)))
    if not groups:
        raise ConfigError("no site has shown a group: there is nothing to bring to parity")
    if not rows and not parity.total:
        raise ConfigError("every group has as many rows as the largest one; --rows makes some of each")
    weights = [parity[group] if parity.total else 1 for group in groups]
    made = _shares(weights, rows) if rows else weights
    return RebalancePlan(dict(zip(groups, made, strict=True)), has=parity.has)


def _possible(counts: GroupCounts, schema: TableSchema) -> list[Group]:
    """Groups that a site has shown and the rules allow, by name."""
    groups = sorted({*counts, *counts.suppressed}, key=str)
    if not schema.rules or not groups:
        return groups
    pairs = [zip(schema.attributes, group.levels, strict=True) for group in groups]
    codes = np.array([[level_code(column, level) for column, (_, level) in each] for each in pairs])
    return [group for group, is_bad in zip(groups, forbidden(codes, schema), strict=True) if not is_bad]


def _shares(weights: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to the total: largest remainders get one more."""
    shares, remainders = zip(*(divmod(total * weight, sum(weights)) for weight in weights), strict=True)
    largest = sorted(range(len(weights)), key=lambda place: -remainders[place])[: total - sum(shares)]
    return [share + (place in largest) for place, share in enumerate(shares)]


def privacy_of(record: Record | None, sites: list[str]) -> list[str]:
    """What can be said about the privacy of the sites' patients after a run.

    Raises:
        PrivacyError: If an account in the record is not whole, or its epsilon is not that of its events.
    """
    if record is None:
        return [NO_RECORD]
    return privacy_lines(sites, record.accounts, dp=bool(record.config.get("dp")))


class _Watched:
    """A model that draws a piece after the other, shows how far it is, and counts what it drew.

    Args:
        model: Draws the rows.
        progress: Is told of every piece.
    """

    def __init__(self, model: Generator, progress: ProgressReport) -> None:
        self._model, self._progress = model, progress
        self.repairs_: Repairs = NO_REPAIRS
        self.drawn: Counter[Group] = Counter()

    def sample(self, n: int, conditions: pd.DataFrame, *, random_state: int) -> pd.DataFrame:
        """``n`` rows; row i has the levels of row i of ``conditions``."""
        self.repairs_, parts = NO_REPAIRS, []
        for start in range(0, n, _PIECE_ROWS):
            piece = conditions.iloc[start : start + _PIECE_ROWS].reset_index(drop=True)
            parts.append(self._model.sample(len(piece), piece, random_state=derive(random_state, start)))
            self.repairs_ += self._model.repairs_
            self._progress.advance()
        names = list(conditions.columns)
        asked = Counter(conditions.itertuples(index=False, name=None))
        self.drawn.update({Group(tuple(zip(names, levels, strict=True))): count for levels, count in asked.items()})
        return pd.concat(parts, ignore_index=True)


def _draw(model: Generator, plan: RebalancePlan, *, seed: int) -> tuple[Rebalanced, Mapping[Group, int]]:
    """The rows, and how many were drawn of each group to get them."""
    pieces = -(-plan.total // _PIECE_ROWS)
    wanted = {group: count for group, count in plan.items() if count}
    with ProgressReport(f"drawing {plan.total:,} rows", pieces, every=max(pieces // 10, 1)) as progress:
        watched = _Watched(model, progress)
        rebalancer = Rebalancer.from_model(watched, wanted, model.schema_, random_state=derive(seed, "rebalance"))
        made = rebalancer.take(plan, stream(seed, "rebalance", "order"))
    return made, watched.drawn


def _site_counts(folder: Path, schema: TableSchema) -> dict[str, GroupCounts]:
    checkpoint = CheckpointFolder(folder / "checkpoints").latest()
    if checkpoint is None:
        raise CheckpointError(f"'{folder / 'checkpoints'}' has no checkpoint: what the sites released is not known")
    try:
        return {site: counts_from_json(text, schema) for site, text in sorted(checkpoint.site_counts.items())}
    except MessageError as error:
        raise CheckpointError(f"'{folder / 'checkpoints'}' is not of this model: {error}") from None


def _plan(plan: RebalancePlan, *, rows: int) -> dict[str, Any]:
    return {
        "rule": f"{rows} rows in the proportions of parity" if rows else "parity with the largest group",
        "rows": plan.total,
        "groups": [
            {"group": group.as_dict(), "counted": plan.has[group], "to_make": count} for group, count in plan.items()
        ],
    }


def _report(made: Rebalanced, drawn: Mapping[Group, int], *, site_counts: Mapping[str, GroupCounts]) -> dict[str, Any]:
    return {
        "rows": len(made.table),
        "groups": [
            {
                "group": group.as_dict(),
                "asked": asked,
                "made": made.made[group],
                "rejected": drawn.get(group, 0) - made.made[group],
            }
            for group, asked in made.asked.items()
        ],
        "rules": made.repairs.lines,
        "sites": {site: _released(counts) for site, counts in site_counts.items()},
    }


def _released(counts: GroupCounts) -> dict[str, Any]:
    return {
        "counts": [{"group": group.as_dict(), "rows": counts[group]} for group in sorted(counts, key=str)],
        "suppressed": [group.as_dict() for group in sorted(counts.suppressed, key=str)],
    }


def _write(out: Path, table: pd.DataFrame, texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes all files into a folder of another name, syncs it and renames it: what is there is whole."""
    draft, old = out.with_name(f".{out.name}"), out.with_name(f".{out.name}.old")
    for abandoned in (draft, old):
        shutil.rmtree(abandoned, ignore_errors=True)
    try:
        draft.mkdir(mode=0o700)
        write_rows(table, draft / "synthetic.csv")
        for name, content in texts.items():
            (draft / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for path in draft.iterdir():
            _sync(path)
        sync_folder(draft)
        if out.exists():
            out.rename(old)  # a folder cannot be renamed over one that has files
        draft.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise ConfigError(f"'{out}' cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
