import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
LINES = "{http://www.w3.org/2000/svg}polyline"


@pytest.mark.soak
def test_the_benchmark_gives_a_curve_for_the_federation_and_for_pooled_rows(tmp_path: Path) -> None:
    plot = tmp_path / "curve.svg"
    options = ["--seeds", "1", "--rounds", "3", "--every", "1", "--test-rows", "400", "--plot", str(plot)]
    command = [sys.executable, "-m", "benchmarks.federated_pooled", *options]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)

    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(point["model"], point["round"]) for point in points] == [
        (model, server_round)
        for model in ("federated", "pooled, large batches", "pooled, more steps")
        for server_round in (1, 2, 3)
    ]
    assert all(0.5 < point["all_pairs"] < 1 and 0.4 < point["detection"] <= 1 for point in points)
    by_model = {point["model"]: point["all_pairs"] for point in points}
    assert len(set(by_model.values())) == 3, "the models are not the same one"
    curves = [line for line in ElementTree.parse(plot).iter(LINES) if len(line.attrib["points"].split()) == 3]
    assert len(curves) == 3 * 3, "three measures of three models; grid and legend are lines of two points"
    assert len({curve.attrib["points"] for curve in curves}) == 3 * 3
