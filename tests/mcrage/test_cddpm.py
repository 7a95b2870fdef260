import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mcrage import rng
from mcrage.cddpm import CDDPM
from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import ModelConfig, check_parameters
from mcrage.errors import CheckpointError, ConfigError, DataError, MessageError, NotFittedError, SamplingError
from mcrage.storage import StoredModel
from mcrage.training.length import default_batch_size, default_steps
from mcrage.training.local import TrainingConfig, train_steps

SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "age", "kind": "integer", "role": "sensitive", "minimum": 18, "maximum": 95, "bins": [50]},
            {"name": "race", "kind": "categorical", "categories": ["a", "b"], "role": "sensitive", "nullable": False},
            {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 200, "decimals": 1},
            {"name": "drug", "kind": "boolean"},
            {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
        ]
    }
)


def make_table(rows: int, seed: int = 0) -> pd.DataFrame:
    """Race b has high labs, which are missing more often there; the label follows the lab."""
    draw = np.random.default_rng(seed)
    is_b = draw.random(rows) < 0.2
    lab = np.where(is_b, draw.normal(90, 15, rows), draw.normal(60, 15, rows)).clip(0, 200).round(1)
    died = draw.random(rows) < np.where(lab > 80, 0.7, 0.1)
    return pd.DataFrame(
        {
            "age": pd.array(draw.integers(18, 96, rows), dtype="Int64"),
            "race": pd.Categorical.from_codes(is_b.astype(int), categories=["a", "b"]),
            "lab": np.where(draw.random(rows) < np.where(is_b, 0.4, 0.05), np.nan, lab),
            "drug": pd.array(draw.random(rows) < 0.3, dtype="boolean"),
            "died": pd.array(died, dtype="boolean"),
        }
    )


TRAINED = make_table(2000)


@pytest.fixture(scope="module")
def fitted() -> CDDPM:
    return CDDPM(width=64, depth=2, steps=1500, batch_size=128, random_state=3).fit(TRAINED, SCHEMA)


def test_rows_have_the_columns_order_and_dtypes_of_the_table(fitted: CDDPM) -> None:
    rows, table = fitted.sample(50), make_table(50)
    assert rows.dtypes.to_dict() == table.dtypes.to_dict()
    assert list(rows.columns) == list(table.columns)
    assert list(rows.index) == list(range(50))


def test_a_condition_holds_in_every_row(fitted: CDDPM) -> None:
    rows = fitted.sample(300, {"race": "b", "age": "50 and over", "died": True})
    assert (rows["race"] == "b").all()
    assert (rows["age"] >= 50).all()
    assert rows["died"].all()


def test_conditions_move_the_other_columns_as_in_the_data(fitted: CDDPM) -> None:
    a, b = (fitted.sample(1500, {"race": race}) for race in "ab")
    real = make_table(20_000, seed=1)
    for rows, race in ((a, "a"), (b, "b")):
        of_race = real[real["race"] == race]
        assert rows["lab"].mean() == pytest.approx(of_race["lab"].mean(), abs=4)
        seen = TRAINED[TRAINED["race"] == race]  # 419 rows of race b tell the rate to ±.05 only
        assert rows["lab"].isna().mean() == pytest.approx(seen["lab"].isna().mean(), abs=0.06)
        assert rows["died"].mean() == pytest.approx(of_race["died"].mean(), abs=0.08)


def test_an_open_label_follows_the_row_and_an_asked_one_is_given(fitted: CDDPM) -> None:
    rows = fitted.sample(4000)
    high, low = (rows.loc[part, "died"].mean() for part in (rows["lab"] > 95, rows["lab"] < 65))
    assert high - low > 0.4
    assert not fitted.sample(200, {"died": False})["died"].any()


def test_a_table_without_a_label_is_generated_as_well() -> None:
    columns = tuple(column for column in SCHEMA.columns if column.role != "target")
    schema, table = SCHEMA.model_copy(update={"columns": columns}), make_table(60).drop(columns="died")
    model = CDDPM(width=8, depth=1, steps=5).fit(table, schema)
    assert not [name for name in model.parameters() if name.startswith("label")]
    assert model.sample(7).dtypes.to_dict() == table.dtypes.to_dict()
    assert np.isfinite(model.loss(table, random_state=0))


def test_open_conditions_give_the_mix_of_the_data(fitted: CDDPM) -> None:
    rows = fitted.sample(3000)
    assert (rows["race"] == "b").mean() == pytest.approx(0.2, abs=0.04)


def test_a_table_of_conditions_is_met_row_by_row(fitted: CDDPM) -> None:
    asked = pd.DataFrame({"race": ["a", "b"] * 20, "died": [True, None] * 20})
    rows = fitted.sample(40, asked)
    assert list(rows["race"]) == ["a", "b"] * 20
    assert rows["died"][::2].all()


def test_the_same_seed_gives_the_same_rows_and_another_seed_does_not(fitted: CDDPM) -> None:
    pd.testing.assert_frame_equal(fitted.sample(20, random_state=1), fitted.sample(20, random_state=1))
    assert not fitted.sample(20, random_state=1).equals(fitted.sample(20, random_state=2))


def test_two_trainings_with_one_seed_give_the_same_bytes() -> None:
    first, second = (CDDPM(width=8, depth=1, steps=20, random_state=5).fit(make_table(100), SCHEMA) for _ in range(2))
    for name, value in first.parameters().items():
        assert value.tobytes() == second.parameters()[name].tobytes()


def test_few_deterministic_steps_agree_with_many_random_ones(fitted: CDDPM) -> None:
    slow = CDDPM.from_description(fitted.describe()).set_params(sampler="ancestral", sampling_steps=200)
    slow.load_parameters(fitted.parameters())
    a, b = fitted.sample(2000), slow.sample(2000)
    assert a["lab"].mean() == pytest.approx(b["lab"].mean(), abs=4)
    assert a["died"].mean() == pytest.approx(b["died"].mean(), abs=0.05)


def test_a_saved_model_samples_the_same_rows(fitted: CDDPM, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    loaded = CDDPM.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.sample(30), fitted.sample(30))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]


@pytest.fixture(scope="module")
def calibrated() -> CDDPM:
    return CDDPM(width=16, depth=1, steps=820, batch_size=512).fit(TRAINED, SCHEMA)


def test_what_was_measured_after_the_training_is_saved_with_the_model(calibrated: CDDPM, tmp_path: Path) -> None:
    calibrated.save(tmp_path)
    rows = CDDPM.load(tmp_path).sample(500)
    pd.testing.assert_frame_equal(rows, calibrated.sample(500))
    without = CDDPM.from_description(calibrated.describe())
    without.load_parameters(calibrated.parameters())
    assert not rows["lab"].equals(without.sample(500)["lab"]), "the check must be able to fail"
    stored = StoredModel.read(tmp_path)
    cut = {name: array[:, :-1].copy() for name, array in stored.calibration.items()}
    replace(stored, calibration=cut).write(tmp_path)
    with pytest.raises(CheckpointError, match="not a model of this version"):
        CDDPM.load(tmp_path)


def test_numbers_that_were_asked_for_stay_in_their_bin_after_calibration(calibrated: CDDPM) -> None:
    assert calibrated.sample(500, {"age": 30})["age"].max() < 50
    assert calibrated.sample(500, {"age": 60})["age"].min() >= 50


def test_bfloat16_learns_the_same_with_other_bytes() -> None:
    """Of products only: parameters stay float32. The mean lab of race b is 90, of race a 60."""
    models = [
        CDDPM(width=32, depth=1, steps=600, random_state=1, precision=precision).fit(TRAINED, SCHEMA)
        for precision in ("float32", "bfloat16")
    ]
    labs = [[model.sample(1500, {"race": race})["lab"].mean() for race in "ab"] for model in models]
    assert labs[1] == pytest.approx(labs[0], abs=2.0)
    models[1].sample(1)
    exact = CDDPM.from_description(models[1].describe())
    exact.load_parameters(models[1].parameters())
    assert models[1].loss(TRAINED, random_state=0) == exact.loss(TRAINED, random_state=0), "losses are float32 again"
    first = [model.parameters()["denoiser.inputs.weight"] for model in models]
    assert first[1].dtype == np.float32
    assert not np.array_equal(*first)


def test_a_saved_model_does_not_ask_for_the_device_it_was_trained_on(fitted: CDDPM, tmp_path: Path) -> None:
    CDDPM.from_description(fitted.describe()).set_params(device="cuda:7").save(tmp_path)
    assert CDDPM.load(tmp_path).device == "cpu"


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_no_steps_and_no_rows_per_step_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        CDDPM(**{name: 0}).fit(TRAINED, SCHEMA)


def test_a_precision_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision must be 'float32' or 'bfloat16', got 'half'"):
        CDDPM(precision="half").fit(TRAINED, SCHEMA)


def test_a_damaged_model_is_refused(fitted: CDDPM, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        CDDPM.load(tmp_path)
    fitted.save(tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="checksum"):
        CDDPM.load(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a model of this version"):
        CDDPM.load(tmp_path)


def test_a_site_rebuilds_the_model_from_its_description_and_trains_it() -> None:
    table = make_table(300)
    server = CDDPM.initialised(SCHEMA, Marginals.of(table, SCHEMA), config=ModelConfig(width=16, depth=1))
    site = CDDPM.from_description(server.describe())
    site.load_parameters(server.parameters())
    before = site.loss(table, random_state=0)
    encoded = site.transform.encode(table, generator=np.random.default_rng(0))
    config = TrainingConfig(total_steps=100, batch_size=64)
    generator = rng.torch_stream(0)
    list(train_steps(site.network_, site.diffusion_, encoded, config=config, steps=range(100), generator=generator))
    assert list(site.parameters()) == list(server.parameters())
    server.load_parameters(site.parameters())
    assert server.loss(table, random_state=0) < before


def test_without_histograms_the_schema_alone_is_enough() -> None:
    model = CDDPM.initialised(SCHEMA, None, config=ModelConfig(width=8, depth=1))
    assert len(CDDPM.from_description(model.describe()).sample(5)) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"denoiser.inputs.bias": np.full(8, np.nan, dtype=np.float32)}, "not finite"),
        (lambda p: p | {"denoiser.inputs.bias": np.zeros((1,), dtype=np.float32)}, r"expected float32 \(8,\)"),
        (lambda p: p | {"denoiser.inputs.bias": np.zeros(8)}, "got float64"),
        (lambda p: p | {"denoiser.inputs.bias": np.full(8, 1e4, dtype=np.float32)}, "beyond"),
        (lambda p: p | {"spare": np.zeros(1, dtype=np.float32)}, "1 unknown"),
        (lambda p: {name: value for name, value in p.items() if name != "denoiser.inputs.bias"}, "1 missing"),
    ],
)
def test_parameters_that_are_not_of_this_model_are_refused(change: object, message: str) -> None:
    model = CDDPM.initialised(SCHEMA, None, config=ModelConfig(width=8, depth=1))
    with pytest.raises(MessageError, match=message):
        model.load_parameters(change(model.parameters()))  # type: ignore[operator]


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", json.dumps({"format": 99})])
def test_a_text_that_describes_no_model_is_refused(text: str) -> None:
    with pytest.raises(MessageError):
        CDDPM.from_description(text)


def test_clear_errors_for_what_cannot_be_done(fitted: CDDPM) -> None:
    with pytest.raises(NotFittedError, match="call fit"):
        CDDPM().sample(1)
    with pytest.raises(SamplingError, match="has no level 'z'; it has a, b"):
        fitted.sample(1, {"race": "z"})
    with pytest.raises(SamplingError, match="asked for -1 rows"):
        fitted.sample(-1)
    with pytest.raises(ConfigError, match="no rows"):
        CDDPM().fit(make_table(0), SCHEMA)
    with pytest.raises(ConfigError, match="width must be between 1 and 4096"):
        CDDPM(width=0).fit(make_table(5), SCHEMA)
    with pytest.raises(ConfigError, match="sampler must be"):
        CDDPM.initialised(SCHEMA, None).set_params(sampler="magic").sample(1)
    with pytest.raises(DataError, match="column 'lab'"):
        CDDPM().fit(make_table(20).drop(columns="lab"), SCHEMA)


def test_no_rows_can_be_asked_for(fitted: CDDPM) -> None:
    assert list(fitted.sample(0).columns) == list(make_table(1).columns)


def test_progress_is_silent_by_default_and_shows_the_loss_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    CDDPM(width=8, depth=1, steps=20).fit(make_table(50), SCHEMA)
    assert capsys.readouterr().err == ""
    CDDPM(width=8, depth=1, steps=20, verbose=1).fit(make_table(50), SCHEMA)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "training 20 steps (as asked)"
    assert "training 20/20 loss" in lines[-1]


def test_the_default_length_is_said_before_the_training_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    model = CDDPM(width=8, depth=1, verbose=1).fit(make_table(50), SCHEMA)
    assert model.steps_ == default_steps(50, default_batch_size(50))
    assert capsys.readouterr().err.startswith(f"training {model.steps_} steps (the default for 50 rows; steps changes")
    assert CDDPM(width=8, depth=1, steps=3).fit(make_table(50), SCHEMA).steps_ == 3


def test_checking_parameters_accepts_what_is_right() -> None:
    check_parameters({"a": np.ones(2, dtype=np.float32)}, {"a": (2,)})


RULED = TableSchema.parse(
    {
        "columns": [*SCHEMA.model_dump(mode="json", exclude_defaults=True)["columns"],
                    {"name": "peak", "kind": "continuous", "minimum": 0, "maximum": 200, "decimals": 1}],
        "rules": ["lab <= peak", "if drug = True then died = False", "if race = b then drug is not missing"],
    }
)  # fmt: skip


def ruled_table(rows: int) -> pd.DataFrame:
    table = make_table(rows)
    table["drug"] = (table["drug"] & ~table["died"]).astype("boolean")
    return table.assign(peak=table["lab"].fillna(50.0).clip(upper=190.0) + 10.0)


@pytest.mark.parametrize("conditions", [None, {"died": True, "race": "b"}])
def test_every_row_of_a_hardly_trained_model_follows_the_rules_of_the_schema(conditions: dict[str, object]) -> None:
    model = CDDPM(width=8, depth=1, steps=5).fit(ruled_table(200), RULED)
    rows = model.sample(400, conditions)
    lab, peak, drug, died = (rows[name] for name in ("lab", "peak", "drug", "died"))
    assert not (lab > peak).any()
    assert not (drug.fillna(False) & died).any()
    assert not (drug.isna() & (rows["race"] == "b")).any()
    assert rows.dtypes.to_dict() == ruled_table(5).dtypes.to_dict()
    assert conditions is None or (died & (rows["race"] == "b")).all()
    assert model.repairs_.rows == 400
    assert model.repairs_.redrawn["lab <= peak"] > 100
    assert model.repairs_.repaired["lab <= peak"] > 0
    without = TableSchema.parse(RULED.model_dump(mode="json", exclude={"rules"}))
    free = CDDPM(width=8, depth=1, steps=5).fit(ruled_table(200), without).sample(400)
    assert (free["lab"] > free["peak"]).sum() > 100


def test_rows_that_break_a_rule_are_not_learned_from() -> None:
    with pytest.raises(DataError, match=r'E601 3 of 50 rows break the schema.s rule "lab <= peak"'):
        CDDPM().fit(ruled_table(50).assign(lab=[199.0] * 3 + [1.0] * 47, peak=50.0), RULED)


def test_a_model_keeps_its_rules_when_it_is_saved(tmp_path: Path) -> None:
    CDDPM(width=8, depth=1, steps=5).fit(ruled_table(200), RULED).save(tmp_path)
    loaded = CDDPM.load(tmp_path)
    assert loaded.schema_.rules == RULED.rules
    assert not (loaded.sample(200)["lab"] > loaded.sample(200)["peak"]).any()


@pytest.mark.slow
def test_sampled_rows_lie_at_bounds_as_often_as_real_ones() -> None:
    """Within one point: a fifth at the maximum, and zero-inflated costs, neither of them rounded."""
    numbers = {"age": (18, 95), "saturation": (50, 100), "cost": (0, 5000)}
    columns = [{"name": n, "kind": "continuous", "minimum": a, "maximum": b} for n, (a, b) in numbers.items()]
    schema = TableSchema.parse({"columns": columns})
    draw = np.random.default_rng(0)
    age = draw.uniform(18, 95, 5000)
    table = pd.DataFrame(
        {
            "age": age,
            "saturation": np.where(draw.random(5000) < 0.2, 100.0, np.clip(draw.normal(99 - age / 20, 2), 50, 99.9)),
            "cost": np.where(draw.random(5000) < 0.8 - age / 200, 0.0, draw.gamma(2.0, 5 * age).clip(0.01, 5000)),
        }
    )
    rows = CDDPM(width=64, depth=2, steps=2000, random_state=0).fit(table, schema).sample(20_000)
    for name, bound in (("saturation", 100.0), ("cost", 0.0), ("cost", 5000.0), ("age", 18.0), ("age", 95.0)):
        assert (rows[name] == bound).mean() == pytest.approx((table[name] == bound).mean(), abs=0.01), (name, bound)
