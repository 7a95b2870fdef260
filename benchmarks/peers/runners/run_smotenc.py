"""SMOTENC of imbalanced-learn on 20,000 training rows: it has no model, so that all its time is sampling."""

import pandas as pd
from harness import MISSING, Sampler, Task, filled, run
from imblearn.over_sampling import SMOTENC

ROWS = 20_000


def train(task: Task) -> tuple[Sampler, int | None]:
    """Picks the rows to interpolate."""
    table = filled(task).sample(min(ROWS, len(task.table)), random_state=task.seed)

    def sample(rows: int) -> pd.DataFrame:
        # One class holds every row and grows; the other, of a single row, is there because there have to be two.
        both = pd.concat([table, table.iloc[:1]], ignore_index=True)
        classes = [1] * len(table) + [0]
        sampler = SMOTENC(task.categories, sampling_strategy={1: len(table) + rows}, random_state=task.seed)
        made = sampler.fit_resample(both, classes)[0].iloc[len(both) :]
        return made.mask(made == MISSING)

    return sample, None


if __name__ == "__main__":
    run(train)
