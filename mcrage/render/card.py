"""The model card: what a model is, and the privacy statement of each site that trained it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mcrage.errors import CheckpointError
from mcrage.generator import Generator
from mcrage.privacy.statement import PrivacyAccount, can_be_stated, statements

_AUDIT = "## Audit"

NO_PRIVACY = (
    "No privacy claim is made. The model was trained without noise on patients' records; its parameters and the rows "
    "that it generates can carry traces of them."
)


def model_card(
    model: Generator,
    *,
    sites: Sequence[str],
    rounds: int,
    accounts: Mapping[str, PrivacyAccount],
    dp: bool,
    audit: str = "",
) -> str:
    """The card as Markdown.

    Args:
        model: The model.
        sites: Sites that trained it.
        rounds: Rounds of the federation.
        accounts: What the sites' ledgers said after the run.
        dp: Whether the run asked for differential privacy.
        audit: Figures of an audit of this model, if there was one.

    Raises:
        PrivacyError: If an account is not whole, or its epsilon is not that of its events.
    """
    schema = model.schema_
    about = [
        "# Model card",
        f"A {model.in_words} of the table '{schema.name}': {len(schema.modelled)} columns, rows asked for "
        f"by {', '.join(column.name for column in schema.attributes) or 'nothing'}.",
        f"Trained by {len(sites)} sites ({', '.join(sites)}) in {rounds} rounds.",
        "It is for filling up training sets of the same table. It is no medical device.",
        "## Privacy",
    ]
    return "\n\n".join([*about, *privacy_lines(sites, accounts, dp=dp), *_ledger(accounts), _audit(audit)]) + "\n"


def privacy_lines(sites: Sequence[str], accounts: Mapping[str, PrivacyAccount], *, dp: bool) -> list[str]:
    """What can be said about the patients of each site; of a federation only what holds for all of them.

    A run that asked for privacy and got no account of it is not one without noise: nothing is known then.
    """
    if not accounts and not dp:
        return [NO_PRIVACY]
    lines = [*statements(accounts.values()).values()]
    silent = [site for site in sites if site not in accounts]
    if silent:
        lines.append(f"No guarantee can be stated for the patients of {', '.join(silent)}: no account came.")
    if silent or not all(can_be_stated(account) for account in accounts.values()):
        lines.append("So nothing is claimed of the model as a whole.")
    return lines


def _ledger(accounts: Mapping[str, PrivacyAccount]) -> list[str]:
    if not accounts:
        return []
    rows = [
        "| site | since | delta | epsilon of this run | epsilon in all | events |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for account in accounts.values():
        events = "; ".join(event.in_words for event in account.events)
        epsilons = f"{account.epsilon_run:.2f} | {account.epsilon:.2f}"
        rows.append(f"| {account.site} | {account.since} | {account.delta:g} | {epsilons} | {events} |")
    return ["## Ledgers", "\n".join(rows)]


def _audit(figures: str) -> str:
    return f"{_AUDIT}\n\n```text\n{figures.strip()}\n```" if figures else f"{_AUDIT}\n\nThis model was not audited."


def write_audit(folder: Path, figures: str) -> None:
    """Puts the figures of an audit into the card of a model, in the place of those that were there.

    Raises:
        CheckpointError: If the model has no card.
    """
    path = folder / "card.md"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; only models of a federation have a card") from None
    path.write_text(text.partition(_AUDIT)[0] + _audit(figures) + "\n", encoding="utf-8")
