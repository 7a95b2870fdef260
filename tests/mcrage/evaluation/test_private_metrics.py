"""Metrics come from noisy histograms alone, their intervals cover, and what has too few patients is absent."""

import inspect
import typing
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from mcrage.data.groups import Group, GroupCounts
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import PrivacyError
from mcrage.evaluation import private_metrics
from mcrage.evaluation.private_metrics import METRICS, MINIMUM_DENOMINATOR, Estimate, PrivateMetrics
from mcrage.privacy.counts import SCORE_EDGES, NoisyScores, noisy_scores, received_scores
from mcrage.privacy.keyed import derive

KEY = bytes(range(32))
WOMEN, MEN, ALL = Group.of(sex="F"), Group.of(sex="M"), Group(())
SCHEMA = TableSchema(
    columns=(
        Column(name="sex", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False),
        Column(name="ill", kind="boolean", role="target", nullable=False),
    )
)
BY_AGE = SCHEMA.model_copy(
    update={
        "columns": (
            Column(name="age", kind="categorical", role="sensitive", categories=("young", "old"), nullable=False),
            *SCHEMA.columns,
        )
    }
)
PREVALENCE = {"F": 0.3, "M": 0.2}
SEPARATION = {"F": 1.0, "M": 1.6}  # distance of the two normal distributions that calibrated scores come from
THRESHOLD = 0.3


def cohort(n: int, draw: np.random.Generator) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    sex = np.where(draw.random(n) < 0.4, "F", "M")
    prevalence, separation = (np.where(sex == "F", of["F"], of["M"]) for of in (PREVALENCE, SEPARATION))
    ill = draw.random(n) < prevalence
    x = draw.normal(size=n) + separation * ill
    scores = expit(logit(prevalence) + separation * x - separation**2 / 2)
    return pd.DataFrame({"sex": sex, "age": draw.choice(["young", "old"], n), "ill": ill}), scores


def true_cells(sex: str) -> NDArray[np.float64]:
    """Probabilities of the score bins without and with the event, from the normal distribution."""
    separation = SEPARATION[sex]
    cuts = (logit(np.array(SCORE_EDGES)) - logit(PREVALENCE[sex]) + separation**2 / 2) / separation
    return np.stack([np.diff(norm.cdf(cuts - separation * label)) for label in (0, 1)])


def true_metrics(sex: str) -> dict[str, float]:
    negative, positive = true_cells(sex)
    first, prevalence = SCORE_EDGES.index(THRESHOLD), PREVALENCE[sex]
    fpr, tpr = negative[first:].sum(), positive[first:].sum()
    auroc = positive @ (np.cumsum(negative) - negative / 2)
    return dict(zip(METRICS, (auroc, tpr, fpr, prevalence * tpr + (1 - prevalence) * fpr), strict=True))


def measured(n: int, seed: int, *, epsilon: float = 0.5, schema: TableSchema = SCHEMA) -> PrivateMetrics:
    draw = np.random.default_rng([7, seed])
    table, scores = cohort(n, draw)
    noisy = noisy_scores(table, schema, scores, epsilon=epsilon, key=derive(KEY, seed))
    return PrivateMetrics(noisy, threshold=THRESHOLD, generator=draw, num_replicates=300)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def covered(found: Mapping[str, Estimate], truth: Mapping[str, float]) -> list[bool]:
    return [bool(found[name].low <= truth[name] <= found[name].high) for name in METRICS]  # type: ignore[operator]


@pytest.fixture(scope="module")
def many_sites() -> list[PrivateMetrics]:
    return [measured(1200, seed) for seed in range(200)]


def test_intervals_of_groups_and_gaps_cover_the_truth(many_sites: list[PrivateMetrics]) -> None:
    women, men = true_metrics("F"), true_metrics("M")
    gap = {name: women[name] - men[name] for name in METRICS}
    hits = [[covered(s.of(WOMEN), women), covered(s.of(MEN), men), covered(s.gap(WOMEN, MEN), gap)] for s in many_sites]
    assert np.mean(hits, axis=0).min() >= 0.9


def test_the_same_test_fails_on_intervals_that_leave_the_noise_out(
    many_sites: list[PrivateMetrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_metrics, "_laplace_sums", lambda scale, num, shape, generator: np.zeros(shape, int))
    blind = [measured(1200, seed) for seed in range(200)]
    hits = [covered(site.of(MEN), true_metrics("M")) for site in blind]
    assert np.mean(hits, axis=0)[METRICS.index("tpr")] < 0.9
    for name in METRICS:
        assert width(blind[0].of(MEN)[name]) < width(many_sites[0].of(MEN)[name])


def test_values_are_unbiased(many_sites: list[PrivateMetrics]) -> None:
    """Within 4 standard errors of the mean of 200 tables."""
    for name, truth in true_metrics("M").items():
        values = np.array([site.of(MEN)[name].value for site in many_sites], dtype=float)
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)) + 0.003


def test_more_noise_means_wider_intervals() -> None:
    for name in METRICS:
        widths = [width(measured(1200, 0, epsilon=epsilon).of(MEN)[name]) for epsilon in (3.0, 0.3, 0.1)]
        assert widths == sorted(widths)
        assert widths[2] > 1.5 * widths[0]


def test_a_union_of_groups_has_the_noise_of_all_its_parts() -> None:
    whole, of_parts = measured(4000, 0, epsilon=0.2), measured(4000, 0, epsilon=0.2, schema=BY_AGE)
    assert width(of_parts.of(MEN)["tpr"]) > 1.2 * width(whole.of(MEN)["tpr"])


def test_with_little_noise_the_values_are_those_of_the_rows() -> None:
    draw = np.random.default_rng(3)
    table, scores = cohort(50_000, draw)
    noisy = noisy_scores(table, SCHEMA, scores, epsilon=3.0, key=KEY)
    found = PrivateMetrics(noisy, threshold=THRESHOLD, generator=draw, num_replicates=50)
    ill, predicted = table["ill"].to_numpy(), scores >= THRESHOLD
    assert found.of(ALL)["tpr"].value == pytest.approx(predicted[ill].mean(), abs=0.005)
    assert found.of(ALL)["fpr"].value == pytest.approx(predicted[~ill].mean(), abs=0.005)
    assert found.of(ALL)["selection_rate"].value == pytest.approx(predicted.mean(), abs=0.005)
    order = np.argsort(np.argsort(scores)) + 1
    exact = (order[ill].sum() - ill.sum() * (ill.sum() + 1) / 2) / (ill.sum() * (~ill).sum())
    assert -0.02 < found.of(ALL)["auroc"].value - exact < 0.005  # type: ignore[operator]


@pytest.mark.parametrize("prevalence", [0.02, 0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("separation", [0.75, 1.2, 1.8])
def test_the_default_bins_cost_little_auroc(prevalence: float, separation: float) -> None:
    cuts = (logit(np.array(SCORE_EDGES)) - logit(prevalence) + separation**2 / 2) / separation
    negative, positive = (np.diff(norm.cdf(cuts - separation * label)) for label in (0, 1))
    lost = norm.cdf(separation / np.sqrt(2)) - positive @ (np.cumsum(negative) - negative / 2)
    assert 0 <= lost < (0.022 if prevalence < 0.1 else 0.017)


def test_groups_are_everybody_every_level_and_every_intersection() -> None:
    by = measured(500, 0, schema=BY_AGE).by
    assert [len(groups) for groups in by.values()] == [2, 2, 4]
    assert list(by) == ["age", "sex", "age × sex"]
    groups = measured(500, 0, schema=BY_AGE).groups
    assert groups[0] == ALL
    assert len(groups) == len(set(groups)) == 9
    assert measured(500, 0).groups == (ALL, WOMEN, MEN)


def test_a_schema_without_sensitive_features_has_everybody_alone() -> None:
    alone = measured(800, 0, schema=SCHEMA.model_copy(update={"columns": SCHEMA.columns[1:]}))
    assert alone.groups == (ALL,)
    assert alone.by == {}
    assert alone.of(ALL)["tpr"].value is not None


def rare(num_positive: int, num_negative: int, *, seed: int = 0) -> PrivateMetrics:
    """Women with so many events, men with plenty of both."""
    sex = np.repeat(["F", "M"], [num_positive + num_negative, 2000])
    ill = np.concatenate([np.arange(num_positive + num_negative) < num_positive, np.arange(2000) < 1000])
    table = pd.DataFrame({"sex": sex, "ill": ill})
    scores = np.where(ill, 0.6, 0.2)
    draw = np.random.default_rng(seed)
    noisy = noisy_scores(table, SCHEMA, scores, epsilon=3.0, key=derive(KEY, seed))
    return PrivateMetrics(noisy, threshold=THRESHOLD, generator=draw, num_replicates=100)


@pytest.mark.parametrize(
    ("positives", "negatives", "absent"),
    [
        (30, 500, {"auroc", "tpr"}),
        (500, 30, {"auroc", "fpr"}),
        (30, 30, {"auroc", "tpr", "fpr"}),
        (5, 5, set(METRICS)),
        (90, 90, set()),
    ],
)
def test_a_metric_of_too_few_patients_is_absent_with_a_reason_and_so_are_its_gaps(
    positives: int, negatives: int, absent: set[str]
) -> None:
    found = rare(positives, negatives)
    for of in (found.of(WOMEN), found.gap(WOMEN, MEN), found.gap(MEN, WOMEN)):
        assert {name for name, estimate in of.items() if estimate.value is None} == absent
        for name, estimate in of.items():
            assert ("fewer than 50 patients" in estimate.reason) == (name in absent)
            assert (estimate.low is None) == (estimate.high is None) == (name in absent)
    assert found.gap(WOMEN, MEN)["tpr"].reason == ("" if "tpr" not in absent else f"{WOMEN}: {_reason(found)}")


def _reason(found: PrivateMetrics) -> str:
    return found.of(WOMEN)["tpr"].reason


def test_the_noisy_count_decides_and_not_the_true_one() -> None:
    """Of groups of 50 with the event some are shown and some are not: noise on their sum has a deviation of about 1."""
    shown = [rare(MINIMUM_DENOMINATOR, 500, seed=seed).of(WOMEN)["tpr"].value is not None for seed in range(40)]
    assert 5 < sum(shown) < 40


def test_a_rate_of_1_has_an_interval_below_it() -> None:
    tpr = rare(100, 500).of(WOMEN)["tpr"]
    assert tpr.value == pytest.approx(1.0, abs=0.05)
    assert tpr.high == pytest.approx(1.0, abs=0.02)
    assert tpr.low is not None
    assert tpr.low < tpr.value
    for estimate in rare(100, 500).of(WOMEN).values():
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1  # type: ignore[operator]


def test_more_noise_than_patients_is_a_reason() -> None:
    """Counts of nobody at ε = .02: where noise alone passes for 50 patients, an interval would say nothing."""
    reasons = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        table, scores = cohort(0, draw)
        noisy = noisy_scores(table, SCHEMA, scores, epsilon=0.02, key=derive(KEY, seed))
        found = PrivateMetrics(noisy, threshold=THRESHOLD, generator=draw, num_replicates=200)
        reasons += [estimate.reason for group in found.groups for estimate in found.of(group).values()]
    assert sum("the noise is larger" in reason for reason in reasons) > 5


def test_the_same_generator_gives_the_same_intervals() -> None:
    assert dict(measured(800, 3).of(MEN)) == dict(measured(800, 3).of(MEN))


def test_only_groups_without_common_patients_are_compared() -> None:
    found = measured(800, 0, schema=BY_AGE)
    for first, second in [(WOMEN, ALL), (WOMEN, WOMEN), (WOMEN, Group.of(age="old")), (MEN, Group.of(sex="X"))]:
        with pytest.raises(PrivacyError, match="cannot be compared"):
            found.gap(first, second)
    there, back = found.gap(WOMEN, MEN)["fpr"], found.gap(MEN, WOMEN)["fpr"]
    turned = (-back.value, -back.high, -back.low)  # type: ignore[operator]
    assert (there.value, there.low, there.high) == pytest.approx(turned)


@pytest.mark.parametrize("threshold", [0.25, 0.0, 1.0, 0.35])
def test_a_threshold_that_is_no_edge_is_refused(threshold: float) -> None:
    draw = np.random.default_rng(0)
    table, scores = cohort(100, draw)
    noisy = noisy_scores(table, SCHEMA, scores, epsilon=0.5, key=KEY)
    with pytest.raises(PrivacyError, match=r"must be an edge of the score bins \(0.01, "):
        PrivateMetrics(noisy, threshold=threshold, generator=draw)


def test_metrics_are_made_from_noisy_scores_and_from_nothing_else() -> None:
    table, scores = cohort(100, np.random.default_rng(0))
    exact = np.zeros((2, 2, 10), dtype=np.int64)
    for other in (exact, table, scores, GroupCounts.of(table, SCHEMA.sensitive), None):
        with pytest.raises(PrivacyError, match="from NoisyScores only"):
            PrivateMetrics(other, threshold=0.5, generator=np.random.default_rng(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        PrivateMetrics(threshold=0.5, generator=np.random.default_rng(0))  # type: ignore[call-arg]


def test_all_that_returns_an_estimate_belongs_to_metrics_of_noisy_scores() -> None:
    assert typing.get_type_hints(PrivateMetrics.__init__)["scores"] is NoisyScores
    public = [
        value
        for name, value in inspect.getmembers(private_metrics, inspect.isroutine)
        if value.__module__ == private_metrics.__name__ and not name.startswith("_")
    ]
    assert public == []
    assert isinstance(measured(200, 0).of(ALL)["fpr"], Estimate)


def test_scores_that_came_over_the_wire_are_those_that_were_released() -> None:
    table, scores = cohort(300, np.random.default_rng(2))
    sent = noisy_scores(table, SCHEMA, scores, epsilon=0.5, key=KEY)
    got = received_scores(sent.histogram.astype(np.float64), SCHEMA, epsilon=0.5)
    np.testing.assert_array_equal(got.histogram, sent.histogram)
    assert (got.groups, got.edges, got.counts.event) == (sent.groups, sent.edges, sent.counts.event)
    with pytest.raises(PrivacyError, match="shape"):
        received_scores(sent.histogram[:1], SCHEMA, epsilon=0.5)
