"""What a run will cost the patients of one site, known from its settings before anything is touched."""

import logging
import math

from mcrage.config import RunConfig
from mcrage.data.schema import TableSchema
from mcrage.marginal.budget import Budget, Shares, precision
from mcrage.marginal.estimation import num_tables
from mcrage.privacy.accounting import alone, calibrate_noise_multiplier, epsilon
from mcrage.privacy.counts import group_counts_event, marginals_event, scores_event
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.shared import SharedNoise
from mcrage.privacy.shared_counts import SharedCounts
from mcrage.prospects import Prospect, signal

_LOG = logging.getLogger("mcrage.server")


def with_noise(config: RunConfig, schema: TableSchema) -> RunConfig:
    """The settings with the noise multiplier that their epsilon asks for; as they are where they name it.

    Raises:
        PrivacyError: If no noise multiplier is enough.
    """
    privacy = config.privacy
    if not privacy.dp or privacy.dp_noise_multiplier or config.federation.generator == "marginal":
        return config
    noise_multiplier = calibrate_noise_multiplier(
        epsilon=privacy.dp_epsilon,
        delta=privacy.dp_delta,
        sample_rate=privacy.dp_sample_rate,
        steps=_steps(config),
        also=_counted(config, schema),
    )
    return config.model_copy(update={"privacy": privacy.model_copy(update={"dp_noise_multiplier": noise_multiplier})})


def planned_events(config: RunConfig, schema: TableSchema) -> tuple[PrivacyEvent, ...]:
    """Everything that a site will be charged for: training, counts, histograms, scores; or tables of counts."""
    privacy = config.privacy
    if not privacy.dp:
        return (PrivacyEvent(mechanism="unprotected"),)
    if config.federation.generator == "marginal":
        return _tables(config, schema)
    training = PrivacyEvent(
        mechanism="dp-sgd",
        noise_multiplier=privacy.dp_noise_multiplier,
        sample_rate=privacy.dp_sample_rate,
        steps=_steps(config),
        own_noise=_own_noise(config),
    )
    return (training, *_counted(config, schema))


def tables_budget(config: RunConfig) -> Budget:
    """What the marginal generator's tables may cost one site; exact ones without privacy.

    With shared noise sums may stay closed before the first is open, and are paid for: as often as ``dp_spare_rounds``
    says, those of the one-way histograms. Later on a question is repeated as it stands, which costs nothing.

    Raises:
        ConfigError: If epsilon is not above .001.
    """
    privacy = config.privacy
    if not privacy.dp:
        return Budget(precision=math.inf)
    whole, shares = precision(epsilon=privacy.dp_epsilon, delta=privacy.dp_delta), Shares()
    return Budget(precision=whole / (1 + _spare(config) * shares.one_ways), shares=shares)


def planned_epsilon(config: RunConfig, schema: TableSchema) -> float:
    """Epsilon of one site's patients for the whole run; infinite without privacy."""
    return epsilon(planned_events(with_noise(config, schema), schema), delta=config.privacy.dp_delta)


def plan_lines(config: RunConfig, schema: TableSchema) -> list[str]:
    """What the run would cost, in words, before anything is touched."""
    config = with_noise(config, schema)
    lines = [f"privacy: {event.in_words}" for event in planned_events(config, schema)]
    if config.privacy.dp_noise_seed >= 0:
        return [*lines, "privacy: the noise comes from a seed, so that nothing is protected and nothing is claimed"]
    if config.federation.generator == "marginal":
        least = min(event.noise_multiplier for event in planned_events(config, schema))
        lines.append(
            f"privacy: sites whose policy has a min_histogram_noise above {least:.3g} refuse the question "
            "with so little noise, after they paid for those before it"
        )
    cost, delta = planned_epsilon(config, schema), config.privacy.dp_delta
    lines.append(f"privacy: each site's patients would pay epsilon = {cost:.2f} at delta = {delta:g} for this run")
    return [*lines, _line_alone(config, schema)] if config.privacy.dp_noise == "shared" else lines


def prospect(config: RunConfig, schema: TableSchema, *, patients: float, sites: int) -> Prospect:
    """What rows of a run can be expected to do, by what they did elsewhere at as much noise.

    Args:
        config: The settings.
        schema: The data dictionary.
        patients: That train, of all sites together.
        sites: Number of sites.
    """
    return Prospect.of(
        config.federation.generator,
        signal(
            patients=max(patients, 1.0),
            epsilon=planned_epsilon(config, schema),
            delta=config.privacy.dp_delta,
            noises=1 if config.privacy.dp_noise == "shared" else sites,
        ),
    )


def tell_prospect(config: RunConfig, schema: TableSchema, *, patients: float, sites: int) -> None:
    """Logs :func:`prospect` of a private run, as a warning where hospitals did worse than with their own rows."""
    if config.privacy.dp:
        found = prospect(config, schema, patients=patients, sites=sites)
        _LOG.log(logging.WARNING if found.harmed else logging.INFO, "%s", found)


def _steps(config: RunConfig) -> int:
    """Noisy steps that are paid for: with shared noise also those of sums that may stay closed."""
    return config.federation.total_steps + _spare(config)


def _spare(config: RunConfig) -> int:
    return config.privacy.dp_spare_rounds if config.privacy.dp_noise == "shared" else 0


def _tables(config: RunConfig, schema: TableSchema) -> tuple[PrivacyEvent, ...]:
    """Tables of counts by question, as with a forest: without one they cost the same, or less."""
    privacy, asked = config.privacy, tables_budget(config).events(num_tables(schema))
    asked += asked[:1] * _spare(config)
    if privacy.dp_noise == "local":
        return asked
    sites, colluders = config.federation.min_sites, privacy.dp_colluders
    return tuple(SharedCounts(noise=e.noise_multiplier, sites=sites, colluders=colluders).event(e) for e in asked)


def _own_noise(config: RunConfig) -> float:
    """A site's share of the noise where the fewest sites share it, as a noise multiplier; 0 where none is shared."""
    privacy = config.privacy
    if privacy.dp_noise != "shared":
        return 0.0
    return SharedNoise(
        noise_multiplier=privacy.dp_noise_multiplier,
        max_grad_norm=privacy.dp_max_grad_norm,
        sites=config.federation.min_sites,
        colluders=privacy.dp_colluders,
    ).own_multiplier


def _line_alone(config: RunConfig, schema: TableSchema) -> str:
    """What it would cost against whoever can take a sum apart, in words."""
    left = epsilon(alone(planned_events(config, schema)), delta=config.privacy.dp_delta)
    said = f"epsilon = {left:.2f}" if math.isfinite(left) else "no epsilon at all"
    colluders = config.privacy.dp_colluders
    return f"privacy: against more than {colluders} colluding sites, or whoever breaks the masks, {said}"


def _counted(config: RunConfig, schema: TableSchema) -> tuple[PrivacyEvent, ...]:
    privacy = config.privacy
    counts = group_counts_event(schema, epsilon=privacy.dp_count_epsilon)
    histograms = (marginals_event(schema, noise=privacy.dp_histogram_noise),) if config.marginals else ()
    scores = tuple(scores_event(schema, epsilon=privacy.dp_score_epsilon) for _ in config.measured_rounds())
    return (counts, *histograms, *scores)
