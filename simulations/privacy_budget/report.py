"""The files of a sweep that people read, and what the terminal says."""

import io
from collections.abc import Sequence
from pathlib import Path

from mcrage.files import replace_file
from simulations.privacy_budget.page import write_page
from simulations.privacy_budget.results import CellResult
from simulations.privacy_budget.summary import findings, tidy
from simulations.privacy_budget.words import problems, sentences, table_of

TABLE = "privacy-budget.csv"
PAGE = "privacy-budget.html"


def write_report(cells: Sequence[CellResult], out: Path) -> str:
    """Writes :data:`TABLE` and :data:`PAGE`; returns the tables and sentences for a terminal."""
    text = io.StringIO()
    tidy(cells).to_csv(text, index=False, float_format="%.6g", lineterminator="\n")
    replace_file(out / TABLE, text.getvalue().encode(), mode=0o644)
    found = findings(cells)
    write_page(found, cells, out / PAGE)
    blocks = ["\n".join([table_of(each), "", *sentences(each)]) for each in found]
    return "\n\n".join([*blocks, *problems(cells)])
