"""Membership attacks as text: for a terminal and for the model card."""

import textwrap

from mcrage.evaluation.disclosure import FALSE_ALARMS, Attack, Measured
from mcrage.evaluation.membership import Consistency, MembershipReport
from mcrage.render.text import WIDTH, interval, number, printable

_CAVEAT = (
    "An AUC of .5 is a guess. One interval in twenty misses by chance, and these attacks are not all that there are: "
    "no figure here shows that the model gives nothing away."
)


def attacks_table(report: MembershipReport, claim: Consistency | None = None) -> str:
    """The report in plain text of at most 100 columns; every line under the head is one attack on one subset."""
    rows = ", ".join(f"{number:,} {name}" for name, number in report.rows.items())
    rate = f"true positive rate at {100 * FALSE_ALARMS:.0f} % false alarms"
    lines = [f"Membership attacks by {report.unit}, with 95 % intervals", rows, "", f"{'':27}{'AUC':22}{rate}"]
    for subset in report.subsets:
        title = printable(": ".join(part for part in (subset.name, subset.detail) if part))
        size = "" if subset.reason else f" ({subset.members:,} members, {subset.others:,} others)"
        lines += ["-" * WIDTH, *textwrap.wrap(title + size, WIDTH)]
        lines += [f"  absent, {subset.reason}"] if subset.reason else map(_attack_line, subset.attacks)
    return "\n".join([*lines, "-" * WIDTH, *textwrap.wrap(_CAVEAT, WIDTH), *_claim_lines(claim)]) + "\n"


def _attack_line(attack: Attack) -> str:
    tpr = _figure(attack.tpr) if attack.tpr.value is not None else f"absent, {attack.tpr.reason}"
    if attack.auc.value is None:
        return f"  {attack.name:25}absent, {attack.auc.reason}"
    return f"  {attack.name:25}{_figure(attack.auc):22}{tpr}"


def _figure(measured: Measured) -> str:
    low, high = (min(max(end, 0.0), 1.0) for end in measured.interval or (0.0, 1.0))
    return f"{number(measured.value or 0.0)} {interval(low, high)}"


def _claim_lines(claim: Consistency | None) -> list[str]:
    if claim is None:
        return []
    said = f"The claim of epsilon {claim.epsilon:g} and delta {claim.delta:g}"
    if claim.says_nothing:
        return [f"{said} says nothing about the true positive rate: it allows 1."]
    lines = [f"{said} allows a true positive rate of {claim.bound:.3f}."]
    lines += [f"  {attack} on {subset} exceeds it with its whole interval" for subset, attack in claim.exceeded]
    return lines if claim.exceeded else [*lines, "  No interval lies above it, which does not prove the claim."]
