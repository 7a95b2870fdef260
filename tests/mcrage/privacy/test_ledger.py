"""What a site's record grants, refuses and survives: limits, retries, crashes and several processes at once."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from mcrage.errors import BudgetExceededError, LedgerError, PrivacyError
from mcrage.privacy.accounting import epsilon, epsilon_bound
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import Charge, Limits, PrivacyLedger
from mcrage.privacy.witness import Witness

ROOT = Path(__file__).parents[3]
DELTA = 1e-5
TRAINING = PrivacyEvent(mechanism="dp-sgd", noise_multiplier=1.8, sample_rate=0.0512, steps=500)
COUNTS = PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=10)
RELEASE = PrivacyEvent(mechanism="unprotected")
WIDE = Limits(delta=DELTA, epsilon_total=100, epsilon_run=100)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "ledger.db", tmp_path / "elsewhere" / "witness.json"


@pytest.fixture
def ledger(places: tuple[Path, Path]) -> Iterator[PrivacyLedger]:
    with PrivacyLedger.create(places[0], witness=places[1]) as made:
        yield made


def charge(ledger: PrivacyLedger, key: str, *events: PrivacyEvent, run: str = "run", limits: Limits = WIDE) -> Charge:
    return ledger.charge(events or [COUNTS], key=key, run=run, task="train", dataset="table", limits=limits)


def test_a_charge_is_a_row_with_everything_that_was_said(ledger: PrivacyLedger) -> None:
    made = charge(ledger, "first", TRAINING, COUNTS)
    assert (made.sequence, made.key, made.run, made.task, made.dataset) == (1, "first", "run", "train", "table")
    assert made.is_new
    assert ledger.since <= made.time
    assert ledger.events == made.events == (TRAINING, COUNTS)
    assert ledger.head == made.hash
    assert [row.hash for row in ledger.rows] == [made.hash]


def test_a_retry_is_free_even_when_nothing_is_left(ledger: PrivacyLedger) -> None:
    first = charge(ledger, "first")
    used_up = Limits(delta=DELTA, epsilon_total=1e-3, epsilon_run=1e-3, most_events=0)
    again = charge(ledger, "first", limits=used_up)
    assert not again.is_new
    assert (again.sequence, again.hash, again.time) == (first.sequence, first.hash, first.time)
    assert len(ledger.rows) == 1


@pytest.mark.usefixtures("ledger")
def test_a_ledger_that_this_user_may_not_look_at_is_not_called_missing(places: tuple[Path, Path]) -> None:
    user, folder = os.geteuid(), places[0].parent
    folder.chmod(0o000)
    try:
        if user == 0:
            os.seteuid(12_345)  # root may look everywhere
        with pytest.raises(LedgerError) as told:
            PrivacyLedger.open(places[0], witness=places[1])
    finally:
        os.seteuid(user)
        folder.chmod(0o700)
    assert str(told.value) == f"{places[0]}: Permission denied"


def test_a_key_stands_for_one_request(ledger: PrivacyLedger) -> None:
    charge(ledger, "first")
    with pytest.raises(LedgerError, match="key of this charge was already used"):
        charge(ledger, "first", TRAINING)
    with pytest.raises(LedgerError, match="key of this charge was already used"):
        charge(ledger, "first", run="other")
    assert len(ledger.rows) == 1


def test_runs_cost_together_what_their_events_cost_together(ledger: PrivacyLedger) -> None:
    one_run = Limits(delta=DELTA, epsilon_total=6.55, epsilon_run=3.0)
    for number in range(4):
        charge(ledger, f"{number}", TRAINING, run=f"run {number}", limits=one_run)
    assert epsilon(ledger.events, delta=DELTA) == pytest.approx(6.5, abs=0.05)
    with pytest.raises(BudgetExceededError, match=r"budget of the site, epsilon 6\.55 at delta 1e-05"):
        charge(ledger, "5", TRAINING, run="run 5", limits=one_run)
    with pytest.raises(BudgetExceededError, match=r"budget for one run, epsilon 3 at"):
        charge(ledger, "6", TRAINING, run="run 0", limits=one_run)
    assert len(ledger.rows) == 4


def test_what_only_the_fast_bound_would_refuse_is_granted(ledger: PrivacyLedger) -> None:
    assert epsilon_bound([TRAINING], delta=DELTA) > 3.1 > epsilon([TRAINING], delta=DELTA)
    assert charge(ledger, "first", TRAINING, limits=Limits(delta=DELTA, epsilon_total=3.1, epsilon_run=3.1)).is_new


def test_the_number_of_events_is_limited_too(ledger: PrivacyLedger) -> None:
    few = Limits(delta=DELTA, epsilon_total=None, epsilon_run=None, most_events=3)
    charge(ledger, "1", COUNTS, COUNTS, limits=few)
    with pytest.raises(BudgetExceededError, match="more than 3 events"):
        charge(ledger, "2", COUNTS, COUNTS, limits=few)
    assert charge(ledger, "3", COUNTS, limits=few).is_new


def test_releases_without_noise_are_recorded_where_they_are_allowed_and_cost_no_epsilon(ledger: PrivacyLedger) -> None:
    with pytest.raises(BudgetExceededError, match="without noise"):
        charge(ledger, "1", RELEASE)
    assert not ledger.unprotected
    open_site = Limits(delta=DELTA, epsilon_total=None, epsilon_run=math.inf, allow_unprotected=True)
    charge(ledger, "1", RELEASE, COUNTS, limits=open_site)
    assert ledger.unprotected
    assert charge(ledger, "2", TRAINING, limits=Limits(delta=DELTA, epsilon_total=3.2, epsilon_run=3.2)).is_new


def test_a_run_has_one_table(ledger: PrivacyLedger) -> None:
    charge(ledger, "1")
    other = {"task": "train", "dataset": "another table", "limits": WIDE}
    with pytest.raises(LedgerError, match="table changed during the run"):
        ledger.charge([COUNTS], key="2", run="run", **other)
    assert ledger.charge([COUNTS], key="2", run="next run", **other).is_new


@pytest.mark.parametrize("text", ["", "x" * 201, "a\nb", "\x1b[2J"])
@pytest.mark.parametrize("name", ["key", "run", "task", "dataset"])
def test_labels_are_short_and_printable(ledger: PrivacyLedger, name: str, text: str) -> None:
    labels = {"key": "k", "run": "r", "task": "t", "dataset": "d", name: text}
    with pytest.raises(PrivacyError, match=f"{name} must be 1 to 200 printable characters"):
        ledger.charge([COUNTS], limits=WIDE, **labels)


def test_a_charge_for_nothing_is_refused(ledger: PrivacyLedger) -> None:
    with pytest.raises(PrivacyError, match="at least one event"):
        ledger.charge([], key="k", run="r", task="t", dataset="d", limits=WIDE)


@pytest.mark.parametrize(
    "change", [{"delta": 0.1}, {"epsilon_total": 0.0}, {"epsilon_run": math.nan}, {"most_events": -1}], ids=str
)
def test_limits_that_mean_nothing_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(PrivacyError, match=f"{next(iter(change))} must"):
        Limits(**{"delta": DELTA, "epsilon_total": 3.0, "epsilon_run": 3.0, **change})  # type: ignore[arg-type]


def test_a_failing_accountant_grants_nothing(ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = PrivacyEvent(mechanism="dp-sgd", noise_multiplier=1.81, sample_rate=0.0512, steps=500)
    monkeypatch.setattr(sys, "executable", "no such program")
    with pytest.raises(PrivacyError, match="cannot be started"):
        charge(ledger, "1", asked, limits=Limits(delta=DELTA, epsilon_total=3.1, epsilon_run=3.1))
    assert ledger.rows == ()
    assert charge(ledger, "1").is_new


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_the_ledger_holds_each_key_once_and_its_cost_only_grows(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    (folder / "elsewhere").mkdir()
    costs = [0.0]
    with PrivacyLedger.create(folder / "l", witness=folder / "elsewhere" / "w") as ledger:
        for key in keys:
            charge(ledger, key)
            costs.append(epsilon_bound(ledger.events, delta=DELTA))
        assert [row.key for row in ledger.rows] == list(dict.fromkeys(keys))
    assert costs == sorted(costs)


def test_a_ledger_reads_what_another_process_charged(places: tuple[Path, Path], ledger: PrivacyLedger) -> None:
    with PrivacyLedger.open(places[0], witness=places[1]) as other:
        charge(other, "theirs")
        assert not charge(ledger, "theirs").is_new
        charge(ledger, "ours")
        assert [row.key for row in other.rows] == ["theirs", "ours"]
        assert other.head == ledger.head
        assert Witness.read(places[1]).charges == 2


def test_a_crash_between_ledger_and_witness_is_made_good(
    places: tuple[Path, Path], ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LedgerError("the witness cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(Witness, "write", fail)
        with pytest.raises(LedgerError, match="witness cannot be written"):
            charge(ledger, "first")
    assert Witness.read(places[1]).charges == 0
    with PrivacyLedger.open(places[0], witness=places[1]) as again:
        assert Witness.read(places[1]) == Witness(ledger=again._id, charges=1, head=again.head)
    assert not charge(ledger, "first").is_new


FULL_DISK = """
import resource, sys
from pathlib import Path
from mcrage.errors import LedgerError
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import Limits, PrivacyLedger

event = PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=10)
limits = Limits(delta=1e-5, epsilon_total=None, epsilon_run=None)
with PrivacyLedger.open(Path(sys.argv[1]), witness=Path(sys.argv[2])) as ledger:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        for number in range(1000):
            ledger.charge([event], key=str(number), run="r", task="t", dataset="d", limits=limits)
    except LedgerError as error:
        print(number, error)
"""


def test_a_full_disk_grants_nothing_and_damages_nothing(places: tuple[Path, Path], ledger: PrivacyLedger) -> None:
    ledger.close()
    command = [sys.executable, "-c", FULL_DISK, *map(str, places)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    granted, _, message = shown.partition(" ")
    assert "nothing was granted" in message or "cannot be used" in message
    assert message.count("\n") == 1
    with PrivacyLedger.open(places[0], witness=places[1]) as again:
        assert [row.key for row in again.rows] == [str(number) for number in range(int(granted))]
        assert charge(again, "next", run="next").is_new


CROWD = """
import sys
from pathlib import Path
from mcrage.errors import BudgetExceededError
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import Limits, PrivacyLedger

event = PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=float(sys.argv[3]))
limits = Limits(delta=1e-5, epsilon_total=float(sys.argv[4]), epsilon_run=None)
granted = 0
with PrivacyLedger.open(Path(sys.argv[1]), witness=Path(sys.argv[2])) as ledger:
    for number in range(100):
        try:
            ledger.charge([event], key=f"{sys.argv[5]}-{number}", run="r", task="t", dataset="d", limits=limits)
            granted += 1
        except BudgetExceededError:
            pass
print(granted)
"""


def exact_cost(scale: float, counts: int) -> float:
    """Epsilon of so many discrete Laplace counts, from the binomial sum over their losses of one over the scale."""
    ups = np.arange(counts + 1)
    weights = binom.pmf(ups, counts, 1 / (1 + math.exp(-1 / scale)))
    low, high = 0.0, counts / scale
    for _ in range(60):
        middle = (low + high) / 2
        delta = weights @ -np.expm1(np.minimum(middle - (2 * ups - counts) / scale, 0))
        low, high = (middle, high) if delta > DELTA else (low, middle)
    return high


@pytest.mark.slow
def test_eight_processes_that_charge_at_once_are_granted_exactly_what_the_cap_admits(
    places: tuple[Path, Path], ledger: PrivacyLedger
) -> None:
    scale = 0.3125
    cap = (exact_cost(scale, 500) + exact_cost(scale, 501)) / 2
    command = [sys.executable, "-c", CROWD, *map(str, places), str(scale), str(cap)]
    crowd = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, cwd=ROOT) for name in "abcdefgh"]
    granted = [int(process.communicate()[0]) for process in crowd]
    assert sum(granted) == 500
    ledger.verify()
    assert len({row.key for row in ledger.rows}) == 500
    assert Witness.read(places[1]).charges == 500


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import Limits, PrivacyLedger

path, witness, told, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
event = PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=10)
limits = Limits(delta=1e-5, epsilon_total=None, epsilon_run=None)
draw = random.Random(seed)

def live(life, told, opened):
    with PrivacyLedger.open(path, witness=witness) as ledger:
        os.write(opened, b"o")
        for number in range(10_000):
            key = f"{life}-{number}"
            ledger.charge([event], key=key, run="r", task="t", dataset="d", limits=limits)
            os.write(told, f"{key}\\n".encode())
            os.write(opened, b"c")

for life in range(100):
    wait, opened = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            live(life, os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), opened)
        finally:
            os._exit(1)
    os.close(opened)
    if draw.random() < 0.8:  # by what it has done and not by the clock, so that a busy machine kills it no sooner
        for _ in range(1 + draw.randrange(5)):
            os.read(wait, 1)
    time.sleep(draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the child ended by itself"
    os.close(wait)
    with PrivacyLedger.open(path, witness=witness):
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_kills_while_charging_damage_nothing_and_lose_nothing_that_was_granted(
    tmp_path: Path, places: tuple[Path, Path], ledger: PrivacyLedger, seed: int
) -> None:
    ledger.close()
    told = tmp_path / "told"
    subprocess.run([sys.executable, "-c", KILLED, *map(str, places), str(told), str(seed)], check=True, cwd=ROOT)
    granted = told.read_text(encoding="utf-8").splitlines()
    with PrivacyLedger.open(places[0], witness=places[1]) as survivor:
        kept = [row.key for row in survivor.rows]
    assert len(granted) > 100
    assert set(granted) <= set(kept)
    assert len(kept) - len(granted) <= 100, "at most the charge that each kill interrupted"


def test_a_charge_takes_milliseconds(ledger: PrivacyLedger) -> None:
    charge(ledger, "first")
    start = time.perf_counter()
    for number in range(50):
        charge(ledger, str(number))
    assert (time.perf_counter() - start) / 50 < 0.05


def test_what_is_stored_is_the_canonical_text_of_the_events(places: tuple[Path, Path], ledger: PrivacyLedger) -> None:
    charge(ledger, "first", TRAINING, COUNTS)
    [(text,)] = ledger._database.execute("SELECT events FROM charges").fetchall()
    assert [PrivacyEvent.from_json(json.dumps(event)) for event in json.loads(text)] == [TRAINING, COUNTS]
