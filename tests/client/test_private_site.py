"""What a site sends under differential privacy, and what it must not depend on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from client.places import LEDGER, POLICY, WITNESS
from client.policy import DataRules, PrivacyRules, SitePolicy
from client.protection import Release, instruction_digest, prepare
from client.site import Site
from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.data.split import split_by_patient
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import BudgetExceededError, PrivacyError, RefusedError
from mcrage.messages import AccountInstruction, DescribeInstruction, EvaluateInstruction, Outgoing, TrainInstruction
from mcrage.privacy.keyed import derive
from mcrage.privacy.ledger import PrivacyLedger
from mcrage.privacy.sampling import KeyedDraws
from mcrage.wire import Wire

RUN = "a" * 64
ROUNDS, STEPS, RATE = 3, 4, 0.05
PRIVATE: dict[str, Any] = {"run": RUN, "test_fraction": 0.3, "dp": True, "delta": 1e-5}


@dataclass(frozen=True)
class Hospital:
    """A pretend hospital whose table can be exchanged."""

    site: Site
    schema: TableSchema
    table: pd.DataFrame

    def with_rows(self, rows: pd.DataFrame) -> "Hospital":
        """The same hospital with more rows."""
        table = pd.concat([self.table, rows], ignore_index=True)
        table.to_csv(self.site.data_path, index=False)
        return replace(self, table=table)

    def ledger(self) -> list[str]:
        """Tasks in the ledger."""
        folder = self.site.private_dir
        with PrivacyLedger.open(folder / LEDGER, witness=folder / WITNESS) as ledger:
            return [row.task for row in ledger.rows]


def write_policy(site: Site, policy: SitePolicy) -> None:
    (site.private_dir / POLICY).write_text(policy.to_toml(), encoding="utf-8")


@pytest.fixture
def new_hospital(site_dir: Path, tiny_schema: TableSchema, tmp_path: Path) -> Callable[..., Hospital]:
    made = iter(range(10_000))

    def make(policy: SitePolicy | None = None) -> Hospital:
        folder = tmp_path / f"hospital-{next(made)}"
        prepare(folder / "private", policy or SitePolicy.simulated(declared_patients=80))
        table = pd.read_csv(site_dir / "site-01.csv")
        table.to_csv(folder / "site.csv", index=False)
        site = Site("st-mary", folder / "site.csv", site_dir / "schema.json", folder / "private")
        return Hospital(site, tiny_schema, table)

    return make


@pytest.fixture(scope="module")
def model(tiny_schema: TableSchema) -> CDDPM:
    return CDDPM.initialised(tiny_schema, None, config=ModelConfig(width=8, depth=1), random_state=0)


def train_instruction(model: CDDPM, server_round: int = 1, **changes: Any) -> TrainInstruction:
    steps: dict[str, Any] = {
        "server_round": server_round,
        "seed": 4,
        "first_step": (server_round - 1) * STEPS,
        "local_steps": STEPS,
        "total_steps": ROUNDS * STEPS,
        "batch_size": 16,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "proximal_mu": 0.0,
        "noise_multiplier": 1.0,
        "sample_rate": RATE,
        "max_grad_norm": 1.0,
        "draws": 2,
    }
    return TrainInstruction(description=model.describe(), parameters=model.parameters(), **(PRIVATE | steps | changes))


def evaluate_instruction(model: CDDPM, **changes: Any) -> EvaluateInstruction:
    given = PRIVATE | {"server_round": ROUNDS, "seed": 4, "score_epsilon": 0.5} | changes
    return EvaluateInstruction(description=model.describe(), parameters=model.parameters(), **given)


DESCRIBE = DescribeInstruction(**PRIVATE, marginals=True, count_epsilon=0.5, histogram_noise=20.0)


def as_bytes(reply: Outgoing) -> bytes:
    """Everything of a reply: names, order, types, shapes and numbers."""
    wire: Wire = reply.to_wire()
    arrays = [(name, str(a.dtype), a.shape, a.tobytes()) for name, a in wire.arrays.items()]
    return repr((list(wire.values.items()), arrays)).encode()


def three_rounds(hospital: Hospital, model: CDDPM) -> Iterator[tuple[TrainInstruction, bytes]]:
    """Instructions of three rounds, each from the parameters of the last one, and the replies; then a measurement."""
    current = CDDPM.from_description(model.describe())
    current.load_parameters(model.parameters())
    for server_round in range(1, ROUNDS + 1):
        instruction = train_instruction(current, server_round, noise_seed=7)
        reply = hospital.site.train(instruction)
        yield instruction, as_bytes(reply)
        current.load_parameters(reply.parameters)
    yield instruction, as_bytes(hospital.site.evaluate(evaluate_instruction(current, noise_seed=7)))


def newcomers(schema: TableSchema, number: int) -> list[pd.DataFrame]:
    """Training patients with one or more rows: ordinary, extreme, with missing cells."""
    draw = np.random.default_rng(5)
    found: list[pd.DataFrame] = []
    for name in (f"new-{place}" for place in range(10 * number)):
        rows = int(draw.choice([1, 1, 2, 50]))
        table = pd.DataFrame(
            {
                "patient": name,
                "sex": draw.choice(["F", "M"], rows),
                "age": draw.choice([18, 100, 55], rows),
                "lab": draw.choice([0.0, 10.0, 5.5, np.nan], rows),
                "ill": draw.choice([True, False], rows),
            }
        )
        if len(split_by_patient(table, schema, test_fraction=0.3)[0]):
            found.append(table)
        if len(found) == number:
            break
    return found


def is_drawn(patient: str, instruction: TrainInstruction) -> bool:
    secret = derive(bytes(32), "simulated", 7, "st-mary")
    key = Release(secret, instruction_digest(instruction)).key("sampling")
    draws = KeyedDraws(key, (f"patient {patient}",))
    steps = range(instruction.first_step, instruction.first_step + STEPS)
    return any(len(draws.included(step, sample_rate=RATE)) for step in steps)


def neighbours_that_differ(
    hospital: Hospital, model: CDDPM, number: int, *, after: Callable[[Hospital], None] = lambda _: None
) -> tuple[int, int]:
    """Among never-sampled patients: how many change a byte of what leaves, and how many there are."""
    expected = list(three_rounds(hospital, model))
    changed = unseen = 0
    for newcomer in newcomers(hospital.schema, 2 * number):
        if any(is_drawn(newcomer["patient"].iloc[0], instruction) for instruction, _ in expected):
            continue
        larger = hospital.with_rows(newcomer)
        renamed = replace(larger, site=replace(larger.site))
        after(renamed)
        replies = [reply for _, reply in three_rounds(renamed, model)]
        changed += replies != [reply for _, reply in expected]
        unseen += 1
        if unseen == number:
            break
    return changed, unseen


@pytest.mark.slow
def test_a_patient_who_is_never_sampled_changes_no_byte_of_what_leaves(
    new_hospital: Callable[..., Hospital], model: CDDPM, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = new_hospital()
    forget_runs(hospital, monkeypatch)
    assert neighbours_that_differ(hospital, model, 200) == (0, 200)


def test_the_same_test_finds_a_site_that_divides_by_its_true_number_of_patients(
    new_hospital: Callable[..., Hospital], model: CDDPM, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = new_hospital(SitePolicy.simulated(declared_patients=120))
    forget_runs(hospital, monkeypatch)

    def declare(changed: Hospital) -> None:
        write_policy(changed.site, SitePolicy.simulated(declared_patients=changed.table["patient"].nunique()))

    assert neighbours_that_differ(hospital, model, 3, after=declare) == (3, 3)


def forget_runs(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets one run go over several tables, which a ledger would refuse: here the tables are those of other worlds."""
    monkeypatch.setattr(Site, "_dataset", property(lambda site: "0" * 64))
    assert hospital.ledger() == []


def test_a_description_differs_by_the_newcomer_in_noisy_counts_and_in_nothing_else(
    new_hospital: Callable[..., Hospital], monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = new_hospital()
    forget_runs(hospital, monkeypatch)
    instruction = DESCRIBE.model_copy(update={"noise_seed": 3})
    before = hospital.site.describe(instruction).to_wire()
    after = hospital.with_rows(newcomers(hospital.schema, 1)[0]).site.describe(instruction).to_wire()
    changed = {name for name in before.values if before.values[name] != after.values[name]}
    assert changed <= {"group-counts"}
    assert list(before.values) == list(after.values)
    for name, cells in before.arrays.items():
        assert np.abs(cells - after.arrays[name]).sum() <= 1


def noise_of(update: Any, model: CDDPM) -> np.ndarray[Any, Any]:
    start = {name: array for name, array in model.parameters().items() if name.startswith("denoiser")}
    return np.concatenate([np.sign(update.parameters[name] - start[name]).ravel() for name in start])


def test_an_identical_retry_is_the_same_bytes_at_no_new_charge(
    new_hospital: Callable[..., Hospital], model: CDDPM
) -> None:
    hospital = new_hospital()
    for ask, instruction in (
        (hospital.site.train, train_instruction(model)),
        (hospital.site.describe, DESCRIBE),
        (hospital.site.evaluate, evaluate_instruction(model)),
    ):
        first, spent = as_bytes(ask(instruction)), len(hospital.ledger())  # type: ignore[operator]
        assert as_bytes(ask(instruction)) == first  # type: ignore[operator]
        assert len(hospital.ledger()) == spent
    assert hospital.ledger() == ["train", "describe", "evaluate"]


def test_the_same_round_with_other_weights_is_a_new_charge_with_noise_of_its_own(
    new_hospital: Callable[..., Hospital], tiny_schema: TableSchema
) -> None:
    large = CDDPM.initialised(tiny_schema, None, config=ModelConfig(width=128, depth=2), random_state=0)
    hospital = new_hospital()
    moved = {name: array + np.float32(1e-6) for name, array in large.parameters().items()}
    still: dict[str, Any] = {"sample_rate": 1e-6, "local_steps": 1, "noise_multiplier": 1.0}
    instruction = train_instruction(large, **still)
    first = noise_of(hospital.site.train(instruction), large)
    second = noise_of(hospital.site.train(instruction.model_copy(update={"parameters": moved})), large)
    assert hospital.ledger() == ["train", "train"]
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(first)) < 0.03
    # power: the same instruction again has the same noise
    assert np.corrcoef(first, noise_of(hospital.site.train(instruction), large))[0, 1] > 0.999


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 0.011}, {"server_round": 2}, {"seed": 5}, {"run": "b" * 64}, {"max_grad_norm": 1.01}]
)
def test_whatever_else_changes_gives_other_noise_and_a_new_charge(
    new_hospital: Callable[..., Hospital], model: CDDPM, changes: dict[str, Any]
) -> None:
    hospital = new_hospital()
    instruction = train_instruction(model)
    first = hospital.site.train(instruction)
    other = hospital.site.train(instruction.model_copy(update=changes))
    assert len(hospital.ledger()) == 2
    assert as_bytes(first) != as_bytes(other)


def test_what_the_site_computes_with_is_bound_too(new_hospital: Callable[..., Hospital], model: CDDPM) -> None:
    hospital = new_hospital()
    first = hospital.site.train(train_instruction(model))
    write_policy(hospital.site, SitePolicy.simulated(declared_patients=90))
    rescaled = hospital.site.train(train_instruction(model))
    assert len(hospital.ledger()) == 2
    size = train_instruction(model).noise_multiplier / (RATE * np.array([80, 90]))
    label = next(name for name in first.parameters if name.startswith("label"))
    moved = [update.parameters[label] - model.parameters()[label] for update in (first, rescaled)]
    # with the noise of the first release the movements would be in the proportion of the declared numbers
    assert not np.allclose(moved[0] / size[0], moved[1] / size[1], rtol=0.2)
    replace(hospital.site, num_threads=2).train(train_instruction(model))
    assert len(hospital.ledger()) == 3


def test_two_sites_have_noise_of_their_own(new_hospital: Callable[..., Hospital], model: CDDPM) -> None:
    instruction = train_instruction(model)
    one, other = (as_bytes(new_hospital().site.train(instruction)) for _ in range(2))
    assert one != other


@pytest.mark.parametrize("dp", [True, False])
def test_no_count_below_the_cell_of_the_policy_leaves(new_hospital: Callable[..., Hospital], dp: bool) -> None:
    plain = {"dp": False, "delta": 0.0, "count_epsilon": 0.0, "histogram_noise": 0.0}
    instruction = DESCRIBE if dp else DESCRIBE.model_copy(update=plain)
    hospital = new_hospital()
    policy = SitePolicy.simulated(declared_patients=80)
    smallest = []
    for cell in (11, 40):
        write_policy(
            hospital.site, policy.model_copy(update={"data": policy.data.model_copy(update={"minimum_cell": cell})})
        )
        shown = hospital.site.describe(instruction).group_counts
        smallest.append(min(shown.values(), default=cell))
        assert smallest[-1] >= cell
    assert smallest[0] < 40
    with pytest.raises(ValidationError):
        DataRules(minimum_cell=10)


def test_no_loss_leaves(new_hospital: Callable[..., Hospital], model: CDDPM) -> None:
    site = new_hospital().site
    assert site.train(train_instruction(model)).loss is None
    assert set(site.evaluate(evaluate_instruction(model)).to_wire().values) == {"server-round"}


def test_without_privacy_a_loss_leaves_only_where_the_policy_says_so(
    new_hospital: Callable[..., Hospital], model: CDDPM
) -> None:
    plain = {"dp": False, "delta": 0.0, "noise_multiplier": 0.0, "sample_rate": 0.0, "max_grad_norm": 0.0}
    plain["draws"] = 1
    hospital = new_hospital()
    assert hospital.site.train(train_instruction(model, **plain)).loss is not None
    policy = SitePolicy(privacy=PrivacyRules(required=False))
    write_policy(hospital.site, policy)
    assert hospital.site.train(train_instruction(model, **plain)).loss is None
    with pytest.raises(RefusedError, match="2008"):
        hospital.site.evaluate(evaluate_instruction(model, dp=False, delta=0.0, score_epsilon=0.0))


def test_the_budget_ends_a_run_and_what_was_refused_costs_nothing(
    new_hospital: Callable[..., Hospital], model: CDDPM
) -> None:
    rules = PrivacyRules(declared_patients=80, max_epsilon_run=6.0, max_epsilon_total=8.0)
    hospital = new_hospital(SitePolicy(privacy=rules))
    instruction = train_instruction(model, sample_rate=0.2)

    def train_until_refused(changes: Iterator[dict[str, Any]]) -> None:
        for change in changes:
            hospital.site.train(instruction.model_copy(update=change))

    with pytest.raises(BudgetExceededError, match="the budget for one run"):
        train_until_refused({"seed": number} for number in range(1000))
    spent = len(hospital.ledger())
    assert spent > 1
    with pytest.raises(BudgetExceededError, match="the budget of the site"):
        train_until_refused({"run": f"{number:064x}"} for number in range(1000))
    assert len(hospital.ledger()) > spent


@pytest.mark.parametrize("missing", [POLICY, LEDGER, WITNESS, "secret.key"])
def test_without_one_of_its_private_files_a_site_does_nothing(
    new_hospital: Callable[..., Hospital], model: CDDPM, missing: str
) -> None:
    hospital = new_hospital()
    (hospital.site.private_dir / missing).unlink()
    with pytest.raises(PrivacyError, match=r"policy|ledger|witness|secret"):
        hospital.site.train(train_instruction(model))


def test_the_account_is_that_of_the_ledger_and_seeded_noise_has_none(
    new_hospital: Callable[..., Hospital], model: CDDPM, caplog: pytest.LogCaptureFixture
) -> None:
    hospital = new_hospital()
    hospital.site.train(train_instruction(model))
    account = hospital.site.account(AccountInstruction(run=RUN)).account
    assert [event.mechanism for event in account.events] == ["dp-sgd"]
    assert account.epsilon == account.epsilon_run > 0
    assert not account.has_unprotected
    hospital.site.train(train_instruction(model, run="b" * 64, noise_seed=3))
    assert "PROTECTS NOBODY" in caplog.text.upper()
    assert hospital.site.account(AccountInstruction(run=RUN)).account.has_unprotected


def test_a_site_with_none_of_a_group_sends_messages_of_the_same_sizes(
    new_hospital: Callable[..., Hospital], model: CDDPM
) -> None:
    sizes = []
    for keep in ("FM", "M"):
        hospital = new_hospital()
        table = hospital.table[[sex in keep for sex in hospital.table["sex"]]]
        table.to_csv(hospital.site.data_path, index=False)
        replies = [hospital.site.train(train_instruction(model)), hospital.site.evaluate(evaluate_instruction(model))]
        sizes.append([[(name, a.shape, a.dtype) for name, a in reply.to_wire().arrays.items()] for reply in replies])
    assert sizes[0] == sizes[1]
