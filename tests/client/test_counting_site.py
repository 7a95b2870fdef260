"""A hospital that answers with tables of counts: what it sends, what it charges, and what it refuses first."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from client import tables
from client.places import LEDGER, POLICY, SECRET, WITNESS
from client.policy import DataRules, PrivacyRules, SitePolicy
from client.protection import prepare
from client.site import Site
from mcrage.data.crossing import Axes, Axis, exact_counts, to_json
from mcrage.data.schema import TableSchema
from mcrage.errors import BudgetExceededError, PrivacyError, RefusedError
from mcrage.messages import CountInstruction, DescribeInstruction, SiteCounts, SiteSum
from mcrage.peers import Peer, peers_to_json
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import read_secret
from mcrage.privacy.ledger import PrivacyLedger
from mcrage.privacy.masking import opened
from mcrage.privacy.shared_counts import SharedCounts
from mcrage.signing import public_key

RUN = "a" * 64
NAMES = ("st-john", "st-luke", "st-mary")
TABLES: list[Axes] = [(Axis("sex"), Axis("ill"))] * 400
"""1,600 cells: their standard deviation is within 10 % of the true one but for one in 10⁷ draws."""
NOISE = 20.0
DP: dict[str, Any] = {"run": RUN, "test_fraction": 0.3, "dp": True, "delta": 1e-5}
EXACT: dict[str, Any] = {"dp": False, "delta": 0.0, "noise": 0.0}


def rules(**changes: Any) -> PrivacyRules:
    given = {"declared_patients": 80, "max_epsilon_run": 1e3, "max_epsilon_total": 1e3, "noise": ("local", "shared")}
    return PrivacyRules(**(given | changes))


@dataclass(frozen=True)
class Federation:
    """Three hospitals that know each other, and what a server asks them."""

    sites: dict[str, Site]
    schema: TableSchema

    def asks(self, **changes: Any) -> CountInstruction:
        given: dict[str, Any] = {"server_round": 1, "tables": to_json(TABLES), "noise": NOISE}
        return CountInstruction(**(DP | given | changes))

    def shares(self, **changes: Any) -> CountInstruction:
        asked = DescribeInstruction(**DP, marginals=False, counts=False, shares_noise=True)
        texts = {name: site.describe(asked).mask_key for name, site in self.sites.items()}
        peers = peers_to_json({name: Peer.parse(text, site=name, run=RUN) for name, text in texts.items()})
        return self.asks(**({"colluders": 1, "peers": peers} | changes))

    def exact(self) -> np.ndarray:
        parts = [tables.split(site._key(0.3))[1] for site in self.sites.values()]
        return exact_counts(pd.concat(parts), TABLES, self.schema)

    def rows(self, name: str) -> list[tuple[PrivacyEvent, ...]]:
        folder = self.sites[name].private_dir
        with PrivacyLedger.open(folder / LEDGER, witness=folder / WITNESS) as ledger:
            return [row.events for row in ledger.rows]


def write(site: Site, policy: SitePolicy) -> None:
    (site.private_dir / POLICY).write_text(policy.to_toml(), encoding="utf-8")


@pytest.fixture
def federation(site_dir: Path, tiny_schema: TableSchema, tmp_path: Path) -> Federation:
    sites, known = {}, []
    for number, name in enumerate(NAMES, start=1):
        folder = tmp_path / name
        prepare(folder / "private", SitePolicy(privacy=rules()))
        pd.read_csv(site_dir / f"site-{number:02d}.csv").to_csv(folder / "site.csv", index=False)
        sites[name] = Site(name, folder / "site.csv", site_dir / "schema.json", folder / "private")
        known.append(f"{name}:{public_key(read_secret(folder / 'private' / SECRET)).hex()}")
    for site in sites.values():
        write(site, SitePolicy(privacy=rules(peers=tuple(known))))
    return Federation(sites, tiny_schema)


def words(replies: list[SiteCounts | SiteSum]) -> np.ndarray:
    assert all(isinstance(reply, SiteSum) for reply in replies)
    return opened(reply.words for reply in replies)  # type: ignore[union-attr]


@pytest.mark.parametrize("colluders", [1, 2])
def test_an_opened_sum_has_the_noise_that_is_claimed_also_without_the_colluders(
    federation: Federation, colluders: int
) -> None:
    asked = federation.shares(colluders=colluders)
    replies = [site.count(asked) for site in federation.sites.values()]
    noise = words(replies) - federation.exact()
    shared = SharedCounts(noise=NOISE, sites=3, colluders=colluders)
    assert noise.std() == pytest.approx(shared.deviation, rel=0.1)
    assert noise.std() * math.sqrt((3 - colluders) / 3) == pytest.approx(NOISE, rel=0.1)
    assert abs(noise.mean()) < 5 * shared.deviation / math.sqrt(len(noise))


def test_a_site_that_forgets_its_share_is_found(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, share = federation.shares(), SharedCounts.share
    *honest, last = federation.sites.values()
    replies = [site.count(asked) for site in honest]
    monkeypatch.setattr(SharedCounts, "share", lambda self, exact, *, key: 0 * share(self, exact, key=key) + exact)
    noise = words([*replies, last.count(asked)]) - federation.exact()
    assert noise.std() < 0.9 * SharedCounts(noise=NOISE, sites=3, colluders=1).deviation


def test_what_one_site_sends_is_uniform_and_no_two_requests_have_a_mask_in_common(federation: Federation) -> None:
    site = federation.sites["st-mary"]
    first, *others = (
        site.count(federation.shares(**change)) for change in ({}, {"attempt": 1}, {"server_round": 2}, {"noise": 21.0})
    )
    assert isinstance(first, SiteSum)
    for other in others:
        assert isinstance(other, SiteSum)
        for sent in (other.words, other.words - first.words):
            counted = np.bincount(sent.view(np.uint8)[3::4], minlength=256)
            assert stats.chisquare(counted).pvalue > 1e-6


def test_local_noise_is_in_every_answer_and_the_same_request_is_the_same_release(federation: Federation) -> None:
    asked = federation.asks()
    answers = [site.count(asked) for site in federation.sites.values()]
    assert all(isinstance(answer, SiteCounts) for answer in answers)
    noise = sum(answer.counts for answer in answers) - federation.exact()  # type: ignore[union-attr]
    assert noise.std() == pytest.approx(NOISE * math.sqrt(3), rel=0.1)
    again = federation.sites["st-mary"].count(asked)
    np.testing.assert_array_equal(again.counts, answers[2].counts)  # type: ignore[union-attr]
    event = PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=NOISE, steps=len(TABLES))
    assert federation.rows("st-mary") == [(event,)]


def test_the_ledger_has_the_noise_of_the_sum_and_the_share(federation: Federation) -> None:
    federation.sites["st-mary"].count(federation.shares())
    event = PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=NOISE, steps=len(TABLES))
    assert federation.rows("st-mary") == [(replace(event, own_noise=NOISE / math.sqrt(2)),)]


def test_a_description_that_tells_nothing_of_the_rows_costs_nothing(federation: Federation) -> None:
    asked = DescribeInstruction(**DP, marginals=False, counts=False)
    told = federation.sites["st-mary"].describe(asked)
    assert (dict(told.group_counts), told.group_counts.suppressed, told.marginals) == ({}, frozenset(), None)
    assert federation.rows("st-mary") == []


@pytest.mark.parametrize("ask", ["asks", "shares"])
def test_the_table_is_read_only_once_the_ledger_has_the_charge(
    federation: Federation, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, site = getattr(federation, ask)(), federation.sites["st-mary"]
    charged: list[int] = []
    split = tables.split
    monkeypatch.setattr(tables, "split", lambda key: charged.append(len(federation.rows("st-mary"))) or split(key))
    site.count(asked)
    assert charged == [1]
    write(site, SitePolicy(privacy=rules(max_epsilon_run=0.5, allow_unknown_peers=True)))
    with pytest.raises(BudgetExceededError):
        site.count(getattr(federation, ask)(server_round=2))
    assert charged == [1], "what may not be charged is not read"


@pytest.mark.parametrize(
    ("code", "ask", "changes", "privacy", "data"),
    [
        (2003, "asks", EXACT, {}, {}),
        (2007, "asks", {"noise": 0.0}, {}, {}),
        (2007, "asks", EXACT | {"peers": "{}"}, {"required": False}, {"release_exact_counts": True}),
        (2110, "asks", {"server_round": 9}, {"max_rounds_run": 8}, {}),
        (2114, "asks", {"noise": 4.0}, {}, {}),
        (2114, "shares", {"noise": 4.0}, {}, {}),
        (2116, "asks", {}, {"allow_histograms": False}, {}),
        (2130, "shares", {}, {"noise": ("local",)}, {}),
        (2131, "shares", {}, {"min_sharing_sites": 4}, {}),
        (2132, "shares", {}, {"min_colluders": 2}, {}),
        (2133, "shares", {}, {"peers": ()}, {}),
        (2134, "asks", {"peers": "{}", "colluders": 1}, {}, {}),
        (2136, "asks", {}, {"noise": ("shared",)}, {}),
        (2140, "asks", EXACT, {"required": False}, {}),
        (2141, "asks", {}, {}, {"max_tables": 399}),
        (2141, "asks", {}, {}, {"max_cells": 1599}),
        (2142, "asks", {"tables": "[]"}, {}, {}),
        (2142, "asks", {"tables": "[" * 1000}, {}, {}),
        (2142, "asks", {"tables": to_json([(Axis("patient"),)])}, {}, {}),
        (2142, "asks", {"tables": to_json([(Axis("sex", (0, 1)),)])}, {}, {}),
        (2141, "asks", {"tables": "[" * 300_000}, {}, {}),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_with_its_code_before_anything_is_charged(
    federation: Federation,
    code: int,
    ask: str,
    changes: dict[str, Any],
    privacy: dict[str, Any],
    data: dict[str, Any],
) -> None:
    site = federation.sites["st-mary"]
    known = SitePolicy.load(site.private_dir / POLICY).privacy.peers
    asked = getattr(federation, ask)(**changes)
    write(site, SitePolicy(privacy=rules(**({"peers": known} | privacy)), data=DataRules(**data)))
    with pytest.raises(RefusedError) as refused:
        site.count(asked)
    assert refused.value.code == code
    assert federation.rows("st-mary") == []


def test_a_table_with_too_many_cells_is_refused_before_anything_is_charged(federation: Federation) -> None:
    from mcrage.data.marginals import num_cells

    axes = tuple(Axis(c.name, tuple(range(num_cells(c) + 1))) for c in federation.schema.modelled)
    with pytest.raises((PrivacyError, RefusedError)):
        federation.sites["st-mary"].count(federation.asks(tables=to_json([axes])))
    assert federation.rows("st-mary") == []


def test_exact_counts_leave_where_the_hospital_allows_it_and_are_noted(federation: Federation) -> None:
    answers = []
    for site in federation.sites.values():
        write(site, SitePolicy(privacy=rules(required=False), data=DataRules(release_exact_counts=True)))
        answers.append(site.count(federation.asks(**EXACT)))
    np.testing.assert_array_equal(sum(answer.counts for answer in answers), federation.exact())  # type: ignore[union-attr]
    assert federation.rows("st-mary") == [(PrivacyEvent(mechanism="unprotected"),)]
