"""Samplers whose pieces are clusters of samples: how these are cut, and what is fitted to them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latticeflow.actions import Action
from latticeflow.config.building import build_flow, build_prior
from latticeflow.config.schema import Config
from latticeflow.flows import ElementwiseAffine, Sequential
from latticeflow.observables.scalar import magnetisation
from latticeflow.samplers import FlowSampler, Partition, PiecewiseSampler, partition, standardised
from latticeflow.samplers.partition import RESTARTS, Clusterer
from latticeflow.streams import stream
from latticeflow.training import LikelihoodSettings

LARGEST_SEED = 2**32
"""Of scikit-learn's random numbers."""


def order_parameters(action: Action, fields: Tensor) -> Tensor:
    """Return what samples are clustered by: the magnetisation `(n,)` on a lattice, the variables `(n, D)` of a density.

    Raw lattice fields would be clustered by their noise.
    """
    return magnetisation(fields) if action.field_name == "phi" else fields


def cut(config: Config, action: Action, fields: Tensor) -> Partition:
    """Return the clusters of samples `(n, *field_shape)`; raises ValueError as `samplers.partition`."""
    settings = config.sampler
    seed = stream(config.run.seed, "partition").initial_seed() % LARGEST_SEED
    if settings.clusterer == "kmeans":
        chosen: dict[str, Any] = {"clusters": settings.clusters}
        if settings.clusters is None:
            chosen["most"] = settings.most_clusters
    else:
        chosen = {"clusterer": _clusterer(config, seed), "noise": settings.noise or "refuse"}
    features = order_parameters(action, fields)
    return partition(features, smallest=settings.smallest_cluster, seed=seed, **chosen)


def build_piece(config: Config, data: Tensor | None = None) -> FlowSampler:
    """Return a piece with untrained weights, of torch's global generator, on the run's device in training precision.

    Its last layer, an affine map, is that of the samples `data`, `(n, *field_shape)`, or the identity. Raises
    ValueError for samples that do not vary.
    """
    dtype = getattr(torch, config.training.dtype)
    prior, flow = build_prior(config), build_flow(config).to(config.run.device, dtype)
    if data is None:
        piece = FlowSampler(prior, Sequential([flow, ElementwiseAffine(config.lattice.shape)]))
    else:
        piece = standardised(flow, prior, data)
    return piece.to(config.run.device, dtype)


def build_pieces(config: Config, states: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> PiecewiseSampler:
    """Return the mixture of fitted pieces, from their weights and their numbers of samples."""
    with torch.random.fork_rng(devices=[]):
        pieces = [build_piece(config) for _ in sizes]
    for piece, state in zip(pieces, states, strict=True):
        piece.load_state_dict(state)
    return PiecewiseSampler(pieces, sizes).to(config.run.device)


def fit_settings(config: Config) -> LikelihoodSettings:
    """Return how the pieces are fitted."""
    names = LikelihoodSettings.__dataclass_fields__.keys() & type(config.training).model_fields.keys()
    return LikelihoodSettings(seed=config.run.seed, **config.training.given(names))


def _clusterer(config: Config, seed: int) -> Clusterer:
    from sklearn.cluster import DBSCAN
    from sklearn.mixture import GaussianMixture

    settings = config.sampler
    if settings.clusterer == "dbscan":
        return DBSCAN(eps=settings.neighbourhood)
    return GaussianMixture(settings.clusters, n_init=RESTARTS, random_state=seed)
