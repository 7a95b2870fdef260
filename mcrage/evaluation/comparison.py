"""The comparisons behind the headline: one per group and downstream model, at one site or over the federation."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mcrage.evaluation.report import ALL, BASELINE_ARMS, HEADLINE_METRIC, GapClosed, GroupVerdict, RunResults, Score

Answer = Literal["yes", "in part", "no evidence", "mixed", "harms", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """AUROC of one group at one site with one downstream model, trained in the ways that matter.

    Attributes:
        baseline: The arm that a hospital can do alone with the highest value, chosen on the same held-out rows, which
            flatters it.
        federated: The arm of the headline.
        verdict: Of the headline arm against local rows; None where the group is too small.
    """

    site: str
    group: str
    model: str
    local: Score | None
    baseline: Score | None
    parity: Score | None
    federated: Score | None
    pooled: Score | None
    gap: GapClosed | None
    verdict: GroupVerdict | None

    @property
    def n(self) -> int | None:
        """Held-out patients of the group; None if they may not be shown."""
        return self.local.n if self.local else None

    @property
    def word(self) -> str:
        """The verdict, or ``insufficient``."""
        return self.verdict.verdict if self.verdict else "insufficient"

    @property
    def reason(self) -> str:
        """Why there is no verdict."""
        found = (score.reason for score in (self.federated, self.local) if score and score.reason)
        return "" if self.verdict else next(found, "not evaluated")

    @property
    def beats_baseline(self) -> bool | None:
        """Whether the federated value is above the best local baseline's; None where one of them is missing."""
        ours, theirs = (score.value if score else None for score in (self.federated, self.baseline))
        return None if ours is None or theirs is None else ours > theirs


def compare(results: RunResults, *, site: str, group: str) -> list[Comparison]:
    """One comparison per downstream model."""
    return [_comparison(results, site=site, group=group, model=model) for model in results.models]


def headline_comparisons(results: RunResults) -> list[Comparison]:
    """Minority groups over the whole federation."""
    return [each for group in results.minority_groups for each in compare(results, site=ALL, group=group)]


def other_comparisons(results: RunResults) -> list[Comparison]:
    """Everybody and the groups that are no minority, over the whole federation."""
    groups = [group for group in results.groups if group not in results.minority_groups]
    return [each for group in groups for each in compare(results, site=ALL, group=group)]


def site_comparisons(results: RunResults) -> list[Comparison]:
    """Minority groups at each hospital."""
    pairs = [(site, group) for site in results.sites for group in results.minority_groups]
    return [each for site, group in pairs for each in compare(results, site=site, group=group)]


def count_words(comparisons: Iterable[Comparison]) -> dict[str, int]:
    """How often each verdict was reached, in the order helps, no evidence, harms, insufficient."""
    counts = Counter(each.word for each in comparisons)
    return {word: counts[word] for word in ("helps", "no evidence", "harms", "insufficient")}


def answer(comparisons: Iterable[Comparison]) -> Answer:
    """What the verdicts say together; never more than the weakest of them allows."""
    counts = count_words(comparisons)
    helps, harms = counts["helps"], counts["harms"]
    if harms:
        return "mixed" if helps else "harms"
    if helps:
        return "in part" if counts["no evidence"] or counts["insufficient"] else "yes"
    return "no evidence" if counts["no evidence"] else "unknown"


def _comparison(results: RunResults, *, site: str, group: str, model: str) -> Comparison:
    def score(arm: str) -> Score | None:
        return results.score(site=site, group=group, arm=arm, model=model, metric=HEADLINE_METRIC)

    baselines = [score(arm) for arm in BASELINE_ARMS]
    computed = [(found.value, found) for found in baselines if found and found.value is not None]
    names = {"site": site, "group": group, "arm": results.headline_arm, "model": model}
    return Comparison(
        site=site,
        group=group,
        model=model,
        local=score("local"),
        baseline=max(computed, key=lambda pair: pair[0])[1] if computed else None,
        parity=score("federated_parity"),
        federated=score(results.headline_arm),
        pooled=score("pooled"),
        gap=results.gap(**names),
        verdict=results.verdict(**names),
    )
