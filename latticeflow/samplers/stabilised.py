"""Stabilised deep flows (arXiv:2402.16408)."""

from typing import Any

from latticeflow.flows import LOFT, ElementwiseAffine, Sequential, coupling_flow
from latticeflow.lattice import Shape
from latticeflow.priors import Prior, StudentT
from latticeflow.samplers.flow import FlowSampler


class StabilisedSampler(FlowSampler):
    """A sampler of real fields that stays finite at any depth: couplings with soft clamps, LOFT, one affine map.

    The draws of `prior`, independent student-t variables with trainable degrees of freedom where it is not given, pass
    `layers` couplings whose log scales a `Clamp` bounds (`coupling_flow` has the settings), then LOFT, which pulls in
    what is beyond `tau`, and last a trainable elementwise affine map, so that large scales stay in reach. Train it with
    the path estimator, in double precision for densities with heavy tails. For those the clamp's positive bound must
    leave room: `layers` couplings expand a variable by `exp(positive layers / 2)` at most, and what is beyond is never
    drawn.

    With `shared` the affine map and the default prior have one parameter for all sites: weights of convolutions then
    fit lattices of any size. With `odd` the sampler has the symmetry `x -> -x`. Raises ValueError for a mask that does
    not fit the shape and settings out of range. Source: arXiv:2402.16408, section 4; the size of the whole as an input
    of dense conditioners is ours.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        layers: int = 64,
        prior: Prior | None = None,
        tau: float = 100.0,
        shared: bool = False,
        odd: bool = False,
        **couplings: Any,
    ) -> None:
        core = coupling_flow(shape, layers=layers, odd=odd, **couplings)
        closing = [LOFT(tau), ElementwiseAffine(shape, shared=shared, shift=not odd)]
        flow = Sequential([*core.layers, *closing], cycle=core.cycle, closing=len(closing))
        super().__init__(StudentT(shape, per_site=not shared) if prior is None else prior, flow)
