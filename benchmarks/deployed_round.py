"""Seconds and bytes of a round of real processes: SuperLink, nginx, TLS, and a daemon per hospital, all on loopback.

    python -m benchmarks.deployed_round [--sites 4] [--rounds 12] [--private | --shared]

One optimiser step per round and site, with the default network, on tables of 200 patients: what is measured is what the
federation itself costs. Wall-clock, because most of it is waiting; the machine's load is printed with it.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from client.policy import SitePolicy
from server.proxy import bytes_by_site
from simulations.cohort import Cohort, CohortConfig
from simulations.deployed import Federation
from simulations.sites import write_sites

PRIVATE = {"dp": True, "dp_noise_multiplier": 4.0, "dp_sample_rate": 0.1, "dp_draws": 2}
KINDS = {"plain": {}, "private": PRIVATE, "shared": PRIVATE | {"dp_noise": "shared", "min_sites": 2}}


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--private", dest="kind", action="store_const", const="private", default="plain")
    kind.add_argument("--shared", dest="kind", action="store_const", const="shared")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sites(folder / "data", Cohort(CohortConfig(num_sites=options.sites, patients_per_site=200)).hospitals())
        policy = SitePolicy.simulated(declared_patients=140)
        federation = Federation(folder, folder / "data", num_sites=options.sites, policy=policy)
        try:
            print(json.dumps(measure(federation.all_up(), rounds=options.rounds, kind=options.kind)))
        finally:
            federation.close()


def measure(federation: Federation, *, rounds: int, kind: str) -> dict[str, object]:
    """Median, slowest and fastest of all rounds but the first, which reads the tables; bytes per round and site."""
    size = {"local_steps": 1, "width": 128, "depth": 3}
    # A short run first: what a run costs once must not stand among the bytes of a round.
    totals = []
    for run, length in (("short", 2), ("long", 2 + rounds)):
        before = _bytes(federation)
        federation.want(run, num_server_rounds=length, **size, **KINDS[kind])
        job = federation.finished(run, seconds=60 + 30 * length)
        if job.state != "done":
            raise SystemExit(f"the run {run} ended as {job.state}: {job.error}")
        totals.append(_bytes(federation) - before)
    seconds = [record["seconds"] for record in federation.result("long")["rounds"][1:]]
    return {
        "sites": len(federation.sites),
        "rounds": len(seconds),
        "kind": kind,
        "round_seconds_median": round(statistics.median(seconds), 2),
        "round_seconds_range": [round(min(seconds), 2), round(max(seconds), 2)],
        "kilobytes_per_round_and_site": round((totals[1] - totals[0]) / rounds / len(federation.sites) / 1e3, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def _bytes(federation: Federation) -> int:
    return sum(sum(pair) for pair in bytes_by_site(federation.home.proxy / "access.log").values())


if __name__ == "__main__":
    main()
