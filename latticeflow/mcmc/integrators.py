"""Symplectic, reversible integrators of Hamilton's equations, as tables of coefficients.

A step of size e alternates kicks `p += k e F(x)` and drifts `x += d e p`. The tables are palindromic, so that a step is
reversible; it keeps the phase-space volume. The energy violation of a trajectory of fixed length goes as `e^order`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Integrator:
    """One step: `kicks[0], drifts[0], kicks[1], ..., kicks[-1]`; the coefficients of either kind add up to 1.

    The last kick of a step and the first of the next use one force, so a step costs `len(drifts)` of them.
    """

    order: int
    kicks: tuple[float, ...]
    drifts: tuple[float, ...]


INTEGRATORS: dict[str, Integrator] = {
    # Velocity Verlet: L. Verlet, Phys. Rev. 159 (1967) 98.
    "leapfrog": Integrator(2, (0.5, 0.5), (1.0,)),
    # Smallest error norm with two forces a step: Omelyan, Mryglod and Folk, Comput. Phys. Commun. 151 (2003) 272.
    "omelyan": Integrator(2, (0.1931833275037836, 0.6136333449924328, 0.1931833275037836), (0.5, 0.5)),
    # The same at fourth order with five forces a step, 4MN5FV: ibid.; hep-lat/0505020.
    "omelyan4": Integrator(
        4,
        (
            0.08398315262876693,
            0.6822365335719091,
            -0.26621968620067602,
            -0.26621968620067602,
            0.6822365335719091,
            0.08398315262876693,
        ),
        (0.2539785108410595, -0.03230286765269967, 0.55664871362328034, -0.03230286765269967, 0.2539785108410595),
    ),
}


def integrate(
    force: Callable[[Tensor], Tensor],
    position: Tensor,
    momentum: Tensor,
    *,
    integrator: Integrator,
    step_size: float | Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Return position and momentum after `steps` steps along `dx/dt = p`, `dp/dt = force(x)`.

    All have the shape of the position, `(replica, ...)`; `step_size` is a number or has a shape that broadcasts.
    """
    first, *kicks = integrator.kicks
    current = force(position)
    for _ in range(steps):
        momentum = momentum + first * step_size * current
        for drift, kick in zip(integrator.drifts, kicks, strict=True):
            position = position + drift * step_size * momentum
            current = force(position)
            momentum = momentum + kick * step_size * current
    return position, momentum
