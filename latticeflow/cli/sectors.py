"""Topological sectors: how often the chains visit and change them, against what is known from elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latticeflow.stats import gamma_method, reweighted_mean

Charges = NDArray[np.float64]
FEWEST_CHANGES = 20
SIGMAS = 4.0
EXPECTED_VISITS = 10
"""A sector counts where at least this many independent draws are expected in it, or fall into it."""


@dataclass(frozen=True)
class Fraction:
    """A probability with its error."""

    value: float
    error: float


@dataclass(frozen=True)
class SectorReport:
    """Fractions of the chains by charge; the expected ones and their `source`; changes of Q from draw to draw.

    `expected` is empty, and `source` too, where nothing is known. `frozen` says that the chains do not sample the
    charge as they should; `warnings` says why, in plain sentences.
    """

    found: dict[int, Fraction]
    expected: dict[int, Fraction]
    source: str
    changes: int
    frozen: bool
    warnings: tuple[str, ...]


def sector_fractions(charge: Charges) -> dict[int, Fraction]:
    """Return the fraction of every charge that occurs in `(chain, draw)` and its error by the Gamma method."""
    results = {int(q): gamma_method((charge == q).astype(float)) for q in np.unique(charge)}
    return {q: Fraction(result.mean, result.error) for q, result in results.items()}


def effective_draws(charge: Charges) -> float:
    """Return the number of independent draws that `(chain, draw)` is worth: the least of those of Q and abs(Q).

    A charge that never changes counts as if all its draws were independent.
    """
    return min(gamma_method(values).n_eff for values in (charge, np.abs(charge)))


def weighted_fractions(charge: Charges, log_weight: Charges) -> dict[int, Fraction]:
    """Return the fractions of the target from independent draws `(n,)` with their log weights."""
    return {int(q): Fraction(*reweighted_mean((charge == q).astype(float), log_weight)) for q in np.unique(charge)}


def judge_sectors(
    charge: Charges, expected: Mapping[int, Fraction], source: str, *, unseen: float = 0.0
) -> SectorReport:
    """Return the report on the charges `(chain, draw)` of the chains.

    `unseen` is the error of the expected fraction, 0, of a charge that `expected` lacks; see `unseen_error`. A sector
    deviates where it is more than four standard deviations off; the error of a fraction is taken to be at least the
    binomial one of as many independent draws as the chain is worth, so that a sector that was never visited has one.
    """
    found, draws = sector_fractions(charge), effective_draws(charge)
    changes = int((np.diff(charge, axis=1) != 0).sum())
    warnings = _movement(charge, changes) if _should_move(expected, draws=charge.size) else []
    off = {q: pull for q, pull in pulls(found, expected, draws=draws, unseen=unseen).items() if abs(pull) > SIGMAS}
    if off:
        places = ", ".join(f"Q = {q} by {pull:+.1f}" for q, pull in off.items())
        warnings.append(
            f"the fractions of the sectors differ from {source} ({places} sigma): they are not sampled as they should "
            "be, whatever the ESS says"
        )
    return SectorReport(found, dict(expected), source, changes, bool(warnings), tuple(warnings))


def pulls(
    found: Mapping[int, Fraction], expected: Mapping[int, Fraction], *, draws: float, unseen: float = 0.0
) -> dict[int, float]:
    """Return (found - expected) / error of every sector that counts, empty where nothing is expected.

    `draws` is the number of independent draws.
    """
    result = {}
    for q in sorted({*found, *expected}) if expected else ():
        one, other = found.get(q, Fraction(0, 0)), expected.get(q, Fraction(0, unseen))
        if max(one.value, other.value) * draws < EXPECTED_VISITS:
            continue
        binomial = np.sqrt(max(other.value * (1 - other.value), 1 / draws) / draws)
        error = float(np.hypot(max(one.error, binomial), other.error))
        result[q] = (one.value - other.value) / error
    return result


def unseen_error(draws: float) -> float:
    """Return the error of the fraction of a sector that none of so many independent draws fell into: 3 / draws."""
    return 3 / draws


def _should_move(expected: Mapping[int, Fraction], *, draws: int) -> bool:
    """Return whether more than one sector should be seen, which is assumed where nothing is known."""
    return not expected or (1 - max(fraction.value for fraction in expected.values())) * draws >= FEWEST_CHANGES


def _movement(charge: Charges, changes: int) -> list[str]:
    if changes >= FEWEST_CHANGES:
        return []
    if changes:
        return [f"the topological charge changed only {changes} times in all replica: do not trust its error"]
    where = f"Q = {int(charge.flat[0])}" if np.ptp(charge) == 0 else "the sectors where they started"
    return [f"the topological charge never changed: all replica are frozen in {where}"]
