"""What a hospital allows: a TOML file that only the hospital writes, and that always wins.

A request inside the policy runs as it stands; one outside is refused with a code, never changed into one that would
pass, because then the server would believe in another run than the one that happened. Without a valid policy nothing is
allowed. Every rule is decided before a row is read and before anything is charged.
"""

import hashlib
import json
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from client.rules import DataRules as DataRules
from client.rules import ModelRules as ModelRules
from client.rules import PrivacyRules as PrivacyRules
from client.rules import Section, Task
from mcrage.data.crossing import check_axes, from_json, num_counts
from mcrage.data.schema import TableSchema
from mcrage.errors import MessageError, RefusedError, SchemaError
from mcrage.messages import (
    CountInstruction,
    DescribeInstruction,
    EvaluateInstruction,
    SumInstruction,
    TrainInstruction,
)
from mcrage.privacy.events import LARGEST_NOISE
from mcrage.refusals import REFUSALS

Instruction = DescribeInstruction | TrainInstruction | SumInstruction | CountInstruction | EvaluateInstruction

_TASKS: dict[type, Task] = {
    DescribeInstruction: "describe",
    TrainInstruction: "train",
    SumInstruction: "train",
    CountInstruction: "train",
    EvaluateInstruction: "evaluate",
}
_SETTINGS = (
    "count_epsilon",
    "histogram_noise",
    "score_epsilon",
    "noise_multiplier",
    "sample_rate",
    "max_grad_norm",
    "noise",
    "peers",
)
_MB = 2**20
_MOST_ARRAYS = 1_000
_MOST_CONTAINERS = 200_000  # of a description: each takes 60 bytes and more, for two characters of text


class SitePolicy(Section):
    """A hospital's policy; see :meth:`load` and :meth:`check`."""

    privacy: PrivacyRules
    data: DataRules = DataRules()
    model: ModelRules = ModelRules()

    @classmethod
    def load(cls, path: Path) -> "SitePolicy":
        """The policy in a file that nobody but its owner may write.

        Raises:
            RefusedError: With code 2001 if there is none, or anything in it or about it is not as it has to be.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise RefusedError(2001, f"policy '{path}' cannot be read: {error.strerror}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o022 or status.st_uid not in (0, os.getuid()):
                raise RefusedError(2001, f"policy '{path}' must be a file of root or this user, writable by no other")
            if status.st_size > _MB:
                raise RefusedError(2001, f"policy '{path}' must have at most {_MB:,} bytes, it has {status.st_size:,}")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                text = file.read()
        finally:
            os.close(descriptor)
        return cls._parse(text, path)

    @classmethod
    def _parse(cls, text: bytes, path: Path) -> "SitePolicy":
        try:
            return cls.model_validate_json(json.dumps(tomllib.loads(text.decode("utf-8"))))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            raise RefusedError(2001, f"policy '{path}': " + "; ".join(lines)) from None
        except (ValueError, TypeError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise RefusedError(2001, f"policy '{path}' is not TOML of plain values: {reason}") from None

    @classmethod
    def simulated(cls, *, declared_patients: int) -> "SitePolicy":
        """The policy of a pretend hospital, which allows everything that can be accounted for."""
        no_limit = 1e6
        privacy = PrivacyRules(
            required=False,
            declared_patients=declared_patients,
            max_epsilon_total=no_limit,
            max_epsilon_run=no_limit,
            min_noise_multiplier=0.3,
            max_steps_round=1_000_000,
            max_steps_run=1_000_000,
            max_rounds_run=1_000_000,
            max_draws=1024,
            max_count_epsilon=100.0,
            max_score_epsilon=100.0,
            min_histogram_noise=0.3,
            max_releases=1_000_000,
            allow_simulated_noise=True,
            noise=("local", "shared"),
            min_sharing_sites=2,
            allow_unknown_peers=True,
        )
        data = DataRules(
            min_test_fraction=1e-12, max_test_fraction=1 - 1e-12, release_loss=True, release_exact_counts=True
        )
        model = ModelRules(max_width=4096, max_depth=32, max_parameters=200_000_000, max_learning_rate=1e3)
        return cls(privacy=privacy, data=data, model=model)

    def to_toml(self) -> str:
        """The policy as :meth:`load` reads it."""
        lines = ["# What this hospital allows. Outside it everything is refused; without this file, everything is."]
        for section, rules in self.model_dump(mode="json").items():
            lines += ["", f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in rules.items())]
        return "\n".join(lines) + "\n"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def delta(self) -> float:
        """δ of the ledger: at most a tenth over the declared patients."""
        patients = self.privacy.declared_patients
        return min(self.privacy.max_delta, 0.1 / patients) if patients else self.privacy.max_delta

    def check(self, instruction: Instruction, schema: TableSchema) -> None:
        """Raises unless the instruction is allowed as it stands.

        Raises:
            RefusedError: With the code of the first rule that it breaks.
        """
        code = next(self._broken(instruction, schema), None)
        if code is not None:
            asked = instruction.model_dump(exclude={"description", "parameters", "tables"})
            raise RefusedError(code, f"{REFUSALS[code]}; policy {self.fingerprint[:12]}, asked for {asked}")

    def _broken(self, instruction: Instruction, schema: TableSchema) -> Iterator[int]:
        """Codes of broken rules, cheap ones first; what comes after the first may rest on it."""
        yield from self._general(instruction, schema)
        yield from self._privacy(instruction)
        if isinstance(instruction, TrainInstruction):
            yield from self._training(instruction)
        if isinstance(instruction, CountInstruction):
            yield from self._tables(instruction, schema)
        if isinstance(instruction, TrainInstruction | SumInstruction | EvaluateInstruction):
            yield from self._model(instruction, schema)

    def _general(self, instruction: Instruction, schema: TableSchema) -> Iterator[int]:
        data = self.data
        if _TASKS[type(instruction)] not in data.tasks:
            yield 2002
        if self.privacy.required and not instruction.dp:
            yield 2003
        if instruction.noise_seed >= 0 and not self.privacy.allow_simulated_noise:
            yield 2004
        if data.allowed_columns and any(column.name not in data.allowed_columns for column in schema.modelled):
            yield 2005
        if isinstance(instruction, DescribeInstruction) and instruction.marginals and not self.privacy.allow_histograms:
            yield 2116
        if not data.min_test_fraction <= instruction.test_fraction <= data.max_test_fraction:
            yield 2006
        if isinstance(instruction, EvaluateInstruction) and not instruction.dp and not data.release_loss:
            yield 2008

    def _privacy(self, instruction: Instruction) -> Iterator[int]:
        if _has_settings(instruction) != (instruction.dp and not _tells_nothing(instruction)):
            yield 2007
        if not instruction.dp:
            return
        if not 0 < instruction.delta <= self.delta:
            yield 2106 if instruction.delta <= 0 else 2105
        if isinstance(instruction, DescribeInstruction):
            yield from self._counts(instruction)
        elif isinstance(instruction, TrainInstruction):
            yield from self._protected_training(instruction)
        elif isinstance(instruction, SumInstruction):
            yield from self._shared(instruction)
        elif isinstance(instruction, CountInstruction):
            yield from self._noisy_tables(instruction)
        else:
            yield from self._scores(instruction)

    def _counts(self, instruction: DescribeInstruction) -> Iterator[int]:
        if instruction.counts and not 0 < instruction.count_epsilon <= self.privacy.max_count_epsilon:
            yield 2113
        if not instruction.counts and instruction.count_epsilon:
            yield 2007
        if instruction.marginals and instruction.histogram_noise < self.privacy.min_histogram_noise:
            yield 2114
        if not instruction.marginals and instruction.histogram_noise:
            yield 2007

    def _scores(self, instruction: EvaluateInstruction) -> Iterator[int]:
        if not 0 < instruction.score_epsilon <= self.privacy.max_score_epsilon:
            yield 2115

    def _protected_training(self, instruction: TrainInstruction) -> Iterator[int]:
        if "local" not in self.privacy.noise:
            yield 2136
        yield from self._noise(instruction)
        if not self.privacy.declared_patients:
            yield 2123
        if instruction.proximal_mu > 0:
            yield 2122

    def _shared(self, instruction: SumInstruction) -> Iterator[int]:
        yield from self._noise(instruction)
        yield from self._sharing(instruction)
        if instruction.server_round > self.privacy.max_rounds_run:
            yield 2110
        if instruction.total_rounds > self.privacy.max_steps_run:
            yield 2111
        if instruction.server_round > instruction.total_rounds:
            yield 2112

    def _sharing(self, instruction: SumInstruction | CountInstruction) -> Iterator[int]:
        if "shared" not in self.privacy.noise:
            yield 2130
        if instruction.colluders < self.privacy.min_colluders:
            yield 2132

    def _noisy_tables(self, instruction: CountInstruction) -> Iterator[int]:
        if instruction.noise < self.privacy.min_histogram_noise:
            yield 2114
        if instruction.peers:
            yield from self._sharing(instruction)
        elif "local" not in self.privacy.noise:
            yield 2136

    def _tables(self, instruction: CountInstruction, schema: TableSchema) -> Iterator[int]:
        if not self.privacy.allow_histograms:
            yield 2116
        if not instruction.dp and not self.data.release_exact_counts:
            yield 2140
        if instruction.server_round > self.privacy.max_rounds_run:
            yield 2110
        text = instruction.tables
        if len(text) > self.model.max_description_mb * _MB or text.count("[") > _MOST_CONTAINERS:
            yield 2141
        try:
            tables = from_json(text)
            check_axes(tables, schema)
        except MessageError:
            tables = ()
        if not tables:
            yield 2142
        if len(tables) > self.data.max_tables or num_counts(tables, schema) > self.data.max_cells:
            yield 2141

    def check_peers(self, peers: Mapping[str, bytes], *, colluders: int) -> None:
        """Raises unless the noise may be shared with these sites.

        Args:
            peers: Signing keys of the other sites, by name.
            colluders: How many of them the noise reckons with.

        Raises:
            RefusedError: With the code of the rule.
        """
        known = {f"{site}:{key.hex()}" for site, key in peers.items()}
        sites = len(peers) + 1
        if sites < self.privacy.min_sharing_sites:
            raise RefusedError(2131, f"{REFUSALS[2131]}: {sites}")
        if colluders >= sites:
            raise RefusedError(2135, f"{REFUSALS[2135]}: {sites} sites, {colluders} colluders")
        if not self.privacy.allow_unknown_peers and not known <= {*self.privacy.peers}:
            raise RefusedError(2133, f"{REFUSALS[2133]}: {', '.join(sorted(known - {*self.privacy.peers}))}")

    def _noise(self, instruction: TrainInstruction | SumInstruction) -> Iterator[int]:
        privacy = self.privacy
        if instruction.noise_multiplier < privacy.min_noise_multiplier:
            yield 2101
        if instruction.noise_multiplier > LARGEST_NOISE:
            yield 2102
        if instruction.sample_rate <= 0:
            yield 2104
        if instruction.sample_rate > privacy.max_sample_rate:
            yield 2103
        if not privacy.min_grad_norm <= instruction.max_grad_norm <= privacy.max_grad_norm:
            yield 2107
        if instruction.draws > privacy.max_draws:
            yield 2108

    def _training(self, instruction: TrainInstruction) -> Iterator[int]:
        privacy = self.privacy
        if instruction.local_steps > privacy.max_steps_round:
            yield 2109
        if instruction.server_round > privacy.max_rounds_run:
            yield 2110
        if instruction.total_steps > privacy.max_steps_run:
            yield 2111
        if instruction.first_step + instruction.local_steps > instruction.total_steps:
            yield 2112
        if instruction.learning_rate > self.model.max_learning_rate:
            yield 2120
        if instruction.batch_size > self.model.max_batch_size:
            yield 2121

    def _model(
        self, instruction: TrainInstruction | SumInstruction | EvaluateInstruction, schema: TableSchema
    ) -> Iterator[int]:
        rules, text, arrays = self.model, instruction.description, instruction.parameters.values()
        if len(text) > rules.max_description_mb * _MB:
            yield 2202
        if len(arrays) > _MOST_ARRAYS or sum(array.nbytes for array in arrays) > 4 * rules.max_parameters:
            yield 2307
        described = _described(text)
        if described is None:
            yield 2203
            return
        width, depth, described_schema = described
        if width > rules.max_width or depth > rules.max_depth:
            yield 2201
        if not _is_schema(described_schema, schema):
            yield 2204


def _tells_nothing(instruction: Instruction) -> bool:
    """Whether the reply depends on no row."""
    return isinstance(instruction, DescribeInstruction) and not instruction.counts and not instruction.marginals


def _has_settings(instruction: Instruction) -> bool:
    """Whether an instruction says anything about its noise."""
    has_noise = any(getattr(instruction, name, 0.0) for name in _SETTINGS)
    # Without privacy δ and draws say something that does not belong there; alone they are no privacy.
    return has_noise or (not instruction.dp and (instruction.delta > 0 or getattr(instruction, "draws", 1) > 1))


def _described(description: str) -> tuple[int, int, object] | None:
    """Width, depth and schema of a described model, of which nothing is built; None if the text describes none."""
    if description.count("{") + description.count("[") > _MOST_CONTAINERS:
        return None
    try:
        content: Any = json.loads(description)
        width, depth, schema = content["config"]["width"], content["config"]["depth"], content["schema"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    is_size = type(width) is int and type(depth) is int and width > 0 and depth > 0
    return (width, depth, schema) if is_size else None


def _is_schema(content: Any, schema: TableSchema) -> bool:
    """Whether this is the content of a schema; one with more columns or rules is not even parsed."""
    try:
        lengths = len(content["columns"]), len(content.get("rules", ()))
        if lengths != (len(schema.columns), len(schema.rules)):
            return False
        return TableSchema.parse(content).fingerprint == schema.fingerprint
    except (KeyError, TypeError, ValueError, AttributeError, SchemaError):
        return False


def _toml(value: object) -> str:
    """A value as TOML: JSON but for two kinds of characters in texts."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
