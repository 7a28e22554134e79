"""Bayesian linear regression with its conjugate prior: a posterior whose evidence is known exactly."""

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from latticeflow.actions.densities.base import Density, check_positive
from latticeflow.actions.densities.data import check_features, check_responses
from latticeflow.actions.positive import log_softplus, softplus
from latticeflow.lattice import check_integer


@dataclass(frozen=True, eq=False, repr=False)
class LinearRegression(Density):
    r"""The posterior of the weights w and the noise s2 of a linear model, times the evidence:

        y | w, s2 ~ N(X w, s2),   w | s2 ~ N(0, s2 / precision),   s2 ~ InverseGamma(shape, rate)

    X are the `features`, `(observations, d)`, and y the `targets`, `(observations,)`; arrays and tensors are taken.
    Fields are `x = (w, u)`, `(batch, d + 1)`, with `s2 = log(1 + e^u)`, whose slope is a factor of the density.
    Raises ValueError for data that are not finite or do not fit, and a precision, shape or rate that is not positive
    and finite. Source: O'Hagan and Forster, Kendall's Advanced Theory of Statistics 2B (2004), chapter 11.
    """

    features: Tensor
    targets: Tensor
    _: KW_ONLY
    precision: float = 1.0
    shape: float = 2.0
    rate: float = 2.0

    theory = "linear_regression"

    def __post_init__(self) -> None:
        features = check_features(self.features)
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "targets", check_responses("targets", self.targets, features))
        for name in ("precision", "shape", "rate"):
            check_positive(name, getattr(self, name))

    def __repr__(self) -> str:
        return f"LinearRegression(dimension={self.dimension}, observations={len(self.features)})"

    @property
    def dimension(self) -> int:
        """Return `D = d + 1`."""
        return self.features.shape[1] + 1

    @cached_property
    def log_z(self) -> float:
        r"""Return the log evidence `log p(y)`, n being the number of observations:

        1/2 log(precision^d / det A) + log Gamma(a) / Gamma(shape) + shape log(rate) - a log(b) - n/2 log(2 pi)

        with `A = X^T X + precision`, `m = A^-1 X^T y`, `a = shape + n/2` and
        `b = rate + (|y - X m|^2 + precision |m|^2) / 2`.
        """
        (n, d), moments = self.features.shape, self.features.T @ self.features
        factor = torch.linalg.cholesky(moments + self.precision * torch.eye(d, dtype=moments.dtype))
        mean = torch.cholesky_solve((self.features.T @ self.targets)[:, None], factor)[:, 0]
        a, b = self.shape + 0.5 * n, float(self._energy(mean[None]))
        log_ratio = 0.5 * d * math.log(self.precision) - float(torch.log(torch.diagonal(factor)).sum())
        return log_ratio + math.lgamma(a) - a * math.log(b) - self._constant()

    def _action(self, x: Tensor) -> Tensor:
        weights, u = x[:, :-1], x[:, -1]
        n, d = self.features.shape
        log_s2, log_slope = log_softplus(u), softplus(u)[1]
        power = 0.5 * (n + d) + self.shape + 1
        constant = self._constant() + 0.5 * d * math.log(2 * math.pi / self.precision)
        return power * log_s2 + self._energy(weights) * torch.exp(-log_s2) - log_slope + constant

    def _energy(self, weights: Tensor) -> Tensor:
        """Return `rate + (|y - X w|^2 + precision |w|^2) / 2` of weights `(batch, d)`, `(batch,)`."""
        residual = self.targets.to(weights) - weights @ self.features.to(weights).T
        return self.rate + 0.5 * ((residual**2).sum(1) + self.precision * (weights**2).sum(1))

    def _constant(self) -> float:
        noise = 0.5 * len(self.targets) * math.log(2 * math.pi)
        return noise + math.lgamma(self.shape) - self.shape * math.log(self.rate)


def synthetic_regression(dimension: int, *, observations: int = 100, seed: int = 0) -> LinearRegression:
    """Return a linear regression with `D = dimension`, whose features, weights and noise are standard normal.

    The same data for the same seed. Raises ValueError for a dimension below 2 and less than one observation.
    """
    check_integer("dimension", dimension, low=2)
    check_integer("observations", observations, low=1)
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((observations, dimension - 1))
    weights = generator.standard_normal(dimension - 1)
    return LinearRegression(features, features @ weights + generator.standard_normal(observations))
