"""Speed of the generator with default settings, as a share of what its matrix products alone would allow.

    python -m benchmarks.speed [--repeats 5] [--steps 100] [--rows 20480] [--sample-rows 4096]

In float32, and in bfloat16 where the processor has instructions for it. The table has the columns of diabetes-130:
its first rows where MCRAGE_DATA names the folder of data sets, else simulated ones. The bare loop does every product
of the same linear layers, in the same shapes and dtype, with nothing in between: ``out = x wᵀ``, and in training the
gradients of inputs (where one is needed) and weights. Times are CPU seconds of one thread, medians of repeats in
which both take turns; a step is what a longer training takes beyond a shorter one. Memory is what the whole training
or sampling adds at its peak.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.generator import tables
from benchmarks.machine import NO_BF16, added_memory_mb, cpu_seconds, describe, described, markdown
from mcrage import CDDPM, TableSchema, rng
from mcrage.data.schema import Column
from simulations.datasets import diabetes130

FEW_STEPS = 10


@dataclass(frozen=True)
class Product:
    """One call of a linear layer.

    Attributes:
        layer: Tells layers of the same shape apart, whose weights lie in different places.
        rows: Rows of its input.
        fan_in: Columns of its input.
        fan_out: Columns of its output.
        dtype: What the product is computed in.
        for_inputs: Whether the gradient of its input is needed.
        for_weights: Whether that of its weights is.
    """

    layer: int
    rows: int
    fan_in: int
    fan_out: int
    dtype: torch.dtype
    for_inputs: bool
    for_weights: bool


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=20_480)
    parser.add_argument("--sample-rows", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table, schema, origin = table_of(options.rows)
    lines = []
    for precision in ("float32", *(() if describe()["bf16"] == NO_BF16 else ("bfloat16",))):
        lines.append(training(table, schema, precision, steps=options.steps, repeats=options.repeats))
        model = CDDPM(steps=FEW_STEPS, precision=precision).fit(table, schema)
        lines.append(sampling(model, rows=options.sample_rows, repeats=options.repeats))
    print(f"{described()}; one thread, medians of {options.repeats}, {origin}\n\n{markdown(lines)}")


def training(
    table: pd.DataFrame, schema: TableSchema, precision: str, *, steps: int, repeats: int
) -> dict[str, object]:
    """The table's line about training steps."""

    def fit(number: int) -> CDDPM:
        return CDDPM(steps=number, precision=precision).fit(table, schema)

    with recorded() as products:
        model, memory = added_memory_mb(lambda: fit(steps))
    called = {product.layer for product in products}
    layers = {name: layer for name, layer in model.network_.denoiser.named_modules() if isinstance(layer, nn.Linear)}
    if silent := [name for name, layer in layers.items() if id(layer) not in called]:
        raise SystemExit(f"layers {', '.join(silent)} are not called as modules: the bare loop would miss them")
    bare = bare_loop(products)
    steps_only, bare_only = [], []
    for _ in range(repeats):
        longer = seconds(lambda: fit(FEW_STEPS + steps))
        steps_only.append(longer - seconds(lambda: fit(FEW_STEPS)))
        bare_only.append(seconds(bare))
    name = f"training in {precision}, {steps} steps of {model.batch_size_} rows"
    return line(name, steps * model.batch_size_, steps_only, bare_only, memory)


def sampling(model: CDDPM, *, rows: int, repeats: int) -> dict[str, object]:
    """The table's line about generated rows."""
    with recorded() as products:
        _, memory = added_memory_mb(lambda: model.sample(rows))
    bare = bare_loop(products)
    whole, bare_only = [], []
    for _ in range(repeats):
        whole.append(seconds(lambda: model.sample(rows)))
        bare_only.append(seconds(bare))
    return line(
        f"sampling {rows} rows in {model.precision}, {model.sampling_steps} steps", rows, whole, bare_only, memory
    )


def line(name: str, rows: int, ours: list[float], bare: list[float], memory: float | None) -> dict[str, object]:
    """Rates and their ratio, a median over repeats of the ratio within each."""
    ratio = statistics.median(alone / whole for alone, whole in zip(bare, ours, strict=True))
    return {
        "what": name,
        "rows/CPU-s": round(rows / statistics.median(ours)),
        "its matrix products alone, rows/CPU-s": round(rows / statistics.median(bare)),
        "ratio": f"{ratio:.3f}",
        "memory MB": None if memory is None else round(memory),
    }


@contextmanager
def recorded() -> Iterator[list[Product]]:
    """Collects every call of a linear layer while it is open."""
    products: list[Product] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            rows, needed = inputs[0].shape[:-1].numel(), inputs[0].requires_grad
            shape = (rows, layer.in_features, layer.out_features)
            products.append(Product(id(layer), *shape, output.dtype, needed, output.requires_grad))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield products
    finally:
        handle.remove()


def bare_loop(products: list[Product]) -> Callable[[], None]:
    """A function that does these products and nothing else."""
    operands = {product: _operands(product) for product in dict.fromkeys(products)}

    def run() -> None:
        for product in products:
            x, w, y, *_ = operands[product]
            torch.mm(x, w.t(), out=y)
        for product in reversed(products):
            x, w, y, of_x, of_w = operands[product]
            if product.for_inputs:
                torch.mm(y, w, out=of_x)
            if product.for_weights:
                torch.mm(y.t(), x, out=of_w)

    return run


def _operands(product: Product) -> tuple[Tensor, ...]:
    """Input, weights and output, and places for the gradients of the first two."""
    draw = rng.torch_stream(0, "speed")
    x = torch.randn(product.rows, product.fan_in, generator=draw).to(product.dtype)
    w = torch.randn(product.fan_out, product.fan_in, generator=draw).div(product.fan_in**0.5).to(product.dtype)
    return x, w, x @ w.t(), torch.empty_like(x), torch.empty_like(w)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    started = cpu_seconds()
    work()
    return cpu_seconds() - started


def table_of(rows: int) -> tuple[pd.DataFrame, TableSchema, str]:
    """Rows with the columns of diabetes-130, and where they are from."""
    if "MCRAGE_DATA" in os.environ:
        train, _, schema = tables()
        return train.iloc[:rows], schema, "rows of diabetes-130"
    return simulated(rows, diabetes130.SCHEMA), diabetes130.SCHEMA, "simulated rows with the columns of diabetes-130"


def simulated(rows: int, schema: TableSchema) -> pd.DataFrame:
    """Independent columns, each level half as frequent as the one before it."""
    return pd.DataFrame({column.name: _column(rows, column) for column in schema.modelled})


def _column(rows: int, column: Column) -> pd.Series:
    draw = rng.stream(0, "speed", column.name)
    if column.is_numeric:
        return pd.Series(draw.integers(int(column.low), int(column.high), rows, endpoint=True)).astype(
            column.pandas_dtype
        )
    codes = (draw.geometric(0.5, rows) - 1) % len(column.levels)
    if column.kind == "boolean":
        return pd.Series(codes == 1).astype(column.pandas_dtype)
    return pd.Series(pd.Categorical.from_codes(codes, categories=list(column.levels), ordered=column.kind == "ordinal"))


if __name__ == "__main__":
    main()
