"""Which groups are too small to be shown, and which others must go with them.

A published group reveals how many of its patients have the event and how many do not: the metrics and n together give
both away. So a group is shown only with enough patients of either kind, and only if no smaller group follows from
what is shown, by subtraction or by any other sum (CMS cell size suppression policy: no cell of 1 to 10 may be reported
nor derivable).

Hidden groups all carry the same reason: saying which of them are small would reveal the others.

Shape: A atoms (the finest groups of each test set) and C cells (what could be published: sums of atoms). Cells come in
blocks of equal length, one per test set and a last one for all test sets together, with the same groups in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from mcrage.data.groups import MINIMUM_CELL

REASON = (
    "insufficient: fewer than {minimum} patients with or without the event in this group, or in one that could be "
    "worked out from it"
)
_TOLERANCE = 1e-6

Family = tuple[int, NDArray[np.int64]]
"""A cell and the cells that add up to it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """What could be published, as sums of atoms.

    Attributes:
        counts: Patients with and without the event in each atom; shape (A, 2).
        membership: Whether a cell contains an atom; shape (C, A).
        families: Cells with the cells that add up to them.
        num_blocks: Test sets and, if there are several, one more for all of them together.
    """

    counts: NDArray[np.int64]
    membership: NDArray[np.bool_]
    families: Sequence[Family]
    num_blocks: int = 1

    @property
    def totals(self) -> NDArray[np.int64]:
        """Patients with and without the event in each cell; shape (C, 2)."""
        return np.asarray(self.membership.astype(np.int64) @ self.counts)


def hidden_cells(cells: Cells, *, minimum: int = MINIMUM_CELL) -> NDArray[np.bool_]:
    """Cells that must not be published; shape (C,).

    Starts from the cells with fewer than ``minimum`` patients with or without the event and goes on until no small
    hidden cell follows from what is shown:

    1. Within a test set, the smallest shown cell of a family is hidden for as long as the hidden ones of that family
       add up to a small number, and a cell of the proof for as long as a small cell has one possible value.
    2. Where test sets together give a cell of one of them away, another test set hides the same groups: whatever one
       of the two has more of, the other may have less of.
    """
    hidden = np.asarray((cells.totals < minimum).any(axis=1))
    blocks = np.arange(len(hidden)).reshape(cells.num_blocks, -1)
    for block in blocks:
        _close(cells, hidden, minimum, within=block)
    everywhere = blocks.ravel()
    while cells.num_blocks > 1:
        exposed = _exposed(cells, hidden, minimum, within=everywhere)
        if exposed is None:
            break
        test_set = exposed.cell // blocks.shape[1]
        partner = _partner(cells, hidden, test_set)
        if partner is None:
            hidden[_breaking(exposed, cells, hidden)] = True
        else:
            hidden[blocks[partner]] |= hidden[blocks[test_set]]
            _close(cells, hidden, minimum, within=blocks[partner])
    return hidden


@dataclass(frozen=True, kw_only=True, eq=False)
class _Exposure:
    """A hidden cell and the shown cells that give it away."""

    cell: int
    proof: NDArray[np.int64]


def _close(cells: Cells, hidden: NDArray[np.bool_], minimum: int, *, within: NDArray[np.int64]) -> None:
    """Hides more of these cells, in place, until they give none of themselves away."""
    while (exposed := _exposed(cells, hidden, minimum, within=within)) is not None:
        hidden[_breaking(exposed, cells, hidden)] = True


def _partner(cells: Cells, hidden: NDArray[np.bool_], test_set: int) -> int | None:
    """The test set that hides the same groups with the fewest more hidden, the smallest of equals; None if none can."""
    of_set = hidden.reshape(cells.num_blocks, -1)[:-1]
    if test_set == len(of_set):
        return None
    more = (of_set[test_set] & ~of_set).sum(axis=1)
    sizes = cells.totals.sum(axis=1).reshape(cells.num_blocks, -1)[:-1].max(axis=1)
    able = [each for each in np.lexsort((sizes, more)).tolist() if more[each]]
    return able[0] if able else None


def _breaking(exposed: _Exposure, cells: Cells, hidden: NDArray[np.bool_]) -> int:
    """The smallest cell of a proof that the other shown cells do not give away: hiding one that they do is in vain."""
    sizes = cells.totals[exposed.proof].sum(axis=1)
    proof = exposed.proof[np.argsort(sizes, kind="stable")].tolist()
    membership = cells.membership.astype(np.float64)
    for cell in proof:
        others = membership[~hidden & (np.arange(len(hidden)) != cell)].T
        shares = np.linalg.lstsq(others, membership[cell], rcond=None)[0]
        if np.abs(others @ shares - membership[cell]).max() > _TOLERANCE:
            return int(cell)
    return int(proof[0])


def _exposed(cells: Cells, hidden: NDArray[np.bool_], minimum: int, *, within: NDArray[np.int64]) -> _Exposure | None:
    """A hidden small cell, or a small sum of hidden cells, that these cells give away; None if there is none."""
    totals = cells.totals
    inside = np.isin(np.arange(len(hidden)), within)
    for parent, children in cells.families:
        rest = totals[children[hidden[children]]].sum(axis=0)
        if inside[[parent, *children]].all() and not hidden[parent] and ((rest > 0) & (rest < minimum)).any():
            shown = children[~hidden[children]]
            return _Exposure(cell=int(children[hidden[children]][0]), proof=shown if len(shown) else np.array([parent]))
    solved = (_solved(cells, hidden, minimum, within=within, label=label) for label in range(totals.shape[1]))
    return next(filter(None, solved), None)


def _solved(
    cells: Cells, hidden: NDArray[np.bool_], minimum: int, *, within: NDArray[np.int64], label: int
) -> _Exposure | None:
    """A hidden small cell that has one possible number of patients with (or without) the event; None if none has.

    What is possible is bounded by linear programs over the atoms. Each solution is a table that agrees with everything
    shown, so it clears every cell in which it differs from the truth, and few programs are solved.
    """
    totals = cells.totals[:, label]
    shown = within[~hidden[within]]
    unclear = within[hidden[within] & (totals[within] > 0) & (totals[within] < minimum)]
    if not len(shown):
        return None
    membership = cells.membership.astype(np.float64)
    atoms = cells.membership[within].any(axis=0)
    known, bounds = membership[shown][:, atoms], (0, int(totals.max()) + minimum)
    while len(unclear):
        cell, proof = int(unclear[0]), shown
        for sign in (1, -1):
            found = linprog(sign * membership[cell, atoms], A_eq=known, b_eq=totals[shown], bounds=bounds)
            proof = shown[np.abs(found.eqlin.marginals) > _TOLERANCE]
            other = membership[unclear][:, atoms] @ found.x
            unclear = unclear[np.abs(other - totals[unclear]) < 1 - _TOLERANCE]
        if len(unclear) and unclear[0] == cell:
            return _Exposure(cell=cell, proof=proof)
    return None
