"""What a run found: the documented types of ``results.json``.

A handful of flat tables, each a list of records that ``pandas.DataFrame`` takes as it stands. Every field is described
in ``docs/results.md``. A number that cannot be computed is null and its ``reason`` says why; a count of patients
that is too small to be shown is refused wherever it stands.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from mcrage.data.groups import MINIMUM_CELL
from mcrage.errors import DataError, Problem

ALL = "all"
"""Name of the federation among the sites and of everybody among the groups."""

ARMS = (
    "local",
    "class_weights",
    "threshold",
    "oversampling",
    "smote",
    "local_cddpm",
    "federated_parity",
    "federated_target",
    "pooled",
)
"""Training sets that are compared, in the order in which they are shown."""

BASELINE_ARMS = ("class_weights", "threshold", "oversampling", "smote", "local_cddpm")
"""What a hospital can do alone."""

FEDERATED_ARMS = ("federated_target", "federated_parity")
"""Arms with records of the federated model; the first one that a run has is the one that the headline is about."""

HEADLINE_METRIC = "auroc"
"""Threshold-free: rebalancing moves F1 by moving the threshold alone."""

MINORITY_SHARE = 0.25
"""A group of one attribute with less than this share of the held-out patients is a minority, if the run names none."""

Verdict = Literal["helps", "no evidence", "harms"]
Reason = Annotated[str, BeforeValidator(lambda reason: reason or "")]
Key = tuple[str, ...]


Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Estimate(_Record):
    """A number with its 95 % interval, or the reason why there is none."""

    site: str
    group: str
    arm: str
    model: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    reason: Reason = ""

    @model_validator(mode="after")
    def _check(self) -> "_Estimate":
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high go together: both numbers or both null")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("low must not be above high")
        if self.low is None and not self.reason:
            raise ValueError("a value or interval that is null needs a reason")
        if self.value is None and self.low is not None:
            raise ValueError("an interval needs a value")
        return self

    @property
    def key(self) -> Key:
        """What there may be one record of."""
        return (self.site, self.group, self.arm, self.model, self.metric)


class Score(_Estimate):
    """One metric of one downstream model on the held-out real rows of one group at one site."""

    n: Count | None


class GapClosed(_Estimate):
    """(arm − local) / (pooled − local): 0 is no gain over local rows, 1 is as good as pooled real rows."""


class GroupVerdict(_Record):
    """What the paired difference against *local untouched* says in words: the interval decides, never the value."""

    site: str
    group: str
    arm: str
    model: str
    verdict: Verdict
    difference: float
    low: float
    high: float

    @model_validator(mode="after")
    def _check(self) -> "GroupVerdict":
        said = "helps" if self.low > 0 else "harms" if self.high < 0 else "no evidence"
        if self.verdict != said:
            raise ValueError(f"the verdict contradicts its interval, which says '{said}'")
        return self

    @property
    def key(self) -> Key:
        """What there may be one record of."""
        return (self.site, self.group, self.arm, self.model)


class GroupSize(_Record):
    """Training rows of a group at a site: real ones, and synthetic ones that the headline arm added.

    Where the real ones may not be shown, the synthetic ones may not either: groups raised to one size would give the
    real ones away by subtraction.
    """

    site: str
    group: str
    real: Count | None
    synthetic: Count | None

    @model_validator(mode="after")
    def _check(self) -> "GroupSize":
        if self.real is None and self.synthetic is not None:
            raise ValueError("synthetic must be null where real is: their sum may be known")
        return self


class Marginal(_Record):
    """One column within one group over the federation: rows per label, real and synthetic."""

    column: str
    group: str
    labels: tuple[str, ...]
    real: tuple[Count | None, ...]
    synthetic: tuple[Count | None, ...]

    @model_validator(mode="after")
    def _check(self) -> "Marginal":
        if not len(self.labels) == len(self.real) == len(self.synthetic):
            raise ValueError("labels, real and synthetic need the same length")
        return self


class Round(_Record):
    """One federated round."""

    round: int = Field(ge=0)
    loss: float | None
    fidelity: float | None
    sites: tuple[str, ...]
    dropped: tuple[str, ...] = ()


class Run(_Record):
    """How the numbers came about."""

    config: dict[str, JsonValue]
    seed: int
    dataset: str
    sites: tuple[str, ...]
    minority_groups: tuple[str, ...] = ()
    minimum_cell: int = Field(default=MINIMUM_CELL, ge=1)
    test_set: Literal["own", "common"] = "own"
    engine: str
    repairs: tuple[str, ...] = ()
    versions: dict[str, str]
    seconds: float = Field(ge=0)
    peak_memory_mb: float = Field(ge=0)


class SitePrivacy(_Record):
    """What the privacy ledger of a site says after the run."""

    site: str
    statement: str
    since: str
    delta: float
    epsilon_run: float | None
    epsilon: float | None
    events: tuple[str, ...]


class AttackFigures(_Record):
    """How well one attack tells training patients from others, in one subset of them."""

    subset: str
    detail: str
    members: int | None
    others: int | None
    attack: str
    auc: tuple[float, float, float] | None
    tpr: tuple[float, float, float] | None
    reason: str = ""


class RunResults(_Record):
    """Everything that a run found; what ``results.json`` holds.

    Sites come in the order of ``run.sites``, groups in the order of their first row. The schema version changes only
    when a field is renamed, removed or means something else.
    """

    schema_version: Literal[1] = 1
    run: Run
    rows: tuple[Score, ...] = ()
    gap_closed: tuple[GapClosed, ...] = ()
    verdicts: tuple[GroupVerdict, ...] = ()
    group_sizes: tuple[GroupSize, ...] = ()
    marginals: tuple[Marginal, ...] = ()
    history: tuple[Round, ...] = ()
    privacy: tuple[SitePrivacy, ...] = ()
    attacks: tuple[AttackFigures, ...] = ()

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "RunResults":
        """Results from plain dicts and lists.

        Raises:
            DataError: With a line per kind of problem and the number of records that have it.
        """
        try:
            return cls.model_validate(dict(document))
        except ValidationError as error:
            raise DataError(_problems(error, document)) from None

    @classmethod
    def read(cls, path: str | Path) -> "RunResults":
        """Results from ``results.json``.

        Raises:
            DataError: If the file is not JSON, or not of the documented form.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            document = None
        if not isinstance(document, dict):
            rule = f"{Path(path).name} is not a JSON object"
            raise DataError([Problem(code=_CODE, rule=rule, remedy="Give the results.json that a run wrote.")])
        return cls.parse(document)

    def write(self, path: str | Path) -> None:
        """Writes ``results.json``: one record per line, so that two runs can be compared line by line."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(self.to_json(), encoding="utf-8")
        os.replace(temporary, path)

    def to_json(self) -> str:
        """The text of ``results.json``."""
        parts = []
        for key, value in self.model_dump(mode="json").items():
            if isinstance(value, list) and value:
                body = "[\n  " + ",\n  ".join(_json(record) for record in value) + "\n ]"
            else:
                body = _json(value)
            parts.append(f' "{key}": {body}')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @model_validator(mode="after")
    def _check(self) -> "RunResults":
        for name in ("rows", "gap_closed", "verdicts"):
            keys = Counter(record.key for record in getattr(self, name))
            if twice := [key for key, times in keys.items() if times > 1]:
                raise ValueError(f"{name} has {len(twice)} records more than once, such as {' / '.join(twice[0])}")
        counts = [*(row.n for row in self.rows), *(size.real for size in self.group_sizes)]
        counts += [count for marginal in self.marginals for count in marginal.real]
        if small := sum(count is not None and 0 < count < self.run.minimum_cell for count in counts):
            raise ValueError(f"{small} counts of patients are below {self.run.minimum_cell}: give null in their place")
        return self

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Sites with a row, without the federation."""
        found = {row.site for row in self.rows} - {ALL}
        return (*(s for s in self.run.sites if s in found), *sorted(found - set(self.run.sites)))

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Groups with a row: everybody, then minorities, then by number of attributes."""
        minorities = self.minority_groups
        found = dict.fromkeys(row.group for row in self.rows if row.metric == HEADLINE_METRIC)
        return tuple(sorted(found, key=lambda g: (g != ALL, g not in minorities, num_attributes(g))))

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Arms with a row."""
        return _known_first((row.arm for row in self.rows), ARMS)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Downstream models with a row."""
        return _known_first((row.model for row in self.rows), ("logistic_regression", "hist_gradient_boosting"))

    @cached_property
    def minority_groups(self) -> tuple[str, ...]:
        """Groups that the headline is about: those that the run names, else by :data:`MINORITY_SHARE`."""
        if self.run.minority_groups:
            return self.run.minority_groups
        sizes: dict[str, int | None] = {}
        for row in self.rows:
            if row.site == ALL and row.arm == "local" and row.metric == HEADLINE_METRIC:
                sizes.setdefault(row.group, row.n)
        limit = MINORITY_SHARE * (sizes.get(ALL) or 0)
        return tuple(g for g, n in sizes.items() if g != ALL and num_attributes(g) == 1 and (n is None or n < limit))

    @cached_property
    def headline_arm(self) -> str:
        """The arm that the headline is about."""
        return next((arm for arm in FEDERATED_ARMS if arm in self.arms), FEDERATED_ARMS[0])

    def score(self, *, site: str, group: str, arm: str, model: str, metric: str = HEADLINE_METRIC) -> Score | None:
        """The row of these names, if there is one."""
        return self._scores.get((site, group, arm, model, metric))

    def gap(self, *, site: str, group: str, arm: str, model: str, metric: str = HEADLINE_METRIC) -> GapClosed | None:
        """The share of the gap closed of these names, if there is one."""
        return self._gaps.get((site, group, arm, model, metric))

    def verdict(self, *, site: str, group: str, arm: str, model: str) -> GroupVerdict | None:
        """The verdict of these names, if there is one."""
        return self._verdicts.get((site, group, arm, model))

    @cached_property
    def _scores(self) -> dict[Key, Score]:
        return {row.key: row for row in self.rows}

    @cached_property
    def _gaps(self) -> dict[Key, GapClosed]:
        return {gap.key: gap for gap in self.gap_closed}

    @cached_property
    def _verdicts(self) -> dict[Key, GroupVerdict]:
        return {verdict.key: verdict for verdict in self.verdicts}


_CODE = "E190"
_ATTRIBUTE = re.compile(r"(?:^|, )[^=,]+=")


def num_attributes(group: str) -> int:
    """How many attributes a group's name lists: 2 for ``race=Black, sex=F``, 0 for ``all``."""
    return len(_ATTRIBUTE.findall(group))


def _known_first(found: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    unique = set(found)
    return (*(name for name in known if name in unique), *sorted(unique - set(known)))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _problems(error: ValidationError, document: Mapping[str, Any]) -> list[Problem]:
    kinds: Counter[tuple[str, str]] = Counter()
    for found in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in found["loc"] if not isinstance(part, int))
        kinds[where, found["msg"].removeprefix("Value error, ")] += 1
    problems = []
    for (where, rule), count in kinds.items():
        records = document.get(where.split(".")[0])
        total = len(records) if isinstance(records, list | tuple) else 0
        remedy = "Every field is described in docs/results.md."
        problems.append(Problem(code=_CODE, column=where, rows=count, total=total, rule=rule, remedy=remedy))
    return problems
