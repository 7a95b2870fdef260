import json
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrage.data.groups import Group, GroupCounts
from mcrage.data.marginals import Marginals, num_cells
from mcrage.data.schema import TableSchema
from mcrage.errors import (
    BudgetExceededError,
    ConfigError,
    DataError,
    LedgerError,
    MessageError,
    PrivacyError,
    Problem,
    RefusedError,
    SchemaError,
)
from mcrage.messages import (
    CountInstruction,
    DescribeInstruction,
    EvaluateInstruction,
    Outgoing,
    SiteCounts,
    SiteDescription,
    SiteError,
    SiteLoss,
    SiteScores,
    SiteUpdate,
    TrainInstruction,
    Wire,
    counts_from_json,
    counts_to_json,
)
from mcrage.refusals import FAILURES, REFUSALS, RUNTIME_FAILURES

PARAMETERS = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
SHAPES = {"a": (2, 3), "b": (4,)}
RUN = "a" * 64
MODEL: dict[str, Any] = {"run": RUN, "server_round": 2, "description": "{}", "test_fraction": 0.3, "seed": 1}
STEPS: dict[str, Any] = {
    "first_step": 5,
    "local_steps": 5,
    "total_steps": 20,
    "batch_size": 8,
    "learning_rate": 0.1,
    "warmup_steps": 0,
    "proximal_mu": 0.0,
}


def description(schema: TableSchema, *, with_marginals: bool = True) -> SiteDescription:
    women = Group.of(sex="F", ill="True")
    cells = {column.name: np.full(num_cells(column) + 1, 12.0) for column in schema.modelled}
    return SiteDescription(
        site="a",
        schema_fingerprint=schema.fingerprint,
        schema_text=schema.to_json(),
        group_counts=GroupCounts({women: 40}, suppressed=[Group.of(sex="M", ill="True")]),
        marginals=Marginals(cells) if with_marginals else None,
        versions={"torch": "2"},
    )


def test_the_list_of_what_leaves_a_site_is_this_one(tiny_schema: TableSchema) -> None:
    fields = {kind.__name__: sorted(kind.model_fields) for kind in (*get_args(Outgoing), SiteError)}
    assert fields == {
        "SiteDescription": [
            "group_counts",
            "marginals",
            "mask_key",
            "schema_fingerprint",
            "schema_text",
            "site",
            "versions",
        ],
        "SiteUpdate": ["loss", "parameters", "server_round"],
        "SiteSum": ["server_round", "words"],
        "SiteCounts": ["counts", "server_round"],
        "SiteLoss": ["loss", "server_round"],
        "SiteScores": ["counts", "server_round"],
        "SiteAccount": ["account"],
        "SiteError": ["code", "error_id"],
    }
    assert sorted(description(tiny_schema).to_wire().values) == [
        "group-counts",
        "has-marginals",
        "mask-key",
        "schema-fingerprint",
        "schema-text",
        "site",
        "versions",
    ]


def test_instructions_come_back_as_they_went_out() -> None:
    describe = DescribeInstruction(run=RUN, test_fraction=0.3, marginals=True)
    train = TrainInstruction(**MODEL, **STEPS, parameters=PARAMETERS)
    evaluate = EvaluateInstruction(**MODEL, parameters=PARAMETERS)
    count = CountInstruction(
        run=RUN, test_fraction=0.3, server_round=1, tables="[]", noise=4.0, colluders=1, peers="{}"
    )
    assert CountInstruction.from_wire(count.to_wire()) == count
    assert DescribeInstruction.from_wire(describe.to_wire()) == describe
    assert TrainInstruction.from_wire(train.to_wire()) == train
    assert EvaluateInstruction.from_wire(evaluate.to_wire()) == evaluate


def test_replies_come_back_as_they_went_out() -> None:
    update = SiteUpdate(server_round=1, loss=0.5, parameters=PARAMETERS)
    assert SiteUpdate.from_wire(update.to_wire(), shapes=SHAPES) == update
    private = SiteUpdate(server_round=1, parameters=PARAMETERS)
    assert "loss" not in private.to_wire().values
    assert SiteUpdate.from_wire(private.to_wire(), shapes=SHAPES) == private
    scores = SiteScores(server_round=1, counts=np.array([[-3.0, 5.0]]))
    np.testing.assert_array_equal(SiteScores.from_wire(scores.to_wire(), shape=(1, 2)).counts, scores.counts)
    counts = SiteCounts(server_round=1, counts=np.array([-3.0, 5.0]))
    np.testing.assert_array_equal(SiteCounts.from_wire(counts.to_wire(), size=2).counts, counts.counts)
    loss = SiteLoss(server_round=1, loss=0.5)
    assert SiteLoss.from_wire(loss.to_wire()) == loss


@pytest.mark.parametrize("with_marginals", [True, False])
def test_a_description_comes_back_as_it_went_out(tiny_schema: TableSchema, with_marginals: bool) -> None:
    sent = description(tiny_schema, with_marginals=with_marginals)
    got = SiteDescription.from_wire(sent.to_wire())
    assert got.table_schema == tiny_schema
    assert (dict(got.group_counts), got.group_counts.suppressed) == (
        dict(sent.group_counts),
        sent.group_counts.suppressed,
    )
    assert got.versions == sent.versions
    wires = [None if m is None else m.to_wire() for m in (got.marginals, sent.marginals)]
    assert wires[0] == wires[1]


def test_counts_below_nothing_come_with_noise_alone(tiny_schema: TableSchema) -> None:
    wire = description(tiny_schema).to_wire()
    wire.arrays[tiny_schema.modelled[0].name][0] = -12.0
    got = SiteDescription.from_wire(wire, noisy=True)
    assert got.marginals is not None
    assert got.marginals.to_wire()[tiny_schema.modelled[0].name][0] == -12.0
    with pytest.raises(MessageError, match="at least 0"):
        SiteDescription.from_wire(wire)


@pytest.mark.parametrize(
    "changes",
    [
        {"server-round": 0},
        {"server-round": "2"},
        {"server-round": True},
        {"loss": float("nan")},
        {"weight": 100.0},
        {"parameters": 1},
        {"server_round": 2},
    ],
)
def test_values_that_were_not_agreed_are_refused(changes: dict[str, Any]) -> None:
    wire = SiteUpdate(server_round=2, loss=0.5, parameters=PARAMETERS).to_wire()
    bad = Wire({**wire.values, **changes}, wire.arrays)
    with pytest.raises(MessageError, match="SiteUpdate"):
        SiteUpdate.from_wire(bad, shapes=SHAPES)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a", np.ones((1,), np.float32)),
        ("a", np.ones((3, 2), np.float32)),
        ("a", np.ones((2, 3), np.float64)),
        ("a", np.full((2, 3), np.nan, np.float32)),
        ("a", np.full((2, 3), -np.inf, np.float32)),
        ("a", np.full((2, 3), 1e30, np.float32)),
        ("c", np.ones(1, np.float32)),
    ],
)
def test_parameters_that_cannot_be_averaged_are_refused(name: str, array: np.ndarray[Any, Any]) -> None:
    wire = SiteUpdate(server_round=1, loss=0.5, parameters=PARAMETERS | {name: array}).to_wire()
    with pytest.raises(MessageError):
        SiteUpdate.from_wire(wire, shapes=SHAPES)


def test_a_missing_array_is_refused() -> None:
    with pytest.raises(MessageError, match="missing"):
        SiteUpdate.from_wire(Wire({"server-round": 1, "loss": 0.5}, {"a": PARAMETERS["a"]}), shapes=SHAPES)


def test_parameters_take_the_order_of_the_model() -> None:
    backwards = dict(reversed(PARAMETERS.items()))
    update = SiteUpdate.from_wire(Wire({"server-round": 1, "loss": 0.5}, backwards), shapes=SHAPES)
    assert list(update.parameters) == list(SHAPES)


def test_a_loss_comes_without_arrays() -> None:
    with pytest.raises(MessageError, match="without arrays"):
        SiteLoss.from_wire(Wire({"server-round": 1, "loss": 0.5}, PARAMETERS))


@pytest.mark.parametrize(
    "counts",
    [
        np.ones((2, 1)),
        np.array([[0.5, 1.0]]),
        np.array([[np.nan, 1.0]]),
        np.array([[1e300, 1.0]]),
        np.ones((1, 2), np.float32),
    ],
)
def test_scores_that_are_no_counts_are_refused(counts: np.ndarray[Any, Any]) -> None:
    with pytest.raises(MessageError, match="counts"):
        SiteScores.from_wire(Wire({"server-round": 1}, {"counts": counts}), shape=(1, 2))
    with pytest.raises(MessageError, match="counts"):
        SiteCounts.from_wire(Wire({"server-round": 1}, {"counts": counts.ravel()[:1]}), size=2)
    with pytest.raises(MessageError, match="nothing else"):
        SiteScores.from_wire(Wire({"server-round": 1}, {"counts": np.ones((1, 2)), "more": counts}), shape=(1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema-text": "{"}, "schema is not valid"),
        ({"schema-fingerprint": "0" * 64}, "fingerprint"),
        ({"site": "../etc"}, "site"),
        ({"site": "A"}, "site"),
        ({"group-counts": "[1"}, "not JSON"),
        ({"versions": "[" * 100_000}, "not JSON"),
        ({"versions": '{"torch": 2}'}, "versions"),
        ({"has-marginals": False}, "announced"),
        ({"has-marginals": 1}, "announced"),
        ({"extra": 1}, "extra"),
        ({"marginals": 1}, "as values"),
    ],
)
def test_a_description_that_was_not_agreed_is_refused(
    tiny_schema: TableSchema, changes: dict[str, Any], message: str
) -> None:
    wire = description(tiny_schema).to_wire()
    with pytest.raises(MessageError, match=message):
        SiteDescription.from_wire(Wire({**wire.values, **changes}, wire.arrays))


@pytest.mark.parametrize(
    "content",
    [
        {"counts": [[[["sex", "F"], ["ill", "True"]], 10]], "suppressed": []},
        {"counts": [[[["sex", "F"], ["ill", "True"]], 11.0]], "suppressed": []},
        {"counts": [[[["sex", "F"], ["ill", "True"]], True]], "suppressed": []},
        {"counts": [[[["sex", "F"]], 40]], "suppressed": []},
        {"counts": [[[["sex", "X"], ["ill", "True"]], 40]], "suppressed": []},
        {"counts": [], "suppressed": [[["age", "18"], ["ill", "True"]]]},
        {"counts": [40], "suppressed": []},
        {"suppressed": []},
        [],
        7,
    ],
)
def test_counts_that_were_not_agreed_are_refused(tiny_schema: TableSchema, content: object) -> None:
    with pytest.raises(MessageError, match="group counts"):
        counts_from_json(json.dumps(content), tiny_schema)


@given(st.dictionaries(st.sampled_from([("F", "False"), ("F", "True"), ("M", "False")]), st.integers(11, 10**6)))
def test_counts_come_back_as_they_went_out(shown: dict[tuple[str, str], int]) -> None:
    columns = [
        {"name": "sex", "kind": "categorical", "role": "sensitive", "categories": ["F", "M"]},
        {"name": "ill", "kind": "boolean", "role": "target", "nullable": False},
    ]
    schema = TableSchema.parse({"columns": columns})
    hidden = [Group.of(sex="M", ill="True")]
    counts = GroupCounts({Group.of(sex=sex, ill=ill): n for (sex, ill), n in shown.items()}, suppressed=hidden)
    got = counts_from_json(counts_to_json(counts), schema)
    assert dict(got) == dict(counts)
    assert got.suppressed == counts.suppressed


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 1001),
        (SchemaError("x"), 1002),
        (DataError([Problem(code="E1", rule="x", remedy="y")]), 1003),
        (MessageError("x"), 1004),
        (BudgetExceededError("x"), 1005),
        (LedgerError("x"), 1006),
        (PrivacyError("x"), 1007),
        (MemoryError("x"), 1008),
        (RefusedError(2101, "Jane Doe"), 2101),
        (ValueError("Jane Doe"), 1000),
    ],
)
def test_an_error_leaves_as_its_kind(error: Exception, code: int) -> None:
    sent = SiteError.of(error, "0123abcd")
    assert (sent.code, sent.error_id) == (code, "0123abcd")
    assert "0123abcd" in str(sent)
    assert SiteError.readable(sent.code, sent.error_id) == str(sent)


@pytest.mark.parametrize(("code", "words"), FAILURES.items())
def test_a_failure_of_the_sites_daemon_is_told_in_the_servers_words(code: int, words: str) -> None:
    assert SiteError.readable(code, "0123abcd") == f"{words} (the site's log has error 0123abcd)"


@pytest.mark.parametrize(("code", "words"), RUNTIME_FAILURES.items())
@pytest.mark.parametrize("reason", ["Jane Doe", "0123abcd", "", None])
def test_a_failure_of_flowers_own_is_told_in_the_servers_words(code: int, words: str, reason: str | None) -> None:
    assert SiteError.readable(code, reason) == words


def test_every_code_has_one_meaning_and_plain_words() -> None:
    kinds = [REFUSALS, FAILURES, RUNTIME_FAILURES, {number: "" for number in range(1000, 1009)}]
    codes = [code for each in kinds for code in each]
    assert len(codes) == len(set(codes))
    assert all(words.isprintable() and len(words) < 100 for each in kinds for words in each.values())
    assert len({*FAILURES.values(), *REFUSALS.values()}) == len(FAILURES) + len(REFUSALS)


# Of a site that lies, or of Flower: the text is not repeated, whatever the code.
NOT_MEANT = [(2, "ValueError: Jane Doe"), (6, None), (9999, "0123abcd"), (-1, "0123abcd")]
NOT_MEANT += [(code, reason) for code in (1000, 1020, 2101) for reason in ("Jane Doe", "0123abcd\n", "0123ABCD", None)]


@pytest.mark.parametrize(("code", "reason"), NOT_MEANT)
def test_the_text_of_an_error_that_was_not_meant_for_the_server_is_not_repeated(code: int, reason: str | None) -> None:
    assert SiteError.readable(code, reason) == f"the site's runtime failed with code {code}"
