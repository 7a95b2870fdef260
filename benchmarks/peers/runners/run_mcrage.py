"""CDDPM with its defaults, for as many steps as it is told."""

import pandas as pd
import torch
from harness import Sampler, Task, run

from benchmarks.peers.tables import exported, restored
from mcrage import CDDPM, TableSchema


def train(task: Task) -> tuple[Sampler, int | None]:
    """Trains for the steps that were asked for: how many fit a budget is found beforehand, by short runs of this."""
    torch.set_num_threads(1)
    schema = TableSchema.load(task.folder / "schema.json")
    model = CDDPM(steps=task.steps, random_state=task.seed).fit(restored(task.table, schema), schema)

    def sample(rows: int) -> pd.DataFrame:
        return exported(model.sample(rows), schema)

    return sample, (task.steps or 0) * model.batch_size_


if __name__ == "__main__":
    run(train)
