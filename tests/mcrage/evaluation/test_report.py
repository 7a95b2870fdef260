import copy
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import BaseModel

from mcrage.errors import DataError
from mcrage.evaluation.report import (
    AttackFigures,
    GapClosed,
    GroupSize,
    GroupVerdict,
    Marginal,
    Round,
    Run,
    RunResults,
    Score,
    SitePrivacy,
    num_attributes,
)

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "results.md"

GOLDEN = {
    "": (
        RunResults,
        [
            *["schema_version", "run", "rows", "gap_closed", "verdicts", "group_sizes", "marginals", "history"],
            *["privacy", "attacks"],
        ],
    ),
    "run": (
        Run,
        [
            *["config", "seed", "dataset", "sites", "minority_groups", "minimum_cell", "test_set"],
            *["engine", "repairs", "versions", "seconds", "peak_memory_mb"],
        ],
    ),
    "rows": (Score, ["site", "group", "arm", "model", "metric", "value", "low", "high", "reason", "n"]),
    "gap_closed": (GapClosed, ["site", "group", "arm", "model", "metric", "value", "low", "high", "reason"]),
    "verdicts": (GroupVerdict, ["site", "group", "arm", "model", "verdict", "difference", "low", "high"]),
    "group_sizes": (GroupSize, ["site", "group", "real", "synthetic"]),
    "marginals": (Marginal, ["column", "group", "labels", "real", "synthetic"]),
    "history": (Round, ["round", "loss", "fidelity", "sites", "dropped"]),
    "privacy": (SitePrivacy, ["site", "statement", "since", "delta", "epsilon_run", "epsilon", "events"]),
    "attacks": (AttackFigures, ["subset", "detail", "members", "others", "attack", "auc", "tpr", "reason"]),
}


def score(**changes: Any) -> dict[str, Any]:
    names = {"site": "all", "group": "all", "arm": "local", "model": "logistic_regression", "metric": "auroc"}
    return {**names, "value": 0.7, "low": 0.6, "high": 0.8, "n": 400, "reason": "", **changes}


def document(**changes: Any) -> dict[str, Any]:
    run = {
        "config": {"rounds": 3},
        "seed": 1,
        "dataset": "cohort",
        "sites": ["B", "A"],
        "engine": "in-process",
        "versions": {"python": "3.11"},
        "seconds": 1.5,
        "peak_memory_mb": 100,
    }
    names = {"site": "all", "group": "race=Black", "arm": "federated_target", "model": "logistic_regression"}
    small = {"value": None, "low": None, "high": None, "n": None, "reason": "insufficient: too few"}
    whole = {
        "schema_version": 1,
        "run": run,
        "rows": [score(), score(group="race=Black", n=40), score(site="A"), score(site="B", **small)],
        "gap_closed": [names | {"metric": "auroc", "value": 0.9, "low": 0.7, "high": 1.1, "reason": ""}],
        "verdicts": [names | {"verdict": "helps", "difference": 0.1, "low": 0.05, "high": 0.15}],
        "group_sizes": [{"site": "A", "group": "race=Black", "real": 40, "synthetic": 60}],
        "marginals": [
            {"column": "age", "group": "all", "labels": ["a", "b"], "real": [20, None], "synthetic": [19, 4]}
        ],
        "history": [{"round": 1, "loss": 0.5, "fidelity": None, "sites": ["A"], "dropped": ["B"]}],
        "privacy": [
            {"site": "A", "statement": "-", "since": "2026-11-28", "delta": 1e-5, "events": ["-"]}
            | {"epsilon_run": 1.0, "epsilon": None}
        ],
        "attacks": [
            {"subset": "everyone", "detail": "", "members": 500, "others": 400, "attack": "loss", "reason": ""}
            | {"auc": [0.5, 0.4, 0.6], "tpr": None}
        ],
    }
    return copy.deepcopy(whole | changes)


def problem(**changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        RunResults.parse(document(**changes))
    return str(caught.value)


@pytest.mark.parametrize("section", GOLDEN)
def test_fields_are_the_golden_ones_and_each_has_its_line_in_the_documentation(section: str) -> None:
    record, names = GOLDEN[section]
    assert issubclass(record, BaseModel)
    assert list(record.model_fields) == names
    text = DOCUMENTATION.read_text(encoding="utf-8")
    part = text.split(f"\n## {section}\n")[1] if section else text
    assert re.findall(r"^\| `(\w+)` \|", part.split("\n## ")[0], flags=re.MULTILINE) == names


def test_file_holds_the_golden_keys_in_order() -> None:
    written = json.loads(RunResults.parse(document()).to_json())
    for section, (_, names) in GOLDEN.items():
        found = written[section] if section else written
        assert list(found[0] if isinstance(found, list) else found) == names


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    results = RunResults.parse(document())
    results.write(tmp_path / "results.json")
    assert RunResults.read(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert len(pd.DataFrame(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"])) == 4


def test_each_record_stands_on_one_line() -> None:
    lines = RunResults.parse(document()).to_json().splitlines()
    assert sum(line.startswith('  {"site"') for line in lines) == 4 + 1 + 1 + 1 + 1


def test_empty_lists_are_written_and_read() -> None:
    results = RunResults.parse({key: document()[key] for key in ("schema_version", "run")})
    assert RunResults.parse(json.loads(results.to_json())) == results
    assert results.sites == results.groups == results.models == results.minority_groups == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": [score(value=float("nan"))]}, "finite"),
        ({"rows": [score(value=None, low=None, high=None)]}, "needs a reason"),
        ({"rows": [score(low=None, high=None)]}, "needs a reason"),
        ({"rows": [score(low=None)]}, "go together"),
        ({"rows": [score(low=0.9)]}, "low must not be above high"),
        ({"rows": [score(value=None)]}, "an interval needs a value"),
        ({"rows": [score(extra=1)]}, "Extra inputs"),
        ({"rows": [score(), score()]}, "rows has 1 records more than once, such as all / all / local"),
        ({"rows": [score(n=10)]}, "1 counts of patients are below 11"),
        ({"schema_version": 2}, "Input should be 1"),
        ({"marginals": [document()["marginals"][0] | {"real": [3, None]}]}, "below 11"),
        ({"marginals": [document()["marginals"][0] | {"labels": ["a"]}]}, "same length"),
        ({"group_sizes": [{"site": "A", "group": "g", "real": 5, "synthetic": 1}]}, "below 11"),
        ({"group_sizes": [{"site": "A", "group": "g", "real": None, "synthetic": 60}]}, "synthetic must be null"),
        ({"verdicts": [document()["verdicts"][0] | {"verdict": "harms"}]}, "its interval, which says 'helps'"),
        ({"verdicts": [document()["verdicts"][0] | {"low": -0.1}]}, "which says 'no evidence'"),
        ({"verdicts": [document()["verdicts"][0] | {"low": -0.3, "high": -0.1}]}, "which says 'harms'"),
    ],
)
def test_what_is_not_of_the_documented_form_is_refused(changes: dict[str, Any], said: str) -> None:
    assert said in problem(**changes)


def test_problems_are_counted_by_kind_and_show_no_value() -> None:
    text = problem(rows=[score(value="secret"), score(value="secret", arm="smote"), score(arm="pooled")])
    assert text.count("\n") == 0
    assert "rows.value" in text
    assert "2 of 3 rows" in text
    assert "secret" not in text


def test_a_lower_minimum_cell_lets_smaller_counts_pass() -> None:
    changed = document(rows=[score(n=4)])
    changed["run"]["minimum_cell"] = 1
    assert RunResults.parse(changed).rows[0].n == 4


def test_a_reason_may_be_null_in_the_input_and_is_text_in_the_output() -> None:
    assert RunResults.parse(document(rows=[score(reason=None)])).rows[0].reason == ""


@pytest.mark.parametrize("text", ["no JSON", "[]"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.json is not a JSON object"):
        RunResults.read(tmp_path / "results.json")


def test_sites_come_in_the_run_s_order_and_arms_and_models_in_the_known_one() -> None:
    rows = [
        score(site="C", arm="pooled"),
        score(site="A", model="custom"),
        score(site="B", arm="mine"),
        score(site="B", model="hist_gradient_boosting"),
    ]
    results = RunResults.parse(document(rows=rows))
    assert results.sites == ("B", "A", "C")
    assert results.arms == ("local", "pooled", "mine")
    assert results.models == ("logistic_regression", "hist_gradient_boosting", "custom")


def test_groups_come_minorities_first_and_then_by_number_of_attributes() -> None:
    groups = ["all", "sex=F, race=B", "sex=F", "sex=M", "race=B"]
    sizes = [1000, 90, 480, 520, 100]
    rows = [score(group=group, n=n) for group, n in zip(groups, sizes, strict=True)]
    results = RunResults.parse(document(rows=[*rows, score(group="race", metric="equalized_odds_difference")]))
    assert results.minority_groups == ("race=B",)
    assert results.groups == ("all", "race=B", "sex=F", "sex=M", "sex=F, race=B")


def test_groups_that_the_run_names_are_the_minorities() -> None:
    changed = document(rows=[score(), score(group="sex=F", n=200)])
    changed["run"]["minority_groups"] = ["sex=F"]
    assert RunResults.parse(changed).minority_groups == ("sex=F",)


def test_a_group_too_small_to_be_counted_is_a_minority() -> None:
    hidden = score(group="race=B", value=None, low=None, high=None, n=None, reason="insufficient")
    assert RunResults.parse(document(rows=[score(), hidden])).minority_groups == ("race=B",)


def test_the_headline_is_about_the_target_arm_where_there_is_one() -> None:
    rows = [score(arm="federated_parity"), score(arm="federated_target")]
    assert RunResults.parse(document(rows=rows)).headline_arm == "federated_target"
    assert RunResults.parse(document(rows=rows[:1])).headline_arm == "federated_parity"


@pytest.mark.parametrize(
    ("group", "count"),
    [("all", 0), ("race", 0), ("sex=F", 1), ("a1c=<=7", 1), ("race=Black, sex=F, age=45 to 64", 3)],
)
def test_attributes_of_a_group_are_counted_from_its_name(group: str, count: int) -> None:
    assert num_attributes(group) == count
