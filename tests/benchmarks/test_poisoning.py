import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from benchmarks import poisoning
from benchmarks.poisoning import LIES, LyingGrid, length, numbers
from mcrage.config import RunConfig
from simulations.grid import InProcessGrid

CAME = {"w": np.full((20, 30), 2, np.float32), "b": np.zeros(5, np.float32)}
TRAINED = {"w": np.full((20, 30), 3, np.float32), "b": np.ones(5, np.float32)}
UPDATE = math.sqrt(605)


def client_app(message: Message, context: Context) -> Message:
    """Adds one to every parameter."""
    arrays = {name: Array(array + np.float32(1)) for name, array in numbers(message.content["arrays"]).items()}
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord({"loss": 0.5})}), reply_to=message)


def lying_grid(lie: str) -> LyingGrid:
    grid = InProcessGrid(client_app, [{}, {}, {}], RunConfig())
    return LyingGrid(grid, list(grid.get_node_ids())[1], LIES[lie], seed=0)


def questions(grid: LyingGrid, kind: str) -> list[Message]:
    record = {name: Array(array) for name, array in CAME.items()}
    return [Message(RecordDict({"arrays": ArrayRecord(record)}), node, kind) for node in grid.get_node_ids()]


def answers(replies: Iterable[Message]) -> list[dict[str, np.ndarray]]:
    return [numbers(reply.content.array_records["arrays"]) for reply in replies]


@pytest.mark.parametrize(
    ("lie", "moved_by", "along"),
    [
        ("update x 10", 10 * UPDATE, 1.0),
        ("update x -1", UPDATE, -1.0),
        ("random, same norm", UPDATE, 0.0),
        ("random, norm 1000", 1e3, 0.0),
    ],
)
def test_lies_are_as_long_and_point_where_their_names_say(lie: str, moved_by: float, along: float) -> None:
    sent = LIES[lie](CAME, TRAINED, np.random.default_rng(0))
    assert {n: (a.dtype, a.shape) for n, a in sent.items()} == {n: (a.dtype, a.shape) for n, a in CAME.items()}
    moved = {n: sent[n] - CAME[n] for n in CAME}
    assert length(moved) == pytest.approx(moved_by, rel=1e-5)
    cosine = sum(float((moved[n] * (TRAINED[n] - CAME[n])).sum()) for n in CAME) / UPDATE / moved_by
    assert cosine == pytest.approx(along, abs=0.1)


@pytest.mark.parametrize("lie", LIES)
def test_only_the_liars_parameters_are_changed(lie: str) -> None:
    grid = lying_grid(lie)
    first, second, third = grid.send_and_receive(questions(grid, "train"))
    assert second.content["config"] == first.content["config"]
    for honest in (first, third):
        assert all((array == TRAINED[n]).all() for n, array in numbers(honest.content["arrays"]).items())
    assert not any((array == TRAINED[n]).any() for n, array in numbers(second.content["arrays"]).items())


def test_the_liar_says_the_truth_about_all_else() -> None:
    grid = lying_grid("update x -1")
    for answer in answers(grid.send_and_receive(questions(grid, "evaluate"))):
        assert all((array == TRAINED[n]).all() for n, array in answer.items())


def test_losses_are_per_cent_of_what_they_are_compared_with_by_seed() -> None:
    lines = [
        {"seed": 0, "strategy": "krum", "case": "nobody lies", "tstr": 0.8},
        {"seed": 0, "strategy": "krum", "case": "update x 10", "tstr": 0.6},
        {"seed": 1, "strategy": "krum", "case": "nobody lies", "tstr": 0.5},
        {"seed": 1, "strategy": "krum", "case": "update x 10", "reason": "it diverged"},
    ]
    lost = poisoning.lost(lines, "tstr", "krum", "update x 10", than=("krum", "nobody lies"))
    assert lost[0] == pytest.approx(25)
    assert math.isnan(lost[1])
    assert poisoning.interval(lost) == "no model (1 of 2)"
    assert poisoning.interval([1.0, 2.0, 3.0]) == "2.00 [-0.48, 4.48]"


@pytest.mark.soak
def test_the_benchmark_compares_every_lie_with_nobody_lying_and_with_the_absent_liar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lines.json"
    options = ["--seeds", "1", "--rounds", "2", "--test-rows", "400", "--only", "fedavg", "krum", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["poisoning", *options, "--set", "local-steps=10"])

    poisoning.main()

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cases = [(line["strategy"], line["case"]) for line in lines]
    assert len(set(cases)) == len(cases) == 2 + 2 * (1 + len(LIES))
    values = {case: line["all_pairs"] for case, line in zip(cases, lines, strict=True)}
    assert values["krum", "random, norm 1000"] > 0.97 * values["krum", "nobody lies"]
    assert values["fedavg", "random, norm 1000"] < 0.5 * values["fedavg", "nobody lies"], "the power of the benchmark"
    table = capsys.readouterr().out
    assert all(word in table for word in (*poisoning.MEASURES, *LIES, "before training", "vs absent"))
