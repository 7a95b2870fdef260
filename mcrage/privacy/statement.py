"""The sentence about privacy that a site may print, and when it may not.

NIST SP 800-226 asks for epsilon, delta, the unit, the neighbours, the adversary and every step that depends on data. A
sentence that lacks one of them, or that stands over a release without noise, is not printed at all.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from typing import Any

from mcrage.errors import PrivacyError
from mcrage.privacy.accounting import alone, epsilon
from mcrage.privacy.events import PrivacyEvent

_TOLERANCE = 0.01
_LONGEST = 200


@dataclass(frozen=True, kw_only=True)
class PrivacyAccount:
    """What a site's ledger says; none of it depends on a patient.

    Attributes:
        site: Name of the site.
        since: Day on which its ledger was begun.
        delta: The site's, for the ledger's lifetime.
        epsilon: Of everything in the ledger.
        epsilon_run: Of the run that was asked about.
        events: Everything in the ledger, equal events merged.
        declared_patients: What updates are scaled by, a public number.
        accountant: What computed epsilon.
        has_unprotected: Whether there ever was a release without noise.
    """

    site: str
    since: str
    delta: float
    epsilon: float
    epsilon_run: float
    events: tuple[PrivacyEvent, ...]
    declared_patients: int
    accountant: str
    has_unprotected: bool

    def to_json(self) -> str:
        """The account as JSON text; an infinite epsilon is ``null``."""
        numbers = {name: getattr(self, name) for name in ("epsilon", "epsilon_run")}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return json.dumps(asdict(self) | finite, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "PrivacyAccount":
        """The account of :meth:`to_json`.

        Raises:
            PrivacyError: If it is anything else.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            events = tuple(PrivacyEvent(**event) for event in content.pop("events"))
            for name in ("epsilon", "epsilon_run"):
                content[name] = math.inf if content[name] is None else float(content[name])
            account = cls(events=events, **content)
            date.fromisoformat(account.since)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise PrivacyError("not the text of a privacy account") from None
        expected = {name: type(getattr(_EXAMPLE, name)) for name in vars(_EXAMPLE)}
        wrong = [name for name, kind in expected.items() if type(getattr(account, name)) is not kind]
        if wrong or any(len(getattr(account, name)) > _LONGEST for name in ("site", "since", "accountant")):
            raise PrivacyError(f"not a privacy account: {', '.join(wrong) or 'a text is too long'}")
        return account


_EXAMPLE = PrivacyAccount(
    site="",
    since="",
    delta=0.5,
    epsilon=0.5,
    epsilon_run=0.5,
    events=(),
    declared_patients=1,
    accountant="",
    has_unprotected=False,
)


def accountant() -> str:
    """What computes epsilon here."""
    return f"PLD (dp-accounting {version('dp-accounting')})"


def can_be_stated(account: PrivacyAccount) -> bool:
    """Whether a guarantee stands behind everything that the site ever released."""
    return not account.has_unprotected and bool(account.events)


def statement(account: PrivacyAccount, *, who: str = "") -> str:
    """What can be said about the privacy of a site's patients.

    Args:
        account: What its ledger says.
        who: How the site is called, or several sites with the same account.

    Raises:
        PrivacyError: If a field is empty, or epsilon is not that of the events.
    """
    if not can_be_stated(account):
        reason = "its ledger has a release without noise" if account.has_unprotected else "its ledger is empty"
        return f"No guarantee can be stated for the patients of {who or f'site {account.site}'}: {reason}."
    for name in ("site", "since", "accountant"):
        if not getattr(account, name):
            raise PrivacyError(f"a privacy statement needs '{name}'")
    for name in ("delta", "epsilon", "declared_patients"):
        if not getattr(account, name) > 0:
            raise PrivacyError(f"a privacy statement needs '{name}' above 0")
    recomputed = epsilon(account.events, delta=account.delta)
    if abs(recomputed - account.epsilon) > _TOLERANCE:
        raise PrivacyError(f"site {account.site}: its events cost {recomputed:.3f}, not {account.epsilon:.3f}")
    subject = f"Each of {who}" if who else f"Site {account.site}"
    told = {"subject": subject, "account": account, "public": _public(account.events)}
    if not any(event.own_noise for event in account.events):
        return _STATEMENT.format(**told, adversary=_ALL_MESSAGES, several=_SEVERAL, broken="")
    return _STATEMENT.format(**told, adversary=_SUMS, several=_SEVERAL_SHARED, broken=_broken(account))


def _broken(account: PrivacyAccount) -> str:
    """What is left of a guarantee that rests on shared noise once the aggregation is broken."""
    left = epsilon(alone(account.events), delta=account.delta)
    provided = f"it provides ({left:.2f}, {account.delta:g})-differential privacy" if math.isfinite(left) else _NOTHING
    return _BROKEN.format(provided=provided)


def statements(accounts: Iterable[PrivacyAccount]) -> dict[tuple[str, ...], str]:
    """What can be said about each site, by the sites of which the same can be said.

    Raises:
        PrivacyError: As :func:`statement`.
    """
    alike: dict[PrivacyAccount, list[PrivacyAccount]] = {}
    for account in accounts:
        alike.setdefault(replace(account, site="any"), []).append(account)
    return {tuple(one.site for one in same): _of_all(same) for same in alike.values()}


def _of_all(same: Sequence[PrivacyAccount]) -> str:
    if len(same) == 1:
        return statement(same[0])
    return statement(same[0], who=f"the sites {', '.join(one.site for one in same)}")


def _public(events: Sequence[PrivacyEvent]) -> str:
    trained = [event for event in events if event.mechanism == "dp-sgd"]
    if not trained:
        return "the noise of its counts"
    return "; ".join(
        f"{event.steps:,} steps with sampling probability {event.sample_rate:g} and noise multiplier "
        f"{event.noise_multiplier:g}{' shared by the sites' if event.own_noise else ''}"
        for event in trained
    )


_STATEMENT = (
    "{subject} provides ({account.epsilon:.2f}, {account.delta:g})-differential privacy at patient level, "
    "where neighbouring tables differ by one patient with all rows, added or removed, against an adversary who sees "
    "{adversary}. {broken}This is the total of the site's ledger since {account.since}, computed by "
    "{account.accountant} from the recorded events. {several} is claimed. Treated as public: the schema, the clipping "
    "norm, {public}, the site's taking part, and its declared {account.declared_patients:,} patients. Not covered: "
    "sites without privacy, the timing of replies, and whether a table can be read at all."
)
_ALL_MESSAGES = (
    "every message of the site in all rounds and runs, the final model and any amount of synthetic rows, including the "
    "server and all other sites"
)
_SEVERAL = (
    "A patient treated at several sites is protected by at most the sum of those sites' epsilons. No amplification by "
    "sampling of sites, by secure aggregation, by shuffling or by hidden iterates"
)
_SUMS = (
    "the sum of the sites' masked messages in every step and every table of counts with shared noise, every other "
    "message of the site, the final model and any amount of synthetic rows: the public, the server, and as many of the "
    "other sites together as the run's dp-colluders says"
)
_BROKEN = (
    "Against more sites than that together, the server among them or not, and against whoever breaks the cryptography "
    "of the masks, {provided}. "
)
_NOTHING = "nothing is claimed"
_SEVERAL_SHARED = (
    "A patient treated at several sites that share the noise is not covered. No amplification by sampling of sites, by "
    "shuffling or by hidden iterates"
)
