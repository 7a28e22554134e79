"""Normalisations from both sides: the Bennett acceptance ratio, and differences of free energies."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, log_expit

from latticeflow.stats.gamma import gamma_method
from latticeflow.stats.weights import log_z, proposal_log_weights, scaled_weights, target_log_weights

TOLERANCE = 1e-13
ROUNDING = 1e-12


def bennett(
    log_weights_of_proposals: ArrayLike, log_weights_of_target_samples: ArrayLike, *, correlated: bool = False
) -> tuple[float, float]:
    """Return ``log Z`` and its error from samples of the proposal ``q`` and of the target ``p = exp(-S)/Z``.

    ``log Z = c`` solves ``sum_q f(u) = sum_p f(-u)``, ``f(u) = 1/(1 + exp(-u))``, ``u = l - c + log(n_p/n_q)``, with
    ``l = -S - log q`` on both sets: of all combinations the one of least variance (Bennett, J. Comput. Phys. 22, 1976,
    245; arXiv:0801.1426). With ``a = f(u)/<f(u)>_q`` and
    ``b = f(-u)/<f(-u)>_p``, the linearised equation has ``error^2 = (var_q(a)/n_q + error_p(b)^2) / slope^2``,
    ``slope = <a f(-u)>_q + <b f(u)>_p``, where ``error_p`` of ``correlated`` target samples is from the Gamma method.
    The square is never below ``1/D - 1/n_q - 1/n_p``, ``D = sum f(u) f(-u)`` over both sets: the same for independent
    samples, but growing without bound where the sets do not overlap.
    Both arguments have any shape and are pooled; with ``correlated`` the second is ``(n,)`` or ``(replica, n)``.
    A proposal may have ``-inf``, a weight of zero. Raises ValueError for NaN and ``+inf`` (naming the index), where
    every proposal has weight zero, for ``-inf`` of a target sample, and where ``gamma_method`` does.
    """
    proposals = proposal_log_weights(log_weights_of_proposals, "log_weights_of_proposals")
    targets = target_log_weights(log_weights_of_target_samples)
    shift = _balance(proposals, targets)
    u_q, u_p = proposals - shift, targets - shift
    a, b = _relative(log_expit(u_q)), _relative(log_expit(-u_p))
    error_a = np.sqrt(np.var(a) / a.size)
    error_b = gamma_method(b).error if correlated else np.sqrt(np.var(b) / b.size)
    slope = np.mean(a * expit(-u_q)) + np.mean(b * expit(u_p))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # no overlap: infinite
        linearised = np.hypot(error_a, error_b) / slope
    value = shift + np.log(targets.size / proposals.size)
    return float(value), float(np.fmax(linearised, _overlap_error(u_q, u_p)))


def free_energy_difference(
    log_weights_a: ArrayLike, log_weights_b: ArrayLike, *, paired: bool = False
) -> tuple[float, float]:
    """Return ``F_b - F_a = -(log Z_b - log Z_a)`` and its error, from proposals weighed for two targets.

    Independent sets: the errors of ``log_z`` in quadrature. ``paired``, the same independent proposals weighed for
    both: ``error^2 = sum_i (w_a/<w_a> - w_b/<w_b>)^2 / n^2``, in which what the two have in common cancels.
    Shapes and errors as ``log_z``, and ValueError for paired weights of unequal shapes.
    """
    (log_z_a, error_a), (log_z_b, error_b) = log_z(log_weights_a), log_z(log_weights_b)
    if not paired:
        return log_z_a - log_z_b, float(np.hypot(error_a, error_b))
    a, b = scaled_weights(log_weights_a), scaled_weights(log_weights_b)
    if a.shape != b.shape:
        raise ValueError(f"paired log_weights_a and log_weights_b must have one shape, found {a.shape} and {b.shape}")
    return log_z_a - log_z_b, float(np.sqrt(np.sum((a / a.mean() - b / b.mean()) ** 2))) / a.size


def _balance(proposals: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    """Return the ``s`` at which ``sum_q f(l - s) = sum_p f(s - l)``: the left side falls with it, the right one rises.

    The bracket holds it: where every ``u >= a``, the sums have a ratio of at least ``exp(a) n_q/n_p``.
    """
    finite = proposals[np.isfinite(proposals)]
    ratio = np.log(targets.size / finite.size)
    lowest = min(finite.min(), targets.min()) - max(ratio, 0.0) - 1
    highest = max(finite.max(), targets.max()) + max(-ratio, 0.0) + 1

    def excess(shift: float) -> float:
        return float(_log_sum(log_expit(finite - shift)) - _log_sum(log_expit(shift - targets)))

    return brentq(excess, lowest, highest, xtol=TOLERANCE)


def _relative(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``exp(logs)`` divided by its mean."""
    weights = np.exp(logs - logs.max())
    return weights / weights.mean()


def _overlap_error(u_q: NDArray[np.float64], u_p: NDArray[np.float64]) -> float:
    """Return the error of independent samples, ``sqrt(1/D - 1/n_q - 1/n_p)``; below rounding it is zero."""
    log_overlap = np.logaddexp(*(_log_sum(log_expit(u) + log_expit(-u)) for u in (u_q, u_p)))
    with np.errstate(over="ignore"):
        inverse = np.exp(-log_overlap)
    least = 1 / u_q.size + 1 / u_p.size
    return float(np.sqrt(inverse - least)) if inverse > least * (1 + ROUNDING) else 0.0


def _log_sum(logs: NDArray[np.float64]) -> np.float64:
    peak = logs.max()
    return peak + np.log(np.sum(np.exp(logs - peak)))
