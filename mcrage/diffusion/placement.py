"""Where a network works, and in which precision.

On a GPU it works in a context in which new tensors are made there. On the CPU there is none, since it would cost
every call of torch a little.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.errors import ConfigError

PRECISIONS = ("float32", "bfloat16")


def require_placement(device: str, precision: str) -> None:
    """Raises a ConfigError unless there are such a device and such a precision."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be 'float32' or 'bfloat16', got '{precision}'")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if device not in ("cpu", *gpus, *(["cuda"] if gpus else [])):
        raise ConfigError(f"there is no device '{device}' here; use 'cpu'")


@contextmanager
def placed(network: RowNetwork, diffusion: TabularDiffusion, device: str, precision: str) -> Iterator[None]:
    """Both work as asked while this is open; afterwards they are back on the CPU, in float32."""
    moved = () if device == "cpu" else (network, diffusion)
    network.denoiser.in_bfloat16 = precision == "bfloat16"
    for part in moved:
        part.to(device)
    try:
        with torch.device(device) if moved else nullcontext():
            yield
    finally:
        network.denoiser.in_bfloat16 = False
        for part in moved:
            part.to("cpu")
