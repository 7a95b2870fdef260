"""``privacy-budget.html``: one self-contained page about what each epsilon costs each group.

As ``report.html`` it has no script, loads nothing, and its content security policy allows only its own style sheet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from mcrage.files import replace_file
from mcrage.render import html
from simulations.privacy_budget.figures import Reference, Series, by_epsilon, key
from simulations.privacy_budget.results import LOCAL, POOLED, CellResult
from simulations.privacy_budget.summary import NOTHING, Estimate, Findings, Line
from simulations.privacy_budget.words import problems, seeds_of, sentences, utility_row

_STYLE = """
.numbers.narrow { min-width: 0; }
.numbers.narrow th, .numbers.narrow td { white-space: nowrap; }
.scroll + .scroll { margin-top: 1.4rem; }
h3 { margin: 1.8rem 0 .6rem; font-size: 1.02rem; font-weight: 600; }
.says { margin: 0; padding-left: 1.1rem; max-width: 56rem; }
.says li { margin-bottom: .35rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0 0 1.2rem; padding: 0; list-style: none; }
.legend li { font-size: .86rem; }
.legend li { display: flex; align-items: center; gap: .5rem; }
.legend .swatch { width: 2.2rem; }
.level { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.level-name { font-style: italic; }
.zero { stroke: var(--faint); stroke-width: 1; }
.join { stroke-width: 2; }
.reach { stroke-width: 1.4; }
.at { stroke-width: 1.8; }
.cddpm { stroke: var(--orange); }
.marginal { stroke: var(--blue); }
.cddpm.shared, .cddpm.none { fill: var(--orange); }
.marginal.shared, .marginal.none { fill: var(--blue); }
.local { fill: var(--paper); }
line.local { stroke-dasharray: 5 4; }
line.reach.local { stroke-dasharray: none; }
"""


@dataclass(frozen=True)
class Figure:
    """A figure with its caption."""

    title: str
    about: str
    plot: Markup


@dataclass(frozen=True)
class Block:
    """Everything about hospitals of one data set and size.

    Attributes:
        title: Data set and size.
        seeds: How many, in words.
        says: Sentences.
        legend: Mark and name of each series.
        figures: What was measured, by epsilon.
        tables: For each group its name and rows of text: line, ε spent, AUROC, gain, gap closed, lost to noise.
    """

    title: str
    seeds: str
    says: list[str]
    legend: list[tuple[Markup, str]]
    figures: list[Figure]
    tables: list[tuple[str, list[list[str]]]]


def write_page(found: Sequence[Findings], cells: Sequence[CellResult], path: Path) -> None:
    """Writes the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (html._TEMPLATES / "report.css").read_text(encoding="utf-8") + _STYLE
    text = environment.get_template("page.html").render(
        style=Markup(style),
        style_hash=html._hash(style),
        blocks=[_block(each) for each in found],
        problems=problems(cells),
    )
    replace_file(path, text.encode(), mode=0o644)


def _block(found: Findings) -> Block:
    kinds = _kinds(found)
    return Block(
        title=found.title,
        seeds=seeds_of(found),
        says=sentences(found),
        legend=[(key(f"{generator} {noise}"), f"{generator}, {noise} noise") for generator, noise in kinds],
        figures=_figures(found, kinds),
        tables=[(group, [utility_row(found, line, group) for line in found.lines]) for group in found.groups],
    )


def _kinds(found: Findings) -> list[tuple[str, str]]:
    """Generators and places of the noise that are lines; the cells without noise end each of them."""
    kinds = sorted({(line.generator, line.noise) for line in found.lines if line.noise != "none"})
    alone = {line.generator for line in found.lines} - {generator for generator, _ in kinds}
    return [*kinds, *((generator, "none") for generator in sorted(alone))]


def _figures(found: Findings, kinds: Sequence[tuple[str, str]]) -> list[Figure]:
    """Utility and share closed by group, gaps between groups, and advantages of attacks."""
    figures = []
    for group in found.groups:
        name = "Everybody" if group == "all" else group
        levels = [
            Reference("own rows", found.of_rows(LOCAL, group, "auroc").value),
            Reference("all rows pooled", found.of_rows(POOLED, group, "auroc").value),
        ]
        figures.append(_figure(found, kinds, f"AUROC: {name}", "logistic regression", (group, "auroc"), levels))
        figures.append(_share_figure(found, kinds, group, name))
    for metric, title in (("auroc_gap", "AUROC gap"), ("tpr_gap", "True positive rate gap")):
        own, pooled = (found.of_rows(rows, found.feature, metric).value for rows in (LOCAL, POOLED))
        levels = [Reference("own rows", own), Reference("all rows pooled", pooled)]
        about = f"largest difference between groups of {found.feature}"
        figures.append(_figure(found, kinds, title, about, (found.feature, metric), levels))
    for metric, about in (("advantage_rows", "attack on generated rows"), ("advantage_loss", "attack on the loss")):
        figures.append(
            _figure(found, kinds, "Membership advantage", about, ("all", metric), [Reference("a guess", 0.0)])
        )
    return [figure for figure in figures if figure.plot]


def _figure(
    found: Findings,
    kinds: Sequence[tuple[str, str]],
    title: str,
    about: str,
    what: tuple[str, str],
    levels: Sequence[Reference],
) -> Figure:
    series = [_series(found, kind, [found.of_line(line, *what) for line in _along(found, kind)]) for kind in kinds]
    plot = by_epsilon(found.epsilons, series, label=f"{title}, {about}, by epsilon", references=levels)
    return Figure(title, about, plot or Markup())


def _share_figure(found: Findings, kinds: Sequence[tuple[str, str]], group: str, name: str) -> Figure:
    series = [_series(found, kind, [found.share(line, group) for line in _along(found, kind)]) for kind in kinds]
    levels = [Reference("own rows", 0.0), Reference("all rows pooled", 1.0)]
    about = "share of the gap from own to pooled rows"
    plot = by_epsilon(found.epsilons, series, label=f"{name}: {about}, by epsilon", references=levels)
    return Figure(f"Gap closed: {name}", about, plot or Markup())


def _along(found: Findings, kind: tuple[str, str]) -> list[Line]:
    """A line per epsilon, whether there are cells of it or not."""
    generator, noise = kind
    return [Line(generator=generator, noise="none" if math.isinf(e) else noise, epsilon=e) for e in found.epsilons]


def _series(found: Findings, kind: tuple[str, str], estimates: Sequence[Estimate]) -> Series:
    known = set(found.lines)
    kept = tuple(one if line in known else NOTHING for line, one in zip(_along(found, kind), estimates, strict=True))
    return Series(", ".join((kind[0], f"{kind[1]} noise")), " ".join(kind), kept)
