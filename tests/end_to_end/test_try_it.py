"""A whole federation in one command, and not one packet to another machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mcrage.errors import ConfigError
from server.proxy import find_nginx

ROOT = Path(__file__).resolve().parents[2]
MADE = (
    "status.txt",
    "check.txt",
    "doctor.txt",
    "coordinator/runs/first/report.html",
    "coordinator/runs/first/model/card.md",
    "coordinator/runs/first/fairness.json",
    "coordinator/runs/first/synthetic/synthetic.csv",
)
# A machine of its own whose only way out counts what goes that way.
COUNTING = """
set -e
ip link set lo up
ip link add way-out type veth peer name nowhere
ip link set way-out addrgenmode none
ip link set nowhere addrgenmode none
ip link set nowhere up
ip address add 10.99.0.1/24 dev way-out
ip link set way-out up
ip route add default via 10.99.0.2 dev way-out
ip neighbour add 10.99.0.2 lladdr 02:00:00:00:00:02 dev way-out
"$@"
echo "packets $(awk '$1 == "way-out:" {print $11}' /proc/net/dev)"
"""


def alone(*command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command in a network namespace of its own."""
    return subprocess.run(
        ["unshare", "--net", "bash", "-c", COUNTING, "alone", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    try:
        find_nginx()
    except ConfigError as error:
        pytest.skip(str(error))
    if shutil.which("unshare") is None or shutil.which("ip") is None or alone("true").returncode:
        pytest.skip("a network namespace cannot be made here (root, iproute2)")


def test_a_packet_to_another_machine_would_be_counted() -> None:
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))"
    assert alone("true").stdout.strip().endswith("packets 0")
    assert alone(sys.executable, "-c", send).stdout.strip().endswith("packets 1")


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_whole_federation_on_one_machine_sends_nothing_to_any_other(tmp_path: Path) -> None:
    folder = tmp_path / "try-it"
    done = alone("bash", "deploy/try-it.sh", str(folder), PYTHON=sys.executable, HTTPS_PROXY="http://192.0.2.1:3128")
    said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    assert done.stdout.strip().endswith("packets 0"), said
    assert [name for name in MADE if not (folder / name).exists()] == [], said
    assert "-differential privacy at patient level" in (folder / "coordinator/runs/first/model/card.md").read_text()
    assert "FAIL" not in (folder / "doctor.txt").read_text()
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout
    assert left == ""
