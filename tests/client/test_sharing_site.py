"""A hospital that shares the noise with others: what it sends, what it charges, and with whom it refuses to."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from client.places import LEDGER, POLICY, SECRET, WITNESS
from client.policy import PrivacyRules, SitePolicy
from client.protection import prepare
from client.site import Site
from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import RefusedError
from mcrage.messages import DescribeInstruction, SiteSum, SumInstruction, TrainInstruction
from mcrage.peers import Peer, peers_from_json, peers_to_json
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import read_secret
from mcrage.privacy.ledger import PrivacyLedger
from mcrage.privacy.masking import opened
from mcrage.privacy.shared import SharedNoise
from mcrage.signing import public_key

RUN = "a" * 64
NAMES = ("st-john", "st-luke", "st-mary")
SHARED: dict[str, Any] = {"run": RUN, "test_fraction": 0.3, "dp": True, "delta": 1e-5}
NOISE = 1.0


@dataclass(frozen=True)
class Federation:
    """Three hospitals that know each other, and what a server asks them."""

    sites: dict[str, Site]
    model: CDDPM

    def offers(self, *names: str) -> dict[str, Peer]:
        asked = DescribeInstruction(**SHARED, marginals=False, count_epsilon=0.5, shares_noise=True)
        texts = {name: self.sites[name].describe(asked).mask_key for name in names or NAMES}
        return {name: Peer.parse(text, site=name, run=RUN) for name, text in texts.items()}

    def asks(self, **changes: Any) -> SumInstruction:
        given: dict[str, Any] = {
            "server_round": 1,
            "attempt": 0,
            "total_rounds": 10,
            "seed": 4,
            "noise_multiplier": NOISE,
            "sample_rate": 0.3,
            "max_grad_norm": 1.0,
            "draws": 1,
            "colluders": 1,
            "peers": peers_to_json(self.offers()),
            "description": self.model.describe(),
            "parameters": self.model.parameters(),
        }
        return SumInstruction(**(SHARED | given | changes))

    def rows(self, name: str) -> list[tuple[PrivacyEvent, ...]]:
        folder = self.sites[name].private_dir
        with PrivacyLedger.open(folder / LEDGER, witness=folder / WITNESS) as ledger:
            return [row.events for row in ledger.rows if row.task == "sum"]


def rules(**changes: Any) -> SitePolicy:
    wide = {"declared_patients": 80, "max_epsilon_run": 1e3, "max_epsilon_total": 1e3}
    return SitePolicy(privacy=PrivacyRules(**wide, noise=("shared",), **changes))


@pytest.fixture
def federation(site_dir: Path, tiny_schema: TableSchema, tmp_path: Path) -> Federation:
    sites, known = {}, []
    for number, name in enumerate(NAMES, start=1):
        folder = tmp_path / name
        prepare(folder / "private", rules())
        pd.read_csv(site_dir / f"site-{number:02d}.csv").to_csv(folder / "site.csv", index=False)
        sites[name] = Site(name, folder / "site.csv", site_dir / "schema.json", folder / "private")
        known.append(f"{name}:{public_key(read_secret(folder / 'private' / SECRET)).hex()}")
    for site in sites.values():
        write(site, rules(peers=tuple(known)))
    model = CDDPM.initialised(tiny_schema, None, config=ModelConfig(width=8, depth=1), random_state=0)
    return Federation(sites, model)


def write(site: Site, policy: SitePolicy) -> None:
    (site.private_dir / POLICY).write_text(policy.to_toml(), encoding="utf-8")


def known_to(site: Site) -> tuple[str, ...]:
    return SitePolicy.load(site.private_dir / POLICY).privacy.peers


def value(replies: list[SiteSum], sites: int = 3, noise: float = NOISE) -> np.ndarray:
    shared = SharedNoise(noise_multiplier=noise, max_grad_norm=1.0, sites=sites, colluders=1)
    return shared.value(opened(reply.words for reply in replies)).numpy()


def test_the_sum_of_all_has_the_noise_that_was_asked_for_and_each_reply_is_uniform(federation: Federation) -> None:
    sent, noises = [], []
    for attempt in range(12):
        asked = federation.asks(attempt=attempt, sample_rate=1e-9, noise_multiplier=3.0)
        replies = [site.sum(asked) for site in federation.sites.values()]
        noises.append(value(replies, noise=3.0))  # nobody was drawn: the sum is noise
        sent += [reply.words for reply in replies]
    assert np.concatenate(noises).std() == pytest.approx(3.0 * math.sqrt(3 / 2), rel=0.02)
    high_bytes = np.concatenate(sent).view(np.uint8)[3::4]
    assert stats.chisquare(np.bincount(high_bytes, minlength=256)).pvalue > 1e-6


def test_the_sum_holds_the_clipped_gradients_of_the_patients_of_all_sites(federation: Federation) -> None:
    """The draws come from keys that differ, so the mean over many requests is compared."""
    means = []
    for rate in (0.5, 1e-9):
        total = 0.0
        for attempt in range(6):
            asked = federation.asks(attempt=attempt, sample_rate=rate, noise_multiplier=0.5)
            total += value([site.sum(asked) for site in federation.sites.values()], noise=0.5)
        means.append(np.linalg.norm(total / 6))
    patients = 3 * 84 * 0.5
    assert 0.1 * patients < means[0] <= 1.1 * patients
    assert means[1] < 0.1 * patients


def test_the_ledger_has_the_noise_of_the_sum_and_the_share(federation: Federation) -> None:
    asked = federation.asks()
    first = federation.sites["st-mary"].sum(asked)
    event = PrivacyEvent(mechanism="dp-sgd", noise_multiplier=NOISE, sample_rate=0.3, own_noise=NOISE / math.sqrt(2))
    assert federation.rows("st-mary") == [(event,)]
    again = federation.sites["st-mary"].sum(asked)
    np.testing.assert_array_equal(first.words, again.words)
    assert len(federation.rows("st-mary")) == 1, "the same request is the same release"
    federation.sites["st-mary"].sum(federation.asks(attempt=1))
    assert len(federation.rows("st-mary")) == 2


def test_no_two_requests_have_a_mask_or_a_noise_in_common(federation: Federation) -> None:
    """Else their difference would be a site's own gradients, bare."""
    site = federation.sites["st-mary"]
    first = site.sum(federation.asks(sample_rate=1e-9)).words
    others = [
        federation.asks(sample_rate=1e-9, attempt=1),
        federation.asks(sample_rate=1e-9, server_round=2),
        federation.asks(sample_rate=2e-9),
    ]
    moved = federation.model.parameters()
    next(iter(moved.values()))[0] += 1e-3
    others.append(federation.asks(sample_rate=1e-9, parameters=moved))
    for other in others:
        difference = (site.sum(other).words - first).view(np.uint8)[3::4]
        assert stats.chisquare(np.bincount(difference, minlength=256)).pvalue > 1e-6


def test_a_site_whose_table_changed_has_another_key_and_says_so(federation: Federation) -> None:
    asked = federation.asks()
    site = federation.sites["st-mary"]
    table = pd.read_csv(site.data_path)
    table.iloc[:-1].to_csv(site.data_path, index=False)
    with pytest.raises(RefusedError) as refused:
        site.sum(asked)
    assert refused.value.code == 2134
    assert not federation.rows("st-mary")
    before = peers_from_json(asked.peers, run=RUN)["st-mary"]
    assert site._protection.mask_key(RUN, dataset=site._dataset).public != before.key


Change = Callable[[Federation], dict[str, Any]]


def _with_stranger(federation: Federation) -> dict[str, Any]:
    stranger = Peer.signed(b"k" * 32, site="st-none", run=RUN, secret=b"s" * 32)
    return {"peers": peers_to_json({**federation.offers(), "st-none": stranger})}


def _with_the_servers_key(federation: Federation) -> dict[str, Any]:
    forged = Peer.signed(b"k" * 32, site="st-john", run=RUN, secret=b"s" * 32)
    return {"peers": peers_to_json({**federation.offers(), "st-john": forged})}


def _without_the_site(federation: Federation) -> dict[str, Any]:
    return {"peers": peers_to_json(federation.offers("st-john", "st-luke"))}


def _of_another_run(federation: Federation) -> dict[str, Any]:
    other = Peer.signed(b"k" * 32, site="st-john", run="b" * 64, secret=b"s" * 32)
    return {"peers": peers_to_json({**federation.offers(), "st-john": other})}


def _with_a_key_twice(federation: Federation) -> dict[str, Any]:
    offers = federation.offers()
    secret = read_secret(federation.sites["st-luke"].private_dir / SECRET)
    copied = Peer.signed(offers["st-john"].key, site="st-luke", run=RUN, secret=secret)
    return {"peers": peers_to_json({**offers, "st-luke": copied})}


@pytest.mark.parametrize(
    ("code", "change", "policy"),
    [
        (2130, lambda _: {}, {"noise": ("local",)}),
        (2131, lambda f: {"peers": peers_to_json(f.offers("st-john", "st-mary"))}, {}),
        (2132, lambda _: {}, {"min_colluders": 2}),
        (2133, _with_stranger, {}),
        (2133, _with_the_servers_key, {}),
        (2134, _without_the_site, {}),
        (2134, _of_another_run, {}),
        (2134, _with_a_key_twice, {}),
        (2134, lambda _: {"peers": "no keys"}, {}),
        (2135, lambda _: {"colluders": 3}, {}),
        (2101, lambda _: {"noise_multiplier": 0.4}, {}),
        (2103, lambda _: {"sample_rate": 0.9}, {}),
        (2110, lambda _: {"server_round": 10**6, "total_rounds": 10**6}, {}),
        (2111, lambda _: {"total_rounds": 10**6}, {}),
        (2112, lambda _: {"server_round": 11}, {}),
        (2003, lambda _: {"dp": False}, {}),
        (2204, lambda _: {"description": "{}"}, {}),
    ],
    ids=lambda given: str(given) if isinstance(given, int) else "",
)
def test_what_the_policy_does_not_allow_is_refused_before_anything_is_charged(
    code: int, change: Change, policy: dict[str, Any], federation: Federation
) -> None:
    site = federation.sites["st-mary"]
    asked = federation.asks(**change(federation))
    privacy = SitePolicy.load(site.private_dir / POLICY).privacy
    write(site, SitePolicy(privacy=privacy.model_copy(update=policy)))
    with pytest.raises(RefusedError) as refused:
        site.sum(asked)
    assert refused.value.code == (2203 if code == 2204 else code)
    assert not federation.rows("st-mary")


def test_a_hospital_that_shares_only_takes_no_steps_of_its_own(federation: Federation) -> None:
    sums = federation.asks()
    given = sums.model_dump(exclude={"attempt", "total_rounds", "colluders", "peers"})
    steps = {"first_step": 0, "local_steps": 1, "total_steps": 10, "warmup_steps": 0}
    local = TrainInstruction(**given, **steps, batch_size=1, learning_rate=0.1, proximal_mu=0.0)
    with pytest.raises(RefusedError) as refused:
        federation.sites["st-mary"].train(local)
    assert refused.value.code == 2136


def test_by_default_a_policy_shares_with_nobody() -> None:
    assert PrivacyRules(declared_patients=1).noise == ("local",)
    assert not PrivacyRules(declared_patients=1).allow_unknown_peers


def test_names_of_peers_are_written_with_their_keys(federation: Federation, tmp_path: Path) -> None:
    site = federation.sites["st-mary"]
    path = site.private_dir / POLICY
    assert len(known_to(site)) == 3
    path.write_text(path.read_text().replace("st-john:", "St John:"))
    with pytest.raises(RefusedError, match="peers"):
        SitePolicy.load(path)
