"""Multi-scale Glow (arXiv:1807.03039, 1605.08803) as one flat sequence of layers of fields `(batch, [C,] H, W)`.

From field to latent, level 1 comes first. Each level squeezes, blocks of 2x2 sites becoming channels, and takes its
steps; then half of its channels are done, they are latent variables now, and the other half goes on to the next level.
So that the sequence can be cut anywhere, the field keeps its shape, and a layer of level l picks out the variables that
are left there and leaves the others as they are.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from latticeflow.flows.bijection import Bijection, Sequential
from latticeflow.flows.channels import ChannelCoupling, InvertibleConvolution
from latticeflow.flows.clamps import Clamp
from latticeflow.flows.coupling import DEFAULT_CLAMP
from latticeflow.flows.elementwise import ActNorm
from latticeflow.lattice import check_integer, check_shape, site_index

STEP_LAYERS = 3
"""A step, from field to latent: normalisation, 1x1 convolution, coupling."""


def level_variables(shape: Sequence[int], level: int) -> Tensor:
    r"""Return which variables of a field `(C, H, W)` are left at a level, as `(2^(level+1) C, H/2^level, W/2^level)`.

    They are row-major numbers in the field: all of them at level 1, and half of the level before at the others. A field
    `(H, W)` has one channel. Raises ValueError for another number of extents, a level below 1, and sides that 2^level
    does not divide.
    """
    given = tuple(shape)
    sites = check_shape((1, *given) if len(given) == 2 else given, dimensions=3)
    check_integer("level", level, low=1)
    if any(side % 2**level for side in sites[1:]):
        raise ValueError(f"sides of the shape {list(sites)} must be divisible by {2**level}, for level {level}")
    left = pixel_unshuffle(site_index(sites), 2)
    for _ in range(level - 1):
        left = pixel_unshuffle(left[: len(left) // 2], 2)
    return left


class AtLevel(Bijection):
    """A bijection of the variables that are left at a level; the others stay.

    Fields `(batch, *shape)`, the shape being `(C, H, W)` or `(H, W)`; `layer` is given the variables of
    `level_variables`, as `(batch, 2^(level+1) C, H/2^level, W/2^level)`. Raises ValueError where these do, and for
    fields of another shape.
    """

    def __init__(self, layer: Bijection, shape: Sequence[int], *, level: int) -> None:
        super().__init__()
        variables = level_variables(shape, level)
        self.register_buffer("variables", variables.flatten(), persistent=False)
        self.shape, self.level_shape, self.layer = tuple(shape), tuple(variables.shape), layer

    @property
    def constant_jacobian(self) -> bool:
        return self.layer.constant_jacobian

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.layer(self._taken(z))
        return self._put_back(z, x), log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.layer.inverse(self._taken(x))
        return self._put_back(x, z), log_det

    def varying_inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.layer.varying_inverse(self._taken(x))
        return self._put_back(x, z), log_det

    def constant_log_det(self, shape: Sequence[int]) -> Tensor:
        return self.layer.constant_log_det(self.level_shape)

    def _taken(self, field: Tensor) -> Tensor:
        if field.shape[1:] != self.shape:
            raise ValueError(f"a level of the shape {list(self.shape)} was given fields of shape {list(field.shape)}")
        return field.flatten(1).index_select(1, self.variables).unflatten(1, self.level_shape)

    def _put_back(self, field: Tensor, moved: Tensor) -> Tensor:
        return field.flatten(1).index_copy(1, self.variables, moved.flatten(1)).reshape(field.shape)


def glow(
    shape: Sequence[int],
    *,
    levels: int,
    steps: int,
    hidden: int = 64,
    clamp: Clamp = DEFAULT_CLAMP,
    periodic: bool = False,
    parts: int = 1,
) -> Sequential:
    """Return Glow for fields `(batch, C, H, W)` or `(batch, H, W)`, with as many `steps` at each level.

    A step is a normalisation, a 1x1 convolution and a coupling. `forward` takes the last level first, see
    `glow_blocks`. With `parts` there are that many complete flows, one after the other, which share the steps of each
    level evenly: a cut between them runs across all levels. With `periodic` it commutes with translations by 2^levels
    sites. The normalisations take their scales from the first batch in training mode; `hidden`, `clamp` and `periodic`
    are those of `ChannelCoupling`. Raises ValueError for sides that 2^levels does not divide, levels, steps or parts
    below 1, and steps that the parts cannot share.

    The places where it can be cut by name are "flow 2", "flow 3", ... across the blocks, and, with a single flow, by
    blocks "level 2", "level 1", ..., each where that begins.
    """
    level_variables(shape, check_integer("levels", levels, low=1))
    settings = {"hidden": hidden, "clamp": clamp, "periodic": periodic}
    share = _share(steps, parts)
    layers = (
        AtLevel(layer, shape, level=level)
        for _ in range(parts)
        for level in range(levels, 0, -1)
        for _ in range(share)
        for layer in _step(shape, level, **settings)
    )
    return Sequential(layers, places=_places(levels, steps, parts))


def glow_blocks(levels: int, steps: int, *, parts: int = 1) -> list[int]:
    """Return the number of layers of each block of `glow` in forward order, a block being one level of one part.

    Those of a part follow each other, the last level first, so to cut by blocks is to cut after each, and to cut across
    them after every `levels`. Raises ValueError as `glow` does.
    """
    check_integer("levels", levels, low=1)
    return [STEP_LAYERS * _share(steps, parts)] * (levels * parts)


def _places(levels: int, steps: int, parts: int) -> dict[str, int]:
    """Return the layers before each place that has a name."""
    block = glow_blocks(levels, steps, parts=parts)[0]
    if parts == 1:
        return {f"level {level}": (levels - level) * block for level in range(levels - 1, 0, -1)}
    return {f"flow {part}": (part - 1) * levels * block for part in range(2, parts + 1)}


def _share(steps: int, parts: int) -> int:
    """Return the steps at each level of one part."""
    check_integer("steps", steps, low=1)
    if steps % check_integer("parts", parts, low=1):
        raise ValueError(f"steps must be divisible by the number of parts, {parts}, got {steps}")
    return steps // parts


def _step(shape: Sequence[int], level: int, **coupling: object) -> list[Bijection]:
    """Return the layers of one step, in forward order."""
    sites = tuple(level_variables(shape, level).shape)
    channels = sites[0]
    return [
        ChannelCoupling(channels, **coupling),
        InvertibleConvolution(channels),
        ActNorm(sites, shared=(1, 2)),
    ]
