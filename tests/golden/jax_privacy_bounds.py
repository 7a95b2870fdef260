"""Lower bounds of epsilon for 100 random score vectors by jax-privacy 2.0.0, to compare ours with.

Makes ``jax_privacy_bounds.json``; needs ``pip install --no-deps jax-privacy==2.0.0`` and dp-accounting, no JAX::

    python tests/golden/jax_privacy_bounds.py > tests/golden/jax_privacy_bounds.json

jax-privacy guesses on one side only. A canary in the lower half is turned over here: it counts as in where it was out,
and its distance to the middle is its score. The highest scores are then the guesses on both sides.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CASES = 100
CONFIDENCE = 0.95
SHARES = (40, 10, 4)


def case(number: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], float]:
    """Scores, coins and delta of a case: from canaries that nobody can tell apart to such that all can."""
    draw = np.random.default_rng([2305, number])
    canaries = int(draw.choice([80, 200, 500, 1000]))
    included = draw.random(canaries) < 0.5
    scores = draw.normal(size=canaries) + draw.uniform(0, 5) * included
    return scores, included, float(draw.choice([1e-5, 1e-6, 1e-3]))


def auditing() -> Any:
    """The module, without the package around it, which would import JAX."""
    found = importlib.util.find_spec("jax_privacy")
    assert found is not None
    assert found.submodule_search_locations is not None
    file = Path(found.submodule_search_locations[0]) / "auditing.py"
    spec = importlib.util.spec_from_file_location("auditing", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["auditing"] = module
    spec.loader.exec_module(module)
    return module


def bounds(module: Any, number: int) -> dict[str, float]:
    """Both bounds of a case, the best of three numbers of guesses."""
    scores, included, delta = case(number)
    ranks = np.argsort(np.argsort(scores, kind="stable")) + 0.5 - len(scores) / 2
    turned, distance = included ^ (ranks < 0), np.abs(ranks)
    auditor = module.CanaryScoreAuditor(distance[turned], distance[~turned])
    error = (1 - CONFIDENCE) / len(SHARES)
    thresholds = [len(scores) / 2 - len(scores) // share for share in SHARES]
    asked = [(error, delta, {"threshold_strategy": module.Explicit(threshold)}) for threshold in thresholds]
    return {
        "one_run": max(float(auditor.epsilon_one_run(first, second, **more)) for first, second, more in asked),
        "gaussian": max(float(auditor.epsilon_one_run_fdp(first, second, **more)) for first, second, more in asked),
    }


if __name__ == "__main__":
    module = auditing()
    print("[\n" + ",\n".join(json.dumps(bounds(module, number)) for number in range(CASES)) + "\n]")
