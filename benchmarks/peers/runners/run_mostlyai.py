"""mostlyai-engine: the autoregressive TabularARGN in its medium size, with its defaults.

Two settings are in its favour: rare values are not protected, and training beyond the first epoch ends with an epoch,
because the engine then keeps the weights of whole epochs only.
"""

from typing import Any

import pandas as pd
import torch
from harness import EpochBudget, Sampler, Task, run
from mostlyai import engine


def train(task: Task) -> tuple[Sampler, int | None]:
    """Trains until the budget, or for as many epochs as asked for."""
    torch.set_num_threads(1)
    engine.set_random_state(task.seed)
    budget = EpochBudget(task.budget)
    place = {"workspace_dir": task.folder / "workspace"}
    kinds = dict.fromkeys(task.categories, "TABULAR_CATEGORICAL")
    engine.split(tgt_data=task.table, tgt_encoding_types=kinds, **place)
    engine.analyze(value_protection=False, **place)
    engine.encode(**place)
    samples, epochs = [0], []
    budget.restart_epoch()

    def update(*, message: dict[str, Any] | None = None, **_: object) -> dict[str, bool]:
        if message:
            samples[0] = message["samples"]
        if not message or message.get("val_loss") is None:
            return {"stopExecution": not task.steps and not epochs and budget.is_over()}
        epochs.append(message["epoch"])
        return {"stopExecution": epochs[-1] >= task.steps if task.steps else budget.is_spent()}

    engine.train(update_progress=update, **place)

    def sample(rows: int) -> pd.DataFrame:
        engine.generate(sample_size=rows, **place)
        files = sorted((task.folder / "workspace" / "SyntheticData").glob("*.parquet"))
        return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)

    return sample, samples[0]


if __name__ == "__main__":
    run(train)
