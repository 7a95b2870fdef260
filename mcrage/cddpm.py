"""CDDPM: a conditional diffusion model of one table (MCRAGE, arXiv 2310.18430), usable with and without a federation.

Example::

    model = CDDPM(random_state=0).fit(table, schema)
    rows = model.sample(500, conditions={"race": "Black", "readmitted": "yes"})
    model.save("model")
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor

from mcrage import rng
from mcrage.data.marginals import Marginals
from mcrage.data.repair import follow_rules
from mcrage.data.schema import TableSchema
from mcrage.data.transform import Constraint, TableTransform, check_table
from mcrage.diffusion.calibration import calibrate, rows_per_round
from mcrage.diffusion.losses import mean_loss, row_losses
from mcrage.diffusion.network import ModelConfig, RowNetwork, check_parameters
from mcrage.diffusion.placement import placed, require_placement
from mcrage.diffusion.quantiles import KNOTS, normalised
from mcrage.diffusion.sampling import ancestral, dpm_solver, guided_estimate
from mcrage.diffusion.tabular import DiffusionConfig, TabularDiffusion
from mcrage.errors import CheckpointError, ConfigError, MessageError, NotFittedError, SamplingError
from mcrage.memory import require_memory
from mcrage.progress import ProgressReport
from mcrage.storage import StoredModel
from mcrage.training.length import default_batch_size, default_learning_rate, default_steps, opening
from mcrage.training.local import Averaged, TrainingConfig, train_steps

FORMAT = 4
_NUMERIC_LIMIT = 6.0  # model numbers reach ±6, the normal quantiles of 1e-9
_SAMPLE_ROWS = 1024  # what is computed of them fits a processor's cache


class CDDPM(BaseEstimator):  # type: ignore[misc]
    """A conditional denoising diffusion probabilistic model of mixed-type rows.

    Rows are conditioned inside the network on any subset of the sensitive features and the target; none is ever
    drawn and thrown away.

    Args:
        width: Hidden units per layer.
        depth: Hidden layers.
        steps: Training steps; by default (:func:`~mcrage.training.length.default_steps`) a number that grows with the
            table, because a long training memorises a small one.
        batch_size: Rows per step; by default (:func:`~mcrage.training.length.default_batch_size`) 256 or 512.
        learning_rate: Highest learning rate; by default (:func:`~mcrage.training.length.default_learning_rate`) lower
            for a small table.
        guidance: Weight of classifier-free guidance when sampling; 0 samples the learned distribution.
        sampling_steps: Steps of the sampler.
        sampler: ``"dpm-solver"`` (few steps) or ``"ancestral"`` (many steps, with fresh noise).
        precision: Of matrix products: ``"float32"``, or ``"bfloat16"``, which is faster where the processor has
            instructions for it (AVX-512 BF16, AMX) and slower elsewhere. Parameters are float32.
        device: ``"cpu"``, or ``"cuda"`` where there is one. It trains and samples there and keeps its parameters on
            the CPU. The same seed gives other rows.
        random_state: Seed of everything that is random.
        verbose: 0 is silent; 1 shows a progress bar, or lines where there is no terminal.

    Attributes:
        schema_: The data dictionary, once fitted.
        transform: The map between tables and tensors, once fitted.
        network_, diffusion_: What is trained, and its loss; the network's parameters may move from outside.
        steps_, batch_size_: Training steps of :meth:`fit`, and rows per step.
        history_: Mean loss of each tenth of the training.
        repairs_: What the schema's rules did to the rows that were sampled last.
    """

    in_words = "conditional diffusion model"

    def __init__(  # noqa: PLR0913 — an estimator's settings, as scikit-learn wants them
        self,
        *,
        width: int = 192,
        depth: int = 3,
        steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        guidance: float = 0.0,
        sampling_steps: int = 10,
        sampler: str = "dpm-solver",
        precision: str = "float32",
        device: str = "cpu",
        random_state: int = 0,
        verbose: int = 0,
    ) -> None:
        self.width = width
        self.depth = depth
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.guidance = guidance
        self.sampling_steps = sampling_steps
        self.sampler = sampler
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @classmethod
    def initialised(
        cls,
        schema: TableSchema,
        marginals: Marginals | None,
        *,
        config: ModelConfig | None = None,
        random_state: int = 0,
    ) -> "CDDPM":
        """An untrained model whose parameters are ready to be replaced.

        Args:
            schema: The data dictionary.
            marginals: Histograms summed over sites; None encodes by the schema alone.
            config: What the network is.
            random_state: Seed of the initial parameters.
        """
        config = config or ModelConfig()
        model = cls(width=config.width, depth=config.depth, random_state=random_state)
        model._build(schema, marginals, config)
        return model

    def fit(self, table: pd.DataFrame, schema: TableSchema) -> "CDDPM":
        """Trains on one table.

        Args:
            table: Rows with the schema's columns; more columns are ignored.
            schema: The data dictionary.

        Raises:
            DataError: If the table does not follow the schema; with every problem.
            ConfigError: If the table has no rows, or the training would not fit into memory; with the estimate.
        """
        self._check_settings()
        config = ModelConfig(width=self.width, depth=self.depth)
        check_table(table, schema)
        self.batch_size_ = batch_size = self.batch_size or default_batch_size(len(table))
        require_memory(TableTransform(schema).layout, config, rows=len(table), batch_size=batch_size)
        self._build(schema, Marginals.of(table, schema), config)
        encoded = self.transform.encode(table, generator=rng.stream(self.random_state, "encode"))
        if not len(encoded):
            raise ConfigError("the table has no rows; at least one is needed to train")
        self.steps_ = steps = self.steps or default_steps(len(encoded), batch_size)
        rate = self.learning_rate or default_learning_rate(len(encoded))
        training = TrainingConfig(total_steps=steps, batch_size=batch_size, learning_rate=rate)
        losses: list[float] = []
        every = max(steps // 10, 1)
        said = opening(steps, len(encoded), is_default=not self.steps)
        progress = ProgressReport("training", steps, enabled=self.verbose > 0, every=every, opening=said)
        with progress, self._placed():
            average = Averaged(self.network_, training.ema_decay)
            for loss in train_steps(
                self.network_,
                self.diffusion_,
                encoded.to(self.device),
                config=training,
                steps=range(steps),
                generator=rng.torch_stream(self.random_state, "train", device=self.device),
            ):
                average.update(self.network_)
                losses.append(loss)
                progress.advance(f"loss {np.mean(losses[-every:]):.3f}")
            average.copy_to(self.network_)
        self.calibrate(steps * batch_size)
        self.history_ = [float(np.mean(part)) for part in np.array_split(losses, min(10, len(losses)))]
        return self

    def sample(
        self,
        n: int,
        conditions: Mapping[str, object] | pd.DataFrame | None = None,
        *,
        random_state: int | None = None,
    ) -> pd.DataFrame:
        """Generated rows with the schema's modelled columns, order and dtypes.

        Args:
            n: Number of rows.
            conditions: Level per attribute (sensitive features and target), or a table with one row of levels per
                row to generate (missing = open). Levels of a numeric feature are its bins, or a value inside one.
            random_state: Seed; the model's own if None.

        Raises:
            NotFittedError: Before :meth:`fit`.
            SamplingError: If a condition names no attribute or no level of it, or the schema's rules forbid it.
        """
        self._require_fitted()
        if n < 0:
            raise SamplingError(f"asked for {n} rows; at least 0 are possible")
        self._check_settings()
        asked = self.transform.constrain(n, conditions)
        seed = self.random_state if random_state is None else random_state
        generator = rng.torch_stream(seed, "sample", device=self.device)
        rows, self.repairs_ = follow_rules(
            self._draw(asked, generator),
            self.schema_,
            asked.attributes.numpy(),
            lambda numbers: self._draw(asked.rows(numbers), generator),
        )
        return rows

    def loss(self, table: pd.DataFrame, *, random_state: int) -> float:
        """Mean loss on rows that were not trained on, the denoiser's with the condition given in full."""
        self._require_fitted()
        rows = self.transform.encode(table, generator=rng.stream(random_state, "encode"))
        return mean_loss(self.network_, self.diffusion_, rows, generator=rng.torch_stream(random_state, "loss"))

    def row_losses(
        self, table: pd.DataFrame, *, times: tuple[float, ...], draws: int, random_state: int
    ) -> NDArray[np.float32]:
        """The denoiser's loss of each row, with the same times and noise for all rows; shape (rows, times, draws)."""
        self._require_fitted()
        encoded = self.transform.encode(table, generator=rng.stream(random_state, "encode"))
        generator = rng.torch_stream(random_state)
        return row_losses(self.network_, self.diffusion_, encoded, times=times, draws=draws, generator=generator)

    def label_losses(self, table: pd.DataFrame) -> NDArray[np.float32] | None:
        """The label model's loss of each row; None where there is no label."""
        self._require_fitted()
        if self.network_.label is None:
            return None
        encoded = self.transform.encode(table, generator=rng.stream(0, "encode"))
        return self.network_.label.loss(encoded).detach().numpy()

    def event_probabilities(self, table: pd.DataFrame) -> NDArray[np.float32]:
        """What the label model says of each row: the probability of the event.

        Raises:
            SchemaError: If the schema has no label.
        """
        self._require_fitted()
        target = self.schema_.target
        assert self.network_.label is not None, "a schema with a target has a label model"
        encoded = self.transform.encode_spread(table, np.zeros((self.transform.layout.num_numeric, len(table))))
        second = torch.sigmoid(self.network_.label(encoded.codes, encoded.covariates)).detach().numpy()
        return second if target.levels.index(target.positive_level) == 1 else 1 - second

    def untrained(self) -> "CDDPM":
        """The same network, with the same encoding of rows, before its training."""
        return CDDPM.from_description(self.describe())

    def calibrate(self, trained_rows: int) -> None:
        """Brings levels and numbers to the released histograms, in place; without histograms it does nothing.

        Args:
            trained_rows: Rows that all training steps saw together; after a short training it does nothing either.
        """
        self._require_fitted()
        rows = rows_per_round(trained_rows)
        if rows and self.transform.marginals is not None:
            anything = self.transform.constrain(rows, None)
            self._quantiles: Tensor | None = None
            self._quantiles = calibrate(
                self.network_.denoiser,
                self.diffusion_,
                lambda generator: list(self._solve(anything, generator)),
                generator=rng.torch_stream(self.random_state, "calibrate", device=self.device),
            )

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """Copies of all trainable parameters, in a fixed order."""
        self._require_fitted()
        return {name: value.detach().numpy().copy() for name, value in self.network_.named_parameters()}

    def load_parameters(self, parameters: Mapping[str, NDArray[np.float32]]) -> None:
        """Replaces all trainable parameters.

        Raises:
            MessageError: If names, shapes, dtypes or values are not those of a model like this one.
        """
        self._require_fitted()
        own = dict(self.network_.named_parameters())
        check_parameters(parameters, {name: tuple(value.shape) for name, value in own.items()})
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(torch.from_numpy(np.array(parameters[name])))

    def describe(self) -> str:
        """Everything but the parameters, as JSON text; a site rebuilds the model from it."""
        self._require_fitted()
        marginals = self.transform.marginals
        return json.dumps(
            {
                "format": FORMAT,
                "schema": json.loads(self.schema_.to_json()),
                "marginals": None if marginals is None else marginals.to_wire(),
                "config": asdict(self.config_),
            }
        )

    @classmethod
    def from_description(cls, description: str) -> "CDDPM":
        """The untrained model of a description.

        Raises:
            MessageError: If the text does not describe a model of this format.
        """
        try:
            content: dict[str, Any] = json.loads(description)
            if content["format"] != FORMAT:
                raise MessageError(f"the model has format {content['format']}; this version reads format {FORMAT}")
            schema = TableSchema.parse(content["schema"])
            wire = content["marginals"]
            marginals = None if wire is None else Marginals.from_wire(wire, schema)
            config = dict(content["config"])
            config["diffusion"] = DiffusionConfig(**config["diffusion"])
            return cls.initialised(schema, marginals, config=ModelConfig(**config))
        except (KeyError, TypeError, ValueError) as error:
            raise MessageError(f"the text does not describe a model ({type(error).__name__})") from None

    def save(self, directory: str | Path) -> None:
        """Writes ``model.safetensors`` and ``model.json``; no pickle, and no device: it works on any machine."""
        quantiles = {} if self._quantiles is None else {"quantiles": self._quantiles.numpy()}
        settings = {name: value for name, value in self.get_params().items() if name != "device"}
        StoredModel(self.describe(), settings, self.parameters(), quantiles).write(Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> "CDDPM":
        """The model that :meth:`save` wrote.

        Raises:
            CheckpointError: If a file is missing, damaged or not of this format.
        """
        stored = StoredModel.read(Path(directory))
        try:
            model = cls.from_description(stored.description)
            model.set_params(**stored.settings)
            model.load_parameters(stored.parameters)
            if stored.calibration:
                check_parameters(stored.calibration, {"quantiles": (model.transform.layout.num_numeric, len(KNOTS))})
                model._quantiles = torch.from_numpy(stored.calibration["quantiles"])
        except (ValueError, MessageError) as error:
            raise CheckpointError(f"{directory}: not a model of this version ({type(error).__name__})") from None
        return model

    def _draw(self, asked: Constraint, generator: torch.Generator) -> pd.DataFrame:
        z, levels = (torch.cat(parts) for parts in zip(*self._solve(asked, generator), strict=True))
        return self.transform.decode(z, levels, self._labels(asked, z, levels, generator))

    def _solve(self, asked: Constraint, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Encoded rows under a constraint, a part of them at a time, which bounds the memory."""
        solve = dpm_solver if self.sampler == "dpm-solver" else ancestral
        for start in range(0, max(len(asked.attributes), 1), _SAMPLE_ROWS):
            part = asked.rows(slice(start, start + _SAMPLE_ROWS))
            net, diffusion, wanted = self.network_.denoiser, self.diffusion_, part.to(self.device)
            with self._placed(), torch.inference_mode():
                estimate = guided_estimate(net, diffusion, wanted, guidance=self.guidance, numeric_limit=_NUMERIC_LIMIT)
                rows, steps = len(part.attributes), self.sampling_steps
                drawn = solve(estimate, diffusion, rows=rows, steps=steps, generator=generator)
            z, levels = (each.cpu() for each in drawn)
            if self._quantiles is not None:
                z = normalised(z, self._quantiles, part.low.isinf() & part.high.isinf())
            yield z, levels

    def _labels(self, asked: Constraint, z: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
        """The label of each row: as asked for, else drawn given the rest of the row."""
        if self.network_.label is None:
            return torch.zeros(len(z), dtype=torch.int64)
        given = asked.attributes[:, -1]
        drawn = self.network_.label.draw(levels, self.transform.covariates(z, levels), generator)
        return torch.where(given < 0, drawn, given)

    def _build(self, schema: TableSchema, marginals: Marginals | None, config: ModelConfig) -> None:
        self.schema_ = schema
        self.config_ = config
        self.transform = TableTransform(schema, marginals)
        layout = self.transform.layout
        self.diffusion_ = TabularDiffusion(layout, log_prior=self.transform.log_prior(), config=config.diffusion)
        generator = rng.torch_stream(self.random_state, "initialise")
        self._quantiles = None
        self.network_ = RowNetwork(self.transform, width=config.width, depth=config.depth, generator=generator)

    def _check_settings(self) -> None:
        if self.sampler not in ("dpm-solver", "ancestral"):
            raise ConfigError(f"sampler must be 'dpm-solver' or 'ancestral', got '{self.sampler}'")
        for name in ("steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        require_placement(self.device, self.precision)

    def _placed(self) -> AbstractContextManager[None]:
        return placed(self.network_, self.diffusion_, self.device, self.precision)

    def _require_fitted(self) -> None:
        if not hasattr(self, "schema_"):
            raise NotFittedError("the model has no parameters yet: call fit, or load a saved one")
