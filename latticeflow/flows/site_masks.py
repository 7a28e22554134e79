"""Which sites of a lattice, or which variables of a density, a coupling updates; the others stay and condition it.

A mask is a boolean tensor of the field's shape, true at the active sites. `window` says what a convolution sees of it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latticeflow.lattice import Shape, check_shape, site_index, volume

MASKS = ("checkerboard", "stripes", "random")


def checkerboard(shape: Sequence[int], parity: int) -> Tensor:
    """Return the sites whose coordinates add up to `parity` modulo 2; on one axis, every other variable."""
    return (_coordinates(check_shape(shape)).sum(-1) - parity) % 2 == 0


def stripes(shape: Sequence[int], parity: int, *, axis: int) -> Tensor:
    """Return the sites whose coordinate along `axis` is `parity` modulo 2."""
    return (_coordinates(check_shape(shape))[..., axis] - parity) % 2 == 0


def random_half(shape: Sequence[int], parity: int, *, seed: int) -> Tensor:
    """Return one half of the sites, chosen at random by `seed`; the other parity is the other half."""
    sites = check_shape(shape)
    order = np.random.RandomState(seed).permutation(volume(sites))  # its stream is the same in every release
    return torch.from_numpy(order % 2 == parity % 2).reshape(sites)


def mask_cycle(kind: str, shape: Sequence[int], layers: int) -> list[Tensor]:
    """Return the masks of `layers` couplings: both parities in turn, of stripes every axis in turn.

    `kind` is "checkerboard", "stripes" or "random", a new division after each pair of layers. Raises ValueError for
    another kind, and where a mask would leave no site active or none to condition on.
    """
    sites = check_shape(shape)
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers!r}")
    if kind not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {kind!r}")
    axes = [axis for axis, extent in enumerate(sites) if extent > 1]
    if not axes:
        raise ValueError(f"mask {kind!r} does not fit the shape {list(sites)}: nothing is left to condition on")
    masks = {
        "checkerboard": lambda layer: checkerboard(sites, layer),
        "stripes": lambda layer: stripes(sites, layer, axis=axes[layer // 2 % len(axes)]),
        "random": lambda layer: random_half(sites, layer, seed=layer // 2),
    }
    return [masks[kind](layer) for layer in range(layers)]


def check_mask(mask: Tensor) -> Tensor:
    """Return `mask`; raise ValueError unless it is boolean with an active and a frozen site."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    if not 0 < int(mask.sum()) < mask.numel():
        raise ValueError(f"mask of shape {list(mask.shape)} has {int(mask.sum())} active sites of {mask.numel()}")
    return mask


def window(centres: Tensor, members: Tensor, kernel: int) -> Tensor:
    """Return the members of one mask inside a `kernel^d` window around each centre, a site of another mask.

    Both are masks; the result `(centres, window)` holds positions in the row-major list of the members. Boundaries are
    periodic, and a window that is wider than the lattice sees every site once. Raises ValueError where the windows of
    two centres differ, as the convolution would have no common weights there, or see no member at all.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and positive, got {kernel!r}")
    shape = tuple(members.shape)
    steps = torch.cartesian_prod(*(_reach(extent, kernel) for extent in shape)).reshape(-1, len(shape))
    extents = torch.tensor(shape)
    seen = (_coordinates(shape)[centres][:, None] + steps) % extents
    sites = site_index(shape)[seen.unbind(-1)]
    inside = members.flatten()[sites]
    if not bool((inside == inside[:1]).all()):
        raise ValueError(
            f"mask does not look the same from all of its sites on the lattice {list(shape)}: convolutions need a "
            "checkerboard or stripes, and even extents; a dense conditioner takes any mask"
        )
    if not inside.any():
        raise ValueError(f"kernel = {kernel} sees none of the sites that it is to read")
    position = torch.cumsum(members.flatten(), 0) - 1
    return position[sites[:, inside[0]]]


def _reach(extent: int, kernel: int) -> Tensor:
    """Return the different steps of a window along one axis."""
    return torch.unique((torch.arange(kernel) - (kernel - 1) // 2) % extent)


def _coordinates(shape: Shape) -> Tensor:
    """Return the coordinates of every site, `(*shape, d)`."""
    return torch.stack(torch.meshgrid(*(torch.arange(extent) for extent in shape), indexing="ij"), dim=-1)
