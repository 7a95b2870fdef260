"""What a sweep says, in tables and sentences for a terminal; the page has the same sentences."""

import math
from collections.abc import Iterator, Sequence

from mcrage.render.text import number, signed
from simulations.privacy_budget.results import LOCAL, POOLED, CellResult
from simulations.privacy_budget.summary import FEWEST_SEEDS, Estimate, Findings, Line

_ATTACKS = ("advantage_rows", "advantage_loss")


def table_of(found: Findings) -> str:
    """Both tables of one data set and size."""
    return "\n".join([f"{found.title}; {seeds_of(found)}", "", *_utility(found), "", *_fairness(found)])


def sentences(found: Findings) -> list[str]:
    """Which generator to choose at each epsilon, which rows do harm, whom noise costs more, and on what that rests."""
    lines = [*_choices(found), *_harms(found), *_unequal(found)]
    if len(found.seeds) < FEWEST_SEEDS:
        lines.append(
            f"With {seeds_of(found)} there is no interval: another draw of the hospitals may say otherwise. "
            f"{FEWEST_SEEDS} seeds or more give one."
        )
    return lines


def problems(cells: Sequence[CellResult]) -> list[str]:
    """A line for every cell that came to nothing."""
    found = [cell for cell in cells if cell.problem]
    return [f"{_named(cell)}: {cell.problem.splitlines()[0]}" for cell in found]


def shown(estimate: Estimate, *, sign: bool = False, percent: bool = False) -> str:
    """A value and its interval; a dash where there is none."""
    if not math.isfinite(estimate.value):
        return "-"

    def write(value: float) -> str:
        if percent:
            return f"{100 * value:.0f}".replace("-", "−")
        return signed(value) if sign else number(value)

    unit = " %" if percent else ""
    if not math.isfinite(estimate.low):
        return write(estimate.value) + unit
    return f"{write(estimate.value)}{unit} [{write(estimate.low)}, {write(estimate.high)}]"


def _utility(found: Findings) -> list[str]:
    heads = ["AUROC of logistic regression", "ε spent", "mean", "over own rows", "gap closed", "lost to noise"]
    rows = []
    for group in found.groups:
        pooled = found.of_rows(POOLED, group, "gap_to_pooled")
        rows.append([group, "", "", "", "", ""])
        rows.append(["  own rows", "", shown(found.of_rows(LOCAL, group, "auroc")), "", "0 %", ""])
        rows.append(
            [
                "  all rows pooled",
                "",
                shown(found.of_rows(POOLED, group, "auroc")),
                shown(pooled, sign=True),
                "100 %",
                "",
            ]
        )
        rows += [
            [f"  {name}", *figures] for name, *figures in (utility_row(found, each, group) for each in found.lines)
        ]
    return aligned(heads, rows)


def utility_row(found: Findings, line: Line, group: str) -> list[str]:
    """A line's name, ε spent, AUROC, gain over own rows, share of the gap closed, and share lost to noise."""
    return [
        found.name_of(line),
        spent_in_words(found.spent(line)),
        shown(found.of_line(line, group, "auroc")),
        shown(found.of_line(line, group, "gain"), sign=True),
        shown(found.share(line, group), percent=True),
        shown(found.lost(line, group), percent=True),
    ]


def _fairness(found: Findings) -> list[str]:
    feature = found.feature
    heads = ["", f"AUROC gap ({feature})", f"TPR gap ({feature})", "advantage, rows", "advantage, loss"]
    rows = []
    for name, rows_ in (("own rows", LOCAL), ("all rows pooled", POOLED)):
        gaps = [shown(found.of_rows(rows_, feature, f"{metric}_gap")) for metric in ("auroc", "tpr")]
        rows.append([name, *gaps, "", ""])
    for line in found.lines:
        gaps = [shown(found.of_line(line, feature, f"{metric}_gap")) for metric in ("auroc", "tpr")]
        attacks = [shown(found.of_line(line, "all", attack), sign=True) for attack in _ATTACKS]
        rows.append([found.name_of(line), *gaps, *attacks])
    return aligned(heads, rows)


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they have to be."""
    widths = [max(len(row[place]) for row in (heads, *rows)) for place in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
    ]


def _choices(found: Findings) -> Iterator[str]:
    """For each epsilon and each group, the generator with the highest AUROC, if it beats the hospitals' own rows."""
    for epsilon in found.epsilons:
        lines = [line for line in found.lines if line.epsilon == epsilon]
        parts = [_choice(found, lines, group) for group in found.groups]
        yield f"{'Without noise' if math.isinf(epsilon) else f'At ε = {epsilon:g}'} choose {'; '.join(parts)}."


def _choice(found: Findings, lines: Sequence[Line], group: str) -> str:
    whom = "for everybody" if group == "all" else f"for {group}"
    scored = [(found.of_line(line, group, "gain"), line) for line in lines]
    known = sorted(((gain, line) for gain, line in scored if gain.seeds), key=lambda pair: -pair[0].value)
    if not known or known[0][0].value <= 0:
        return f"{whom} the hospitals' own rows"
    gain, best = known[0]
    doubt = "" if gain.is_above or gain.seeds < FEWEST_SEEDS else ", which is no evidence of a gain"
    beside = ""
    if len(known) > 1 and not found.difference(best, known[1][1], group).is_above and gain.seeds >= FEWEST_SEEDS:
        beside = f", though no better for certain than {_short(known[1][1])}"
    return f"{whom} {_short(best)} ({shown(gain, sign=True)} over own rows{doubt}{beside})"


def _harms(found: Findings) -> Iterator[str]:
    for line in found.lines:
        worse = []
        for group in found.groups:
            gain = found.of_line(line, group, "gain")
            if gain.is_below or (gain.seeds and gain.seeds < FEWEST_SEEDS and gain.value < 0):
                worse.append(f"{'everybody' if group == 'all' else group} ({shown(gain, sign=True)})")
        if worse:
            word = "does worse than the hospitals' own rows for"
            yield f"{_sentence(line.name)} {word} {', '.join(worse)}."


def _unequal(found: Findings) -> Iterator[str]:
    """For each minority, where noise costs it more than everybody and where less, as far as seeds can tell."""
    for group in found.minorities:
        costs = [(line, found.lost_more(line, group)) for line in found.lines]
        known = [(line, cost) for line, cost in costs if cost.seeds >= FEWEST_SEEDS]
        more, less = _listed(known, above=True), _listed(known, above=False)
        parts = [f"{word} than everybody with {lines}" for word, lines in (("more", more), ("less", less)) if lines]
        if parts:
            yield f"Noise costs {group} {', and '.join(parts)}."
        elif known:
            yield f"That noise costs {group} more than everybody, or less, is not certain of any line."


def _listed(costs: Sequence[tuple[Line, Estimate]], *, above: bool) -> str:
    certain = [(line, cost) for line, cost in costs if (cost.is_above if above else cost.is_below)]
    return "; ".join(f"{line.name} ({shown(cost, sign=True)} AUROC)" for line, cost in certain)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _short(line: Line) -> str:
    return line.generator if math.isinf(line.epsilon) else f"{line.generator} with {line.noise} noise"


def spent_in_words(value: float) -> str:
    """An epsilon."""
    return "∞" if math.isinf(value) else f"{value:.2f}"


def seeds_of(found: Findings) -> str:
    """How many seeds, in words."""
    return f"{len(found.seeds)} seed{'' if len(found.seeds) == 1 else 's'}"


def _named(cell: CellResult) -> str:
    place = cell.cell
    epsilon = "inf" if place.epsilon is None else f"{place.epsilon:g}"
    return f"{place.dataset}, seed {place.seed}, {place.generator}, {place.noise} noise, epsilon {epsilon}"
