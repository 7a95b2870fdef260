"""A federation of real processes that is killed, stopped and cut off, and what comes of it.

Every test leaves the coordinator and three hospitals running as it found them.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.bundles import Approvals, Bundle
from client.journal import verify
from client.places import JOURNAL
from client.policy import SitePolicy
from mcrage.config import Scalar
from server import jobs, sites
from server.proxy import bytes_by_site
from simulations.deployed import Federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG: dict[str, Scalar] = {"local_steps": 150, "num_server_rounds": 6}


# What some hospital has: no home, nowhere for temporary files, another language and time, proxies for the web.
ODD = {
    "HOME": "/proc/nowhere",
    "TMPDIR": "/proc/nowhere",
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "TZ": "Pacific/Chatham",
    **{name: "http://127.0.0.1:9" for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY")},
}


@pytest.fixture(scope="module")
def federation(new_federation: Callable[..., Federation], site_dir: Path) -> Federation:
    made = new_federation(site_dir, num_sites=3, policy=SitePolicy.simulated(declared_patients=84))
    return made.all_up(**{"site-03": ODD})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_of(federation: Federation, run: str) -> str:
    return sha256(federation.home.run(run) / "model" / "model.safetensors")


def kill(process_ids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    assert process_ids, "there is such a process"
    for each in process_ids:
        os.kill(each, number)


def rounds_without(federation: Federation, run: str, site: str) -> list[int]:
    return [record["server_round"] for record in federation.result(run)["rounds"] if site not in record["sites"]]


def test_a_run_gives_the_bytes_of_the_same_run_in_one_process(
    federation: Federation, in_one_process: Callable[..., str]
) -> None:
    federation.want("plain", num_server_rounds=4)
    assert federation.finished("plain").state == "done", federation.log("coordinator")[-2000:]
    assert model_of(federation, "plain") == in_one_process(federation, "plain")
    for name, settings in federation.sites.items():
        verdict = verify(settings.site.private / JOURNAL)
        assert not verdict.problems
        assert verdict.lines >= 2 * (1 + 4), name  # an instruction and a reply each, for the roll call and four rounds
    sent = bytes_by_site(federation.home.proxy / "access.log")
    assert set(sent) == set(federation.sites)


def test_a_coordinator_killed_in_every_part_goes_on_to_the_same_bytes(
    federation: Federation, in_one_process: Callable[..., str]
) -> None:
    federation.want("killed", local_steps=100, num_server_rounds=8)
    federation.reached("killed", 2)
    kill(federation.processes("coordinator", "flower-superlink"))
    federation.reached("killed", 4)
    kill(federation.processes("coordinator", "nginx: master"))  # and with it what it was carrying
    federation.reached("killed", 5)
    federation.end("coordinator", signal.SIGKILL)
    left = lambda: set(federation.processes("coordinator"))  # noqa: E731
    federation.wait(lambda: len(left()) <= 1, seconds=60, what="the end of what it started")
    stuck = left()  # Flower's ServerApp waits for its SuperLink, for ever
    federation.up()
    federation.wait(lambda: not stuck & left(), seconds=30, what="the end of an earlier coordinator's ServerApp")
    assert federation.finished("killed", seconds=150).state == "done"
    assert [record["server_round"] for record in federation.result("killed")["rounds"]] == list(range(1, 9))
    assert model_of(federation, "killed") == in_one_process(federation, "killed")


def test_a_killed_worker_costs_its_site_a_round_and_a_stopped_one_does_not_hold_up_the_others(
    federation: Federation,
) -> None:
    federation.want("worker", local_steps=500, num_server_rounds=7, min_sites=2, round_timeout_seconds=20.0)
    federation.reached("worker", 1)
    federation.training("worker", "site-01")
    kill(federation.processes("site-01", "client.worker"))
    federation.reached("worker", 2)
    federation.training("worker", "site-02")
    kill(federation.processes("site-02", "client.worker"), signal.SIGSTOP)
    federation.reached("worker", 3)
    kill(federation.processes("site-02", "client.worker"), signal.SIGCONT)
    assert federation.finished("worker").state == "done"
    rounds = federation.result("worker")["rounds"]
    dropped = {record["server_round"]: record["dropped"] for record in rounds if record["dropped"]}
    assert "ended unexpectedly" in dropped[2]["site-01"], "the server knows at once, not after a minute of silence"
    assert 7 not in rounds_without(federation, "worker", "site-01")
    missed = rounds_without(federation, "worker", "site-02")
    assert missed
    assert 7 not in missed, "a late site catches up"


def test_a_killed_node_leaves_nothing_behind_and_is_back_within_90_seconds(federation: Federation) -> None:
    federation.want("node", **LONG, min_sites=1, round_timeout_seconds=10.0)
    federation.reached("node", 1)
    kill(federation.processes("site-01", "client.node"))
    federation.end("site-02", signal.SIGKILL)
    # A killed daemon leaves no process that still works on the data.
    federation.wait(lambda: not federation.processes("site-02"), seconds=5, what="the end of its processes")
    federation.start_site("site-02")
    started = time.monotonic()
    # Flower holds a killed node for connected until its heartbeat has been missing for a minute.
    until_back = federation.wait_for_online({"site-01", "site-02"}, since=started, seconds=90)
    assert until_back < 90
    assert federation.finished("node").state == "done"


def test_sigterm_ends_a_daemon_in_the_middle_of_a_round_within_30_seconds(federation: Federation) -> None:
    federation.want("term", **LONG, min_sites=2, round_timeout_seconds=10.0)
    federation.reached("term", 1)
    code, seconds = federation.end("site-03", signal.SIGTERM)
    assert code == 0
    assert seconds < 30
    assert not federation.processes("site-03")
    federation.start_site("site-03")
    assert federation.finished("term").state == "done"


def test_a_run_that_is_stopped_says_so_and_goes_on_to_the_same_bytes(
    federation: Federation, in_one_process: Callable[..., str]
) -> None:
    federation.want("halted", local_steps=500, num_server_rounds=3)
    federation.reached("halted", 1)
    for site in federation.sites:
        federation.training("halted", site)
    jobs.want(federation.home, "halted", "stop")
    assert federation.finished("halted").state == "stopped"
    says = lambda: federation.status("halted")["state"]  # noqa: E731
    federation.wait(lambda: says() not in ("training", "waiting for sites"), seconds=60, what="the end of its process")
    assert (says(), federation.status("halted")["error"]) == ("stopped", "")
    jobs.want(federation.home, "halted", "run")
    federation.wait(lambda: jobs.is_heard(federation.home, "halted"), seconds=30, what="the wish to go on")
    assert federation.finished("halted").state == "done"
    assert model_of(federation, "halted") == in_one_process(federation, "halted")


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        ("shared", {"dp_noise_multiplier": 0.7, "dp_sample_rate": 0.3, "local_steps": 1, "num_server_rounds": 4}),
        ("counted", {"generator": "marginal", "dp_epsilon": 20.0}),
    ],
)
def test_real_hospitals_share_noise_under_masks_to_the_bytes_of_the_same_run_in_one_process(
    federation: Federation, in_one_process: Callable[..., str], run: str, settings: dict[str, Scalar]
) -> None:
    federation.want(run, **{"dp": True, "dp_noise": "shared", "dp_noise_seed": 3, **settings})
    assert federation.finished(run).state == "done", federation.log("coordinator")[-2000:]
    assert all(len(record["sites"]) == 3 for record in federation.result(run)["rounds"])
    assert model_of(federation, run) == in_one_process(federation, run)


def test_two_runs_at_once_do_not_disturb_each_other(federation: Federation, in_one_process: Callable[..., str]) -> None:
    federation.want("first", num_server_rounds=2, seed=1)
    federation.want("second", num_server_rounds=2, seed=2)
    assert federation.finished("first").state == "done"
    assert federation.finished("second").state == "done"
    for run in ("first", "second"):
        assert model_of(federation, run) == in_one_process(federation, run)


def test_a_site_may_join_and_be_removed_between_rounds(federation: Federation, site_dir: Path) -> None:
    federation.want("joined", local_steps=150, num_server_rounds=24, min_sites=2, round_timeout_seconds=20.0)
    federation.reached("joined", 1)
    policy = SitePolicy.simulated(declared_patients=84)
    federation.enrol("site-09", site_dir / "site-03.csv", site_dir / "schema.json", policy)
    try:
        federation.start_site("site-09")
        lines = federation.home.run("joined") / "metrics.jsonl"

        def has_trained() -> bool:
            told = [json.loads(line) for line in lines.read_text().splitlines() if "site-09" in line]
            return any(line["dropped"] is None for line in told)

        federation.wait(has_trained, seconds=150, what="a round with the new site")
        sites.remove(federation.home, "site-09")
        assert federation.finished("joined").state == "done"
        took_part = ["site-09" in record["sites"] for record in federation.result("joined")["rounds"]]
        assert not took_part[0]
        assert any(took_part)
        assert federation.end("site-09")[0] == 0
    finally:
        del federation.sites["site-09"]


def test_a_bundle_that_is_not_approved_is_refused_and_leaves_no_trace(federation: Federation) -> None:
    settings = federation.sites["site-01"]
    Approvals(settings.daemon.approved).withdraw(hashlib.sha256(federation.bundle).hexdigest())
    before = {path for path in settings.file.parent.rglob("*") if path.is_file()}
    federation.want("unapproved", num_server_rounds=1, min_sites=2)
    assert federation.finished("unapproved").state == "done"
    assert "site-01" not in federation.result("unapproved")["sites"]
    assert "approve" in str(federation.result("unapproved")["absent"])
    assert {path for path in settings.file.parent.rglob("*") if path.is_file()} == before
    assert federation.processes("site-01", "client.node"), "the daemon is alive"
    Approvals(settings.daemon.approved).add(Bundle.read(federation.bundle), by="test")
    federation.want("approved", num_server_rounds=1)
    assert federation.finished("approved").state == "done"
