"""What the server asks of a site: every field of every instruction."""

from typing import Annotated

from pydantic import Field, SkipValidation

from mcrage.wire import Parameters, Wire, WireMessage, checked

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Round = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(gt=0, lt=1)]
_NotNegative = Annotated[float, Field(ge=0)]


class Instruction(WireMessage):
    """What every instruction says.

    Attributes:
        run: Which run it belongs to; a repeated instruction of the same run is the same release.
        test_fraction: Share of patients that the site keeps for testing.
        dp: Whether the reply has to be differentially private.
        delta: Of the guarantee that is asked for; 0 without one.
        noise_seed: Root of the noise in a simulation; -1 for the site's own, without which nothing is protected.
    """

    run: Sha256
    test_fraction: _Share
    dp: bool = False
    delta: Annotated[float, Field(ge=0, le=1e-3)] = 0.0
    noise_seed: Annotated[int, Field(ge=-1)] = -1


class DescribeInstruction(Instruction):
    """Asks a site what it has, apart from the patients that it keeps for testing: round zero.

    Attributes:
        marginals: Whether one-way histograms are asked for.
        counts: Whether numbers of rows by group are asked for.
        count_epsilon: ε of the group counts.
        histogram_noise: Standard deviation of the noise on each cell of the histograms.
        shares_noise: Whether a key is asked for, with which sites mask what they send.
    """

    marginals: bool
    counts: bool = True
    count_epsilon: _NotNegative = 0.0
    histogram_noise: _NotNegative = 0.0
    shares_noise: bool = False

    @classmethod
    def from_wire(cls, wire: Wire) -> "DescribeInstruction":
        """Checks every field."""
        return checked(cls, wire.values)


class _ModelInstruction(Instruction):
    """A model to work on.

    Attributes:
        server_round: Round, from 1.
        description: The untrained model: schema, transform and size as JSON. A site with another schema refuses.
        seed: Root of the random streams.
        parameters: float32 by name.
    """

    server_round: Round
    description: str
    seed: Annotated[int, Field(ge=0)]
    parameters: SkipValidation[Parameters]


class TrainInstruction(_ModelInstruction):
    """Asks a site to train.

    Attributes:
        first_step: Global number of the first step.
        local_steps: Steps to take.
        total_steps: Steps of the whole run, for the learning-rate schedule.
        batch_size: Rows per step, without privacy.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of warm-up over the whole run.
        proximal_mu: Weight of FedProx's proximal term; 0 without it.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sample_rate: Probability that a patient takes part in a step.
        max_grad_norm: Clipping norm of a patient's gradient.
        draws: Noise levels per patient and step, averaged before clipping.
    """

    first_step: Annotated[int, Field(ge=0)]
    local_steps: Annotated[int, Field(ge=1)]
    total_steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    proximal_mu: Annotated[float, Field(ge=0)]
    noise_multiplier: _NotNegative = 0.0
    sample_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: _NotNegative = 0.0
    draws: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def from_wire(cls, wire: Wire) -> "TrainInstruction":
        """Checks every value; the model checks the parameters when it loads them."""
        return checked(cls, wire.values, parameters=wire.arrays)


class SumInstruction(_ModelInstruction):
    """Asks a site, together with others, for the noisy sum of its patients' clipped gradients, under a mask.

    Attributes:
        attempt: Sums of the run that stayed closed before this one: no two requests are the same.
        total_rounds: Rounds of the whole run; each is one step.
        noise_multiplier: Standard deviation of the honest sites' noise together over the clipping norm.
        sample_rate: Probability that a patient takes part.
        max_grad_norm: Clipping norm of a patient's gradient.
        draws: Noise levels per patient, averaged before clipping.
        colluders: How many of the sites may tell what noise they added.
        peers: Who is asked together, with signed keys (:mod:`mcrage.peers`).
    """

    attempt: Annotated[int, Field(ge=0)]
    total_rounds: Annotated[int, Field(ge=1)]
    noise_multiplier: _NotNegative
    sample_rate: Annotated[float, Field(ge=0, le=1)]
    max_grad_norm: _NotNegative
    draws: Annotated[int, Field(ge=1)]
    colluders: Annotated[int, Field(ge=1)]
    peers: str

    @classmethod
    def from_wire(cls, wire: Wire) -> "SumInstruction":
        """Checks every value; the model checks the parameters when it loads them."""
        return checked(cls, wire.values, parameters=wire.arrays)


class CountInstruction(Instruction):
    """Asks a site for tables of counts of its training patients, alone or, with ``peers``, for its part of a sum.

    Attributes:
        server_round: Which question of the run, from 1.
        attempt: Sums of the run that stayed closed before this one: no two requests are the same.
        tables: What to cross with what, as JSON (:func:`mcrage.data.crossing.to_json`).
        noise: Standard deviation of the noise on each cell: the site's own or, with ``peers``, that of the honest
            sites together.
        colluders: How many of the peers may tell what noise they added; 0 without peers.
        peers: Who is asked together, with signed keys (:mod:`mcrage.peers`); empty where the site answers by itself.
    """

    server_round: Round
    attempt: Annotated[int, Field(ge=0)] = 0
    tables: str
    noise: _NotNegative = 0.0
    colluders: Annotated[int, Field(ge=0)] = 0
    peers: str = ""

    @classmethod
    def from_wire(cls, wire: Wire) -> "CountInstruction":
        """Checks every field; the site's policy looks into the tables."""
        return checked(cls, wire.values)


class EvaluateInstruction(_ModelInstruction):
    """Asks a site for the loss on the rows that it keeps for testing, or under privacy for noisy counts of scores.

    Attributes:
        score_epsilon: ε of the counts of scores.
    """

    score_epsilon: _NotNegative = 0.0

    @classmethod
    def from_wire(cls, wire: Wire) -> "EvaluateInstruction":
        """Checks every value; the model checks the parameters when it loads them."""
        return checked(cls, wire.values, parameters=wire.arrays)


class AccountInstruction(WireMessage):
    """Asks a site what its ledger says, of one run and in all; no row is read for it."""

    run: Sha256

    @classmethod
    def from_wire(cls, wire: Wire) -> "AccountInstruction":
        """Checks every field."""
        return checked(cls, wire.values)
