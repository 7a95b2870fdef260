"""The groups that results are given for, and which test rows belong to them.

Everybody, every level of every sensitive feature, and every intersection of all of them that occurs at any hospital.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mcrage.data.groups import Group
from mcrage.data.schema import MISSING, TableSchema
from mcrage.evaluation.suppression import Cells, Family


class Strata:
    """Groups to report, in the schema's order.

    Args:
        codes: Codes of the sensitive features of each row (:func:`group_codes`), one array per test set.
        schema: The data dictionary.

    Attributes:
        groups: The groups; the first is everybody.
        atoms: Codes of the finest intersections; shape (A, number of sensitive features).
        membership: Whether a group contains an atom; shape (G, A).
        by: Positions of the groups to compare in a gap, by the name of the feature, or of all features together.
    """

    def __init__(self, codes: Sequence[NDArray[np.int64]], schema: TableSchema) -> None:
        columns = schema.sensitive
        self.atoms = np.unique(np.concatenate(list(codes)), axis=0)
        names = [
            [(column.name, MISSING if code < 0 else column.group_levels[code]) for code in self.atoms[:, position]]
            for position, column in enumerate(columns)
        ]
        of_atom = [Group(pairs) for pairs in zip(*names, strict=True)] if columns else [Group(())]
        self.groups = [Group(())]
        masks = [np.ones(len(self.atoms), dtype=bool)]
        self.by: dict[str, NDArray[np.int64]] = {}
        for position, column in enumerate(columns):
            levels = sorted(set(self.atoms[:, position].tolist()), key=lambda code: (code < 0, code))
            self.by[column.name] = len(self.groups) + np.arange(len(levels))
            masks += [self.atoms[:, position] == code for code in levels]
            self.groups += [Group(((column.name, MISSING if c < 0 else column.group_levels[c]),)) for c in levels]
        if len(columns) > 1:
            self.by[" × ".join(column.name for column in columns)] = len(self.groups) + np.arange(len(of_atom))
            masks += list(np.eye(len(of_atom), dtype=bool))
            self.groups += of_atom
        self.membership = np.array(masks)

    def rows(self, codes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Positions of the rows of each group."""
        atom = self._atom(codes)
        return [np.flatnonzero(mask[atom]) for mask in self.membership]

    def patients(
        self, codes: NDArray[np.int64], event: NDArray[np.bool_], patients: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Patients with and without the event in each atom; shape (A, 2)."""
        keys = np.unique(np.stack([self._atom(codes), ~event, patients]), axis=1)
        counts = np.zeros((len(self.atoms), 2), dtype=np.int64)
        np.add.at(counts, (keys[0], keys[1]), 1)
        return counts

    def cells(self, counts: Sequence[NDArray[np.int64]]) -> Cells:
        """Every group of every test set and, after them, of all test sets together, as what could be published.

        Args:
            counts: From :meth:`patients`, one array per test set.
        """
        num_sets, num_groups = len(counts), len(self.groups)
        membership = np.kron(np.eye(num_sets, dtype=bool), self.membership)
        inner = self._families()
        families: list[Family] = []
        scopes = num_sets
        if num_sets > 1:
            membership = np.vstack([membership, np.tile(self.membership, num_sets)])
            families = [
                (num_sets * num_groups + group, group + num_groups * np.arange(num_sets)) for group in range(num_groups)
            ]
            scopes += 1
        families += [(parent + s * num_groups, part + s * num_groups) for s in range(scopes) for parent, part in inner]
        return Cells(counts=np.concatenate(list(counts)), membership=membership, families=families, num_blocks=scopes)

    def _families(self) -> list[Family]:
        """Groups with the groups that divide them: a level into intersections, everybody into any partition."""
        families: list[Family] = [(0, members) for members in self.by.values()]
        if len(self.by) > 1:
            *single, finest = self.by.values()
            families += [(level, finest[self.membership[level]]) for members in single for level in members.tolist()]
        return families

    def _atom(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.atoms.shape[1]:
            return np.zeros(len(codes), dtype=np.int64)
        lookup = {tuple(atom): position for position, atom in enumerate(self.atoms.tolist())}
        return np.array([lookup[tuple(row)] for row in codes.tolist()], dtype=np.int64)
