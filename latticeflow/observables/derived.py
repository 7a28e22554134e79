"""Quantities that are functions of several ensemble means: susceptibilities, cumulants, masses, Creutz ratios."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.actions import Action, HolonomyMarginal, ScalarAction, SchwingerAction
from latticeflow.exact import schwinger_dyson_residual

Array = NDArray[np.float64]
MASSES = ("effective_mass", "pion_effective_mass", "eta_effective_mass", "pcac_mass")
FROM_ONE = frozenset({"wilson_loops", "creutz_ratios", *MASSES})


@dataclass(frozen=True)
class Derived:
    """A function of ensemble means, for `gamma_derived`.

    `series` turns the stored arrays of `inputs`, `(chain, draw, *own_shape)` each, into K arrays `(chain, draw)`;
    `function` maps their K means to the values `(*shape)`, NaN where they are not defined.
    """

    inputs: tuple[str, ...]
    series: Callable[..., list[Array]]
    function: Callable[[Array], Array]


def derived(action: Action, shape: Sequence[int]) -> dict[str, Derived]:
    r"""Return the derived quantities of the action's theory on a lattice of this shape by name.

    Scalar, M being the magnetisation and V the volume:

        susceptibility        V (<M^2> - <|M|>^2)
        binder_cumulant       1 - <M^4> / (3 <M^2>^2)
        correlation_length    second moment, see `second_moment_length`
        effective_mass        of `two_point`, nothing subtracted
        schwinger_dyson       what is left of the identity `<phi dS/dphi> = 1`; 0 in an exact ensemble

    Gauge: `creutz_ratios`, see there. With fermions also, c being the condensate of a configuration,

        chiral_susceptibility_disconnected    V (<c^2> - <c>^2)
        eta_correlator                        pion_correlator - flavours * eta_disconnected, t = 0..L0//2
        pion_effective_mass, eta_effective_mass
        pcac_mass                             see `pcac_mass`

    The masses are those at t = 1..L0//2; a lattice of one time slice has none. Densities have no derived quantities.
    """
    bare = action.action if isinstance(action, HolonomyMarginal) else action
    if bare.field_name == "x":
        return {}
    found = _scalar(bare, tuple(shape)) if isinstance(bare, ScalarAction) else _gauge(tuple(shape))
    if isinstance(bare, SchwingerAction):
        found |= _fermions(bare.flavours, tuple(shape))
    return {name: replace(quantity, function=partial(_finite, quantity.function)) for name, quantity in found.items()}


def first_index(name: str) -> int:
    """Return the length or distance that the first element of an observable or derived quantity stands for.

    1 for loops, Creutz ratios and masses, whose sides and distances begin with 1; 0 for correlators.
    """
    return int(name in FROM_ONE)


def effective_mass(correlator: ArrayLike, *, extent: int | None = None) -> Array:
    r"""Return the mass at t = 1..L//2 of an even correlator on a periodic axis, `(..., L//2 + 1) -> (..., L//2)`.

    `m(t) = arccosh[ (C(t-1) + C(t+1)) / (2 C(t)) ]` with `C(t) = C(L - t)` beyond the middle: exact for
    `cosh(m (t - L/2))`. NaN where the ratio is below 1 or `C(t) <= 0`. `extent` is L, even if it is not given. Raises
    ValueError for an extent that does not belong to the number of distances.
    """
    values = np.asarray(correlator, dtype=np.float64)
    half = values.shape[-1] - 1
    extent = 2 * half if extent is None else extent
    if extent // 2 != half:
        raise ValueError(
            f"effective_mass: {half + 1} distances belong to extents {2 * half}, {2 * half + 1}, got {extent}"
        )
    behind, here, ahead = _neighbours(values, extent, 1)
    with np.errstate(all="ignore"):
        ratio = (behind + ahead) / (2 * here)
        return np.arccosh(np.where((here > 0) & (ratio >= 1), ratio, np.nan))


def pcac_mass(pion: ArrayLike, axial: ArrayLike, *, extent: int) -> Array:
    r"""Return the quark mass at t = 1..L0//2 from the divergence of the axial current, `(..., L0//2)`.

    `m(t) = -(C_A(t+1) - C_A(t-1)) / (4 C_P(t))` from `axial_correlator` and `pion_correlator`, `C_A` being odd about
    the middle. In lattice units, positive for kappa below the critical one; t = 1 touches the source. NaN where
    `C_P(t) <= 0`. Free field at large t: `sinh(2 log(1 + m_0)) / 2`.
    """
    behind, _, ahead = _neighbours(np.asarray(axial, dtype=np.float64), extent, -1)
    density = np.asarray(pion, dtype=np.float64)[..., 1:]
    with np.errstate(all="ignore"):
        return np.where(density > 0, (behind - ahead) / (4 * density), np.nan)


def creutz_ratios(loops: ArrayLike) -> Array:
    """Return `chi(r,t) = -log[ W(r,t) W(r-1,t-1) / (W(r-1,t) W(r,t-1)) ]`, with `W(r,0) = W(0,t) = 1`.

    `(R0, R1)`, the shape of `wilson_loops`; constant in infinite volume, where it is the string tension. NaN where the
    quotient is not positive.
    """
    w = np.pad(np.asarray(loops, dtype=np.float64), ((1, 0), (1, 0)), constant_values=1.0)
    with np.errstate(all="ignore"):
        ratio = w[1:, 1:] * w[:-1, :-1] / (w[:-1, 1:] * w[1:, :-1])
        return -np.log(np.where((ratio > 0) & np.isfinite(ratio), ratio, np.nan))


def second_moment_length(zero: float, smallest: float, shape: Sequence[int]) -> float:
    r"""Return the second-moment correlation length from the propagators at zero and at the smallest momentum.

    The solution xi of `(1/d) sum_mu 1/(1 + xi^2 khat_mu^2) = smallest/zero`, `khat_mu = 2 sin(pi/L_mu)`: exact for one
    pole, and `sqrt(zero/smallest - 1) / (2 sin(pi/L))` where all extents are L. `smallest` is the mean over directions
    of the propagators at `2 pi/L_mu`. It is a length only where the field has no mean. NaN where there is no solution.
    """
    squares = np.array([4 * np.sin(np.pi / extent) ** 2 if extent > 1 else 0.0 for extent in shape])
    with np.errstate(all="ignore"):
        target = np.float64(smallest) / np.float64(zero)
    if not (zero > 0 and np.mean(squares == 0) < target <= 1):
        return float("nan")
    xi2 = 0.0
    for _ in range(200):  # the left side is convex and falls with xi^2, so Newton's steps from 0 never overshoot
        pole = 1 / (1 + xi2 * squares)
        step = (np.mean(pole) - target) / np.mean(squares * pole**2)
        xi2 += step
        if abs(step) <= 1e-15 * xi2:
            break
    return float(np.sqrt(max(xi2, 0.0)))


def _scalar(action: ScalarAction, shape: tuple[int, ...]) -> dict[str, Derived]:
    volume = prod(shape)

    def length(means: Array) -> Array:
        return np.asarray(second_moment_length(means[0], means[1], shape))

    found = {
        "susceptibility": Derived(("magnetisation",), lambda m: [m**2, np.abs(m)], partial(_variance, volume)),
        "binder_cumulant": Derived(
            ("magnetisation",), lambda m: [m**2, m**4], lambda means: 1 - means[1] / (3 * means[0] ** 2)
        ),
        "schwinger_dyson": Derived(
            ("phi_squared", "phi_fourth", "phi_neighbour"),
            _flat,
            lambda means: np.asarray(schwinger_dyson_residual(action.m2, action.lam, *means, dimension=len(shape))),
        ),
        "correlation_length": Derived(("magnetisation_squared", "momentum_min"), _flat, length),
    }
    if shape[0] > 1:
        found["effective_mass"] = Derived(("two_point",), _flat, partial(effective_mass, extent=shape[0]))
    return found


def _gauge(shape: tuple[int, ...]) -> dict[str, Derived]:
    sides = [max(1, extent // 2) for extent in shape]
    return {"creutz_ratios": Derived(("wilson_loops",), _flat, lambda means: creutz_ratios(means.reshape(sides)))}


def _fermions(flavours: int, shape: tuple[int, ...]) -> dict[str, Derived]:
    extent = shape[0]
    distances = extent // 2 + 1
    singlet = ("pion_correlator", "eta_disconnected")

    def eta(means: Array) -> Array:
        return means[:distances] - flavours * means[distances:]

    def quark_mass(means: Array) -> Array:
        axial = np.zeros(distances)
        axial[1 : 1 + len(means) - extent // 2] = means[extent // 2 :]
        return pcac_mass(np.append(np.nan, means[: extent // 2]), axial, extent=extent)

    def away_from_zero(pion: Array, axial: Array) -> list[Array]:
        return _flat(pion[..., 1:]) + _flat(axial[..., 1 : (extent + 1) // 2])  # the others vanish by symmetry

    found = {
        "chiral_susceptibility_disconnected": Derived(
            ("condensate",), lambda c: [c**2, c], partial(_variance, prod(shape))
        ),
        "eta_correlator": Derived(singlet, _flat, eta),
    }
    if extent > 1:
        mass = partial(effective_mass, extent=extent)
        found |= {
            "pion_effective_mass": Derived(("pion_correlator",), _flat, mass),
            "eta_effective_mass": Derived(singlet, _flat, lambda means: mass(eta(means))),
            "pcac_mass": Derived(("pion_correlator", "axial_correlator"), away_from_zero, quark_mass),
        }
    return found


def _flat(*stored: Array) -> list[Array]:
    """Return the elements of stored arrays `(chain, draw, *own_shape)`, one array `(chain, draw)` each."""
    return [column for array in stored for column in np.moveaxis(array.reshape(*array.shape[:2], -1), -1, 0)]


def _neighbours(values: Array, extent: int, sign: int) -> tuple[Array, Array, Array]:
    """Return C(t-1), C(t) and C(t+1) at t = 1..extent//2, with `C(t) = sign C(extent - t)`."""
    half = extent // 2
    beyond = values[..., extent - half - 1 : extent - half] if half else values[..., :0]
    return values[..., :-1], values[..., 1:], np.concatenate([values[..., 2:], sign * beyond], axis=-1)


def _variance(volume: int, means: Array) -> Array:
    return volume * (means[0] - means[1] ** 2)


def _finite(function: Callable[[Array], Array], means: Array) -> Array:
    """Return the values of a function of means, NaN for those that are not finite, without warnings."""
    with np.errstate(all="ignore"):
        values = np.asarray(function(means))
    return np.where(np.isfinite(values), values, np.nan)
