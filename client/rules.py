"""The rules of a hospital's policy: what each of them is called in ``policy.toml``, and what it is by default."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mcrage.data.groups import MINIMUM_CELL
from mcrage.privacy.events import LARGEST_RATE, SMALLEST_NOISE

Task = Literal["describe", "train", "evaluate"]

_PEER = r"^[a-z0-9][a-z0-9_-]{0,63}:[0-9a-f]{64}$"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PrivacyRules(Section):
    """What the hospital asks for its patients.

    Attributes:
        required: Whether everything that leaves has to be differentially private.
        declared_patients: Public number of training patients; every update is divided by it, and δ is at most a tenth
            over it.
        max_epsilon_total, max_epsilon_run: Of everything for ever, and of one run.
        max_delta: Of every epsilon here.
        min_noise_multiplier, max_sample_rate, max_draws: Of a training step.
        min_grad_norm, max_grad_norm: The clipping norm lies between them.
        max_steps_round, max_steps_run, max_rounds_run: Length of a training.
        max_count_epsilon, max_score_epsilon: Of the group counts, and of the scores of the test patients.
        min_histogram_noise: Standard deviation on every cell of one-way histograms and of tables of counts.
        allow_histograms: Whether one-way histograms and tables of counts may leave.
        max_releases: Events in the ledger, for ever.
        allow_simulated_noise: Whether noise may come from a seed, which protects nobody.
        noise: Whose noise may protect a training step or a table of counts: ``local`` for the site's own, ``shared``
            for that of all sites together, which the server must not be able to take apart
            (:mod:`mcrage.privacy.shared`).
        min_sharing_sites: Fewest sites that share the noise, this one among them.
        min_colluders: How many of them the noise has to reckon with as colluding.
        peers: Sites that may share the noise and their signing keys, as ``name:key``.
        allow_unknown_peers: Whether others may as well; then the server's word is taken for who they are.
    """

    required: bool = True
    declared_patients: int = Field(default=0, ge=0)
    max_epsilon_total: float = Field(default=10.0, gt=0)
    max_epsilon_run: float = Field(default=3.0, gt=0)
    max_delta: float = Field(default=1e-5, gt=0, le=1e-3)
    min_noise_multiplier: float = Field(default=0.5, ge=SMALLEST_NOISE)
    max_sample_rate: float = Field(default=0.5, gt=0, le=LARGEST_RATE)
    max_draws: int = Field(default=32, ge=1)
    min_grad_norm: float = Field(default=1e-3, gt=0)
    max_grad_norm: float = Field(default=100.0, gt=0)
    max_steps_round: int = Field(default=1_000, ge=1)
    max_steps_run: int = Field(default=20_000, ge=1)
    max_rounds_run: int = Field(default=1_000, ge=1)
    max_count_epsilon: float = Field(default=1.0, gt=0)
    max_score_epsilon: float = Field(default=1.0, gt=0)
    min_histogram_noise: float = Field(default=5.0, ge=SMALLEST_NOISE)
    allow_histograms: bool = True
    max_releases: int = Field(default=10_000, ge=1)
    allow_simulated_noise: bool = False
    noise: tuple[Literal["local", "shared"], ...] = ("local",)
    min_sharing_sites: int = Field(default=3, ge=2)
    min_colluders: int = Field(default=1, ge=1)
    peers: tuple[Annotated[str, Field(pattern=_PEER)], ...] = ()
    allow_unknown_peers: bool = False

    @model_validator(mode="after")
    def _declared(self) -> "PrivacyRules":
        if self.required and not self.declared_patients:
            raise ValueError("declared_patients: give the public number of training patients")
        if self.required and self.allow_simulated_noise:
            raise ValueError("allow_simulated_noise: noise from a seed protects nobody, so required must be false")
        return self


class DataRules(Section):
    """What may be done with which columns.

    Attributes:
        tasks: What may be asked.
        allowed_columns: Columns that may be modelled; empty for all of the schema.
        minimum_cell: Smallest number of patients by group that may leave, also where it has noise; cells of one-way
            histograms with fewer are merged. Tables of counts, from which the marginal generator is made, cannot keep
            to it: their margins would tell what is hidden.
        min_test_fraction, max_test_fraction: The share of test patients lies between them.
        release_loss: Whether a loss may leave in a run without privacy; with privacy none does.
        release_exact_counts: Whether tables of counts may leave as they are, small cells included, in a run without
            privacy.
        max_tables, max_cells: Of the tables of counts that are asked for at once.
    """

    tasks: tuple[Task, ...] = ("describe", "train", "evaluate")
    allowed_columns: tuple[str, ...] = ()
    minimum_cell: int = Field(default=MINIMUM_CELL, ge=MINIMUM_CELL)
    min_test_fraction: float = Field(default=0.05, gt=0, lt=1)
    max_test_fraction: float = Field(default=0.5, gt=0, lt=1)
    release_loss: bool = False
    release_exact_counts: bool = False
    max_tables: int = Field(default=5_000, ge=1)
    max_cells: int = Field(default=1_000_000, ge=1)


class ModelRules(Section):
    """How large a model and its training may be.

    Attributes:
        max_width, max_depth: Of the network.
        max_description_mb: Of the text that describes it, in 2^20 characters.
        max_parameters: Numbers that come with it, as float32.
        max_learning_rate, max_batch_size: Of a training step.
    """

    max_width: int = Field(default=1024, ge=1)
    max_depth: int = Field(default=8, ge=1)
    max_description_mb: int = Field(default=16, ge=1)
    max_parameters: int = Field(default=20_000_000, ge=1)
    max_learning_rate: float = Field(default=1.0, gt=0)
    max_batch_size: int = Field(default=65_536, ge=1)
