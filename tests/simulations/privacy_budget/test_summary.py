"""What cells say together: differences within a seed, intervals over seeds, words that go no further than these."""

import math
from pathlib import Path

import pandas as pd
import pytest

from simulations.privacy_budget.report import PAGE, TABLE, write_report
from simulations.privacy_budget.results import CellPlace, CellResult, Row
from simulations.privacy_budget.summary import Line, findings, tidy
from simulations.privacy_budget.words import sentences, table_of

GROUPS = ("all", "race=Black")


def cell(seed: int, generator: str, noise: str = "none", epsilon: float | None = None, **auroc: float) -> CellResult:
    """A cell with an AUROC of everybody for each kind of rows; .1 less of the minority."""
    rows = [
        Row(rows=rows, group=group, metric="auroc", value=value - 0.1 * (group != "all"))
        for rows, value in auroc.items()
        for group in GROUPS
    ]
    rows += [Row(rows=rows, group="race", metric="auroc_gap", value=0.1) for rows in auroc]
    if generator != "real":
        rows.append(Row(rows="federated", group="all", metric="advantage_rows", value=0.02))
    place = CellPlace(
        dataset="cohort", sites=4, patients=100, seed=seed, generator=generator, noise=noise, epsilon=epsilon
    )
    return CellResult(
        cell=place,
        settings={},
        minority_groups=("race=Black",),
        epsilon_spent=None if epsilon is None else epsilon - 0.01,
        rows=tuple(rows),
    )


def cells(seeds: int) -> list[CellResult]:
    """Own rows .70, pooled .80; the marginal model gains .05 without noise and loses .03 at ε = 1."""
    found = []
    for seed in range(seeds):
        moved = 0.02 * seed  # of the hospitals, and so of all their rows
        noise = 0.001 * (seed % 2)
        found += [
            cell(seed, "real", local=0.70 + moved, pooled=0.80 + moved),
            cell(seed, "marginal", federated=0.75 + moved + noise),
            cell(seed, "marginal", "local", 1.0, federated=0.67 + moved + noise),
            cell(seed, "marginal", "shared", 1.0, federated=0.72 + moved + noise),
            cell(seed, "cddpm", "shared", 1.0, federated=0.719 + moved + 2.5 * noise),
        ]
    return found


WITHOUT = Line(generator="marginal", noise="none", epsilon=math.inf)
HARMFUL = Line(generator="marginal", noise="local", epsilon=1.0)
SHARED = Line(generator="marginal", noise="shared", epsilon=1.0)


def test_shares_are_of_the_gap_within_each_seed_and_what_noise_loses_is_beside_the_same_generator() -> None:
    (found,) = findings(cells(4))
    assert found.share(WITHOUT, "all").value == pytest.approx(0.505)
    assert found.share(HARMFUL, "all").value == pytest.approx(-0.295)
    assert found.lost(HARMFUL, "all").value == pytest.approx(0.8)
    assert found.lost(SHARED, "race=Black").value == pytest.approx(0.3)
    assert math.isnan(found.lost(WITHOUT, "all").value)
    # hospitals differ by far more than a generator: differences within a seed do not
    gain = found.of_line(HARMFUL, "all", "gain")
    assert gain.is_below
    assert found.of_line(HARMFUL, "all", "auroc").high > found.of_rows("local", "all", "auroc").value


def test_harm_and_choice_are_said_in_words() -> None:
    (found,) = findings(cells(4))
    said = " ".join(sentences(found))
    assert "At ε = 1 choose for everybody marginal with shared noise (+.021" in said
    assert "though no better for certain than cddpm with shared noise" in said
    assert "Without noise choose for everybody marginal (+.051" in said
    assert "Marginal, local noise, ε = 1 does worse than the hospitals' own rows for everybody" in said
    assert "race=Black (−.029" in said
    assert "Marginal, shared noise, ε = 1 does worse" not in said
    assert "there is no interval" not in said


def test_whom_noise_costs_more_is_said_where_seeds_can_tell() -> None:
    found = "That noise costs race=Black more than everybody, or less, is not certain of any line."
    assert sentences(*findings(cells(4)))[-1] == found
    harmed = [
        each.model_copy(
            update={
                "rows": tuple(
                    row.model_copy(update={"value": row.value - 0.03 - 0.001 * each.cell.seed})
                    if row.group == "race=Black" and each.cell.noise == "local"
                    else row
                    for row in each.rows
                )
            }
        )
        for each in cells(4)
    ]
    said = sentences(*findings(harmed))[-1]
    assert said.startswith("Noise costs race=Black more than everybody with marginal, local noise, ε = 1 (+.032 [")
    assert not any("than everybody" in line for line in sentences(*findings(cells(2)))), (
        "of two seeds nothing is certain"
    )


def test_where_nothing_gains_the_hospitals_own_rows_are_the_choice() -> None:
    kept = [each for each in cells(4) if each.cell.generator == "real" or each.cell.noise == "local"]
    (found,) = findings(kept)
    assert (
        "At ε = 1 choose for everybody the hospitals' own rows; for race=Black the hospitals' own rows."
        in sentences(found)
    )


def test_one_or_two_seeds_have_no_interval_and_the_words_say_so() -> None:
    (found,) = findings(cells(2))
    estimate = found.share(WITHOUT, "all")
    assert estimate.value == pytest.approx(0.505)
    assert math.isnan(estimate.low)
    assert "With 2 seeds there is no interval" in sentences(found)[-1]


def test_a_minority_is_a_small_group_where_the_data_set_names_none() -> None:
    plain = [each.model_copy(update={"minority_groups": ()}) for each in cells(3)]
    shares = (("all", 1.0), ("race=Black", 0.1), ("race=<missing>", 0.02), ("race=Asian", 0.01))
    rows = tuple(Row(rows="local", group=group, metric="train_share", value=share) for group, share in shares)
    plain[0] = plain[0].model_copy(update={"rows": plain[0].rows + rows})
    (found,) = findings(plain)
    assert found.minorities == ("race=Black",)  # the others have no figures


def test_the_table_of_values_has_a_row_per_cell_group_and_metric() -> None:
    frame = tidy(cells(2))
    assert not frame.duplicated(["seed", "generator", "noise", "epsilon", "rows", "group", "metric"]).any()
    part = frame[(frame["metric"] == "gain") & (frame["noise"] == "local") & (frame["group"] == "all")]
    assert part["value"].tolist() == pytest.approx([-0.03, -0.029])
    assert part["epsilon_spent"].tolist() == [0.99, 0.99]


def test_a_report_has_both_files_and_says_what_came_to_nothing(tmp_path: Path) -> None:
    broken = cell(9, "cddpm", "local", 1.0).model_copy(update={"rows": (), "problem": "it <diverged>\nand more"})
    text = write_report([*cells(3), broken], tmp_path)
    assert "cohort, seed 9, cddpm, local noise, epsilon 1: it <diverged>" in text
    assert "and more" not in text
    values = pd.read_csv(tmp_path / TABLE)
    assert set(values["seed"]) == {0, 1, 2}
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "it &lt;diverged&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_every_generator_and_place_of_noise_is_a_line_of_each_figure(tmp_path: Path) -> None:
    write_report(cells(3), tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    for kind in ("cddpm shared", "marginal local", "marginal shared"):
        assert page.count(f'class="at {kind}"') > 4
    assert "AUROC: Everybody" in page
    assert "attack on generated rows" in page
    assert "attack on the loss" not in page  # no cell has it


def test_both_tables_show_own_and_pooled_rows_and_every_line() -> None:
    (found,) = findings(cells(3))
    lines = table_of(found).splitlines()
    assert lines[0] == "cohort, 4 hospitals of 100 patients; 3 seeds"
    assert sum("own rows" in line for line in lines) == len(GROUPS) + 2
    assert sum(HARMFUL.name in line for line in lines) == len(GROUPS) + 1
    assert sum(line.strip().startswith("marginal, local noise, ε = 1") and "0.99" in line for line in lines) == 2


def test_a_line_of_fewer_seeds_says_so_and_gains_over_the_rows_of_its_own_hospitals() -> None:
    kept = [each for each in cells(3) if each.cell.noise != "local" or each.cell.seed == 2]
    (found,) = findings(kept)
    assert f"{HARMFUL.name} (1 of 3 seeds)" in table_of(found)
    assert f"{SHARED.name} (" not in table_of(found)
    assert found.of_line(HARMFUL, "all", "gain").value == pytest.approx(-0.03)


def test_without_real_rows_there_is_nothing_to_compare_with() -> None:
    assert findings([each for each in cells(3) if each.cell.generator != "real"]) == []
