import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from mcrage.config import RunConfig, Scalar
from mcrage.errors import ConfigError


def test_what_is_left_out_has_its_default() -> None:
    config = RunConfig.parse({"local-steps": 7, "out-dir": "elsewhere", "num-threads": 2})
    assert config.federation.local_steps == 7
    assert config.places.out_dir == "elsewhere"
    assert config.execution.num_threads == 2
    assert config.federation.width == RunConfig().federation.width


def test_the_flat_form_reads_back_to_the_same_settings() -> None:
    config = RunConfig.parse({"strategy": "fedprox", "learning-rate": 0.25, "resume": True})
    assert RunConfig.parse(config.to_flat()) == config


def test_the_flower_app_declares_every_setting_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["tool"]["flwr"]["app"]["config"] == RunConfig().to_flat()


def test_everything_that_is_wrong_is_reported_at_once() -> None:
    wrong = {"num-server-rounds": "three", "local-step": 5, "width": 3.0, "seed": True, "strategy": "best", "zz": 1}
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(wrong)
    lines = str(caught.value).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == sorted(wrong)
    assert "did you mean local-steps?" in str(caught.value)
    assert "'three'" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning-rate", float("nan")),
        ("learning-rate", 0.0),
        ("ema-decay", 1.0),
        ("test-fraction", 0.0),
        ("min-sites", 0),
        ("max-update-norm", -1.0),
        ("quorum-wait-seconds", float("inf")),
        ("out-dir", ""),
        ("resume", 1),
        ("local_steps", 5),
    ],
)
def test_values_that_make_no_sense_are_refused(key: str, value: float | str) -> None:
    with pytest.raises(ConfigError, match=key):
        RunConfig.parse({key: value})


def test_a_whole_number_serves_where_a_fraction_is_expected() -> None:
    assert RunConfig.parse({"learning-rate": 1}) == RunConfig.parse({"learning-rate": 1.0})


def test_the_fingerprint_follows_what_changes_the_result_and_nothing_else() -> None:
    fingerprint = RunConfig().federation.fingerprint
    elsewhere = RunConfig.parse(
        {"out-dir": "b", "sites-file": "x", "resume": True, "num-threads": 4, "round-timeout-seconds": 1.0}
    )
    assert elsewhere.federation.fingerprint == fingerprint
    for key in ("seed", "width", "local-steps", "max-update-norm"):
        assert RunConfig.parse({key: 17}).federation.fingerprint != fingerprint


def test_total_steps_are_those_of_all_rounds() -> None:
    assert RunConfig.parse({"num-server-rounds": 4, "local-steps": 5}).federation.total_steps == 20


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        RunConfig().federation.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dp": True}, "dp-epsilon"),
        ({"dp": True, "dp-epsilon": 3.0, "strategy": "fedprox"}, "strategy"),
        ({"dp": True, "dp-epsilon": 3.0, "dp-noise-multiplier": 1.0}, "dp-noise-multiplier"),
        ({"dp-sample-rate": 0.0}, "dp-sample-rate"),
        ({"dp-delta": 0.1}, "dp-delta"),
    ],
)
def test_privacy_that_cannot_hold_is_refused(given: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "krum"}, "min-sites: krum with malicious-sites=1 needs 5 sites in every round; it is 2"),
        (
            {"strategy": "multikrum", "min-sites": 6, "malicious-sites": 2},
            "min-sites: multikrum with malicious-sites=2 needs 7 sites in every round; it is 6",
        ),
        (
            {"strategy": "fedtrimmedavg", "min-sites": 9, "trimmed-share": 0.1},
            "min-sites: fedtrimmedavg with trimmed-share=0.1 needs 10 sites in every round; it is 9",
        ),
        ({"strategy": "fedmedian"}, "min-sites: fedmedian needs 3 sites in every round; it is 2"),
        (
            {"strategy": "fedmedian", "min-sites": 3, "site-weights": "counts"},
            "site-weights: fedmedian counts every site once, whatever rows it claims; set it to uniform",
        ),
        ({"trimmed-share": 0.5}, "trimmed-share: input should be less than 0.5; it is 0.5"),
        ({"malicious-sites": 0}, "malicious-sites: input should be greater than or equal to 1; it is 0"),
    ],
)
def test_averages_that_cannot_bear_a_lying_site_are_refused_in_one_line(
    given: dict[str, float | str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("strategy", "sites"), [("fedmedian", 3), ("fedtrimmedavg", 5), ("krum", 5), ("multikrum", 5), ("fedavgm", 1)]
)
def test_a_strategy_is_accepted_with_as_many_sites_as_it_needs(strategy: str, sites: int) -> None:
    federation = RunConfig.parse({"strategy": strategy, "min-sites": sites}).federation
    assert federation.needed_sites == sites


def test_a_run_is_named_by_what_its_releases_depend_on() -> None:
    usual = RunConfig.parse({})
    assert usual.run == RunConfig.parse({"num-threads": 2, "out-dir": "elsewhere", "resume": True}).run
    others = [{"run-name": "again"}, {"dp-sample-rate": 0.2}, {"seed": 1}]
    assert len({usual.run, *(RunConfig.parse(other).run for other in others)}) == 4


def test_rounds_are_measured_as_fixed_before_the_first_one() -> None:
    assert RunConfig.parse({"num-server-rounds": 25}).measured_rounds() == (10, 20, 25)
    private = {"num-server-rounds": 25, "dp": True, "dp-epsilon": 3.0}
    assert RunConfig.parse(private).measured_rounds() == ()
    assert RunConfig.parse(private | {"dp-score-epsilon": 0.5}).measured_rounds() == (10, 20, 25)
    assert not RunConfig.parse(private | {"dp-histogram-noise": 0}).marginals


SHARED = {"dp": True, "dp-epsilon": 8.0, "dp-noise": "shared", "local-steps": 1}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dp": False, "dp-epsilon": 0.0}, "dp-noise: there is no noise to share; set dp=true"),
        ({"local-steps": 30}, "local-steps: with dp-noise=shared every round is one step of the server; set it to 1"),
        ({"strategy": "fedadam"}, "strategy: fedadam would have to see each site's update; leave it out"),
        ({"strategy": "krum", "min-sites": 5}, "strategy: krum would have to see each site's update; leave it out"),
        ({"max-update-norm": 5.0}, "max-update-norm: nobody sees a site's update with dp-noise=shared; set it to 0"),
        ({"site-weights": "counts"}, "site-weights: with dp-noise=shared every patient counts the same"),
        ({"dp-colluders": 2}, "min-sites: of 2 sites 2 may collude; ask for more"),
    ],
)
def test_what_does_not_go_with_sums_that_nobody_can_look_into_is_refused(changes: dict[str, Scalar], told: str) -> None:
    RunConfig.parse(SHARED)
    with pytest.raises(ConfigError) as refused:
        RunConfig.parse(SHARED | changes)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(told)


COUNTED = {"generator": "marginal", "dp": True, "dp-epsilon": 3.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dp-epsilon": 0.0}, "dp-epsilon: the noise of generator=marginal follows from it; give it"),
        ({"dp-noise-multiplier": 1.0}, "dp-noise-multiplier: generator=marginal has none; give dp-epsilon"),
        ({"dp-score-epsilon": 0.5}, "dp-score-epsilon: generator=marginal scores no patient; set it to 0"),
        ({"dp": False, "dp-epsilon": 0.0, "dp-noise": "shared"}, "dp-noise: there is no noise to share; set dp=true"),
        ({"dp-noise": "shared", "dp-colluders": 2}, "min-sites: of 2 sites 2 may collude; ask for more"),
        ({"strategy": "fedmedian", "min-sites": 3}, "strategy: fedmedian averages parameters, and generator=marginal"),
        ({"max-update-norm": 5.0}, "max-update-norm: generator=marginal takes no updates; set it to 0"),
        ({"site-weights": "counts"}, "site-weights: with generator=marginal every patient counts the same"),
        ({"marginals": False}, "marginals: generator=marginal is made of histograms; leave it true"),
    ],
)
def test_what_tables_of_counts_would_ignore_is_refused(changes: dict[str, Scalar], told: str) -> None:
    RunConfig.parse(COUNTED)
    RunConfig.parse(COUNTED | {"dp-noise": "shared"})  # its rounds are no steps
    with pytest.raises(ConfigError) as refused:
        RunConfig.parse(COUNTED | changes)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(told)


def test_a_run_of_the_marginal_generator_has_as_many_rounds_as_questions() -> None:
    config = RunConfig.parse(COUNTED)
    assert (config.federation.rounds, RunConfig().federation.rounds) == (5, 40)
    assert not config.marginals
    assert config.measured_rounds() == RunConfig.parse({"generator": "marginal"}).measured_rounds() == ()
    assert config.run != RunConfig.parse(COUNTED | {"generator": "cddpm"}).run
