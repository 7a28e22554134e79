"""Random streams that depend on what they are for, not on what was drawn before; where and how numbers are drawn."""

import zlib
from typing import Any

import numpy as np
import torch
from torch import Generator


def stream(seed: int, purpose: str, block: int = 0, *, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator for (seed, purpose, block), independent of all others.

    Any block's numbers can be had again without those before it, which is what makes a resumed run the same run. The
    words are mixed by NumPy's SeedSequence. Raises ValueError for a negative seed or block.
    """
    if seed < 0 or block < 0:
        raise ValueError(f"seed and block must not be negative, got {seed} and {block}")
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), block])
    state = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(state)


def device_options(generator: Generator | None) -> dict[str, Any]:
    """Return the keywords of a float64 tensor on the generator's device, without one on the CPU."""
    device = generator.device if generator is not None else torch.device("cpu")
    return {"dtype": torch.float64, "device": device}


def draw_options(generator: Generator | None) -> dict[str, Any]:
    """Return the keywords of float64 random numbers from this generator, on its device."""
    return {"generator": generator, **device_options(generator)}
