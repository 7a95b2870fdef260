"""Named random streams from one root seed.

Each use of randomness has a name, so that adding a draw in one place moves nothing elsewhere::

    rng.stream(seed, "rebalance", "site-3")

Streams are for simulations, sampling and training without privacy. Noise that protects real patients never comes
from here.
"""

import hashlib

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) that depends on the root seed and on every name."""
    digest = hashlib.sha256("\x1f".join([str(int(seed)), *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator of its own for this seed and these names."""
    return np.random.default_rng(derive(seed, *names))


def torch_stream(seed: int, *names: str | int, device: str = "cpu") -> torch.Generator:
    """A torch generator of its own for this seed and these names; a GPU's gives other numbers than the CPU's."""
    return torch.Generator(device).manual_seed(derive(seed, *names))
