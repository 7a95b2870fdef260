"""What happened, round by round: in memory, and as a JSON line per round and site."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcrage.data.groups import GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.generator import Generator
from mcrage.privacy.statement import PrivacyAccount


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What happened in one round.

    Attributes:
        server_round: Number, from 1.
        sites: Sites that took part.
        losses: Mean training loss by site; empty where none leaves the sites.
        held_out: Loss of the averaged model on the test rows by site; empty where it was not measured.
        scores: Noisy numbers of test patients by group, label and score bin, by site; only with privacy.
        dropped: Sites that did not take part, with the reason.
        seconds: Wall-clock time.
    """

    server_round: int
    sites: Sequence[str]
    losses: Mapping[str, float]
    held_out: Mapping[str, float]
    scores: Mapping[str, Any]
    dropped: Mapping[str, str]
    seconds: float

    @property
    def mean_loss(self) -> float:
        """Mean training loss over the sites that told one."""
        return sum(self.losses.values()) / len(self.losses)


class MetricsFile:
    """A JSON line per round and site.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def restart(self, records: Iterable[RoundRecord]) -> None:
        """Begins the file anew with the rounds that are done."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")
        for record in records:
            self.append(record)

    def append(self, record: RoundRecord) -> None:
        """Adds the lines of one round."""
        lines = [
            {
                "round": record.server_round,
                "site": site,
                "loss": record.losses.get(site),
                "held_out_loss": record.held_out.get(site),
                "dropped": record.dropped.get(site),
            }
            for site in sorted({*record.sites, *record.dropped})
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


@dataclass(frozen=True, kw_only=True)
class FederationResult:
    """What a run gives.

    Attributes:
        model: The generator: of a network the moving average of the rounds.
        site_counts: Group counts that each site released about its training rows, by site; empty ones where none were
            asked for.
        group_counts: Their sum, or what the marginal generator's own table of groups has.
        marginals: One-way histograms summed over the sites; None without them.
        history: One record per round.
        absent: Nodes that took no part in the run, with the reason.
        accounts: What the sites' privacy ledgers say after the run, by site; empty without privacy.
    """

    model: Generator
    site_counts: Mapping[str, GroupCounts]
    group_counts: GroupCounts
    marginals: Marginals | None
    history: tuple[RoundRecord, ...]
    absent: Mapping[str, str]
    accounts: Mapping[str, PrivacyAccount] = field(default_factory=dict)
