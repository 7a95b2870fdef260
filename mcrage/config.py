"""The settings of one federated run: frozen, read once from a flat mapping of scalars, checked at once.

Four kinds that are never mixed: :class:`FederationConfig` changes the result, :class:`PrivacyConfig` is what the
guarantee rests on, :class:`ExecutionConfig` changes only when and how fast the result comes, :class:`PlacesConfig` says
where things live. Flower's run configuration is one flat mapping with
kebab-case keys, so every field has a key of its own: ``local_steps`` is ``local-steps``.
"""

import difflib
import hashlib
import math
from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from mcrage.errors import ConfigError

Scalar = bool | int | float | str

SITE_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
"""What a hospital may be called, in messages, certificates and folders."""

RobustName = Literal["fedmedian", "fedtrimmedavg", "krum", "multikrum"]
StrategyName = Literal["fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", RobustName]
GeneratorName = Literal["cddpm", "marginal"]
MOST_QUESTIONS = 5
"""Most rounds of a run of the marginal generator: each is a question for tables of counts."""

SITES_FOR_MEDIAN = 3
"""Fewest updates whose median is not their mean."""


def sites_for_trimming(share: float) -> int:
    """Fewest updates of which the trimmed mean leaves out one at each end."""
    sites = math.ceil(1 / share)
    return sites if int(share * sites) else sites + 1  # rounded down in floats, as Flower does


def sites_for_krum(malicious: int) -> int:
    """Fewest updates among which Krum finds an honest one (Blanchard et al., 2017)."""
    return 2 * malicious + 3


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=_kebab, populate_by_name=True, allow_inf_nan=False
    )


class FederationConfig(_Section):
    """What changes the result.

    The defaults of the strategies are those with which the held-out loss on the simulated cohort came closest to
    FedAvg's: a momentum of 0.9 (Hsu et al., 2019) made it rise again, a proximal weight of 0.1 slowed it down.

    The learning rate is the higher of the two tried (the other is 3e-3) at which the model of one hospital still learns
    a minority of 2 %: at 1e-2, optimisers that start anew each round follow what most rows say
    (``benchmarks/minority.py collapse``).

    Attributes:
        generator: ``cddpm``, the network; or ``marginal``, which is made of tables of counts and needs far fewer
            patients per epsilon (:mod:`mcrage.marginal`). Of what follows it uses ``min_sites``, ``test_fraction`` and
            ``seed``.
        num_server_rounds: Rounds of training.
        local_steps: Optimiser steps at each site per round.
        batch_size: Rows per step.
        learning_rate: Peak learning rate at the sites (AdamW).
        warmup_steps: Steps of linear warm-up, counted over the whole run.
        width, depth: Size of the network.
        strategy: How updates are averaged: FedAvg (McMahan et al., 2017), FedAvgM (Hsu et al., 2019), FedProx
            (Li et al., 2020), FedAdam and FedYogi (Reddi et al., 2021). Four bear a site that lies: FedMedian and
            FedTrimmedAvg of each parameter by itself (Yin et al., 2018), Krum, which takes the one update with the
            closest neighbours, and MultiKrum, the mean of all but the ``malicious_sites`` farthest ones (Blanchard et
            al., 2017). These have no momentum, count every site once, and want ``min_sites`` to be what they need: of
            so many sites none may stay away, so a federation needs some more. They bound what a lie does; they do not
            find it: late in a training honest updates differ from each other as much as from a lie of their length
            (``benchmarks/poisoning.py``).
        proximal_mu: Weight of the proximal term at the sites; FedProx only.
        server_learning_rate, server_momentum: FedAvgM only.
        eta, tau, beta_1, beta_2: Learning rate, adaptivity and moments of FedAdam and FedYogi, as in their paper.
        trimmed_share: Share of the sites that the trimmed mean leaves out at each end, rounded down to whole sites;
            FedTrimmedAvg only.
        malicious_sites: How many sites may lie; Krum and Multi-Krum only.
        ema_decay: Decay of the server's moving average of the parameters, which is the model that is kept; 0 keeps
            the last round's.
        site_weights: ``uniform``, or ``counts``: in proportion to the rows of the groups that the site released.
        min_sites: Fewest sites whose updates make a round.
        max_update_norm: L2 norm of a site's change of the parameters in one round, above which the site is dropped for
            the round; 0 for any.
        test_fraction: Share of the patients that every site keeps for testing.
        marginals: Whether sites release one-way histograms, from which numbers are spread.
        evaluate_every: Rounds between two measurements of the held-out loss; the last round is always measured
            unless this is 0.
        seed: Root of every random stream.
    """

    generator: GeneratorName = "cddpm"
    num_server_rounds: int = Field(default=40, ge=1)
    local_steps: int = Field(default=30, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    width: int = Field(default=128, ge=1)
    depth: int = Field(default=3, ge=1)
    strategy: StrategyName = "fedavgm"
    proximal_mu: float = Field(default=0.01, ge=0)
    server_learning_rate: float = Field(default=1.0, gt=0)
    server_momentum: float = Field(default=0.5, ge=0, lt=1)
    eta: float = Field(default=1e-2, gt=0)
    tau: float = Field(default=1e-3, gt=0)
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    trimmed_share: float = Field(default=0.2, gt=0, lt=0.5)
    malicious_sites: int = Field(default=1, ge=1)
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    site_weights: Literal["uniform", "counts"] = "uniform"
    min_sites: int = Field(default=2, ge=1)
    max_update_norm: float = Field(default=0.0, ge=0)
    test_fraction: float = Field(default=0.3, gt=0, lt=1)
    marginals: bool = True
    evaluate_every: int = Field(default=10, ge=0)
    seed: int = Field(default=0, ge=0)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it: two runs that agree here, on the same tables, give the same model."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def needed_sites(self) -> int:
        """Fewest updates that the strategy is worth its name with."""
        match self.strategy:
            case "fedmedian":
                return SITES_FOR_MEDIAN
            case "fedtrimmedavg":
                return sites_for_trimming(self.trimmed_share)
            case "krum" | "multikrum":
                return sites_for_krum(self.malicious_sites)
            case _:
                return 1

    @property
    def rounds(self) -> int:
        """Rounds that a run has at most."""
        return self.num_server_rounds if self.generator == "cddpm" else MOST_QUESTIONS

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run at one site."""
        return self.num_server_rounds * self.local_steps


class PrivacyConfig(_Section):
    """What the privacy guarantee rests on: all of it public, and the same at every site.

    Attributes:
        dp: Whether everything that leaves a site has to be differentially private, the unit being a patient.
        dp_epsilon: What one site's patients may pay for the run, at ``dp_delta``; the noise follows from it. 0 takes
            ``dp_noise_multiplier`` as it is.
        dp_delta: δ of the guarantee, well below one over a site's patients.
        dp_noise_multiplier: Standard deviation of the noise on a step's summed gradients over the clipping norm.
        dp_sample_rate: Probability that a patient takes part in a step. Few large steps beat many small ones.
        dp_max_grad_norm: Clipping norm of a patient's gradient.
        dp_draws: Noise levels per patient and step (Dockhorn et al., 2023); they cost time, not privacy.
        dp_noise: ``local``: every site adds all of the noise, and whatever leaves it is protected by itself.
            ``shared``: the sites add it up together under masks (:mod:`mcrage.privacy.shared`), so that small ones can
            take part; a round is then one step, taken by the server.
        dp_colluders: How many sites may tell others what noise they added without harm; with shared noise only.
        dp_spare_rounds: How many sums of a run with shared noise may stay closed because a site fell silent; they are
            paid for, so the noise reckons with them.
        dp_count_epsilon: ε of the numbers of patients by group, which a site releases once a run; the marginal
            generator asks for none.
        dp_histogram_noise: Standard deviation of the noise on every cell of the one-way histograms; 0 for none of
            them. That of the marginal generator's follows from ``dp_epsilon``.
        dp_score_epsilon: ε of the test patients' scores by group and label, at each measurement; 0 measures nothing.
        dp_noise_seed: Root of all noise in a simulation that has to repeat itself; such noise protects nobody, and
            sites outside a simulation refuse it. −1 for noise from each site's own secret.
    """

    dp: bool = False
    dp_epsilon: float = Field(default=0.0, ge=0)
    dp_delta: float = Field(default=1e-5, gt=0, le=1e-3)
    dp_noise_multiplier: float = Field(default=0.0, ge=0)
    dp_sample_rate: float = Field(default=0.1, gt=0, le=0.5)
    dp_max_grad_norm: float = Field(default=1.0, gt=0)
    dp_draws: int = Field(default=4, ge=1)
    dp_noise: Literal["local", "shared"] = "local"
    dp_colluders: int = Field(default=1, ge=1)
    dp_spare_rounds: int = Field(default=2, ge=0)
    dp_count_epsilon: float = Field(default=0.5, gt=0)
    dp_histogram_noise: float = Field(default=20.0, ge=0)
    dp_score_epsilon: float = Field(default=0.0, ge=0)
    dp_noise_seed: int = Field(default=-1, ge=-1)


class ExecutionConfig(_Section):
    """What changes when the result comes, not what it is.

    Attributes:
        num_threads: Threads of torch in a simulated site; a hospital sets its own.
        round_timeout_seconds: How long the server waits for the replies of a round.
        quorum_retries: How often the sites that are missing are asked again in a round below ``min_sites``.
        quorum_wait_seconds: Pause before they are asked again.
    """

    num_threads: int = Field(default=1, ge=1)
    round_timeout_seconds: float = Field(default=3600.0, gt=0)
    quorum_retries: int = Field(default=3, ge=0)
    quorum_wait_seconds: float = Field(default=10.0, ge=0)


class PlacesConfig(_Section):
    """Where things live.

    Attributes:
        site_dir: Simulations only: folder of ``schema.json`` and one CSV or Parquet file per pretend hospital.
        out_dir: Folder for checkpoints, the model, metrics and the description of the run.
        resume: Whether to go on from the last checkpoint in ``out_dir``.
        sites_file: The coordinator's list of sites and their nodes (:mod:`server.registry`), read anew at every round;
            empty lets every node take part.
        run_name: Tells runs with the same settings apart in the sites' privacy ledgers. The same name, settings and
            table are the same releases, which cost nothing the second time.
    """

    site_dir: str = ""
    out_dir: str = Field(default="runs/federation", min_length=1)
    resume: bool = False
    sites_file: str = ""
    run_name: str = Field(default="", max_length=200)


class RunConfig(BaseModel):
    """The settings of one run, in their four kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    execution: ExecutionConfig = ExecutionConfig()
    places: PlacesConfig = PlacesConfig()

    @classmethod
    def parse(cls, flat: Mapping[str, Scalar]) -> "RunConfig":
        """The settings in a flat mapping with kebab-case keys; what it leaves out has its default.

        Raises:
            ConfigError: With a line for every unknown key and every value that is not allowed.
        """
        problems: list[str] = []
        parts: dict[str, _Section] = {}
        unknown = dict(flat)
        for name, section in _SECTIONS.items():
            keys = [_kebab(field) for field in section.model_fields]
            given = {key: unknown.pop(key) for key in keys if key in unknown}
            try:
                parts[name] = section.model_validate(given)
            except ValidationError as error:
                problems += [_readable(problem, given) for problem in error.errors()]
        problems += [_unknown(key, [*cls().to_flat()]) for key in unknown]
        problems += _together(parts) + _averaged(parts.get("federation"))
        if problems:
            raise ConfigError("\n".join(problems))
        return cls(**parts)  # type: ignore[arg-type]  # each part was validated by its own section

    @property
    def run(self) -> str:
        """SHA-256 that names the run in messages and ledgers."""
        # A noise multiplier that follows from epsilon names nothing of its own.
        asked = self.privacy.model_copy(update={"dp_noise_multiplier": 0.0} if self.privacy.dp_epsilon else {})
        parts = self.federation.fingerprint + asked.model_dump_json() + self.places.run_name
        return hashlib.sha256(parts.encode()).hexdigest()

    @property
    def marginals(self) -> bool:
        """Whether sites are asked for one-way histograms before the first round."""
        if self.federation.generator == "marginal":
            return False
        return self.federation.marginals and not (self.privacy.dp and not self.privacy.dp_histogram_noise)

    def measured_rounds(self) -> tuple[int, ...]:
        """The rounds after which sites measure the model on their test patients: fixed before the first one."""
        rounds, every = self.federation.num_server_rounds, self.federation.evaluate_every
        if not every or (self.privacy.dp and not self.privacy.dp_score_epsilon):
            return ()
        if self.federation.generator == "marginal":  # there is no loss to measure
            return ()
        return tuple(number for number in range(1, rounds + 1) if number % every == 0 or number == rounds)

    def to_flat(self) -> dict[str, Scalar]:
        """Every setting by its kebab-case key: what :meth:`parse` reads."""
        sections = (self.federation, self.privacy, self.execution, self.places)
        return {key: value for section in sections for key, value in section.model_dump(by_alias=True).items()}


_SECTIONS: dict[str, type[_Section]] = {
    "federation": FederationConfig,
    "privacy": PrivacyConfig,
    "execution": ExecutionConfig,
    "places": PlacesConfig,
}


def _together(parts: Mapping[str, _Section]) -> list[str]:
    """What is wrong with settings that are fine one by one."""
    privacy, federation = parts.get("privacy"), parts.get("federation")
    if not isinstance(privacy, PrivacyConfig) or not isinstance(federation, FederationConfig):
        return []
    if federation.generator == "marginal":
        return _counted(privacy, federation)
    if not privacy.dp:
        return ["dp-noise: there is no noise to share; set dp=true"] if privacy.dp_noise == "shared" else []
    problems = []
    if not privacy.dp_epsilon and not privacy.dp_noise_multiplier:
        problems.append("dp-epsilon: dp=true needs the ε that the run may cost, or dp-noise-multiplier; both are 0")
    if privacy.dp_epsilon and privacy.dp_noise_multiplier:
        problems.append("dp-noise-multiplier: it follows from dp-epsilon; give one of them")
    if federation.strategy == "fedprox":
        problems.append("strategy: fedprox pulls with gradients that have no noise; choose another one with dp=true")
    return problems + (_shared(privacy, federation) if privacy.dp_noise == "shared" else [])


def _shared(privacy: PrivacyConfig, federation: FederationConfig) -> list[str]:
    """What does not go together with sums that nobody can look into."""
    problems = []
    if federation.local_steps != 1:
        problems.append("local-steps: with dp-noise=shared every round is one step of the server; set it to 1")
    if federation.strategy not in ("fedavg", "fedavgm"):
        problems.append(f"strategy: {federation.strategy} would have to see each site's update; leave it out")
    if federation.max_update_norm:
        problems.append("max-update-norm: nobody sees a site's update with dp-noise=shared; set it to 0")
    if federation.site_weights != "uniform":
        problems.append("site-weights: with dp-noise=shared every patient counts the same; set it to uniform")
    return problems + _honest(privacy, federation)


def _honest(privacy: PrivacyConfig, federation: FederationConfig) -> list[str]:
    if federation.min_sites > privacy.dp_colluders:
        return []
    return [f"min-sites: of {federation.min_sites} sites {privacy.dp_colluders} may collude; ask for more"]


def _counted(privacy: PrivacyConfig, federation: FederationConfig) -> list[str]:
    """What does not go together with tables of counts, which are summed: whatever would be ignored in silence."""
    refused = (
        (not privacy.dp and privacy.dp_noise == "shared", "dp-noise: there is no noise to share; set dp=true"),
        (privacy.dp and not privacy.dp_epsilon, "dp-epsilon: the noise of generator=marginal follows from it; give it"),
        (privacy.dp_noise_multiplier, "dp-noise-multiplier: generator=marginal has none; give dp-epsilon"),
        (privacy.dp_score_epsilon, "dp-score-epsilon: generator=marginal scores no patient; set it to 0"),
        (
            federation.strategy not in ("fedavg", "fedavgm"),
            f"strategy: {federation.strategy} averages parameters, and generator=marginal sums counts; leave it out",
        ),
        (federation.max_update_norm, "max-update-norm: generator=marginal takes no updates; set it to 0"),
        (federation.site_weights != "uniform", "site-weights: with generator=marginal every patient counts the same"),
        (not federation.marginals, "marginals: generator=marginal is made of histograms; leave it true"),
    )
    problems = [text for is_refused, text in refused if is_refused]
    return problems + (_honest(privacy, federation) if privacy.dp_noise == "shared" else [])


def _averaged(federation: _Section | None) -> list[str]:
    """Why the sites' updates cannot be averaged as asked."""
    if not isinstance(federation, FederationConfig) or federation.strategy not in get_args(RobustName):
        return []
    if federation.generator == "marginal":
        return []
    problems, strategy, needed, given = [], federation.strategy, federation.needed_sites, federation.min_sites
    if given < needed:
        share, malicious = f" with trimmed-share={federation.trimmed_share:g}", federation.malicious_sites
        at = {"fedmedian": "", "fedtrimmedavg": share}.get(strategy, f" with malicious-sites={malicious}")
        problems.append(f"min-sites: {strategy}{at} needs {needed} sites in every round; it is {given}")
    if federation.site_weights != "uniform":
        problems.append(f"site-weights: {strategy} counts every site once, whatever rows it claims; set it to uniform")
    return problems


def _readable(problem: ErrorDetails, given: Mapping[str, Scalar]) -> str:
    key, message = str(problem["loc"][0]), problem["msg"]
    return f"{key}: {message[0].lower()}{message[1:]}; it is {given[key]!r}"


def _unknown(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key}: there is no such setting; " + (f"did you mean {close[0]}?" if close else f"use {', '.join(known)}")
