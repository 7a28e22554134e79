"""Logistic regression under the horseshoe prior: few coefficients matter, and their widths span many scales."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latticeflow.actions.densities.base import Density
from latticeflow.actions.densities.data import check_features, check_labels
from latticeflow.actions.densities.normal import normal_action
from latticeflow.actions.positive import log_softplus, softplus
from latticeflow.lattice import check_integer

INTERCEPT_WIDTH = 10.0
COEFFICIENT = 3.0
"""The size of the coefficients of synthetic data that are not zero."""


@dataclass(frozen=True, eq=False, repr=False)
class HorseshoeLogistic(Density):
    r"""The posterior of a sparse logistic regression, times its unknown evidence:

        y_i ~ Bernoulli(1 / (1 + e^{-(a + x_i . b)})),   a ~ N(0, 10^2),   b_j ~ N(0, (tau lambda_j)^2),
        lambda_j, tau ~ HalfCauchy(1)

    x are the `features`, `(observations, d)`, and y the `labels`, `(observations,)`, 0 or 1; arrays and tensors are
    taken. Fields are `(b_1..b_d, u_1..u_d, u_tau, a)`, `(batch, 2 d + 2)`, with `lambda_j = log(1 + e^{u_j})`, the same
    for tau, and the slopes as factors of the density. Raises ValueError for data that are not finite or do not fit.
    Source: Carvalho, Polson and Scott, Biometrika 97 (2010) 465.
    """

    features: Tensor
    labels: Tensor

    theory = "horseshoe"

    def __post_init__(self) -> None:
        features = check_features(self.features)
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "labels", check_labels(self.labels, features))

    def __repr__(self) -> str:
        return f"HorseshoeLogistic(dimension={self.dimension}, observations={len(self.features)})"

    @property
    def dimension(self) -> int:
        """Return `D = 2 d + 2`."""
        return 2 * self.features.shape[1] + 2

    def _action(self, x: Tensor) -> Tensor:
        d = self.features.shape[1]
        coefficients, u, intercept = x[:, :d], x[:, d:-1], x[:, -1:]
        log_scales = log_softplus(u)
        log_widths = log_scales[:, :-1] + log_scales[:, -1:]
        prior = normal_action(coefficients, log_widths).sum(1) + half_cauchy_action(u).sum(1)
        broad = torch.full_like(intercept, math.log(INTERCEPT_WIDTH))
        return prior + normal_action(intercept, broad)[:, 0] - self._log_likelihood(coefficients, intercept)

    def _log_likelihood(self, coefficients: Tensor, intercept: Tensor) -> Tensor:
        logits = intercept + coefficients @ self.features.to(coefficients).T
        return logsigmoid((2 * self.labels.to(logits) - 1) * logits).sum(1)


def half_cauchy_action(u: Tensor) -> Tensor:
    """Return `-log p(u)` for `log(1 + e^u) ~ HalfCauchy(1)`, elementwise, the slope included.

    `log(pi/2) + log(1 + lambda^2) - log(1 / (1 + e^-u))`, from the logarithm of lambda, so that no square overflows.
    """
    return math.log(math.pi / 2) + softplus(2 * log_softplus(u))[0] - softplus(u)[1]


def synthetic_horseshoe(dimension: int, *, observations: int = 100, seed: int = 0) -> HorseshoeLogistic:
    """Return a sparse logistic regression with `D = 2 d + 2 = dimension` and standard normal features.

    A tenth of the d true coefficients, at least one, are +3 or -3, the others 0, and so is the intercept. The same data
    for the same seed. Raises ValueError for a dimension that is odd or below 4, and less than one observation.
    """
    check_integer("dimension", dimension, low=4)
    if dimension % 2:
        raise ValueError(f"dimension must be even, 2 d + 2 for d features, got {dimension}")
    check_integer("observations", observations, low=1)
    d, generator = dimension // 2 - 1, np.random.default_rng(seed)
    features, coefficients = generator.standard_normal((observations, d)), np.zeros(d)
    active = generator.choice(d, size=max(1, round(d / 10)), replace=False)
    coefficients[active] = COEFFICIENT * generator.choice([-1.0, 1.0], size=len(active))
    noise = generator.logistic(size=observations)
    return HorseshoeLogistic(features, features @ coefficients + noise > 0)


def breast_cancer_horseshoe() -> HorseshoeLogistic:
    """Return the sparse logistic regression of the Wisconsin breast cancer data: 569 observations, D = 62.

    The 30 features have mean 0 and variance 1. Source: the data set that scikit-learn ships.
    """
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    return HorseshoeLogistic((features - features.mean(0)) / features.std(0), labels)
