"""ctgan with its defaults; training ends with the epoch that lies nearest to the budget."""

from collections.abc import Iterator

import pandas as pd
import torch
from ctgan import CTGAN
from ctgan.synthesizers import ctgan as module
from harness import MISSING, EpochBudget, Sampler, Task, filled, run


def train(task: Task) -> tuple[Sampler, int | None]:
    """Trains until the budget, or for as many epochs as asked for."""
    torch.set_num_threads(1)
    budget = EpochBudget(task.budget)
    epochs = 0

    def until_spent(numbers: range, **_: object) -> Iterator[int]:
        nonlocal epochs
        budget.restart_epoch()
        for number in numbers:
            yield number
            epochs = number + 1
            if not task.steps and budget.is_spent():
                return

    module.tqdm = until_spent  # its loop over epochs has no other hook
    model = CTGAN(epochs=task.steps or 300, enable_gpu=False)
    model.set_random_state(task.seed)
    model.fit(filled(task), task.categories)

    def sample(rows: int) -> pd.DataFrame:
        made = model.sample(rows)
        return made.mask(made == MISSING)

    return sample, epochs * len(task.table)


if __name__ == "__main__":
    run(train)
