"""Round zero: who is there, and whether all of them speak of the same table."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from mcrage.config import RunConfig
from mcrage.data.groups import MINIMUM_CELL, GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.errors import FederationError, PrivacyError, SchemaError
from mcrage.messages import AccountInstruction, DescribeInstruction, SiteAccount, SiteDescription
from mcrage.privacy.statement import PrivacyAccount, statement
from server.validation import check_replies

_LOG = logging.getLogger("mcrage.server")


@dataclass(frozen=True)
class Roster:
    """The sites of a run, in the order of their names.

    Attributes:
        nodes: Flower's node id by site.
        descriptions: What each site told about itself.
        absent: Nodes that did not give a description, with the reason.
    """

    nodes: Mapping[str, int]
    descriptions: Mapping[str, SiteDescription]
    absent: Mapping[str, str]

    @property
    def schema(self) -> TableSchema:
        """The data dictionary that all sites share."""
        return next(iter(self.descriptions.values())).table_schema

    @property
    def marginals(self) -> Marginals | None:
        """Histograms summed over the sites; None if a site gave none."""
        released = [description.marginals for description in self.descriptions.values()]
        return reduce(add, released) if all(marginals is not None for marginals in released) else None

    def weights(self, rule: str) -> dict[str, float]:
        """Weight of each site in the average, from what the server knows.

        Args:
            rule: ``uniform``, or ``counts``: the rows of the groups that a site released, at least the smallest count
                that may be released.
        """
        if rule == "uniform":
            return dict.fromkeys(self.nodes, 1.0)
        rows = {site: sum(description.group_counts.values()) for site, description in self.descriptions.items()}
        return {site: float(max(count, MINIMUM_CELL)) for site, count in rows.items()}


def call_roll(grid: Grid, config: RunConfig) -> Roster:
    """Asks every node to describe itself, and again those that are missing while there are too few.

    Raises:
        FederationError: If fewer than ``min_sites`` sites describe themselves, or two have the same name.
        SchemaError: If the data dictionaries differ; with a line per difference and its site.
    """
    described: dict[int, SiteDescription] = {}
    absent: dict[str, str] = {}
    for attempt in range(1 + config.execution.quorum_retries):
        if attempt:
            time.sleep(config.execution.quorum_wait_seconds)
        new = {node_id: str(node_id) for node_id in sorted(grid.get_node_ids()) if node_id not in described}
        replies = check_replies(_ask(grid, list(new), config), asked=new, read=SiteDescription.from_wire)
        described |= {int(node): description for node, description in replies.accepted.items()}
        absent = {f"node {node}": reason for node, reason in replies.dropped.items()}
        if len(described) >= config.federation.min_sites:
            return _roster(described, absent)
    reasons = "".join(f"\n{node}: {reason}" for node, reason in absent.items())
    raise FederationError(f"{len(described)} sites are there, {config.federation.min_sites} are needed{reasons}")


def _ask(grid: Grid, node_ids: list[int], config: RunConfig) -> list[Message]:
    federation, privacy = config.federation, config.privacy
    instruction = DescribeInstruction(
        run=config.run,
        test_fraction=federation.test_fraction,
        marginals=config.marginals,
        dp=privacy.dp,
        delta=privacy.dp_delta if privacy.dp else 0.0,
        noise_seed=privacy.dp_noise_seed,
        count_epsilon=privacy.dp_count_epsilon if privacy.dp else 0.0,
        histogram_noise=privacy.dp_histogram_noise if privacy.dp and config.marginals else 0.0,
    )
    values = ConfigRecord(dict(instruction.to_wire().values))
    messages = [Message(RecordDict({"config": values}), node_id, "query.describe") for node_id in node_ids]
    return list(grid.send_and_receive(messages, timeout=config.execution.round_timeout_seconds))


def collect_accounts(grid: Grid, config: RunConfig, roster: Roster) -> dict[str, PrivacyAccount]:
    """What the ledgers of the sites say, by site.

    Left out is a site that does not answer, speaks for another one, or tells an epsilon that is not that of its events.
    """
    values = ConfigRecord(dict(AccountInstruction(run=config.run).to_wire().values))
    asked = {roster.nodes[site]: site for site in roster.nodes}
    messages = [Message(RecordDict({"config": values}), node_id, "query.account") for node_id in asked]
    answers = grid.send_and_receive(messages, timeout=config.execution.round_timeout_seconds)
    replies = check_replies(answers, asked=asked, read=SiteAccount.from_wire)
    accounts = {}
    for site, reply in replies.accepted.items():
        try:
            if reply.account.site != site:
                raise PrivacyError("it names another site")
            statement(reply.account)
        except PrivacyError as error:
            _LOG.warning("the privacy account of site %s is left out: %s", site, error)
        else:
            accounts[site] = reply.account
    return accounts


def _roster(described: Mapping[int, SiteDescription], absent: Mapping[str, str]) -> Roster:
    by_name = sorted((description.site, node_id) for node_id, description in described.items())
    twice = sorted(name for name, nodes in Counter(name for name, _ in by_name).items() if nodes > 1)
    if twice:
        raise FederationError(f"several nodes call themselves {', '.join(twice)}; every site needs a name of its own")
    descriptions = {name: described[node_id] for name, node_id in by_name}
    _check_schemas(descriptions)
    return Roster(dict(by_name), descriptions, absent)


def _check_schemas(descriptions: Mapping[str, SiteDescription]) -> None:
    """The schema of most sites is the reference; of the first one, if it is a tie."""
    votes = Counter(description.schema_fingerprint for description in descriptions.values())
    agreed = votes.most_common(1)[0][0]
    reference = next(site for site, description in descriptions.items() if description.schema_fingerprint == agreed)
    lines = []
    for site, description in descriptions.items():
        if description.schema_fingerprint != agreed:
            differences = descriptions[reference].table_schema.diff(description.table_schema)
            lines += [f"site '{reference}' (here) and site '{site}' (there): {line}" for line in differences]
    if lines:
        raise SchemaError("the sites' schemas differ; nothing was trained\n" + "\n".join(lines))


def total_counts(site_counts: Mapping[str, GroupCounts]) -> GroupCounts:
    """Rows per group over all sites: the sum of what each of them could show."""
    return reduce(add, site_counts.values(), GroupCounts({}))
