"""A patient's name in every cell that can hold one, when all is well and in twenty faults: it never leaves the site."""

import base64
import errno
import logging
import re
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute

from client.app import app
from client.places import DEBUG_LOG
from client.policy import SitePolicy
from mcrage.config import RunConfig, Scalar
from mcrage.data.schema import TableSchema
from mcrage.errors import DataError, FederationError, Problem
from server.app import save_result
from server.rounds import run_federation
from simulations import grid
from simulations.deployed import Federation
from simulations.grid import InProcessGrid

CANARY = "PHI_CANARY_7c1e9f0a"
PRIVATE: dict[str, Scalar] = {
    "dp": True,
    "dp-noise-multiplier": 1.0,
    "dp-sample-rate": 0.2,
    "dp-score-epsilon": 0.5,
    "num-server-rounds": 2,
    "local-steps": 2,
    "evaluate-every": 1,
    "width": 8,
    "depth": 1,
    "quorum-retries": 0,
}


def spellings(text: str) -> list[bytes]:
    """The text as it may stand in bytes: raw, UTF-16, hexadecimal, and base64 at each of three offsets."""
    raw = text.encode()
    found = [raw, text.encode("utf-16-le"), text.encode("utf-16-be"), raw.hex().encode(), raw.hex().upper().encode()]
    for offset in range(3):
        encoded = base64.b64encode(b"x" * offset + raw)
        start = -(-offset * 4 // 3)
        found.append(encoded[start + 1 : len(encoded) - 4])  # without what neighbours would change
    return found


def holds_canary(content: bytes) -> bool:
    if any(spelling in content for spelling in spellings(CANARY)):
        return True
    for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", content):
        try:
            inner = zlib.decompressobj().decompress(content[match.start() :])
        except zlib.error:
            continue
        if CANARY.encode() in inner:
            return True
    return False


@pytest.mark.parametrize(
    "hide",
    [
        str.encode,
        lambda text: b"ab" + text.encode("utf-16-le") + b"cd",
        lambda text: text.encode().hex().encode(),
        lambda text: base64.b64encode(b"1" + text.encode() + b"2"),
        lambda text: base64.b64encode(b"12" + text.encode() + b"34"),
        lambda text: base64.b64encode(b"123" + text.encode() + b"4"),
        lambda text: b"prefix" + zlib.compress(b"some " + text.encode()),
    ],
)
def test_the_search_finds_what_is_hidden(hide: Callable[[str], bytes]) -> None:
    assert holds_canary(hide(CANARY))
    assert not holds_canary(hide("PHI_CANARY_0000"))


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    """Two hospitals in whose tables every text is the canary."""
    folder = tmp_path / "sites"
    folder.mkdir()
    columns: list[dict[str, Any]] = [
        {"name": "patient", "kind": "text", "role": "patient_id", "nullable": False},
        {"name": "sex", "kind": "categorical", "role": "sensitive", "categories": ["F", "M"], "nullable": False},
        {"name": "ward", "kind": "categorical", "categories": ["A"], "other": "another"},
        {"name": "note", "kind": "text", "role": "ignored"},
        {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 10},
        {"name": "ill", "kind": "boolean", "role": "target", "nullable": False},
    ]
    TableSchema.parse({"name": "canary", "columns": columns}).save(folder / "schema.json")
    for number in (1, 2):
        draw = np.random.default_rng(number)
        ward = np.where(draw.random(100) < 0.03, f"{CANARY}_ward", "A")
        table = pd.DataFrame(
            {
                "patient": [f"{CANARY}_{number}_{row}" for row in range(100)],
                "sex": draw.choice(["F", "M"], 100),
                "ward": ward,
                "note": f"{CANARY}_note",
                "lab": draw.uniform(0, 10, 100),
                "ill": draw.random(100) < 0.4,
            }
        )
        table.to_csv(folder / f"site-{number:02d}.csv", index=False)
    return folder


class Wiretap:
    """Everything that passes between server and sites, as bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[bytes] = []
        passing = grid.over_the_wire

        def listen(message: Message) -> Message:
            with no_object_id_recompute():
                self.seen += [nested.deflate() for nested in get_all_nested_objects(message).values()]
            self.seen.append(repr(message.metadata).encode())
            return passing(message)

        monkeypatch.setattr(grid, "over_the_wire", listen)


def run(hospitals: Path, out: Path, **changes: Scalar) -> None:
    places: dict[str, Scalar] = {"site-dir": str(hospitals), "out-dir": str(out)}
    config = RunConfig.parse(PRIVATE | places | {name.replace("_", "-"): value for name, value in changes.items()})
    save_result(run_federation(InProcessGrid.of_folder(app, 2, config), config), config, seconds=1.0)


def leaked_files(folder: Path) -> list[str]:
    """Files with the canary, apart from the hospitals' tables and their own debug logs."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    own = [path for path in files if path.name == DEBUG_LOG or re.fullmatch(r"(site-\d+|table)\.csv", path.name)]
    assert all(path.stat().st_mode & 0o077 == 0 for path in own if path.name == DEBUG_LOG)
    return [str(path) for path in files if path not in own and holds_canary(path.read_bytes())]


@pytest.mark.parametrize("dp", [True, False])
def test_in_the_happy_path_no_text_of_a_patient_leaves(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dp: bool
) -> None:
    wiretap = Wiretap(monkeypatch)
    with caplog.at_level(logging.DEBUG):
        run(hospitals, tmp_path / "out", dp=dp, dp_noise_multiplier=1.0 if dp else 0.0)
    assert len(wiretap.seen) > 20
    assert not any(map(holds_canary, wiretap.seen))
    assert not holds_canary(caplog.text.encode())
    assert leaked_files(tmp_path) == []


def cause(error: BaseException) -> BaseException:
    error.__cause__ = ValueError(CANARY)
    error.add_note(CANARY)
    return error


FAULTS: list[tuple[str, Callable[[], BaseException]]] = [
    ("client.tables.read_table", lambda: ValueError(f"could not parse '{CANARY}'")),
    ("client.tables.read_table", lambda: UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY)),
    ("client.tables.read_table", lambda: OSError(errno.ENOSPC, CANARY, CANARY)),
    ("client.tables.read_table", lambda: MemoryError(CANARY)),
    ("client.tables.read_table", lambda: DataError([Problem(code="E301", rule=CANARY, remedy=CANARY)])),
    ("client.tables.split_by_patient", lambda: KeyError(CANARY)),
    ("client.tables.split_by_patient", lambda: AssertionError(CANARY)),
    ("client.tables.fingerprint", lambda: PermissionError(errno.EACCES, CANARY)),
    ("client.tables.model", lambda: ImportError(CANARY, name=CANARY, path=CANARY)),
    ("client.tables.encoded_by_row", lambda: pd.errors.ParserError(CANARY)),
    ("client.tables.encoded_by_row", lambda: RecursionError(CANARY)),
    ("client.site.train_privately", lambda: RuntimeError(CANARY)),
    ("client.site.train_privately", lambda: SystemExit(CANARY)),
    ("client.site.train_privately", lambda: GeneratorExit(CANARY)),
    ("client.site.train_privately", lambda: ExceptionGroup(CANARY, [ValueError(CANARY)])),
    ("client.site.train_privately", lambda: cause(ZeroDivisionError(CANARY))),
    ("client.protection.PrivacyLedger.charge", lambda: sqlite3.DatabaseError(CANARY)),
    ("mcrage.privacy.counts.noisy_group_counts", lambda: TypeError(CANARY)),
    ("mcrage.privacy.counts.noisy_columns", lambda: StopIteration(CANARY)),
    ("mcrage.cddpm.CDDPM.event_probabilities", lambda: TimeoutError(CANARY)),
]


@pytest.mark.parametrize(("place", "fault"), FAULTS, ids=[f"{place}-{n}" for n, (place, _) in enumerate(FAULTS)])
def test_in_a_fault_no_text_of_a_patient_leaves(
    hospitals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    fault: Callable[[], BaseException],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault()

    wiretap = Wiretap(monkeypatch)
    monkeypatch.setattr(place, fail)
    failure = ""
    with caplog.at_level(logging.DEBUG):
        try:
            run(hospitals, tmp_path / "out")
        except FederationError as error:
            failure = str(error)
    assert not any(map(holds_canary, wiretap.seen))
    assert not holds_canary((caplog.text + failure).encode())
    assert leaked_files(tmp_path) == []
    kept = [path.read_text(encoding="utf-8") for path in hospitals.rglob(DEBUG_LOG)]
    assert kept  # the fault happened, and the hospital can read about it
    assert all(CANARY in text for text in kept)


def break_table(path: Path) -> None:
    table = pd.read_csv(path)
    table["lab"] = table["lab"].astype(object)
    table.loc[3, "lab"] = f"{CANARY}_lab"
    table.to_csv(path, index=False)


@pytest.mark.slow
def test_among_real_daemons_no_text_of_a_patient_leaves_its_hospital(
    hospitals: Path, new_federation: Callable[..., Federation]
) -> None:
    """All is well at one hospital, and the other one's table cannot be read."""
    break_table(hospitals / "site-02.csv")
    policy = SitePolicy.simulated(declared_patients=70)
    federation = new_federation(hospitals, num_sites=2, policy=policy).all_up()
    federation.want("canary", **{name.replace("-", "_"): value for name, value in PRIVATE.items()}, min_sites=1)
    assert federation.finished("canary").state == "done"
    assert federation.result("canary")["sites"] == ["site-01"]
    assert "table does not follow" in str(federation.result("canary")["absent"])
    assert list((federation.home.folder / "state").glob("*.sqlite-wal"))  # the database is searched while it is in use
    assert leaked_files(federation.folder) == []
    site = federation.sites["site-02"].site
    assert holds_canary(site.data.read_bytes()), "there was something to leave"
    assert "not a number" in (site.private / DEBUG_LOG).read_text()  # the hospital can read what is wrong


@pytest.mark.slow
def test_in_flowers_own_runtime_a_broken_table_stays_at_its_hospital(hospitals: Path, tmp_path: Path) -> None:
    for path in hospitals.glob("site-*.csv"):
        break_table(path)
    out = tmp_path / "out"
    script = (
        "import sys; from pathlib import Path; "
        "from mcrage.config import RunConfig; from simulations.flower import flwr_run; "
        f"config = RunConfig.parse({PRIVATE | {'site-dir': str(hospitals), 'out-dir': str(out)}!r}); "
        "sys.exit(flwr_run(Path('.'), config, num_sites=2))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 1
    assert not holds_canary(done.stdout + done.stderr)
    assert [
        path for path in out.rglob("*") if path.suffix.startswith(".db")
    ]  # the SuperLink's database is searched too
    assert leaked_files(tmp_path) == []
