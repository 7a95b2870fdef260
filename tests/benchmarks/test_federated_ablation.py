import pytest

from benchmarks import federated_ablation
from mcrage.config import RunConfig
from mcrage.training import optimisers

ARMS = ["pooled", "defaults", "optimiser state kept"]


@pytest.mark.soak
def test_arms_differ_and_are_measured_for_everybody_and_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federated_ablation, "MOST_ROWS", 600)
    begin = optimisers._adam

    lines = list(federated_ablation.runs("cohort", 0, 2, ARMS))

    assert optimisers._adam is begin, "what the benchmark changed is as it was"
    everybody = {line["model"]: line for line in lines if line["group"] == "everybody"}
    assert list(everybody) == ARMS
    assert len({line["all_pairs"] for line in everybody.values()}) == 3, "the models are not the same one"
    assert all(0.5 < float(str(line["all_pairs"])) < 1 for line in everybody.values())
    real = [line for line in lines if line["group"] == "everybody, real rows"]
    assert len({line["all_pairs"] for line in real}) == 1
    assert {"race=White", "race=Black"} <= {line["group"] for line in lines}
    table = federated_ablation.table_of(lines)
    assert "all_pairs, % of pooled" in table


def test_every_arm_sees_as_many_rows() -> None:
    usual = RunConfig().to_flat()
    for settings in federated_ablation.variants(usual).values():
        run = RunConfig.parse({**usual, **settings}).federation
        rows = run.total_steps * run.batch_size
        assert rows == pytest.approx(RunConfig().federation.total_steps * RunConfig().federation.batch_size, rel=0.05)
