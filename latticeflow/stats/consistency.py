"""Do independent results agree with a reference?"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtrc

from latticeflow.stats.series import check_values


def compare_means(
    values: ArrayLike, errors: ArrayLike, *, reference: ArrayLike, reference_errors: ArrayLike = 0.0
) -> tuple[NDArray[np.float64], float, float]:
    """Return the pulls of independent results, their ``chi^2``, and the probability of one at least as large.

    ``pull = (value - reference) / sqrt(error^2 + reference_error^2)``, ``chi^2 = sum pull^2``. All must be independent:
    a reference that several results share makes their pulls correlated. Where both errors are zero, equal values have
    pull 0 and are not counted as a degree of freedom, unequal ones have an infinite pull and probability 0; with
    nothing to count the probability is 1. The arguments are broadcast to one shape, which the pulls have.
    Raises ValueError for values that are not finite, negative errors (naming the index), or no values.
    """
    names = ("values", "errors", "reference", "reference_errors")
    given = [np.asarray(item, dtype=np.float64) for item in (values, errors, reference, reference_errors)]
    for name, array in zip(names, given, strict=True):
        check_values(np.atleast_1d(array), name, legal=_is_error if name.endswith("errors") else np.isfinite)
    value, error, expected, expected_error = np.broadcast_arrays(*given)
    if value.size == 0:
        raise ValueError(f"values must hold at least one result, found shape {value.shape}")
    difference, sigma = value - expected, np.hypot(error, expected_error)
    pulls = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    np.divide(difference, sigma, out=pulls, where=sigma > 0)
    chi2 = float(np.sum(pulls**2))
    counted = np.count_nonzero((sigma > 0) | (difference != 0))
    return pulls, chi2, float(chdtrc(counted, chi2)) if counted else 1.0


def equal_means(values: ArrayLike, errors: ArrayLike) -> float:
    """Return the probability that independent results of one quantity scatter at least as much as these.

    ``chi^2 = sum (value - mean)^2 / error^2`` about the mean weighted with ``1/error^2``, with one degree of freedom
    fewer than there are results ``(n,)``. Raises ValueError for fewer than two results, values that are not finite and
    errors that are not positive (naming the index).
    """
    means, sigmas = (np.atleast_1d(np.asarray(item, dtype=np.float64)) for item in (values, errors))
    if means.ndim != 1 or means.size < 2 or means.shape != sigmas.shape:
        raise ValueError(f"values and errors must be (n,) with n > 1, found shapes {means.shape} and {sigmas.shape}")
    check_values(means, "values")
    check_values(sigmas, "errors", legal=lambda error: np.isfinite(error) & (error > 0))
    centre = np.average(means, weights=sigmas**-2)
    return float(chdtrc(means.size - 1, np.sum(((means - centre) / sigmas) ** 2)))


def _is_error(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.isfinite(values) & (values >= 0)
