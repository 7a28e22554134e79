"""Random streams that depend on what they are for, not on what was drawn before; where and how numbers are drawn."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor


def stream(
    seed: int, purpose: str, block: int = 0, *, process: int | None = None, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a generator for (seed, purpose, block), independent of all others, those of other processes too.

    Any block's numbers can be had again without those before it, which is what makes a resumed run the same run. The
    words are mixed by NumPy's SeedSequence. Raises ValueError for a negative seed or block.
    """
    if seed < 0 or block < 0:
        raise ValueError(f"seed and block must not be negative, got {seed} and {block}")
    own = () if process is None else (process,)
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), block], spawn_key=own)
    state = int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(state)


def device_options(generator: Generator | None) -> dict[str, Any]:
    """Return the keywords of a float64 tensor on the generator's device, without one on the CPU."""
    device = generator.device if generator is not None else torch.device("cpu")
    return {"dtype": torch.float64, "device": device}


def draw_options(generator: Generator | None) -> dict[str, Any]:
    """Return the keywords of float64 random numbers from this generator, on its device."""
    return {"generator": generator, **device_options(generator)}


@dataclass(frozen=True)
class SharedStream:
    """A stream that several processes have alike: each draws all rows of a batch, `total`, and keeps its own.

    It is no generator, so that draws which do not go through `own_rows` fail instead of being the same everywhere.
    """

    generator: Generator
    rows: slice
    total: int


def own_rows(
    draw: Callable[[int, Generator | None], Tensor], n: int, stream: Generator | SharedStream | None
) -> Tensor:
    """Return `draw(n, generator)`; of a shared stream these n rows, `(n, ...)`, out of all that it draws.

    Raises ValueError where n is not the number of rows that the process has.
    """
    if not isinstance(stream, SharedStream):
        return draw(n, stream)
    if n != stream.rows.stop - stream.rows.start:
        raise ValueError(f"{n} rows are asked for, this process has {stream.rows} of {stream.total}")
    return draw(stream.total, stream.generator)[stream.rows]
