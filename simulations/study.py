"""What an experiment is about: hospitals on disk, and what is known about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from client.pretend import pretend_private_folder
from mcrage import rng
from mcrage.config import Scalar
from mcrage.data.reader import read_table
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError
from simulations import datasets
from simulations.cohort import OTHER_RACES, Cohort, CohortConfig
from simulations.sites import SCHEMA_FILE, Hospitals, site_name, write_sites
from simulations.truth import MINORITY

COHORT = "cohort"
"""Name of the embedded data set."""

TEST_PATIENTS = 10_000
TEST_MINORITY_SHARE = 0.3
"""Share of the minority among the cohort's test patients: 3,000 of them make intervals tight enough to judge."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Hospitals with their files.

    Attributes:
        dataset: Name of the data.
        hospitals: Their tables, as the files hold them.
        files: The table of each hospital, in the order of ``hospitals.tables``.
        schema_path: The data dictionary.
        minority_groups: Groups that the headline is about; empty lets their share of the patients decide.
    """

    dataset: str
    hospitals: Hospitals
    files: Sequence[Path]
    schema_path: Path
    minority_groups: tuple[str, ...] = ()

    @property
    def schema(self) -> TableSchema:
        """The data dictionary."""
        return self.hospitals.schema

    @property
    def site_ids(self) -> list[str]:
        """The hospitals' names inside the federation: ``site-01`` and so on, as Flower's simulation calls them."""
        return [f"site-{number:02d}" for number in range(1, len(self.files) + 1)]

    def node_configs(self, folder: Path) -> list[dict[str, Scalar]]:
        """What each hospital's node is told about itself.

        Args:
            folder: Where pretended private folders are, made when they are not there.
        """
        return [
            {
                "site": site,
                "data-path": str(path.resolve()),
                "schema-path": str(self.schema_path.resolve()),
                "private-dir": str(pretend_private_folder(folder, site, path).resolve()),
            }
            for site, path in zip(self.site_ids, self.files, strict=True)
        ]


def hospitals_of(
    dataset: str, *, seed: int, cohort: CohortConfig | None = None, dealt: tuple[int | None, int | None] = (None, None)
) -> Hospitals:
    """The hospitals of a data set: simulated for :data:`COHORT`, else public ones.

    Args:
        dataset: Name of the data set.
        seed: Draws the cohort, or deals a public data set to pretend hospitals.
        cohort: Size of the cohort; its seed is replaced.
        dealt: Number of pretend hospitals and patients of each that a public data set is dealt to; None has defaults.

    Raises:
        ConfigError: If there is no such data set, or it has hospitals of its own or too few patients to be dealt so.
    """
    if dataset != COHORT:
        if dataset not in datasets.names():
            raise ConfigError(f"there is no data set '{dataset}'; there are {', '.join((COHORT, *datasets.names()))}")
        number, patients = dealt
        public = datasets.hospitals(dataset, seed=seed, num_sites=number, patients_per_site=patients)
        return _shuffled(public, seed=seed)
    size = CohortConfig(**(vars(cohort or CohortConfig()) | {"seed": seed}))
    others = {race: share * (1 - TEST_MINORITY_SHARE) for race, share in OTHER_RACES.items()}
    return Cohort(size).hospitals(test_patients=TEST_PATIENTS, test_races=others | {MINORITY: TEST_MINORITY_SHARE})


def _shuffled(hospitals: Hospitals, *, seed: int) -> Hospitals:
    """The same hospitals with their rows in another order.

    Rows without a patient id go to training or test by their position: another order is another split.
    """
    tables = {
        site: table.iloc[rng.stream(seed, "order", site).permutation(len(table))].reset_index(drop=True)
        for site, table in hospitals.tables.items()
    }
    return Hospitals(hospitals.schema, tables, hospitals.test)


def minority_of(dataset: str) -> tuple[str, ...]:
    """The groups that the headline of a data set is about; empty where shares decide."""
    return (f"race={MINORITY}",) if dataset == COHORT else ()


def written_study(
    dataset: str,
    folder: Path,
    *,
    seed: int,
    cohort: CohortConfig | None = None,
    dealt: tuple[int | None, int | None] = (None, None),
) -> Study:
    """A data set as files in a folder, one per hospital; sizes as :func:`hospitals_of` takes them."""
    hospitals = hospitals_of(dataset, seed=seed, cohort=cohort, dealt=dealt)
    files = write_sites(folder, hospitals)
    return Study(
        dataset=dataset,
        hospitals=hospitals,
        files=files,
        schema_path=folder / SCHEMA_FILE,
        minority_groups=minority_of(dataset),
    )


def own_study(schema_path: Path, files: Sequence[Path], *, minority_groups: Sequence[str] = ()) -> Study:
    """A person's own files, one per hospital, read where they are.

    Raises:
        SchemaError: If the schema is not valid, or lacks what an experiment needs.
        DataError: With every problem of the first file that does not follow it.
        ConfigError: If two hospitals have one name.
    """
    schema = TableSchema.load(schema_path)
    tables: dict[str, pd.DataFrame] = {}
    for path in files:
        table = read_table(path, schema)
        name = site_name(table, schema, default=path.stem)
        if name in tables:
            raise ConfigError(f"two files are of the hospital '{name}'; give each hospital one file")
        tables[name] = table
    return Study(
        dataset=schema.name or "own files",
        hospitals=Hospitals(schema, tables),
        files=files,
        schema_path=schema_path,
        minority_groups=tuple(minority_groups),
    )
