"""Who takes part: the roll call before the first round, and who comes, returns or may not stay between rounds."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from mcrage import __version__
from mcrage.config import RunConfig
from mcrage.data.groups import MINIMUM_CELL, GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.errors import FederationError, SchemaError
from mcrage.messages import DescribeInstruction, SiteDescription
from mcrage.privacy.counts import readable_marginals
from server.exchange import Answer, Exchange, Subject
from server.registry import Registry, SitesFile
from server.validation import check_replies

_LOG = logging.getLogger("mcrage.server")

ROUNDS_UNTIL_ASKED_AGAIN = 5
"""How many rounds a node that failed to describe itself is left alone."""
_VERSION = re.compile(r"(\d{1,4}\.\d{1,4})[0-9A-Za-z.+-]{0,30}")
_MOST_DIFFERENCES = 3
Waiting = Callable[[Mapping[str, str]], None]


@dataclass(frozen=True)
class Standing:
    """What can be expected of sites at a moment, in the order of their names.

    Attributes:
        free: Sites that can be asked.
        busy: Sites that still owe an answer, and about what.
        absent: Sites that cannot be asked, with the reason.
    """

    free: Sequence[str]
    busy: Mapping[str, Subject]
    absent: Mapping[str, str]

    @property
    def reasons(self) -> dict[str, str]:
        """Why sites are not asked."""
        busy = {site: f"still busy with round {subject.server_round}" for site, subject in self.busy.items()}
        return {**self.absent, **busy}


class Roster:
    """The sites of a run. Once a site takes part its name is kept, whether or not it is there.

    Args:
        exchange: Through which nodes are asked.
        config: The settings.
        schema: The data dictionary of a run that goes on; None where the sites have to agree on one first.
    """

    def __init__(self, exchange: Exchange, config: RunConfig, *, schema: TableSchema | None = None) -> None:
        self.exchange = exchange
        self._config = config
        self._schema = schema
        self._sites_file = SitesFile(config.places.sites_file)
        self._registry: Registry | None = None
        self._nodes: dict[str, int] = {}
        self._descriptions: dict[str, SiteDescription] = {}
        self._described: dict[int, SiteDescription] = {}
        self._absent: dict[int, str] = {}
        self._refused: dict[int, str | None] = {}
        self._ask_again: dict[int, int] = {}

    @property
    def nodes(self) -> dict[str, int]:
        """Flower's node id by site."""
        return {site: self._nodes[site] for site in sorted(self._nodes)}

    @property
    def descriptions(self) -> dict[str, SiteDescription]:
        """What each site told about itself when it joined."""
        return {site: self._descriptions[site] for site in sorted(self._descriptions)}

    @property
    def absent(self) -> dict[str, str]:
        """Nodes that take no part, with the reason."""
        return {_label(node_id): self._absent[node_id] for node_id in sorted(self._absent)}

    @property
    def schema(self) -> TableSchema:
        """The data dictionary that all sites share."""
        assert self._schema is not None, "known once the roll was called"
        return self._schema

    @property
    def marginals(self) -> Marginals | None:
        """Histograms summed over the sites, and only then made readable; None if a site gave none."""
        told = [description.marginals for description in self.descriptions.values()]
        released = [marginals for marginals in told if marginals is not None]
        if len(released) < len(told):
            return None
        total = reduce(add, released)
        if not self._config.privacy.dp:
            return total
        deviation = self._config.privacy.dp_histogram_noise * math.sqrt(len(released))
        return readable_marginals(total, self.schema, deviation=deviation)

    def call(self, waiting: Waiting | None = None) -> None:
        """Asks every node that may take part to describe itself, and again those missing while there are too few."""
        execution, needed = self._config.execution, self._config.federation.min_sites
        for attempt in range(1 + execution.quorum_retries):
            if attempt:
                self.exchange.pause(execution.quorum_wait_seconds)
            nodes = [node_id for node_id in self._allowed() if self._is_wanted(node_id)]
            answers = self.exchange.ask(self._questions(nodes), Subject("description", 0))
            self._hear(answers, asked=nodes, server_round=0)
            present = self._present()
            if len({description.site for description in present.values()}) >= needed:
                return self._open(present)
            if waiting is not None:
                waiting(self.absent)
        reasons = "".join(f"\n{node}: {reason}" for node, reason in self.absent.items())
        raise FederationError(f"{len(present)} sites are there, {needed} are needed{reasons}")

    def update(self, server_round: int) -> None:
        """Lets in who came since the last round. Nobody is waited for: who describes itself late joins a round later.

        Args:
            server_round: Round that is about to begin.
        """
        allowed = self._allowed()
        nodes = [
            node_id
            for node_id in allowed
            if self._is_wanted(node_id) and self._ask_again.get(node_id, 0) <= server_round
        ]
        self.exchange.send(self._questions(nodes), Subject("description", server_round))
        answers = self.exchange.descriptions()
        self._hear(answers, asked=[answer.node_id for answer in answers], server_round=server_round)
        for node_id in sorted(self._described):
            self._seat(node_id, allowed)

    def standing(self, sites: Iterable[str]) -> Standing:
        """Which of these sites can be asked now, and why the others cannot."""
        online = set(self.exchange.online())
        free: list[str] = []
        busy: dict[str, Subject] = {}
        absent: dict[str, str] = {}
        for site in sorted(sites):
            node_id = self._nodes[site]
            if not self._is_listed(node_id, site):
                absent[site] = "is not in the sites file any more"
            elif node_id not in online:
                absent[site] = "is not connected"
            elif subject := self.exchange.busy(node_id):
                busy[site] = subject
            else:
                free.append(site)
        return Standing(free, busy, absent)

    def _allowed(self) -> list[int]:
        """Connected nodes that the sites file knows, as it is now; the others are noted as absent."""
        self._registry = self._sites_file.current()
        online = self.exchange.online()
        if self._registry is None:
            return online
        self.exchange.signers, listed = self._registry.signers, self._registry.site_of
        self._absent |= {n: "is not in the sites file" for n in online if n not in listed}
        return [node_id for node_id in online if node_id in listed]

    def _is_listed(self, node_id: int, site: str) -> bool:
        return self._registry is None or self._registry.site_of.get(node_id) == site

    def _is_wanted(self, node_id: int) -> bool:
        """Whether a node should describe itself: it did not, or was refused when the sites file said something else."""
        is_settled = node_id in self._refused and self._refused[node_id] == self._listed_as(node_id)
        return node_id not in self._described and not is_settled and self.exchange.busy(node_id) is None

    def _listed_as(self, node_id: int) -> str | None:
        return None if self._registry is None else self._registry.site_of.get(node_id)

    def _questions(self, node_ids: Iterable[int]) -> dict[str, Message]:
        federation, privacy = self._config.federation, self._config.privacy
        counts = federation.generator == "cddpm"  # the marginal generator's own tables tell how many there are
        instruction = DescribeInstruction(
            run=self._config.run,
            test_fraction=federation.test_fraction,
            marginals=self._config.marginals,
            counts=counts,
            dp=privacy.dp,
            delta=privacy.dp_delta if privacy.dp else 0.0,
            noise_seed=privacy.dp_noise_seed,
            count_epsilon=privacy.dp_count_epsilon if privacy.dp and counts else 0.0,
            shares_noise=privacy.dp_noise == "shared",
            histogram_noise=privacy.dp_histogram_noise if privacy.dp and self._config.marginals else 0.0,
        )
        content = RecordDict({"config": ConfigRecord(dict(instruction.to_wire().values))})
        return {_label(node_id): Message(content, node_id, "query.describe") for node_id in node_ids}

    def _hear(self, answers: Iterable[Answer], *, asked: Iterable[int], server_round: int) -> None:
        labels = {_label(node_id): node_id for node_id in asked}
        replies = check_replies(
            answers, asked=labels, read=partial(SiteDescription.from_wire, noisy=self._config.privacy.dp)
        )
        for label, reason in replies.dropped.items():
            self._absent[labels[label]] = reason
            self._ask_again[labels[label]] = server_round + ROUNDS_UNTIL_ASKED_AGAIN
        for label, description in replies.accepted.items():
            node_id = labels[label]
            if reason := self._objection(node_id, description):
                self._refuse(node_id, reason)
            else:
                self._described[node_id] = description
                self._absent.pop(node_id, None)

    def _objection(self, node_id: int, description: SiteDescription) -> str:
        """Why a node may not take part; empty if it may."""
        if not self._is_listed(node_id, description.site):
            return f"calls itself {description.site}, the sites file says {self._listed_as(node_id)}"
        if reason := version_objection(description.versions.get("mcrage", "")):
            return f"site {description.site} {reason}"
        if self._schema is None or description.schema_fingerprint == self._schema.fingerprint:
            return ""
        lines = self._schema.diff(description.table_schema)
        more = [f"and {len(lines) - _MOST_DIFFERENCES} more"] if len(lines) > _MOST_DIFFERENCES else []
        differences = "; ".join([*lines[:_MOST_DIFFERENCES], *more])
        return f"site {description.site} has another schema than the run (here): {differences}"

    def _refuse(self, node_id: int, reason: str) -> None:
        _LOG.warning("node %d takes no part: %s", node_id, reason)
        self._refused[node_id] = self._listed_as(node_id)
        self._absent[node_id] = reason
        self._described.pop(node_id, None)

    def _present(self) -> dict[int, SiteDescription]:
        """Nodes that have described themselves and are still listed; of a site's nodes the newest last."""
        order = sorted(self._described) if self._registry is None else list(self._registry.site_of)
        known = {node_id: self._described[node_id] for node_id in order if node_id in self._described}
        return {node_id: told for node_id, told in known.items() if self._is_listed(node_id, told.site)}

    def _open(self, present: Mapping[int, SiteDescription]) -> None:
        """Begins with these nodes."""
        names = Counter(description.site for description in present.values())
        twice = sorted(name for name, nodes in names.items() if nodes > 1)
        if twice and self._registry is None:
            raise FederationError(
                f"several nodes call themselves {', '.join(twice)}; every site needs a name of its own"
            )
        for node_id, description in present.items():
            self._nodes[description.site], self._descriptions[description.site] = node_id, description
        if self._schema is None:
            self._schema = _agreed_schema(self.descriptions)

    def _seat(self, node_id: int, allowed: Sequence[int]) -> None:
        """Gives a node the place of its name, where it is free or the site's other node is gone."""
        description = self._described[node_id]
        site, holder = description.site, self._nodes.get(description.site)
        if holder == node_id or node_id not in allowed or not self._is_listed(node_id, site):
            return
        if holder is None:
            _LOG.info("site %s joins the run", site)
            self._nodes[site], self._descriptions[site] = node_id, description
        elif self._registry is None:
            self._refuse(
                node_id, f"calls itself {site}, as another node does; a sites file can give a site several nodes"
            )
        elif holder not in allowed or not self._is_listed(holder, site):
            _LOG.info("site %s returns with another node", site)
            self._nodes[site] = node_id


def call_roll(
    grid: Grid,
    config: RunConfig,
    *,
    exchange: Exchange | None = None,
    schema: TableSchema | None = None,
    waiting: Waiting | None = None,
) -> Roster:
    """The sites that are there and agree.

    Args:
        grid: Reaches the nodes.
        config: The settings.
        exchange: Through which they are asked; a new one if None.
        schema: The data dictionary of a run that goes on; sites with another one are left out.
        waiting: Told while there are too few sites which nodes take no part, with the reason.

    Raises:
        FederationError: If fewer than ``min_sites`` sites describe themselves, or two have the same name.
        SchemaError: If the data dictionaries differ and none is given; with a line per difference and its site.
        ConfigError: If there is a sites file that cannot be read.
    """
    exchange = exchange or Exchange(grid, timeout=config.execution.round_timeout_seconds)
    roster = Roster(exchange, config, schema=schema)
    roster.call(waiting)
    return roster


def version_objection(version: str) -> str:
    """Why a site with this version of mcrage may not take part; empty if it may.

    Releases that differ in one of the first two numbers may train differently or not understand each other.
    """
    ours, theirs = _VERSION.fullmatch(__version__), _VERSION.fullmatch(version)
    assert ours is not None, "the version of this package"
    if theirs is not None and theirs[1] == ours[1]:
        return ""
    said = theirs[0] if theirs is not None else "of an unknown version"
    return f"has mcrage {said}, the coordinator has {__version__}: the first two numbers have to agree"


def site_weights(site_counts: Mapping[str, GroupCounts], rule: str) -> dict[str, float]:
    """Weight of each site in the average, from what the server knows.

    Args:
        site_counts: Group counts that each site released.
        rule: ``uniform``, or ``counts``: the rows of the groups that a site released, at least the smallest count
            that may be released.
    """
    if rule == "uniform":
        return dict.fromkeys(site_counts, 1.0)
    return {site: float(max(sum(counts.values()), MINIMUM_CELL)) for site, counts in site_counts.items()}


def total_counts(site_counts: Mapping[str, GroupCounts]) -> GroupCounts:
    """Rows per group over all sites: the sum of what each of them could show."""
    return reduce(add, site_counts.values(), GroupCounts({}))


def _label(node_id: int) -> str:
    return f"node {node_id}"


def _agreed_schema(descriptions: Mapping[str, SiteDescription]) -> TableSchema:
    """The schema of most sites is the reference; of the first one, if it is a tie."""
    votes = Counter(description.schema_fingerprint for description in descriptions.values())
    agreed = votes.most_common(1)[0][0]
    reference = next(site for site, description in descriptions.items() if description.schema_fingerprint == agreed)
    schema = descriptions[reference].table_schema
    lines = []
    for site, description in descriptions.items():
        if description.schema_fingerprint != agreed:
            differences = schema.diff(description.table_schema)
            lines += [f"site '{reference}' (here) and site '{site}' (there): {line}" for line in differences]
    if lines:
        raise SchemaError("the sites' schemas differ; nothing was trained\n" + "\n".join(lines))
    return schema
