"""``mcrage budget``: what it prints, its exit codes, and that it stays light."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mcrage import cli
from mcrage.data.schema import TableSchema
from mcrage.privacy.accounting import epsilon
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import Limits, PrivacyLedger

TRAINING = PrivacyEvent(mechanism="dp-sgd", noise_multiplier=1.8, sample_rate=0.0512, steps=250)
COUNTS = PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=10)
RELEASE = PrivacyEvent(mechanism="unprotected")
LIMITS = Limits(delta=1e-5, epsilon_total=None, epsilon_run=None, allow_unprotected=True)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, standard output and standard error of ``mcrage budget`` with arguments."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mcrage", "budget", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return int(caught.value.code or 0), shown.out, shown.err

    return call


@pytest.fixture
def site(tmp_path: Path) -> list[object]:
    """The arguments that name a ledger, which is not there yet, and its witness."""
    (tmp_path / "elsewhere").mkdir()
    return [tmp_path / "ledger.db", "--witness", tmp_path / "elsewhere" / "witness.json"]


@pytest.fixture
def used(site: list[object]) -> list[object]:
    """The same after two runs and a release without noise."""
    with PrivacyLedger.create(Path(str(site[0])), witness=Path(str(site[2]))) as ledger:
        for key, run, event in (
            *(("1", "spring", TRAINING), ("2", "spring", TRAINING), ("3", "spring", COUNTS)),
            *(("4", "autumn", TRAINING), ("5", "autumn", RELEASE)),
        ):
            ledger.charge([event], key=key, run=run, task="train", dataset="table", limits=LIMITS)
    return site


def test_a_new_ledger_is_empty_and_sound_and_never_replaced(run: Run, site: list[object]) -> None:
    assert run("verify", *site)[0] == 3
    assert run("init", *site)[:2] == (0, f"{site[0]}: an empty ledger; keep it for as long as the data are kept\n")
    code, out, _ = run("verify", *site)
    assert code == 0
    assert "0 charges, all as they were made" in out
    code, out, err = run("init", *site)
    assert (code, out) == (3, "")
    assert err == f"{site[0]} is there already; a ledger is never replaced\n"


def test_show_says_what_was_spent_on_what_and_since_when(run: Run, used: list[object]) -> None:
    code, out, err = run("show", *used)
    assert (code, err) == (0, "")
    first, *middle, total, warning = out.splitlines()
    assert first.startswith(f"{used[0]}: 5 charges since 20")
    assert first.endswith("UTC")
    assert middle[1:3] == [
        "  1 counts with discrete-laplace noise 10",
        "  500 steps of dp-sgd, noise multiplier 1.8, sample rate 0.0512",
    ]
    assert middle[0].startswith("run spring: epsilon 3.0")
    assert middle[3].startswith("run autumn: epsilon 2.")
    assert middle[-1] == "  1 releases without noise"
    spent = epsilon([TRAINING, TRAINING, TRAINING, COUNTS], delta=1e-5)
    assert total.startswith(f"epsilon {spent:.2f} at delta 1e-05 in all, for one patient with all rows (privacy loss")
    assert warning == "no epsilon covers the 1 releases without noise"


def test_show_gives_the_same_as_json(run: Run, used: list[object]) -> None:
    content = json.loads(run("show", *used, "--json", "--delta", "1e-6")[1])
    assert content["epsilon"] == epsilon([TRAINING, TRAINING, TRAINING, COUNTS], delta=1e-6)
    assert content["epsilon"] < content["epsilon_renyi_bound"] < 1.2 * content["epsilon"]
    assert (content["delta"], content["charges"], content["unprotected"]) == (1e-6, 5, 1)
    assert content["accountant"].startswith("privacy loss distributions, dp-accounting 0.")
    assert [(part["run"], part["charges"], part["unprotected"]) for part in content["runs"]] == [
        ("spring", 3, 0),
        ("autumn", 2, 1),
    ]
    assert content["runs"][0]["epsilon"] == epsilon([TRAINING, TRAINING, COUNTS], delta=1e-6)


def test_an_altered_ledger_is_one_line_and_no_success(run: Run, used: list[object]) -> None:
    path = Path(str(used[0]))
    content = path.read_bytes()
    assert content.count(b"autumn") >= 2
    path.write_bytes(content.replace(b"autumn", b"winter"))
    for verb in ("verify", "show"):
        code, out, err = run(verb, *used)
        assert (code, out) == (3, "")
        assert err == f"{path}: charge 4 was altered\n"


def test_plan_is_a_table_with_a_mark_at_each_number_of_steps(run: Run) -> None:
    code, out, _ = run("plan", "--patients", 300, "--epsilon", 1, "--rounds", 100)
    assert code == 0
    first, head, *rows, _, _, size, local, shared = out.splitlines()
    assert size == "10 hospitals of 300 training patients, with noise of their own and with shared noise:"
    assert local.startswith("expected: ")
    assert shared.startswith("expected: ")
    assert first == "epsilon 1 at delta 1e-05 for 300 patients and 100 rounds"
    assert head.split() == ["steps/round", "sample", "rate", "patients/step", "noise", "multiplier", "noise"]
    assert len(rows) == 20
    marked = [row.split()[0] for row in rows if row.endswith("*")]
    assert marked == ["1", "4", "16", "64"]


def test_plan_counts_other_releases_and_gives_json(run: Run) -> None:
    options = ("--patients", 20, "--epsilon", 3, "--rounds", 50, "--json")
    alone = json.loads(run("plan", *options)[1])
    also = ("--also", COUNTS.to_json(), "--also", TRAINING.to_json(), "--delta", "1e-6")
    together = json.loads(run("plan", *options, *also)[1])
    assert (alone["delta"], together["delta"]) == (1e-5, 1e-6)
    assert len(alone["choices"]) == len(together["choices"]) == 16, "the smallest batches would have no patient"
    for less, more in zip(alone["choices"], together["choices"], strict=True):
        assert less["noise_multiplier"] < more["noise_multiplier"]


def test_a_plan_of_tables_names_their_noise_and_the_epsilon_of_all(
    run: Run, tmp_path: Path, tiny_schema: TableSchema
) -> None:
    tiny_schema.save(tmp_path / "schema.json")
    asked = ("plan", "--patients", 1000, "--epsilon", 2, "--schema", tmp_path / "schema.json")
    code, out, _ = run(*asked)
    assert code == 0
    assert re.match(r"epsilon (1\.9\d|2\.00) at delta 1e-05 for 1,000 patients", out)
    *planned, _, own, shared = out.splitlines()
    assert "WORSE than a hospital's own rows" in str(run("plan", *asked[1:], "--sites", 2)[1])
    assert own.startswith("expected: ")
    assert own != shared
    assert [line.split()[:2] for line in planned[2:]] == [
        ["one_ways", "4"], ["groups", "1"], ["conditions", "2"], ["pairs", "1"], ["edges", "1"]
    ]  # fmt: skip
    told = json.loads(run(*asked, "--json")[1])
    events = [PrivacyEvent(**{k: v for k, v in each.items() if k != "question"}) for each in told["questions"]]
    assert told["epsilon"] == epsilon(events, delta=1e-5) <= 2.0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--patients", 0, "--epsilon", 1, "--rounds", 10), 2, "--patients"),
        (("--patients", 100, "--epsilon", 1, "--rounds", 10, "--also", "{}"), 3, "not the text of a privacy event"),
        (
            ("--patients", 100, "--epsilon", 1, "--rounds", 10, "--delta", 0.1),
            3,
            "delta must lie in (0, 0.001], got 0.1",
        ),
        (("--patients", 100, "--epsilon", 1e-5, "--rounds", 10), 3, "no choice keeps the cost"),
        (("--patients", 100, "--epsilon", 1), 2, "--rounds: how many the training has; or --schema"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(run: Run, options: tuple[object, ...], code: int, message: str) -> None:
    found, out, err = run("plan", *options)
    assert (found, out) == (code, "")
    assert message in err


def test_the_budget_needs_neither_torch_nor_pandas(site: list[object]) -> None:
    program = (
        "import sys; from mcrage.cli import main; sys.argv = ['mcrage', 'budget', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'pandas', 'sklearn', 'dp_accounting', 'scipy'} & set(sys.modules)))\n"
    )
    for arguments in (["init", *site], ["show", *site], ["verify", *site]):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("\n[]\n")
