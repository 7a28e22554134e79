"""Flows that are read as energy-based models (EBFlow, arXiv:2305.15267)."""

import torch
from torch import Tensor

from latticeflow.flows import Bijection, Sequential
from latticeflow.priors import Prior
from latticeflow.samplers.flow import FlowSampler


class EBFlowSampler(FlowSampler):
    r"""A flow with linear layers, `q(x) = exp(-E(x)) / Z`, that can be trained by its score alone.

        E(x) = -log prior(g(x)) - sum_nonlinear log|det J_i|,   log Z = -sum_linear log|det J_i|

    with g the map from data to latent and J_i the Jacobians of its layers, those with `constant_jacobian` being the
    linear ones. `energy`, whose gradient all score losses need, costs no determinant. `log_prob = -E - log Z` and
    draws are exact; where no gradients are asked for, what they need of a layer's weights is computed once and kept
    until these change.

    `preprocessing` is a bijection next to the data with a Jacobian that is large where they are at their bounds, as
    that of `Logit` is. Scores are then matched of the variable that it makes of them ("match after preprocessing"), see
    `matched`; densities and draws are of the data.

    Raises ValueError for a flow without linear layers. Source: arXiv:2305.15267, sections 3 and 4.
    """

    def __init__(self, prior: Prior, flow: Sequential, *, preprocessing: Bijection | None = None) -> None:
        if not any(layer.constant_jacobian for layer in flow.layers):
            raise ValueError(
                "an energy-based flow needs linear layers, whose log-determinants it leaves out; got "
                f"{', '.join(sorted({type(layer).__name__ for layer in flow.layers})) or 'no layers'}"
            )
        self.preprocessed = preprocessing is not None
        super().__init__(prior, Sequential([*flow.layers, *([preprocessing] if self.preprocessed else [])]))

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.energy(x) - self.flow.constant_log_det(x.shape[1:])

    def log_z(self) -> Tensor:
        """Return `log Z = log int exp(-E)`, float64. Raises SingularWeightsError, naming the layer, where Z is 0."""
        return self.flow.constant_log_det(self.prior.sample(0, torch.Generator()).shape[1:])

    def matched(self, x: Tensor) -> tuple[FlowSampler, Tensor]:
        """Return the sampler whose score is to be matched and the data for it: those behind the preprocessing."""
        if not self.preprocessed:
            return self, x
        *layers, preprocessing = self.flow.layers
        return FlowSampler(self.prior, Sequential(layers)), preprocessing.inverse(x)[0]
