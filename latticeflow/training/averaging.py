"""Exponential moving averages of weights, which are better than the last ones where gradients are noisy."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

START = 10
"""Updates in which the average forgets where it began."""


class WeightAverage:
    """The average `a <- d a + (1 - d) w` of a module's weights and buffers; those that are no floats are the last ones.

    `d = min(decay, (1 + n) / (10 + n))` after n updates, so that the first weights do not stay for `1 / (1 - decay)`
    steps. Raises ValueError unless decay is at least 0 and below 1. Source: arXiv:2305.15267, section 4.3, with a decay
    of 0.999.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {decay!r}")
        self.decay, self.updates = decay, 0
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the present weights."""
        fresh = 1 - min(self.decay, (1 + self.updates) / (START + self.updates))
        for name, tensor in module.state_dict().items():
            average = self.weights[name]
            if average.is_floating_point():
                average.lerp_(tensor.detach(), fresh)
            else:
                average.copy_(tensor)
        self.updates += 1

    def copy(self) -> dict[str, Tensor]:
        """Return the average as it is now."""
        return {name: tensor.clone() for name, tensor in self.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        self.weights = {name: tensor.clone() for name, tensor in state["weights"].items()}
