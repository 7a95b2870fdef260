import math
from dataclasses import fields, replace
from typing import Any

import pytest

from mcrage.errors import PrivacyError
from mcrage.privacy.accounting import epsilon
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.statement import PrivacyAccount, accountant, can_be_stated, statement, statements

EVENTS = (
    PrivacyEvent(mechanism="dp-sgd", noise_multiplier=2.0, sample_rate=0.1, steps=100),
    PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=2.0),
)
ACCOUNT = PrivacyAccount(
    site="st-mary",
    since="2026-11-28",
    delta=1e-5,
    epsilon=epsilon(EVENTS, delta=1e-5),
    epsilon_run=1.0,
    events=EVENTS,
    declared_patients=700,
    accountant=accountant(),
    has_unprotected=False,
)
CLAIM = "differential"


def test_the_statement_has_everything_that_a_guarantee_needs() -> None:
    text = statement(ACCOUNT)
    for part in (
        f"Site st-mary provides ({ACCOUNT.epsilon:.2f}, 1e-05)-differential privacy at patient level",
        "differ by one patient with all rows, added or removed",
        "every message of the site in all rounds and runs, the final model and any amount of synthetic rows",
        "the server and all other sites",
        "the total of the site's ledger since 2026-11-28",
        "PLD (dp-accounting 0.6",
        "at most the sum of those sites' epsilons",
        "No amplification by sampling of sites, by secure aggregation, by shuffling or by hidden iterates is claimed",
        "100 steps with sampling probability 0.1 and noise multiplier 2",
        "declared 700 patients",
        "Not covered: sites without privacy",
    ):
        assert part in text


@pytest.mark.parametrize(
    "changes",
    [
        {"site": ""},
        {"since": ""},
        {"accountant": ""},
        {"delta": 0.0},
        {"epsilon": 0.0},
        {"declared_patients": 0},
        {"epsilon": ACCOUNT.epsilon / 4},
        {"epsilon": math.inf},
        {"events": EVENTS[:1]},
        {"events": (replace(EVENTS[0], steps=50), EVENTS[1])},
    ],
)
def test_a_statement_with_a_missing_field_or_an_epsilon_that_is_not_true_cannot_be_made(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(PrivacyError):
        statement(replace(ACCOUNT, **changes))


@pytest.mark.parametrize("changes", [{"has_unprotected": True}, {"events": ()}])
def test_over_a_release_without_noise_the_words_are_not_printed(changes: dict[str, Any]) -> None:
    account = replace(ACCOUNT, **changes)
    assert not can_be_stated(account)
    assert CLAIM not in statement(account)
    assert "No guarantee" in statement(account)


def test_sites_with_the_same_account_are_named_together() -> None:
    other = replace(ACCOUNT, site="st-john")
    found = statements([ACCOUNT, other, replace(ACCOUNT, site="general", has_unprotected=True)])
    assert list(found) == [("st-mary", "st-john"), ("general",)]
    assert found["st-mary", "st-john"].startswith("Each of the sites st-mary, st-john provides (")
    assert CLAIM not in found["general",]


def test_an_account_comes_back_as_it_went_out() -> None:
    for account in (ACCOUNT, replace(ACCOUNT, epsilon=math.inf, epsilon_run=math.inf)):
        assert PrivacyAccount.from_json(account.to_json()) == account


@pytest.mark.parametrize("field", [field.name for field in fields(PrivacyAccount)])
def test_an_account_that_was_not_agreed_is_refused(field: str) -> None:
    text = ACCOUNT.to_json()
    for bad in (text.replace(f'"{field}"', '"other"'), text.replace(f'"{field}": ', f'"{field}": {{}}, "x": ')):
        with pytest.raises(PrivacyError):
            PrivacyAccount.from_json(bad)


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 100_000, '{"events": 3}'])
def test_what_is_no_account_is_refused(text: str) -> None:
    with pytest.raises(PrivacyError):
        PrivacyAccount.from_json(text)


def test_a_name_of_any_length_is_not_taken() -> None:
    with pytest.raises(PrivacyError, match="too long"):
        PrivacyAccount.from_json(replace(ACCOUNT, site="x" * 1000).to_json())


SHARED = (replace(EVENTS[0], own_noise=1.0), EVENTS[1])


def test_with_shared_noise_both_adversaries_are_named_with_their_numbers() -> None:
    text = statement(replace(ACCOUNT, events=SHARED))
    broken = epsilon((replace(EVENTS[0], noise_multiplier=1.0), EVENTS[1]), delta=1e-5)
    assert broken > 2 * ACCOUNT.epsilon
    for part in (
        f"provides ({ACCOUNT.epsilon:.2f}, 1e-05)-differential privacy",
        "the sum of the sites' masked messages in every step and every table of counts with shared noise",
        "as many of the other sites together as the run's dp-colluders says",
        f"whoever breaks the cryptography of the masks, it provides ({broken:.2f}, 1e-05)-differential privacy.",
        "noise multiplier 2 shared by the sites",
        "A patient treated at several sites that share the noise is not covered",
    ):
        assert part in text
    for claim in (
        "every message of the site in all rounds",
        "by secure aggregation",
        "at most the sum of those sites'",
    ):
        assert claim not in text


def test_of_a_share_that_is_too_small_nothing_is_claimed() -> None:
    tiny = (replace(EVENTS[0], own_noise=0.1), EVENTS[1])
    text = statement(replace(ACCOUNT, events=tiny))
    assert "whoever breaks the cryptography of the masks, nothing is claimed." in text


def test_the_words_for_noise_of_a_sites_own_stand_over_no_shared_noise() -> None:
    account = replace(ACCOUNT, events=(EVENTS[0], *SHARED), epsilon=epsilon((EVENTS[0], *SHARED), delta=1e-5))
    assert "every message of the site in all rounds" not in statement(account)
