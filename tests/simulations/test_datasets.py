"""Public data sets: found, fetched and checked; and what the real files hold, where they are at hand."""

import gzip
import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from mcrage.errors import ConfigError
from simulations import datasets
from simulations.datasets import DatasetUnavailableError, diabetes130
from simulations.datasets.files import SourceFile, content

CONTENT = b"a,b\r\n1,None\r\n"
SOURCE = SourceFile(dataset="tiny", name="tiny.csv", sha256=hashlib.sha256(CONTENT).hexdigest(), page="https://page")

needs_data = pytest.mark.skipif(
    not os.environ.get("MCRAGE_DATA"), reason="MCRAGE_DATA is not set: the public data sets are not at hand"
)


def _zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr(name, CONTENT)
    return buffer.getvalue()


PAGES = {
    "/tiny.csv": CONTENT,
    "/tiny.csv.gz": gzip.compress(CONTENT),
    "/tiny.zip": _zip("folder/tiny.csv"),
    "/other.zip": _zip("other.csv"),
    "/changed.csv": CONTENT + b"2,x\r\n",
    "/damaged.gz": gzip.compress(CONTENT)[:-9],
}


class _Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page = PAGES.get(self.path)
        self.send_response(200 if page else 404)
        self.send_header("Content-Length", str(len(page or b"")))
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test output clean."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pages) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MCRAGE_DATA", raising=False)
    monkeypatch.setenv("MCRAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


@pytest.mark.parametrize("path", ["/tiny.csv", "/tiny.csv.gz", "/tiny.zip"])
def test_a_file_is_fetched_once_unpacked_and_kept(address: str, cache: Path, path: str) -> None:
    assert content(replace(SOURCE, address=address + path)) == CONTENT
    assert (cache / "tiny" / "tiny.csv").read_bytes() == CONTENT
    assert content(replace(SOURCE, address=address + "/gone")) == CONTENT


@pytest.mark.parametrize("path", ["/changed.csv", "/other.zip", "/damaged.gz"])
def test_another_file_than_expected_is_refused_and_not_kept(address: str, cache: Path, path: str) -> None:
    with pytest.raises(DatasetUnavailableError, match=f"has changed: {SOURCE.sha256}"):
        content(replace(SOURCE, address=address + path))
    assert not cache.exists()


def test_a_damaged_cache_is_fetched_again(address: str, cache: Path) -> None:
    (cache / "tiny").mkdir(parents=True)
    (cache / "tiny" / "tiny.csv").write_bytes(b"half a fi")
    assert content(replace(SOURCE, address=address + "/tiny.csv")) == CONTENT


@pytest.mark.parametrize("host", ["http://127.0.0.1:9", "ftp:nowhere", "no address at all"])
def test_what_cannot_be_fetched_says_in_one_line_what_to_do(cache: Path, host: str) -> None:
    with pytest.raises(DatasetUnavailableError) as caught:
        content(replace(SOURCE, address=host), timeout_seconds=2)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("'tiny'", "tiny.csv", host, "https://page", str(cache / "tiny"), "MCRAGE_DATA"):
        assert part in message


def test_a_missing_page_is_not_taken_for_the_file(address: str, cache: Path) -> None:
    with pytest.raises(DatasetUnavailableError, match="cannot be fetched"):
        content(replace(SOURCE, address=address + "/nothing-here"))


def test_a_file_without_an_address_is_asked_for(cache: Path) -> None:
    with pytest.raises(DatasetUnavailableError, match="no stable address; get it from https://page"):
        content(SOURCE)


@pytest.mark.parametrize("packed", [False, True])
def test_the_folder_comes_before_cache_and_address(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    (folder / ("tiny.csv.gz" if packed else "tiny.csv")).write_bytes(gzip.compress(CONTENT) if packed else CONTENT)
    monkeypatch.setenv("MCRAGE_DATA", str(tmp_path / "data"))
    assert content(SOURCE) == CONTENT
    assert not cache.exists()


def test_a_folder_with_another_file_of_this_name_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tiny.csv").write_bytes(b"something else")
    monkeypatch.setenv("MCRAGE_DATA", str(tmp_path))
    with pytest.raises(DatasetUnavailableError, match=SOURCE.sha256):
        content(SOURCE)


def test_a_cache_that_cannot_be_written_says_so(
    address: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MCRAGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DatasetUnavailableError, match="set MCRAGE_CACHE"):
        content(replace(SOURCE, address=address + "/tiny.csv"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="heart-disease, diabetes130, eicu-demo, heart-failure, patient-treatment"):
        datasets.load("heart")


@needs_data
def test_heart_disease_has_its_four_hospitals() -> None:
    hospitals = datasets.hospitals("heart-disease")
    sizes = {name: len(table) for name, table in hospitals.tables.items()}
    assert sizes == {"Cleveland": 303, "Hungarian": 294, "Switzerland": 123, "VA Long Beach": 200}
    diseased = {name: round(100 * table["diseased"].mean(), 1) for name, table in hospitals.tables.items()}
    assert diseased == {"Cleveland": 45.9, "Hungarian": 36.1, "Switzerland": 93.5, "VA Long Beach": 74.5}
    va = hospitals.tables["VA Long Beach"]
    assert (va["sex"] == "female").sum() == 6
    assert (hospitals.tables["Switzerland"]["chol"].isna()).all()
    # 49 zeros and 7 question marks in chol; one zero and 56 question marks in trestbps.
    assert va["chol"].isna().sum() == 56
    assert va["trestbps"].isna().sum() == 57
    with pytest.raises(ConfigError, match="hospitals of its own"):
        datasets.hospitals("heart-disease", num_sites=3)


@needs_data
def test_eicu_has_regions_as_hospitals_and_no_minus_one() -> None:
    hospitals = datasets.hospitals("eicu-demo")
    assert list(hospitals.tables) == ["Midwest", "Northeast", "South", "Unstated", "West"]
    stays = pd.concat(hospitals.tables.values())
    assert len(stays) == 2_179
    assert stays["age"].max() == 90
    assert stays["ph"].notna().sum() < 405 < stays["wbc"].notna().sum()
    for column in hospitals.schema.features:
        if column.kind == "continuous":
            assert not (stays[column.name] == -1).any()
    assert set(stays["region"]) == set(hospitals.tables)


@needs_data
def test_patient_treatment_and_heart_failure_are_read_whole() -> None:
    treatment = datasets.load("patient-treatment").table
    assert treatment["SOURCE"].value_counts().to_dict() == {"out": 2_628, "in": 1_784}
    assert not treatment.isna().any(axis=None)
    failure = datasets.load("heart-failure")
    assert len(failure.table) == 299
    assert failure.table["DEATH_EVENT"].sum() == 96
    assert "time" not in failure.table


@needs_data
def test_pretend_hospitals_differ_in_mix_share_no_row_and_follow_the_seed() -> None:
    public = datasets.load("patient-treatment")
    one, again, other = (datasets.deal(public, seed=seed) for seed in (1, 1, 2))
    assert [len(table) for table in one.tables.values()] == [600] * 5
    assert one.test is not None
    assert len(one.test) == 1_400
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(table, again.tables[name])
    assert not one.tables["site-01"].equals(other.tables["site-01"])
    rows = pd.concat([*one.tables.values(), one.test])
    # No patient of this data set has a twin, so every dealt row is another patient.
    assert not rows.duplicated().any()
    women = [(table["SEX"] == "F").mean() for table in one.tables.values()]
    assert max(women) - min(women) > 0.1
    smaller = datasets.deal(public, num_sites=2, patients_per_site=100)
    assert [len(table) for table in smaller.tables.values()] == [100, 100]


@needs_data
@pytest.mark.slow
def test_diabetes_keeps_one_living_stay_per_patient_in_39_columns() -> None:
    public = datasets.load("diabetes130")
    table, schema = public.table, public.schema
    assert len(table) == 69_973
    assert table["patient_nbr"].is_unique
    assert sum(column.is_numeric for column in schema.modelled) == 8
    assert sum(not column.is_numeric for column in schema.modelled) == 31
    assert table["readmitted"].mean() == pytest.approx(0.407, abs=0.001)
    # The level None is a word, not a missing value.
    assert (table["max_glu_serum"] == "None").mean() > 0.9
    assert table["race"].isna().sum() > 1_500
    assert set(table["diag_1"].cat.categories) >= {"circulatory", "diabetes", "other"}
    hospitals = datasets.deal(public)
    assert [len(part) for part in hospitals.tables.values()] == [1_000] * 10
    assert hospitals.test is not None
    assert len(hospitals.test) == 30_000
    black = [(part["race"] == "AfricanAmerican").mean() for part in hospitals.tables.values()]
    assert max(black) - min(black) > 0.1
    ids = pd.concat([*hospitals.tables.values(), hospitals.test])["patient_nbr"]
    assert ids.is_unique


@needs_data
@pytest.mark.slow
def test_all_stays_of_diabetes_patients_can_be_had_and_are_not_dealt_by_row() -> None:
    public = diabetes130.load(one_per_patient=False, within_30_days=True)
    assert len(public.table) == 99_343
    assert public.table["readmitted"].mean() == pytest.approx(0.114, abs=0.001)
    with pytest.raises(ConfigError, match="several rows of a patient"):
        datasets.deal(public)


@pytest.mark.parametrize(
    ("code", "group"),
    [
        ("250.83", "diabetes"), ("428", "circulatory"), ("785", "circulatory"), ("486", "respiratory"),
        ("787", "digestive"), ("788", "genitourinary"), ("820", "injury"), ("715", "musculoskeletal"),
        ("153", "neoplasms"), ("V58", "other"), ("E909", "other"), ("276", "other"), ("?", "?"),
    ],
)  # fmt: skip
def test_a_diagnosis_falls_into_the_publishers_group(code: str, group: str) -> None:
    assert diabetes130.diagnosis_group(code) == group
