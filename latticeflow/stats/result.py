"""What an error analysis returns, and the plain sentences it is judged by."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latticeflow.stats.window import Window

WARN_BELOW = 100
CONVERGED_ABOVE = 20
SMALLEST_P_VALUE = 1e-3


@dataclass(frozen=True)
class GammaResult:
    """Mean and error of one observable, with what is needed to judge and to plot them.

    ``error`` is the standard error of ``mean`` and ``error_error`` its own uncertainty. ``tau_int`` is
    ``1/2 + sum_{t=1}^{window} rho(t)`` (1/2 for independent samples) and ``n_eff = n / (2 tau_int)``. ``rho`` and
    ``tau_int_of_window`` have the same length, from lag 0 to some lag beyond the window. ``chi2`` and ``p_value`` test
    that the replica have one mean, with one degree of freedom fewer than there are replica; both are NaN for one
    replica. ``converged`` is False where the error must not be used as it is; ``warnings`` says why, in plain
    sentences.
    """

    mean: float
    error: float
    error_error: float
    tau_int: float
    tau_int_error: float
    window: int
    rho: NDArray[np.float64]
    tau_int_of_window: NDArray[np.float64]
    n: int
    n_eff: float
    chi2: float
    p_value: float
    converged: bool
    warnings: tuple[str, ...]


def constant_result(mean: float, n: int) -> GammaResult:
    """Return the result for a series without fluctuations: error 0, ``tau_int`` 1/2, not converged, and a warning."""
    return GammaResult(
        mean=mean,
        error=0.0,
        error_error=0.0,
        tau_int=0.5,
        tau_int_error=0.0,
        window=0,
        rho=np.ones(1),
        tau_int_of_window=np.full(1, 0.5),
        n=n,
        n_eff=float(n),
        chi2=float("nan"),
        p_value=float("nan"),
        converged=False,
        warnings=("the series is constant: its error cannot be estimated",),
    )


def undefined_result(n: int, reason: str) -> GammaResult:
    """Return the result for a value that does not exist: NaN throughout, not converged, and the reason as a warning."""
    nan = float("nan")
    return GammaResult(
        mean=nan,
        error=nan,
        error_error=nan,
        tau_int=nan,
        tau_int_error=nan,
        window=0,
        rho=np.full(1, nan),
        tau_int_of_window=np.full(1, nan),
        n=n,
        n_eff=nan,
        chi2=nan,
        p_value=nan,
        converged=False,
        warnings=(f"undefined: {reason}",),
    )


def judge(n: int, tau: float, p_value: float, *, window: Window, floored: bool) -> tuple[bool, tuple[str, ...]]:
    """Return whether the error can be used as it is, and the warnings that the user should read.

    ``n / tau`` below 100 warns and below 20 is not converged; ``tau`` is ``tau_int``, or the memory of an antithetic
    chain where that is longer. A window that did not close, disagreeing replica, and a sum that came out negative are
    not converged either.
    """
    ratio = n / max(tau, window.memory)
    disagree = p_value < SMALLEST_P_VALUE
    sentences = {
        f"n / tau = {ratio:.3g} is below {WARN_BELOW}: the error is itself uncertain": ratio < WARN_BELOW,
        f"n / tau is below {CONVERGED_ABOVE}: the error is too small": ratio < CONVERGED_ABOVE,
        f"the sum over the autocorrelation did not close up to lag {window.lag}": not window.closed,
        f"the replica disagree in the mean (p-value {p_value:.1g})": disagree,
        "the summed autocorrelation is not positive: the naive error is quoted": floored,
    }
    converged = ratio >= CONVERGED_ABOVE and window.closed and not disagree and not floored
    return converged, tuple(text for text, applies in sentences.items() if applies)
