import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pytest

from client.app import app
from mcrage.config import RunConfig
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError
from mcrage.render.card import NO_PRIVACY
from server.app import save_result
from server.home import CoordinatorSettings, Home, write_json
from server.overview import Record, read_part
from server.rebalance import rebalance
from server.report import Measure, fairness_tables, site_lines, spans, write_report
from server.rounds import run_federation
from simulations.grid import InProcessGrid

SCRIPT, IMAGE = "<script>alert(1)</script>", "<img src=x onerror=alert(2)>"
VOID = {"meta", "br", "hr", "img", "input", "link", "col", "base"}
SCHEMA = TableSchema.parse(
    {
        "name": "hostile",
        "columns": [
            {"name": "patient", "kind": "text", "role": "patient_id", "nullable": False},
            {
                "name": "race",
                "kind": "categorical",
                "role": "sensitive",
                "categories": [SCRIPT, IMAGE],
                "nullable": False,
            },
            {"name": "age", "kind": "integer", "minimum": 18, "maximum": 100},
            {"name": "ill", "kind": "boolean", "role": "target", "nullable": False},
        ],
    }
)


class Page(HTMLParser):
    """Elements with their attributes, visible text, and elements that were never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def loads_or_runs(self) -> list[str]:
        """What would fetch or execute anything."""
        tags = {"script", "link", "img", "iframe", "object", "embed", "form", "base", "use", "image"}
        found = [tag for tag, _ in self.elements if tag in tags]
        for _, attributes in self.elements:
            found += [name for name in attributes if name.startswith("on") or name in ("src", "style")]
            found += [href for href in [attributes.get("href") or "#"] if not href.startswith("#")]
        return found


def write_sites(folder: Path) -> Path:
    folder.mkdir()
    SCHEMA.save(folder / "schema.json")
    for number in range(1, 4):
        draw = np.random.default_rng([0, number])
        age = draw.integers(18, 100, 300)
        table = {
            "patient": [f"p{number}-{row}" for row in range(300)],
            "race": draw.choice([SCRIPT, IMAGE], 300, p=[0.3, 0.7]),
            "age": age,
            "ill": draw.random(300) < age / 100,
        }
        pd.DataFrame(table).to_csv(folder / f"site-{number:02d}.csv", index=False)
    return folder


def finished(home: Home, name: str, sites: Path, **settings: Any) -> None:
    """Makes a run that is done."""
    places = {"site-dir": str(sites), "out-dir": str(home.run(name)), "run-name": name}
    size = {"num-server-rounds": 3, "local-steps": 2, "batch-size": 32, "width": 16, "depth": 1, "quorum-retries": 0}
    given = places | size | {"evaluate-every": 1} | {key.replace("_", "-"): value for key, value in settings.items()}
    config = RunConfig.parse(given)
    save_result(run_federation(InProcessGrid.of_folder(app, 3, config), config), config, seconds=200.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A coordinator with a private run, and then a plain one over the same sites."""
    folder = tmp_path_factory.mktemp("report")
    home = Home.create(folder / "home", CoordinatorSettings(names=("fed.example.org",)))
    sites = write_sites(folder / "sites")
    finished(home, "private", sites, dp=True, dp_noise_multiplier=1.0, dp_sample_rate=0.2, dp_score_epsilon=1.0)
    finished(home, "plain", sites)
    return home


@pytest.fixture
def home(made: Home, tmp_path: Path) -> Home:
    """A copy to work on."""
    return Home.open(Path(shutil.copytree(made.folder, tmp_path / "home")))


def page_of(home: Home, run: str) -> Page:
    page = Page(write_report(home, run).read_text(encoding="utf-8"))
    assert page.open == []
    assert page.loads_or_runs == []
    return page


def change(home: Home, run: str, **changes: Any) -> None:
    path = home.run(run) / "run.json"
    write_json(path, json.loads(path.read_text()) | changes)


def test_the_page_of_a_plain_run_says_what_it_was_and_claims_nothing(home: Home) -> None:
    page = page_of(home, "plain")
    assert "3 sites trained one generator of patient records in 3 rounds, which took 3 min 20 s." in page.text
    assert "No privacy claim is made." in page.text
    assert NO_PRIVACY in page.text
    labels = [
        attributes["aria-label"] for tag, attributes in page.elements if tag == "svg" and "aria-label" in attributes
    ]
    assert labels == ["Held-out loss by round", "Training loss by round"]
    assert "num-server-rounds 3" in page.text
    assert "learning-rate 0.005" in page.text
    assert "None were drawn yet" in page.text
    assert str(home.folder) not in page.text


def test_the_page_of_a_private_run_has_the_statement_and_the_fairness_of_every_site(home: Home) -> None:
    page = page_of(home, "private")
    card = (home.run("private") / "model" / "card.md").read_text()
    (statement,) = [line for line in card.splitlines() if "-differential privacy at patient level" in line]
    assert statement in page.text
    assert NO_PRIVACY not in page.text
    assert "under differential privacy none does" in page.text
    rows = json.loads((home.run("private") / "fairness.json").read_text())
    value = next(
        row["value"] for row in rows if row["value"] is not None and row["round"] == 3 and row["metric"] == "tpr"
    )
    assert f"{value:.3f}".removeprefix("0") in page.text
    assert [site for site in ("site-01", "site-02", "site-03") if page.text.count(site) >= 2] == [
        "site-01",
        "site-02",
        "site-03",
    ]


def test_the_policy_allows_only_the_style_sheet_that_is_there(home: Home) -> None:
    text = write_report(home, "plain").read_text(encoding="utf-8")
    (policy,) = [
        attributes["content"]
        for tag, attributes in Page(text).elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style
    assert "@import" not in style


def hostile(home: Home) -> None:
    """Puts markup wherever names and reasons come from outside."""
    for run in ("plain", "private"):
        rebalance(home.run(run), rows=20, seed=0, force=True)
        rounds = json.loads((home.run(run) / "run.json").read_text())["rounds"]
        rounds[1] |= {"sites": ["site-01"], "dropped": {"site-02": SCRIPT, f"site-03{IMAGE}": IMAGE}}
        change(home, run, absent={f"node {SCRIPT}": IMAGE}, rounds=rounds)


@pytest.mark.parametrize("run", ["plain", "private"])
def test_markup_in_names_and_reasons_is_shown_and_does_nothing(home: Home, run: str) -> None:
    hostile(home)
    page = page_of(home, run)
    assert f"race={SCRIPT}" in page.text
    assert f"race={IMAGE}" in page.text
    assert f"round 2: {SCRIPT}" in page.text
    assert f"node {SCRIPT}" in page.text


@pytest.mark.parametrize("run", ["plain", "private"])
def test_without_escaping_the_same_page_would_run_a_script(
    home: Home, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(home)
    whole = jinja2.Environment
    monkeypatch.setattr(jinja2, "Environment", lambda **given: whole(**(given | {"autoescape": False})))
    text = write_report(home, run).read_text(encoding="utf-8")
    assert SCRIPT in text
    monkeypatch.undo()
    assert SCRIPT not in write_report(home, run).read_text(encoding="utf-8")


def test_every_link_leads_to_a_section(home: Home) -> None:
    page = page_of(home, "plain")
    places = {attributes.get("id") for _, attributes in page.elements}
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links
    assert {str(link).removeprefix("#") for link in links} <= places


def test_how_often_each_site_took_part_and_why_not() -> None:
    def at(number: int, sites: list[str], **dropped: str) -> dict[str, Any]:
        return {"server_round": number, "sites": sites, "losses": {}, "held_out": {}, "dropped": dropped, "seconds": 1}

    rounds = [at(1, ["a"], b="late"), at(2, ["a"], b="late"), at(3, ["a", "b", "c"]), at(4, ["a", "c"], b="late")]
    record = Record.model_validate(
        {"config": {}, "seconds": 4, "sites": ["a", "b", "c"], "absent": {}, "privacy": {}, "rounds": rounds}
    )
    lines = site_lines(record, {"a": (123_456, 99_000)})
    assert [(line.site, line.rounds, line.came, line.went) for line in lines] == [
        ("a", 4, "0.1 MB", "99.0 kB"),
        ("b", 1, "–", "–"),
        ("c", 2, "–", "–"),
    ]
    assert [line.missed for line in lines] == [
        [],
        [("rounds 1–2, 4", "late")],
        [("rounds 1–2", "it was not one of the sites")],
    ]


def test_numbers_in_a_row_are_a_span() -> None:
    assert spans([1, 2, 3, 7, 9, 10]) == "1–3, 7, 9–10"
    assert spans([4]) == "4"


def test_bytes_are_those_of_the_proxy_and_a_line_that_was_cut_off_does_not_count(home: Home) -> None:
    assert "From it" not in page_of(home, "plain").text
    entry = {"time": "2026-03-01T00:59:07+02:00", "site": "site-02", "bytes_in": 1_500_000, "bytes_out": 2_600_000}
    (home.proxy / "access.log.00007").write_text(f"{json.dumps(entry)}\n")
    (home.proxy / "access.log").write_text(
        f'{json.dumps(entry | {"time": "2026-03-02T01:00:00+02:00"})}\n{{"site": "si'
    )
    text = page_of(home, "plain").text
    assert "site-02 3 of 3 3.0 MB 5.2 MB" in text
    assert "of all that the sites did since 2026-02-28 22:59 UTC, not of this run alone" in text


def test_what_was_drawn_is_shown_and_whether_it_is_of_this_model(home: Home) -> None:
    rebalance(home.run("plain"), rows=1234, seed=9, force=False)
    text = page_of(home, "plain").text
    assert "Drawn from this model with seed 9" in text
    assert "all 1,234 1,234 0" in text
    path = home.run("plain") / "synthetic" / "report.json"
    write_json(path, json.loads(path.read_text()) | {"model_sha256": "0" * 64})
    assert "Drawn from another model" in page_of(home, "plain").text


def measure(**changes: Any) -> Measure:
    row = {"round": 2, "site": "a", "group": "all", "against": None, "metric": "auroc", "value": 0.71}
    return Measure.model_validate(row | {"low": 0.6, "high": 0.8, "reason": ""} | changes)


def test_fairness_is_of_the_last_round_with_intervals_or_the_reason_why_not() -> None:
    nothing = {"value": None, "low": None, "high": None, "reason": "F: insufficient: fewer than 50 patients"}
    rows = [
        measure(round=1, value=0.1),
        measure(),
        measure(metric="tpr", **nothing),
        measure(group="M", against="F", value=-0.04, low=-0.1, high=0.02),
    ]
    (table,) = fairness_tables(rows)
    ((name, cells),) = table.groups
    assert (name, cells[0].value, cells[0].interval) == ("everybody", ".710", "[.600, .800]")
    assert (cells[1].value, cells[1].mark, table.notes) == ("–", "a", [("a", "fewer than 50 patients")])
    ((name, cells),) = table.gaps
    assert (name, cells[0].value, cells[0].interval) == ("M − F", "−.040", "[−.100, +.020]")
    assert fairness_tables([]) == []


def test_a_run_that_is_not_done_or_is_damaged_is_one_line(home: Home) -> None:
    with pytest.raises(ConfigError, match=r"^there is no run other; 'status' shows all$"):
        write_report(home, "other")
    (home.run("private") / "fairness.json").write_text('[{"round": 2')
    with pytest.raises(ConfigError, match=r"^[^\n]*fairness\.json' is damaged[^\n]*$"):
        write_report(home, "private")
    (home.run("plain") / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"^run plain is not done: [^\n]*$"):
        write_report(home, "plain")
    assert not list(home.folder.glob("runs/*/report.html"))


def test_where_a_site_also_trained_without_noise_nothing_is_claimed_of_it(home: Home) -> None:
    record = read_part(home.run("private") / "run.json", Record)
    assert record is not None
    account = record.privacy["site-01"] | {"has_unprotected": True, "epsilon": None}
    change(home, "private", privacy=record.privacy | {"site-01": account})
    text = page_of(home, "private").text
    assert "No guarantee can be stated for the patients of site site-01" in text
    assert "So nothing is claimed of the model as a whole." in text
    assert "no bound" in text
