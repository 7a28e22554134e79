"""Glow: the variables of its levels, its 1x1 convolutions and couplings, cuts, starts, translations and refusals.

Round trips, log-determinants and gradients of more cases are in `test_real_bijections.py`.
"""

import io
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import (
    ActNorm,
    AtLevel,
    ChannelCoupling,
    Clamp,
    InvertibleConvolution,
    Reflection,
    Sequential,
    glow,
    glow_blocks,
)
from latticeflow.flows.glow import level_variables

BATCH = 5
CASES = [((1, 8, 8), 1), ((1, 8, 8), 2), ((1, 8, 8), 3), ((3, 4, 4), 2), ((2, 8, 4), 2)]
DIRECTIONS = ("forward", "inverse")


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(flow, *, seed=2, strength=0.1):
    """Return the flow in double precision and evaluation mode, noise added to every weight."""
    flow.double().eval()
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(strength * torch.randn(weight.shape, generator=draws, dtype=torch.float64))
    return flow


def seeded(build, seed=3):
    """Build under a seed of the global generator and leave that as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def small(shape, levels, *, steps=2, **options):
    return seeded(lambda: perturbed(glow(shape, levels=levels, steps=steps, **{"hidden": 6, **options})))


def saved_and_loaded(module, other):
    """Carry the state over by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def norms(flow):
    return [module for module in flow.modules() if isinstance(module, ActNorm)]


# ---------------------------------------------------------------- the whole flow


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize(("shape", "levels"), CASES)
def test_round_trip_and_opposite_log_determinants(shape, levels, periodic):
    flow, fields = small(shape, levels, periodic=periodic), normal(BATCH, *shape)
    for there, back in itertools.permutations((flow.forward, flow.inverse)):
        moved, log_det = there(fields)
        returned, log_det_back = back(moved)
        assert (moved - fields).abs().max() > 0.1
        assert log_det.abs().max() > 0.1
        assert_close(returned, fields, rtol=0, atol=1e-10)
        assert_close(log_det_back, -log_det, rtol=0, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("shape", "levels"), [((1, 4, 4), 2), ((1, 4, 8), 2), ((3, 2, 2), 1)])
def test_log_determinant_is_that_of_the_autograd_jacobian(shape, levels, direction):
    flow = small(shape, levels)
    run, one = getattr(flow, direction), normal(*shape)
    jacobian = torch.autograd.functional.jacobian(lambda x: run(x[None])[0][0], one, vectorize=True)
    expected = torch.linalg.slogdet(jacobian.reshape(one.numel(), -1)).logabsdet
    assert_close(run(one[None])[1][0], expected, rtol=0, atol=1e-9)


def test_every_variable_depends_on_every_one():
    """Three levels of an 8x8 field with one channel: the coarse variables reach all of it."""
    flow, one = small((1, 8, 8), 3, steps=3, periodic=True), normal(1, 8, 8)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0][0], one, vectorize=True)
    assert (jacobian.reshape(64, 64) != 0).all()


def test_gradient_reaches_all_parameters():
    flow, fields = small((1, 8, 8), 3), normal(BATCH, 1, 8, 8)
    for direction in DIRECTIONS:
        moved, log_det = getattr(flow, direction)(fields)
        for gradient in torch.autograd.grad((moved**3).sum() + log_det.sum(), tuple(flow.parameters())):
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0


def test_single_precision_stays_and_agrees_with_double():
    flow, fields = small((1, 8, 8), 3), normal(BATCH, 1, 8, 8)
    for direction in DIRECTIONS:
        exact, log_det = getattr(flow.double(), direction)(fields)
        moved, log_det_single = getattr(flow.float(), direction)(fields.float())
        assert moved.dtype == torch.float32
        assert_close(moved.double(), exact, rtol=1e-4, atol=1e-4)
        assert_close(log_det_single, log_det, rtol=0, atol=1e-3)
        for layer in flow.layers:
            assert getattr(layer, direction)(fields.float())[0].dtype == torch.float32


def test_the_global_seed_decides_the_start():
    flows = [seeded(lambda: glow((1, 4, 4), levels=2, steps=1), seed=seed) for seed in (1, 1, 2)]
    first, again, other = (flow.state_dict() for flow in flows)
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert not torch.equal(first["layers.1.layer.matrix.factors"], other["layers.1.layer.matrix.factors"])


def test_the_start_keeps_lengths():
    """1x1 convolutions start as rotations, couplings near the identity."""
    flow, fields = seeded(lambda: glow((1, 8, 8), levels=3, steps=2)).double().eval(), normal(BATCH, 1, 8, 8)
    moved, log_det = flow(fields)
    assert_close(moved.square().sum((1, 2, 3)), fields.square().sum((1, 2, 3)), rtol=0.1, atol=0)
    assert log_det.abs().max() < 1


# ---------------------------------------------------------------- levels


@pytest.mark.parametrize(("shape", "levels"), CASES)
def test_variables_of_the_levels_are_nested_and_halve(shape, levels):
    total = math.prod(shape)
    before = set(range(total))
    for level in range(1, levels + 1):
        variables = level_variables(shape, level)
        left = set(variables.flatten().tolist())
        assert variables.shape == (2 ** (level + 1) * shape[0], shape[1] // 2**level, shape[2] // 2**level)
        assert len(left) == variables.numel() == total // 2 ** (level - 1)
        assert left <= before
        before = left


def test_levels_of_one_channel_of_four_by_four():
    """Level 1 has the corners of 2x2 blocks as channels, and its upper row of each goes on."""
    sites = torch.arange(16).reshape(4, 4)
    corners = torch.stack([sites[i::2, j::2] for i in (0, 1) for j in (0, 1)])
    assert torch.equal(level_variables((1, 4, 4), 1), corners)
    going_on = [[corners[channel, i, j]] for channel in (0, 1) for i in (0, 1) for j in (0, 1)]
    assert torch.equal(level_variables((1, 4, 4), 2), torch.tensor(going_on)[..., None])


def test_two_extents_are_one_channel():
    """The same variables at every level, and the same flow of the field without its axis of channels."""
    for level in (1, 2, 3):
        assert torch.equal(level_variables((8, 16), level), level_variables((1, 8, 16), level))
    planar, channels = (small(shape, 2) for shape in ((8, 4), (1, 8, 4)))
    assert planar.state_dict().keys() == channels.state_dict().keys()
    fields = normal(BATCH, 8, 4)
    for direction in DIRECTIONS:
        moved, log_det = getattr(planar, direction)(fields)
        expected, log_det_expected = getattr(channels, direction)(fields[:, None])
        assert torch.equal(moved, expected[:, 0])
        assert torch.equal(log_det, log_det_expected)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_layer_moves_the_variables_of_its_level_alone(level):
    layer, fields = AtLevel(Reflection(), (1, 8, 8), level=level), normal(BATCH, 1, 8, 8)
    left = torch.zeros(64, dtype=torch.bool)
    left[level_variables((1, 8, 8), level).flatten()] = True
    expected = torch.where(left.reshape(1, 8, 8), -fields, fields)
    for direction in DIRECTIONS:
        assert torch.equal(getattr(layer, direction)(fields)[0], expected)


@pytest.mark.parametrize("level", [1, 2])
def test_a_layer_is_given_its_channels_and_puts_them_back_in_place(level):
    shape = (2, 8, 4)
    coupling = perturbed(seeded(lambda: ChannelCoupling(2 ** (level + 1) * 2, hidden=4)))
    fields, variables = normal(BATCH, *shape), level_variables(shape, level)
    for direction in DIRECTIONS:
        moved, log_det = getattr(AtLevel(coupling, shape, level=level), direction)(fields)
        expected, log_det_expected = getattr(coupling, direction)(fields.flatten(1)[:, variables])
        assert torch.equal(moved.flatten(1)[:, variables], expected)
        assert torch.equal(log_det, log_det_expected)


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize(("levels", "steps", "parts"), [(1, 1, 1), (3, 2, 1), (3, 4, 2), (2, 3, 3)])
def test_blocks_are_the_levels_of_the_parts(levels, steps, parts):
    flow = glow((1, 8, 8), levels=levels, steps=steps, hidden=3, parts=parts)
    blocks = glow_blocks(levels, steps, parts=parts)
    assert sum(blocks) == len(flow.layers) == 3 * levels * steps
    step = [ChannelCoupling, InvertibleConvolution, ActNorm]
    layers = iter(flow.layers)
    for block, level in zip(blocks, list(range(levels, 0, -1)) * parts, strict=True):
        taken = list(itertools.islice(layers, block))
        assert {layer.level_shape for layer in taken} == {(2 ** (level + 1), 8 // 2**level, 8 // 2**level)}
        assert [type(layer.layer) for layer in taken] == step * (steps // parts)


@pytest.mark.parametrize("parts", [1, 2])
def test_pieces_between_cuts_make_up_the_flow(parts):
    flow, fields = small((1, 8, 8), 3, parts=parts), normal(BATCH, 1, 8, 8)
    ends = list(itertools.accumulate(glow_blocks(3, 2, parts=parts)))
    pieces = [Sequential(flow.layers[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    for direction in DIRECTIONS:
        cut = getattr(Sequential(pieces), direction)(fields)
        assert_close(cut, getattr(flow, direction)(fields), rtol=0, atol=1e-12)


def test_a_part_is_a_complete_flow():
    flow, whole = small((1, 4, 4), 2, steps=4, parts=2), small((1, 4, 4), 2, steps=2)
    fields = normal(BATCH, 1, 4, 4)
    for layers in (flow.layers[:12], flow.layers[12:]):
        part = Sequential(layers)
        whole.load_state_dict(part.state_dict())
        assert torch.equal(whole(fields)[0], part(fields)[0])


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_batch_leaves_every_normalisation_standard_by_channel(direction):
    flow, seen = small((1, 8, 8), 2, steps=2).train(), []
    for layer in norms(flow):
        call = getattr(layer, direction)
        setattr(layer, direction, lambda field, run=call: seen.append(run(field)) or seen[-1])
    getattr(flow, direction)(3 + 2 * normal(50, 1, 8, 8))
    assert len(seen) == 4
    assert all(layer.initialised for layer in norms(flow))
    for moved, _ in seen:
        mean, variance = moved.mean((0, 2, 3)), moved.var((0, 2, 3), unbiased=False)
        assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-10)
        assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-10)
        assert moved.var(0).std() > 0.01  # by channel, not by variable


def test_normalisation_has_one_scale_and_shift_for_each_channel():
    for layer, channels in zip(norms(glow((1, 8, 8), levels=3, steps=1)), (16, 8, 4), strict=True):
        assert layer.log_scale.shape == layer.shift.shape == (channels, 1, 1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_initialisation_survives_saving_and_is_not_repeated(direction):
    """The 1x1 convolutions too: another start has other rotations, which the state replaces."""
    flow, fields = small((1, 8, 8), 3).train(), normal(BATCH, 1, 8, 8)
    expected = getattr(flow, direction)(fields)
    assert_close(getattr(flow, direction)(fields), expected)
    other = seeded(lambda: glow((1, 8, 8), levels=3, steps=2, hidden=6), seed=4).double()
    again = saved_and_loaded(flow, other)
    assert again.training
    for back in DIRECTIONS:
        getattr(again, back)(5 * normal(BATCH, 1, 8, 8, seed=6) - 2)
    assert all(torch.equal(weight, flow.state_dict()[name]) for name, weight in again.state_dict().items())
    moved, log_det = getattr(again, direction)(fields)
    assert torch.equal(moved, expected[0])
    assert torch.equal(log_det, expected[1])


# ---------------------------------------------------------------- 1x1 convolution


@pytest.mark.parametrize("sites", [(), (3,), (2, 3)])
@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_convolution_is_one_matrix_at_every_site(channels, sites):
    layer, fields = perturbed(seeded(lambda: InvertibleConvolution(channels))), normal(BATCH, channels, *sites)
    matrix = layer(torch.eye(channels, dtype=torch.float64))[0].T
    x, log_det = layer(fields)
    assert_close(x, torch.einsum("ij,bj...->bi...", matrix, fields))
    expected = math.prod(sites) * torch.linalg.slogdet(matrix).logabsdet
    assert_close(log_det, expected.expand(BATCH), rtol=0, atol=1e-10)
    z, log_det_back = layer.inverse(x)
    assert_close(z, fields, rtol=0, atol=1e-10)
    assert_close(log_det_back, -log_det)


@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_convolution_starts_as_the_orthogonal_matrix_drawn(channels):
    layer = seeded(lambda: InvertibleConvolution(channels))
    assert layer.matrix.factors.dtype == layer.matrix.signs.dtype == torch.float32
    matrix = layer(torch.eye(channels))[0].T
    drawn = seeded(lambda: torch.nn.init.orthogonal_(torch.empty(channels, channels, dtype=torch.float64)))
    assert_close(matrix, drawn.float(), rtol=0, atol=1e-5)
    assert_close(matrix @ matrix.T, torch.eye(channels), rtol=0, atol=1e-5)
    assert layer(torch.eye(channels))[1].abs().max() < 1e-5
    assert torch.equal(layer.matrix.signs.abs(), torch.ones(channels))
    assert channels == 1 or (matrix - torch.eye(channels)).abs().max() > 0.1


def test_convolution_starts_are_not_of_one_kind():
    """Rotations and reflections, with many orders of the rows, so that nothing fixed is lost by the LU form."""
    layers = seeded(lambda: [InvertibleConvolution(4) for _ in range(50)])
    assert {torch.linalg.det(layer(torch.eye(4))[0]).round().item() for layer in layers} == {-1.0, 1.0}
    assert len({tuple(layer.matrix.pivots.tolist()) for layer in layers}) > 10


@pytest.mark.parametrize("strength", [1.0, 5.0])
def test_no_weights_make_the_convolution_singular(strength):
    """Whatever L, U and log|s| are, the determinant is the product of the |s|, in sign and size."""
    layer = perturbed(seeded(lambda: InvertibleConvolution(6)), strength=strength)
    matrix = layer(torch.eye(6, dtype=torch.float64))[0]
    sign, log_size = torch.linalg.slogdet(matrix)
    permuted = torch.linalg.det(torch.eye(6)[layer.matrix.pivots]).round()
    assert sign == layer.matrix.signs.prod() * permuted
    assert_close(log_size, layer.matrix.factors.diagonal().sum(), rtol=0, atol=1e-6)
    with torch.no_grad():
        layer.matrix.factors.zero_()
    assert_close(layer(torch.eye(6, dtype=torch.float64))[0].det().abs(), torch.ones((), dtype=torch.float64))


# ---------------------------------------------------------------- coupling


def test_coupling_is_the_formula():
    layer, z = perturbed(seeded(lambda: ChannelCoupling(6, hidden=4, clamp=Clamp("none")))), normal(BATCH, 6, 4, 2)
    x, log_det = layer(z)
    log_scale, shift = layer.network(z[:, 3:]).split(3, dim=1)
    assert_close(x[:, :3], z[:, :3] * log_scale.exp() + shift)
    assert torch.equal(x[:, 3:], z[:, 3:])
    assert_close(log_det, log_scale.sum((1, 2, 3)))


def test_coupling_starts_near_the_identity():
    layer, z = seeded(lambda: ChannelCoupling(8)).double(), normal(50, 8, 4, 4)
    moved, log_det = layer(z)
    assert 0 < (moved - z).abs().max() < 0.01
    assert 0 < log_det.abs().max() < 0.05


def test_coupling_keeps_the_bounds_of_its_clamp():
    layer = perturbed(seeded(lambda: ChannelCoupling(2, hidden=4, clamp=Clamp())), strength=30.0)
    _, log_det = layer(normal(50, 2, 1, 1))
    assert (log_det.min() > -2) & (log_det.max() < 0.1)
    assert log_det.min() < -1.5


@pytest.mark.parametrize("periodic", [False, True])
def test_coupling_reaches_two_sites_and_wraps_around_where_it_is_periodic(periodic):
    layer = perturbed(seeded(lambda: ChannelCoupling(2, hidden=4, periodic=periodic)))
    z = normal(1, 2, 8, 8)
    touched = z.clone()
    touched[0, 1, 0, 3] += 1.0
    changed = (layer(touched)[0] - layer(z)[0])[0, 0].abs() > 1e-12
    rows = {0, 1, 2, 6, 7} if periodic else {0, 1, 2}
    assert set(changed.any(1).nonzero().flatten().tolist()) == rows
    assert set(changed.any(0).nonzero().flatten().tolist()) == {1, 2, 3, 4, 5}


# ---------------------------------------------------------------- translations


@pytest.mark.parametrize(("shape", "levels"), CASES)
def test_periodic_flows_commute_with_translations_by_blocks(shape, levels):
    """By 2^levels sites, and by no fewer; without `periodic`, by none."""
    flow, open_flow = (small(shape, levels, periodic=periodic) for periodic in (True, False))
    fields, block = normal(BATCH, *shape), 2**levels
    for direction in DIRECTIONS:
        moved, log_det = getattr(flow, direction)(fields)
        for steps in itertools.product((0, block, -block), repeat=2):
            translated, log_det_translated = getattr(flow, direction)(fields.roll(steps, (-2, -1)))
            assert_close(translated, moved.roll(steps, (-2, -1)), rtol=0, atol=1e-10)
            assert_close(log_det_translated, log_det, rtol=0, atol=1e-9)
        half = (block // 2, 0)
        assert (getattr(flow, direction)(fields.roll(half, (-2, -1)))[0] - moved.roll(half, (-2, -1))).abs().max() > 0.1
        if shape[1] > block:
            one = (block, 0)
            moved = getattr(open_flow, direction)(fields)[0].roll(one, (-2, -1))
            assert (getattr(open_flow, direction)(fields.roll(one, (-2, -1)))[0] - moved).abs().max() > 1e-3


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8, 6), {"levels": 2}, r"sides of the shape \[1, 8, 6\] must be divisible by 4, for level 2"),
        ((1, 8, 8), {"levels": 4}, r"sides of the shape \[1, 8, 8\] must be divisible by 16, for level 4"),
        ((8,), {}, r"lattice shape \[8\] has 1 extents, expected 3"),
        ((0, 8, 8), {}, r"lattice shape \[0, 8, 8\] must hold positive integers"),
        ((1, 8, 8), {"levels": 0}, "levels must be an integer of at least 1, got 0"),
        ((1, 8, 8), {"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ((1, 8, 8), {"steps": 1.5}, "steps must be an integer of at least 1, got 1.5"),
        ((1, 8, 8), {"parts": 0}, "parts must be an integer of at least 1, got 0"),
        ((1, 8, 8), {"parts": 3}, "steps must be divisible by the number of parts, 3, got 2"),
        ((1, 8, 8), {"hidden": 0}, "hidden must be an integer of at least 1, got 0"),
    ],
)
def test_settings_that_make_no_flow_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        glow(shape, **{"levels": 1, "steps": 2, **options})


@pytest.mark.parametrize(
    ("levels", "steps", "parts", "message"),
    [
        (0, 1, 1, "levels must be an integer of at least 1, got 0"),
        (1, 0, 1, "steps must be an integer of at least 1, got 0"),
        (1, 1, 0, "parts must be an integer of at least 1, got 0"),
        (1, 4, 3, "steps must be divisible by the number of parts, 3, got 4"),
    ],
)
def test_blocks_of_no_flow_are_refused(levels, steps, parts, message):
    with pytest.raises(ValueError, match=message):
        glow_blocks(levels, steps, parts=parts)


@pytest.mark.parametrize("channels", [1, 3])
def test_couplings_refuse_channels_that_have_no_halves(channels):
    with pytest.raises(ValueError, match=f"channels must be even to be split in two halves, got {channels}"):
        ChannelCoupling(channels)


@pytest.mark.parametrize("build", [ChannelCoupling, InvertibleConvolution])
def test_layers_refuse_no_channels(build):
    with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
        build(0)


def test_a_level_below_one_is_refused():
    with pytest.raises(ValueError, match="level must be an integer of at least 1, got 0"):
        AtLevel(Reflection(), (1, 4, 4), level=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers_refuse_fields_of_another_shape(direction):
    for layer, shape, message in [
        (InvertibleConvolution(4), (2, 3, 4), r"a convolution of 4 channels was given fields of \[2, 3, 4\]"),
        (InvertibleConvolution(4), (4,), r"a convolution of 4 channels was given fields of \[4\]"),
        (ChannelCoupling(4), (2, 6, 3, 3), r"a coupling of 4 channels was given fields of \[2, 6, 3, 3\]"),
        (ChannelCoupling(4), (2, 4, 3), r"a coupling of 4 channels was given fields of \[2, 4, 3\]"),
        (AtLevel(Reflection(), (1, 4, 4), level=1), (2, 1, 4, 8), r"level of the shape \[1, 4, 4\] was given fields"),
        (AtLevel(Reflection(), (4, 4), level=1), (2, 1, 4, 4), r"level of the shape \[4, 4\] was given fields"),
    ]:
        with pytest.raises(ValueError, match=message):
            getattr(layer, direction)(torch.zeros(shape))


def test_cuts_have_names():
    blocks = glow((1, 8, 8), levels=3, steps=2, hidden=4)
    assert [len(part.layers) for part in blocks.cut(["level 2", "level 1"])] == [6, 6, 6]
    assert [len(part.layers) for part in blocks.cut(["level 1"])] == [12, 6]
    across = glow((1, 8, 8), levels=3, steps=2, hidden=4, parts=2)
    assert [len(part.layers) for part in across.cut(["flow 2"])] == [9, 9]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["level 3"], "there is no place 'level 3' to cut; the places with a name are: 'level 2', 'level 1'$"),
        (["level 1", "level 2"], "are not in the order of the layers: .'level 2', 'level 1'.$"),
        (["level 1", "level 1"], "are not in the order of the layers"),
    ],
)
def test_cuts_by_other_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        glow((1, 8, 8), levels=3, steps=1, hidden=4).cut(names)
