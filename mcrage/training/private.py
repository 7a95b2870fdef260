"""Training that protects patients: DP-SGD (Abadi et al., 2016) on the diffusion's loss, one gradient per patient.

The place where diffusion and privacy meet. Every patient takes part in a step with a public probability, with one or
several noise levels (Dockhorn et al., 2023), each on a row of the patient's own; their mean loss gives one gradient,
which is clipped; the sum over the batch gets Gaussian noise and is divided by the public size of a batch. An empty
batch is a step like any other. Nothing comes out but parameters.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from mcrage.data.transform import EncodedTable
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.errors import PrivacyError
from mcrage.privacy.dpsgd import ClippedSum
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import derive
from mcrage.privacy.noise import GaussianNoise
from mcrage.privacy.sampling import KeyedDraws, Patients, normal
from mcrage.training.optimisers import Optimisers, TrainingConfig

_KEPT_AT_ONCE = 2**22  # inputs and outputs of layers: a batch is summed in parts, so that its size takes no memory


@dataclass(frozen=True, kw_only=True)
class DPSGDConfig:
    """What the guarantee rests on; every number is public.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sample_rate: Probability that a patient takes part in a step.
        max_grad_norm: Clipping norm.
        draws: Noise levels per patient and step; their number costs time and no privacy.
        patients: Declared number of patients. Updates are divided by ``sample_rate`` times it, never by a count.
        label_weight: Weight of the label model's loss. Its gradients are longer than the denoiser's by several times,
            and would take up the clipping norm of both.
    """

    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    draws: int
    patients: int
    label_weight: float = 1.0

    def event(self, steps: int) -> PrivacyEvent:
        """What this many steps are to a ledger."""
        return PrivacyEvent(
            mechanism="dp-sgd", noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps
        )


@dataclass(frozen=True)
class RoundKeys:
    """The two keys of a round, which differ from those of any other round, run, model, configuration or table.

    Attributes:
        sampling: Who takes part, and with which random numbers.
        noise: The noise.
    """

    sampling: bytes
    noise: bytes

    @classmethod
    def of(cls, secret: bytes, release: bytes) -> "RoundKeys":
        """The keys of a release.

        Args:
            secret: The site's 32 bytes.
            release: Digest of everything that the release depends on: run, round, incoming parameters, configuration
                and table. The same gives the same bytes again, which is one release; anything else is another one.
        """
        return cls(derive(secret, "sampling", release), derive(secret, "noise", release))


@dataclass(frozen=True)
class PatientRows:
    """Rows and whose they are.

    Attributes:
        encoded: The rows; each row's encoding depends on that row alone.
        patients: The patients that they belong to.
    """

    encoded: EncodedTable
    patients: Patients


def train_privately(
    network: RowNetwork,
    diffusion: TabularDiffusion,
    rows: PatientRows,
    *,
    config: TrainingConfig,
    privacy: DPSGDConfig,
    keys: RoundKeys,
    steps: range,
) -> None:
    """Trains in place.

    *Guarantee*: for the parameters after these steps, and for everything computed from them, one patient's presence
    with all rows is protected as by ``privacy.event(len(steps))``. The caller has charged it before.

    Args:
        network: Its parameters move.
        diffusion: Loss of its denoiser.
        rows: Of the site's patients.
        config: How parameters move once their gradient is noisy.
        privacy: Noise, sampling and clipping.
        keys: Of this round.
        steps: Global numbers of the steps, which place them on the learning rate's path.

    Raises:
        PrivacyError: If a parameter's gradient per patient would not be exact, or a pull towards the incoming
            parameters is asked for.
    """
    if config.proximal_mu:
        raise PrivacyError("a proximal term is not used with privacy")
    if network.denoiser.in_bfloat16:
        raise PrivacyError("with privacy the network is float32: norms of bfloat16 gradients would not be exact")
    moved = Optimisers(network, config)
    noise = GaussianNoise(keys.noise)
    gradients = PatientGradients(network, diffusion, rows, privacy=privacy, key=keys.sampling)
    deviation = privacy.noise_multiplier * privacy.max_grad_norm
    try:
        for step in steps:
            moved.zero()
            gradients.add(step)
            for part in moved.parts:
                part.gradient.copy_(noise.add(part.gradient, deviation=deviation))
                part.gradient.div_(privacy.sample_rate * privacy.patients)
            moved.step(step)
    finally:
        gradients.close()


class PatientGradients:
    """The sum of the clipped gradients of a step's patients.

    Args:
        network: Its parameters' ``grad`` receive the sum.
        diffusion: Loss of its denoiser.
        rows: Of the site's patients.
        privacy: Sampling and clipping.
        key: Decides who takes part, and gives every patient random numbers of their own.
    """

    def __init__(
        self,
        network: RowNetwork,
        diffusion: TabularDiffusion,
        rows: PatientRows,
        *,
        privacy: DPSGDConfig,
        key: bytes,
    ) -> None:
        self._network, self._diffusion, self._rows, self._privacy = network, diffusion, rows, privacy
        self._draws = KeyedDraws(key, rows.patients.names)
        self._clipped = ClippedSum(network, max_grad_norm=privacy.max_grad_norm, draws=privacy.draws)
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        self._kept_per_patient = privacy.draws * sum(layer.in_features + layer.out_features for layer in layers)
        if network.label is not None:
            network.label.through_layers = True

    def add(self, step: int) -> None:
        """Adds the gradients of the patients who take part in a step."""
        drawn = self._draws.included(step, sample_rate=self._privacy.sample_rate)
        parts = -(-len(drawn) * self._kept_per_patient // _KEPT_AT_ONCE)
        for part in np.array_split(drawn, parts) if parts else []:
            self._clipped.add(self._losses(part, step))

    def close(self) -> None:
        """Leaves the network as it was found, apart from its parameters."""
        self._clipped.cleanup()
        if self._network.label is not None:
            self._network.label.through_layers = False

    def _losses(self, drawn: NDArray[np.int64], step: int) -> Float[Tensor, " rows"]:
        """The loss of each draw of each patient, the draws of a patient one after the other."""
        draws, layout = self._privacy.draws, self._diffusion.layout
        per_row = 1 + layout.width, len(layout.attribute_sizes)
        normals = draws * per_row[0] + draws * per_row[0] % 2
        uniform = self._draws.uniform(drawn, step, size=normals + draws * per_row[1] + draws)
        gaussian = normal(uniform[:, :normals])[:, : draws * per_row[0]].reshape(-1, per_row[0])
        dropped = uniform[:, normals : normals + draws * per_row[1]].reshape(-1, per_row[1])
        picked = self._rows.patients.pick(drawn, uniform[:, normals + draws * per_row[1] :]).flatten()
        rows = self._rows.encoded.rows(picked)
        losses = self._diffusion.loss_at(
            self._network.denoiser,
            rows,
            time=self._diffusion.schedule.times(gaussian[:, 0]),
            noise=gaussian[:, 1:],
            attributes=self._diffusion.open_conditions(rows.attributes, dropped),
        )
        if self._network.label is None:
            return losses
        return losses + self._privacy.label_weight * self._network.label.loss(rows)
