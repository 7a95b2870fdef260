from pathlib import Path

import pytest

from mcrage import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import CheckpointError
from mcrage.privacy.accounting import epsilon
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.statement import PrivacyAccount, accountant, statement
from mcrage.render.card import NO_PRIVACY, model_card, write_audit

EVENTS = (PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=20.0, steps=7),)


def account(site: str, *, has_unprotected: bool = False) -> PrivacyAccount:
    cost = epsilon(EVENTS, delta=1e-5)
    return PrivacyAccount(
        site=site,
        since="2026-11-28",
        delta=1e-5,
        epsilon=cost,
        epsilon_run=cost,
        events=EVENTS,
        declared_patients=700,
        accountant=accountant(),
        has_unprotected=has_unprotected,
    )


@pytest.fixture(scope="module")
def model(clinic_schema: TableSchema) -> CDDPM:
    return CDDPM.initialised(clinic_schema, None, config=ModelConfig(width=8, depth=1))


def test_the_card_has_the_statement_the_ledger_and_the_audit(model: CDDPM) -> None:
    accounts = {"a": account("a")}
    card = model_card(model, sites=["a"], rounds=3, accounts=accounts, dp=True, audit="loss .501 [.480, .522]\n")
    assert statement(accounts["a"]) in card
    assert "| a | 2026-11-28 | 1e-05 |" in card
    assert "7 counts per patient with Gaussian noise of standard deviation 20" in card
    assert "loss .501 [.480, .522]" in card
    assert "So nothing is claimed" not in card


def test_without_accounts_the_card_claims_nothing(model: CDDPM) -> None:
    card = model_card(model, sites=["a"], rounds=3, accounts={}, dp=False)
    assert NO_PRIVACY in card
    assert "was not audited" in card
    assert "differential" not in card


def test_a_run_that_asked_for_privacy_and_got_no_account_is_not_called_one_without_noise(model: CDDPM) -> None:
    card = model_card(model, sites=["a"], rounds=3, accounts={}, dp=True)
    assert NO_PRIVACY not in card
    assert "No guarantee can be stated for the patients of a: no account came." in card
    assert "So nothing is claimed of the model as a whole." in card


@pytest.mark.parametrize(
    "accounts", [{"a": account("a")}, {"a": account("a"), "b": account("b", has_unprotected=True)}]
)
def test_of_a_federation_nothing_is_claimed_that_does_not_hold_for_all(
    model: CDDPM, accounts: dict[str, PrivacyAccount]
) -> None:
    card = model_card(model, sites=["a", "b"], rounds=3, accounts=accounts, dp=True)
    assert "So nothing is claimed of the model as a whole." in card
    assert "No guarantee can be stated for the patients of" in card


def test_an_audit_takes_the_place_of_the_last_one(model: CDDPM, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text(model_card(model, sites=["a"], rounds=1, accounts={}, dp=False), encoding="utf-8")
    for figures in ("first", "second"):
        write_audit(tmp_path, figures)
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "second" in card
    assert "first" not in card
    assert "was not audited" not in card
    with pytest.raises(CheckpointError, match="only models of a federation have a card"):
        write_audit(tmp_path / "nowhere", "figures")
