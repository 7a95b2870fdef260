"""Numbers, names and sentences, the same in the terminal and in ``report.html``."""

import textwrap
from collections.abc import Iterable, Sequence

from mcrage.evaluation.comparison import (
    Answer,
    Comparison,
    answer,
    count_words,
    headline_comparisons,
    other_comparisons,
    site_comparisons,
)
from mcrage.evaluation.report import GapClosed, RunResults, Score

WIDTH = 100
"""Columns of the terminal table."""

ARM_NAMES = {
    "local": "Local, untouched",
    "class_weights": "Class weights",
    "threshold": "Threshold tuned",
    "oversampling": "Random oversampling",
    "smote": "SMOTE(NC)",
    "local_cddpm": "Local CDDPM",
    "federated_parity": "Federated, parity",
    "federated_target": "Federated, target",
    "pooled": "Pooled real rows",
}

MODEL_NAMES = {"logistic_regression": "logistic regression", "hist_gradient_boosting": "gradient boosting"}

METRIC_NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "tpr": "True positive rate",
    "fpr": "False positive rate",
    "selection_rate": "Selection rate",
    "brier": "Brier score",
    "calibration_error": "Calibration error",
    "demographic_parity_difference": "Demographic parity difference",
    "equalized_odds_difference": "Equalised odds difference",
}

TEST_RECORDS = {
    "own": "real records that each hospital held out",
    "common": "real records of a common test set, of patients of no hospital",
}
"""What the models were tested on, by ``run.test_set``."""

_OPENINGS: dict[Answer, str] = {
    "yes": "Yes.",
    "in part": "In part.",
    "no evidence": "No evidence that they did.",
    "mixed": "Mixed: help in some comparisons, harm in others.",
    "harms": "No, they did harm.",
    "unknown": "This run cannot say.",
}


def number(value: float) -> str:
    """Three decimals without a leading zero: ``.746``, ``1.000``, ``−.012``."""
    text = f"{abs(value):.3f}".removeprefix("0")
    return f"−{text}" if value < 0 and text != ".000" else text


def signed(value: float) -> str:
    """A difference: ``+.142``, ``−.012``, ``.000``."""
    text = number(value)
    return text if text[0] == "−" or text == ".000" else f"+{text}"


def percent(value: float) -> str:
    """A share of the gap in whole percent, without the sign for percent: ``98``, ``−7``."""
    return f"{round(100 * value)}".replace("-", "−")


def interval(low: float | None, high: float | None, *, style: str = "number") -> str:
    """``[.721, .770]``; empty where there is none. ``style`` is number, signed or percent."""
    if low is None or high is None:
        return ""
    write = {"number": number, "signed": signed, "percent": percent}[style]
    return f"[{write(low)}, {write(high)}]"


def name_of(key: str, names: dict[str, str]) -> str:
    """The name for people, or the key itself."""
    return names.get(key, key.replace("_", " "))


def answer_word(results: RunResults) -> str:
    """The first words of the headline."""
    return _OPENINGS[answer(headline_comparisons(results))]


def headline(results: RunResults) -> str:
    """Whether, by how much and how sure, in one sentence from the numbers; the first words are :func:`answer_word`."""
    comparisons = headline_comparisons(results)
    judged = [each for each in comparisons if each.verdict]
    source = f"records sampled from the model that {len(results.sites)} hospitals trained"
    if not comparisons:
        return "No group of this run counts as a minority, so there is nothing to compare."
    if not judged:
        return f"Of {_these(comparisons)}, none has enough held-out patients to judge {source}."
    clauses = [f"{source[0].upper()}{source[1:]} {_what_happened(comparisons)}: {_change(judged)}", *_gap(comparisons)]
    return "; ".join(clauses) + "."


def remarks(results: RunResults) -> list[str]:
    """What has to be said beside the headline: other groups, single hospitals, local baselines."""
    remarks = []
    if others := [each for each in other_comparisons(results) if each.verdict]:
        harmed = [each for each in others if each.word == "harms"]
        text = f"Everybody else: {_counted(others)}."
        if harmed:
            text += f" Harmed: {_named(harmed)}."
        remarks.append(text)
    if by_site := site_comparisons(results):
        remarks.append(f"Minority groups hospital by hospital: {_counted(by_site)}.")
    beaten = [each.beats_baseline for each in headline_comparisons(results) if each.beats_baseline is not None]
    if beaten:
        remarks.append(
            f"Against the best that a hospital can do alone: higher AUROC in {sum(beaten)} of "
            f"{_comparisons(len(beaten))} (values only, no interval)."
        )
    return remarks


def estimate(score: Score | GapClosed | None, *, style: str = "number") -> str:
    """A value with its interval: ``.746 [.721, .770]``, ``98 % [91, 105]``; where there is no value its reason."""
    if score is None:
        return "not evaluated"
    if score.value is None:
        return score.reason
    value = f"{percent(score.value)} %" if style == "percent" else number(score.value)
    return f"{value} {interval(score.low, score.high, style=style)}".strip()


def summary_table(results: RunResults) -> str:
    """The headline and a table of the minority groups, in plain text of at most :data:`WIDTH` columns."""
    lines = [*_wrap(f"{answer_word(results)} {headline(results)}"), ""]
    comparisons = headline_comparisons(results)
    if comparisons:
        lines += [_row(_HEADER), "-" * WIDTH]
        for group in dict.fromkeys(each.group for each in comparisons):
            lines += _block(group, [each for each in comparisons if each.group == group])
        lines += ["-" * WIDTH, *_wrap(_LEGEND.format(records=TEST_RECORDS[results.run.test_set])), ""]
    for remark in remarks(results):
        lines += _wrap(remark)
    return "\n".join(lines).rstrip() + "\n"


_COLUMNS = (19, 8, 20, 6, 10, 7, 18)
_HEADER = ("minority group", "n", "downstream model", "local", "federated", "pooled", "gap closed", "verdict")
_LEGEND = (
    "AUROC on {records}, n patients of the group; gap closed: share of the distance from local to pooled real rows, "
    "with 95 % interval; verdict: from the 95 % interval of federated − local."
)


def _row(cells: Sequence[str]) -> str:
    widths = _COLUMNS
    fixed = [_fit(cell, width - 1).ljust(width) for cell, width in zip(cells, widths, strict=False)]
    fixed[1] = f"{_fit(cells[1], widths[1] - 2).rjust(widths[1] - 2)}  "
    return ("".join(fixed) + "".join(cells[len(widths) :])).rstrip()


def _block(group: str, comparisons: list[Comparison]) -> list[str]:
    names = textwrap.wrap(printable(group), _COLUMNS[0] - 2) or [""]
    rows = []
    for position in range(max(len(names), len(comparisons))):
        name = names[position] if position < len(names) else ""
        cells = _cells(comparisons[position], first=position == 0) if position < len(comparisons) else [""] * 7
        rows.append(_row([name, *cells]))
    return rows


def _cells(comparison: Comparison, *, first: bool) -> list[str]:
    n = "" if not first else "-" if comparison.n is None else f"{comparison.n:,}"
    values = [
        number(score.value) if score and score.value is not None else "-"
        for score in (comparison.local, comparison.federated, comparison.pooled)
    ]
    return [
        n,
        name_of(comparison.model, MODEL_NAMES),
        *values,
        short(estimate(comparison.gap, style="percent")),
        comparison.word,
    ]


def printable(text: str) -> str:
    """The text with control characters replaced, so that a category name cannot steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def short(text: str) -> str:
    """A reason without its explanation: ``no gap`` of ``no gap: pooled rows …``."""
    return text.partition(":")[0]


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(printable(text), WIDTH)


def _comparisons(count: int) -> str:
    return f"{count} comparison{'' if count == 1 else 's'}"


def _these(comparisons: Sequence[Comparison]) -> str:
    groups, models = ({getattr(each, key) for each in comparisons} for key in ("group", "model"))
    plural = "" if len(groups) == 1 else "s"
    return (
        f"{_comparisons(len(comparisons))} ({len(groups)} minority group{plural} × {len(models)} downstream model"
        f"{'' if len(models) == 1 else 's'})"
    )


def _named(comparisons: Iterable[Comparison]) -> str:
    return ", ".join(f"{each.group} with {name_of(each.model, MODEL_NAMES)}" for each in comparisons)


def _counted(comparisons: Iterable[Comparison]) -> str:
    counts = count_words(comparisons)
    said = [f"{word} in {count}" for word, count in counts.items() if count and word != "insufficient"]
    if counts["insufficient"]:
        said.append(f"{counts['insufficient']} too small to judge")
    return f"{', '.join(said)} (of {_comparisons(sum(counts.values()))})"


def _what_happened(comparisons: list[Comparison]) -> str:
    counts = count_words(comparisons)
    groups = list(dict.fromkeys(each.group for each in comparisons))
    if counts["helps"] == len(comparisons):
        whom = {1: groups[0], 2: "both minority groups"}.get(len(groups), f"all {len(groups)} minority groups")
        return f"helped {whom} with every downstream model"
    parts = [f"helped in {counts['helps']} of {_these(comparisons)}"]
    if counts["no evidence"]:
        parts.append(f"showed no evidence of help or harm in {counts['no evidence']}")
    if counts["harms"]:
        parts.append(f"harmed in {counts['harms']} ({_named(each for each in comparisons if each.word == 'harms')})")
    if counts["insufficient"]:
        parts.append(f"could not be judged in {counts['insufficient']}")
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _change(judged: list[Comparison]) -> str:
    verdicts = [each.verdict for each in judged if each.verdict]
    values = _range([signed(value) for value in sorted(verdict.difference for verdict in verdicts)])
    low, high = min(verdict.low for verdict in verdicts), max(verdict.high for verdict in verdicts)
    plural = "" if len(verdicts) == 1 else "s"
    return f"AUROC changed by {values} (95 % interval{plural} from {signed(low)} to {signed(high)})"


def _gap(comparisons: list[Comparison]) -> list[str]:
    gaps = [each.gap for each in comparisons if each.gap and each.gap.value is not None]
    if not gaps:
        return ["no gap to pooled real rows could be shown, so no share of it is given"]
    values = _range([percent(value) for value in sorted(gap.value for gap in gaps if gap.value is not None)])
    bounds = [(gap.low, gap.high) for gap in gaps if gap.low is not None and gap.high is not None]
    where = "" if len(gaps) == len(comparisons) else f", which {len(gaps)} of {_comparisons(len(comparisons))} show,"
    text = f"of the gap to pooled real rows{where} this closes {values} %"
    if bounds:
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        text += f" (interval{'' if len(gaps) == 1 else 's'} from {percent(low)} to {percent(high)})"
    return [text]


def _range(ordered: list[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
