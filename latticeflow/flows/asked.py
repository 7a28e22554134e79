"""What gradients are computed for: autograd tells a function what could be asked for, and no more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class Asked:
    """Whether gradients of the weights of convolutions, and of the parameters of splines, are asked for."""

    weights = True
    parameters = True


@contextmanager
def without(kind: Literal["weights", "parameters"]) -> Iterator[None]:
    """Compute no gradients of these."""
    setattr(Asked, kind, False)
    try:
        yield
    finally:
        setattr(Asked, kind, True)
