"""Hostile requests as they come over the wire: each gets its code, no row is read, nothing is spent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.places import LEDGER, WITNESS
from client.policy import PrivacyRules, SitePolicy
from client.protection import prepare
from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import ModelConfig
from mcrage.messages import TrainInstruction
from mcrage.privacy.ledger import PrivacyLedger
from mcrage.refusals import REFUSALS

Arrays = dict[str, np.ndarray[Any, Any]]
Answer = Callable[..., int]

FIRST, OTHER = "denoiser.inputs.weight", "denoiser.inputs.bias"


@pytest.fixture(scope="module")
def model(tiny_schema: TableSchema) -> CDDPM:
    return CDDPM.initialised(tiny_schema, None, config=ModelConfig(width=8, depth=1), random_state=0)


@pytest.fixture
def answer(site_dir: Path, tmp_path: Path, model: CDDPM) -> Answer:
    """The code that a site answers a training instruction with: a site whose table cannot be read at all."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    private = tmp_path / "private"
    prepare(private, SitePolicy(privacy=PrivacyRules(declared_patients=80)))
    node: dict[str, str | int] = {
        "site": "st-mary",
        "data-path": str(tmp_path / "there-is-no-table.csv"),
        "schema-path": str(site_dir / "schema.json"),
        "private-dir": str(private),
    }

    def ask(change: Callable[[Arrays], Arrays] = lambda arrays: arrays, **values: Any) -> int:
        instruction = TrainInstruction(
            run="a" * 64,
            test_fraction=0.3,
            dp=True,
            delta=1e-5,
            server_round=1,
            description=model.describe(),
            seed=4,
            parameters={},
            first_step=0,
            local_steps=4,
            total_steps=12,
            batch_size=16,
            learning_rate=0.01,
            warmup_steps=0,
            proximal_mu=0.0,
            noise_multiplier=1.0,
            sample_rate=0.1,
            max_grad_norm=1.0,
            draws=2,
        )
        arrays = change({name: array for name, array in model.parameters().items()})
        config = instruction.to_wire().values | {name.replace("_", "-"): value for name, value in values.items()}
        content = RecordDict(
            {
                "config": ConfigRecord(config),  # type: ignore[arg-type]
                "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            }
        )
        reply = app(Message(content, 7, "train"), Context(1, 7, dict(node), RecordDict(), {}))
        with PrivacyLedger.open(private / LEDGER, witness=private / WITNESS) as ledger:
            assert ledger.rows == ()
        return reply.error.code if reply.has_error() else 0

    return ask


def replaced(name: str, array: np.ndarray[Any, Any]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: array}


def spoiled(value: float) -> Callable[[Arrays], Arrays]:
    def spoil(arrays: Arrays) -> Arrays:
        array = arrays[FIRST].copy()
        array[0, 0] = value
        return arrays | {FIRST: array}

    return spoil


WEIGHTS: list[tuple[str, Callable[[Arrays], Arrays], int]] = [
    ("missing", lambda arrays: {name: a for name, a in arrays.items() if name != FIRST}, 2301),
    ("none", lambda arrays: {}, 2301),
    ("unknown", replaced("denoiser.trap.weight", np.ones((8, 8), np.float32)), 2302),
    ("float64", lambda arrays: arrays | {FIRST: arrays[FIRST].astype(np.float64)}, 2303),
    ("int8", lambda arrays: arrays | {FIRST: arrays[FIRST].astype(np.int8)}, 2303),
    ("complex", lambda arrays: arrays | {FIRST: arrays[FIRST].astype(np.complex64)}, 2303),
    ("broadcast", lambda arrays: arrays | {FIRST: np.ones((1,), np.float32)}, 2304),
    ("transposed", lambda arrays: arrays | {FIRST: arrays[FIRST].T.copy()}, 2304),
    ("nan", spoiled(float("nan")), 2305),
    ("infinite", spoiled(float("-inf")), 2305),
    ("huge", spoiled(1e30), 2306),
    ("too many", replaced("denoiser.large", np.zeros(20_000_001, np.float32)), 2307),
]


@pytest.mark.parametrize(
    ("change", "code"), [(change, code) for _, change, code in WEIGHTS], ids=[w[0] for w in WEIGHTS]
)
def test_hostile_weights_are_refused_by_what_is_wrong_with_them(
    answer: Answer, change: Callable[[Arrays], Arrays], code: int
) -> None:
    assert answer(change) == code
    assert code in REFUSALS


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"dp": False}, 2003),
        ({"noise_seed": 1}, 2004),
        ({"noise_multiplier": 0.05}, 2101),
        ({"noise_multiplier": 1e9}, 2102),
        ({"sample_rate": 0.9}, 2103),
        ({"sample_rate": 0.0}, 2104),
        ({"delta": 1e-3}, 2105),
        ({"delta": 0.0}, 2106),
        ({"max_grad_norm": 1e9}, 2107),
        ({"draws": 10_000}, 2108),
        ({"local_steps": 10**9, "total_steps": 10**9}, 2109),
        ({"first_step": 10**6}, 2112),
        ({"test_fraction": 0.999}, 2006),
        ({"learning_rate": 1e9}, 2120),
        ({"description": "{"}, 2203),
        ({"noise_multiplier": -1.0}, 1004),
        ({"epsilon": 1e9}, 1004),
        ({"data_path": "/etc/passwd"}, 1004),
        ({"run": "../run"}, 1004),
    ],
)
def test_hostile_settings_are_refused_by_the_rule_that_they_break(
    answer: Answer, values: dict[str, Any], code: int
) -> None:
    assert answer(**values) == code


def test_a_model_of_hostile_size_is_refused_before_it_is_made(answer: Answer, model: CDDPM) -> None:
    content = json.loads(model.describe())
    content["config"] |= {"width": 4096, "depth": 32}
    assert answer(description=json.dumps(content)) == 2201


def test_what_is_allowed_gets_as_far_as_the_table(answer: Answer) -> None:
    assert answer() == 1001
