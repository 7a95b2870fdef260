"""A made-up run of realistic size: 8 hospitals, 18 groups, every arm, metric and reason."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

SITES = ("Northgate", "St Mary's", "Riverside", "County General", "Lakeview", "University", "Hillcrest", "Harbour")
MODELS = ("logistic_regression", "hist_gradient_boosting")
ARMS = {
    "local": 0.0,
    "class_weights": 0.02,
    "threshold": 0.0,
    "oversampling": 0.08,
    "smote": 0.2,
    "local_cddpm": 0.35,
    "federated_parity": 0.7,
    "federated_target": 0.93,
    "pooled": 1.0,
}
METRICS = {
    "auprc": 0.41,
    "accuracy": 0.78,
    "balanced_accuracy": 0.66,
    "f1": 0.44,
    "tpr": 0.52,
    "fpr": 0.17,
    "selection_rate": 0.24,
    "brier": 0.16,
    "calibration_error": 0.04,
}
SHARES = {"race=White": 0.78, "race=Black": 0.12, "race=Asian": 0.07, "race=Native American": 0.03}
SEXES = {"sex=F": 0.52, "sex=M": 0.48}
AGES = {"age=under 45": 0.3, "age=45 to 64": 0.4, "age=65 and over": 0.3}


def group_shares() -> dict[str, float]:
    """Share of the patients by group: single attributes and the intersections of race and sex."""
    crossed = {f"{race}, {sex}": a * b for race, a in SHARES.items() for sex, b in SEXES.items()}
    return {"all": 1.0, **SHARES, **SEXES, **AGES, **crossed}


def estimates(rng: np.random.Generator, site: str, group: str, n: int) -> list[dict[str, Any]]:
    """Rows of one group at one site: AUROC by arm and model, and every other metric over the federation."""
    half = 0.9 / np.sqrt(max(n, 11))
    minority = group.startswith("race=") and "White" not in group
    spread = 0.5 if "Native" in group else 0.08
    rows = []
    for model in MODELS:
        local = (0.6 if minority else 0.74) + rng.normal(0, half / 4)
        gap = (0.12 if minority else 0.015) + rng.normal(0, half / 6)
        for arm, share in ARMS.items():
            value = local + gap * (share + rng.normal(0, spread) * (arm not in ("local", "threshold", "pooled")))
            rows.append(row(site, group, arm, model, "auroc", value, half, n))
            if arm != "local":
                change = value - local
                rows.append(row(site, group, arm, model, "auroc_difference", change, 0.7 * half, n))
            if site == "all":
                for metric, base in METRICS.items():
                    rows.append(row(site, group, arm, model, metric, base + rng.normal(0, 0.02), half, n))
    return rows


def row(site: str, group: str, arm: str, model: str, metric: str, value: float, half: float, n: int) -> dict[str, Any]:
    """One entry of ``rows``; without a value below 30 patients, without a count below 11."""
    entry: dict[str, Any] = {"site": site, "group": group, "arm": arm, "model": model, "metric": metric}
    if n < 30:
        reason = "suppressed: fewer than 11 patients" if n < 11 else f"insufficient: {n} held-out patients, 30 needed"
        return entry | {"value": None, "low": None, "high": None, "n": None if n < 11 else n, "reason": reason}
    return entry | {"value": value, "low": value - half, "high": value + half, "n": n, "reason": ""}


def derived(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shares of the gap closed and verdicts that follow from the AUROC rows."""
    by_key = {(r["site"], r["group"], r["arm"], r["model"]): r for r in rows if r["metric"] == "auroc"}
    gaps, verdicts = [], []
    for (site, group, arm, model), entry in by_key.items():
        if arm in ("local", "pooled"):
            continue
        names = {"site": site, "group": group, "arm": arm, "model": model}
        local, pooled = (by_key[site, group, other, model] for other in ("local", "pooled"))
        gap: dict[str, Any] = names | {"metric": "auroc", "value": None, "low": None, "high": None}
        if entry["value"] is None:
            gaps.append(gap | {"reason": entry["reason"]})
            continue
        half = 0.7 * (entry["high"] - entry["value"])
        change, distance = entry["value"] - local["value"], pooled["value"] - local["value"]
        low, high = change - half, change + half
        word = "helps" if low > 0 else "harms" if high < 0 else "no evidence"
        verdicts.append(names | {"verdict": word, "difference": change, "low": low, "high": high})
        if distance < half:
            gaps.append(gap | {"reason": "no gap: pooled rows do not do better than local ones beyond the interval"})
        else:
            ends = {"value": change / distance, "low": low / distance, "high": high / distance}
            gaps.append(gap | ends | {"reason": ""})
    return gaps, verdicts


def marginals(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Distributions of three kinds of column by race."""
    found = []
    columns = {
        "age": [f"{low} to {low + 4}" for low in range(20, 95, 5)],
        "creatinine_mg_dl": [f"{low / 10:.1f} to {low / 10 + 0.2:.1f}" for low in range(4, 44, 2)],
        "smoking": ["Never smoked", "Former smoker, quit more than ten years ago", "Current smoker", "missing"],
        "admission": ["Emergency", "Elective", "Transfer"],
        "diabetes": ["False", "True"],
        "systolic_pressure": [f"{low} to {low + 9}" for low in range(80, 220, 10)],
    }
    for group, share in SHARES.items():
        for column, labels in columns.items():
            weights = rng.dirichlet(2 + 8 * np.exp(-(((np.arange(len(labels)) - len(labels) / 2.5) / 4) ** 2)))
            real = rng.multinomial(int(4000 * share), weights)
            made = rng.multinomial(4000, 0.93 * weights + 0.07 * rng.dirichlet(np.ones(len(labels))))
            shown = [None if 0 < count < 11 else int(count) for count in real]
            found.append(
                {"column": column, "group": group, "labels": labels, "real": shown, "synthetic": made.tolist()}
            )
    return found


def history(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Forty rounds; fidelity every second one; one hospital lost twice."""
    rounds = []
    for at in range(1, 41):
        lost = ["Harbour"] if at in (7, 23) else []
        rounds.append(
            {
                "round": at,
                "loss": float(0.42 + 0.6 * np.exp(-at / 6) + rng.normal(0, 0.006)),
                "fidelity": float(0.98 - 0.3 * np.exp(-at / 7) + rng.normal(0, 0.003)) if at % 2 == 0 else None,
                "sites": [site for site in SITES if site not in lost],
                "dropped": lost,
            }
        )
    return rounds


def make_document(*, seed: int = 7, black: str = "race=Black", column: str = "age") -> dict[str, Any]:
    """The content of a results.json; ``black`` and ``column`` rename a group and a column."""
    rng = np.random.default_rng(seed)
    rows, sizes = [], []
    for site in ("all", *SITES):
        patients = 20_000 if site == "all" else int(rng.integers(220, 2600))
        for group, share in group_shares().items():
            mix = share if site == "all" else share * rng.uniform(0.5, 1.5) if share < 1 else 1.0
            n = int(patients * mix)
            rows += estimates(rng, site, group, n)
            real = int(patients * mix * 0.7)
            if group != "all":
                made = max(0, int(patients * 0.9) - real)
                sizes.append(
                    {
                        "site": site,
                        "group": group,
                        "real": None if real < 11 else real,
                        "synthetic": None if real < 11 else made,
                    }
                )
    gaps, verdicts = derived(rows)
    document = {
        "schema_version": 1,
        "run": {
            "config": {
                "rounds": 40,
                "local_steps": 50,
                "strategy": "fedavg",
                "width": 256,
                "model": {"depth": 3, "guidance": 0.0},
                "targets": ["parity", "federation"],
                "deadline_seconds": None,
            },
            "seed": seed,
            "dataset": "simulated EHR cohort",
            "sites": list(SITES),
            "minority_groups": ["race=Black", "race=Asian", "race=Native American"],
            "engine": "in-process",
            "versions": {"python": "3.11.9", "mcrage": "0.1.0", "torch": "2.13.0", "scikit-learn": "1.9.1"},
            "seconds": 148.2,
            "peak_memory_mb": 2210.4,
        },
        "rows": rows,
        "gap_closed": gaps,
        "verdicts": verdicts,
        "group_sizes": sizes,
        "marginals": marginals(rng),
        "history": history(rng),
    }
    return _renamed(document, {"race=Black": black, "age": column} if black != "race=Black" else {})


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_renamed(each, names) for each in value]
    if isinstance(value, dict):
        return {key: _renamed(each, names) for key, each in value.items()}
    return value


@pytest.fixture(scope="session")
def document() -> Callable[..., dict[str, Any]]:
    """Makes documents: ``document(seed=…, black=…, column=…)``."""
    return make_document
