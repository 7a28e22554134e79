"""Samples of the target that maximum likelihood learns from: those of an ensemble, or exact draws."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from latticeflow.actions import Action, Drawable
from latticeflow.config.schema import Config
from latticeflow.storage import DataError, Ensemble
from latticeflow.streams import stream


def source_of(config: Config) -> str:
    """Return the key of the training that names the samples, and its value, for messages."""
    settings = config.training
    return f"training.draws = {settings.draws}" if settings.samples is None else f"training.samples: {settings.samples}"


def training_fields(config: Config, action: Action) -> Tensor:
    """Return the samples of a training by forward_kl, `(n, *field_shape)`, float64, on the CPU.

    They are those of the stored ensemble, all chains together, or the exact independent draws of (seed, their number).
    Raises FileNotFoundError, DataError for an ensemble of another theory or shape, or that is damaged or not finite.
    """
    settings = config.training
    if settings.samples is not None:
        return ensemble_fields(settings.samples, action, shape=config.lattice.shape)
    if not isinstance(action, Drawable):
        raise DataError(f"{source_of(config)}: {action} has no exact draws")
    return action.sample(settings.draws, stream(config.run.seed, "training draws"))


def check_samples(config: Config, action: Action) -> None:
    """Raise what `training_fields` raises, and DataError for fewer samples than its clusters have to have."""
    n, clusters, smallest = (
        len(training_fields(config, action)),
        config.sampler.clusters or 1,
        config.sampler.smallest_cluster,
    )
    if n < clusters * smallest:
        least = f"{clusters * smallest} ({clusters} x sampler.smallest_cluster = {smallest})"
        raise DataError(f"{source_of(config)}: {n} samples, expected at least {least}")


def ensemble_fields(path: str | Path, action: Action, *, shape: tuple[int, ...]) -> Tensor:
    """Return all configurations of a stored ensemble, `(n, *field_shape)`; raises as `training_fields`."""
    with Ensemble.open(path, theory=action.theory, lattice_shape=shape) as ensemble:
        stored = ensemble.field(action.field_name)
    fields = torch.from_numpy(np.ascontiguousarray(stored, dtype=np.float64)).flatten(0, 1)
    bad = (~torch.isfinite(fields).flatten(1).all(1)).nonzero().flatten()
    if len(bad):
        chain, draw = divmod(int(bad[0]), stored.shape[1])
        found = f"{len(bad)} of {len(fields)} configurations are not finite, the first at chain {chain}, draw {draw}"
        raise DataError(f"{path}: {found}")
    return fields


def random_choice(fields: Tensor) -> Callable[[int, Generator | None], Tensor]:
    """Return `target(n, generator)`, which picks n of these fields at random, with replacement."""

    def target(n: int, generator: Generator | None = None) -> Tensor:
        device = generator.device if generator is not None else "cpu"
        return fields[torch.randint(len(fields), (n,), generator=generator, device=device).cpu()].to(device)

    return target
