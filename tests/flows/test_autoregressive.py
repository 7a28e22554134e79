"""Masked autoregressive blocks: who sees whom, both directions, against zuko, at the edges and at the start.

Round trips, log-determinants and gradients of more cases are in `test_real_bijections.py`.
"""

import math

import pytest
import torch
import zuko
from torch import nn
from torch.testing import assert_close

from latticeflow.flows import Clamp, MaskedAutoregressive, autoregressive_flow
from latticeflow.flows.autoregressive import ACTIVATIONS, MaskedLinear, MaskedNetwork

BATCH = 7
SHAPES = [(1,), (2,), (5,), (2, 3), (2, 1, 2)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def randomised(flow, seed=2):
    """Fill all weights so that shifts and log scales are of order one."""
    draws = generator(seed)
    flow.double()
    with torch.no_grad():
        for layer in (module for module in flow.modules() if isinstance(module, MaskedLinear)):
            seen = layer.mask.sum(1, keepdim=True).clamp(min=1)
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draws) / seen.sqrt())
            layer.bias.copy_(0.5 * torch.randn(layer.bias.shape, generator=draws))
    return flow


def block(shape, **options):
    return randomised(MaskedAutoregressive(shape, **{"hidden": (11, 8), **options}))


def jacobian(run, field):
    """Return d out / d in of one configuration, `(D, D)`."""
    found = torch.autograd.functional.jacobian(lambda one: run(one[None])[0][0], field, vectorize=True)
    return found.reshape(field.numel(), field.numel())


# ---------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_jacobian_is_triangular_and_full(shape, reverse):
    """The zeros are exact, every entry on the other side is there, and the diagonal is the log-determinant."""
    flow, field = block(shape, reverse=reverse), normal(*shape)
    for run in (flow.inverse, flow.forward):
        matrix = jacobian(run, field)
        ordered = matrix.flip(0, 1) if reverse else matrix
        assert not torch.triu(ordered, 1).any()
        assert (ordered[tuple(torch.tril_indices(len(matrix), len(matrix)))] != 0).all()
        assert (ordered.diagonal() > 0).all()
        assert_close(run(field[None])[1][0], ordered.diagonal().log().sum(), rtol=0, atol=1e-12)
        assert_close(run(field[None])[1][0], torch.linalg.slogdet(matrix).logabsdet, rtol=0, atol=1e-10)


@pytest.mark.parametrize("hidden", [(), (1,), (3,), (3, 20), (20, 3), (4, 4, 4, 4)])
def test_any_widths_keep_the_order(hidden):
    matrix = jacobian(block((6,), hidden=hidden).inverse, normal(6))
    assert not torch.triu(matrix, 1).any()
    assert (matrix[1:, 0] != 0).all()
    if not hidden or min(hidden) >= 5:
        assert torch.equal(matrix != 0, torch.ones(6, 6).tril().bool())


def test_the_last_variable_sees_all_before_it_through_narrow_layers():
    matrix = jacobian(block((9,), hidden=(3, 2)).inverse, normal(9))
    assert (matrix[8] != 0).all()


def test_degrees_are_spread_evenly():
    network = MaskedNetwork(4, (7,), torch.tanh)
    assert network.layers[0].mask.sum(1).tolist() == [1, 1, 1, 2, 2, 3, 3]
    assert network.layers[1].mask.sum(1).tolist() == [0, 0, 3, 3, 5, 5, 7, 7]


@pytest.mark.parametrize("clamp", [Clamp("none"), Clamp("tanh", negative=0.3)])
def test_formula(clamp):
    """`z = (x - t) exp(-c(s))`, the network read at the field itself."""
    flow, x = block((3,), clamp=clamp), normal(BATCH, 3)
    s, t = flow.network(x).unbind(2)
    z, log_det = flow.inverse(x)
    assert_close(z, (x - t) * torch.exp(-clamp(s)))
    assert_close(log_det, -clamp(s).sum(1))
    assert s.abs().max() > 0.5


# ---------------------------------------------------------------- both directions


@pytest.mark.parametrize("activation", [*ACTIVATIONS, torch.sin, nn.LeakyReLU(), nn.PReLU()])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, activation):
    """Draws are made unit by unit, densities with masks: they must be each other's inverse."""
    flow = randomised(autoregressive_flow(shape, blocks=3, hidden=(9, 6), activation=activation))
    z = normal(BATCH, *shape)
    x, log_det = flow(z)
    back, log_det_back = flow.inverse(x)
    assert_close(back, z, rtol=0, atol=1e-9)
    assert_close(log_det_back, -log_det, rtol=0, atol=1e-9)
    assert (x - z).abs().max() > 0.3
    assert torch.linalg.slogdet(jacobian(flow, z[0])).logabsdet.sub(log_det[0]).abs() < 1e-8


def test_gradients_agree_between_the_directions():
    """Of draws and of densities: `dz/dtheta` at fixed x is `-dz/dx dx/dtheta`."""
    flow, z = block((4,)), normal(1, 4)
    x = flow(z)[0]
    slope = jacobian(flow.inverse, x[0].detach())
    for i in range(4):
        through_draw = torch.autograd.grad((slope @ flow(z)[0][0])[i], tuple(flow.parameters()))
        through_density = torch.autograd.grad(flow.inverse(x.detach())[0][0, i], tuple(flow.parameters()))
        for one, other in zip(through_draw, through_density, strict=True):
            assert_close(one, -other, rtol=1e-9, atol=1e-10)
    assert any(gradient.abs().max() > 0.1 for gradient in through_density)


@pytest.mark.parametrize("reverse", [False, True])
def test_draws_equal_those_by_repeated_passes(reverse):
    """The textbook way: D passes of the whole network, each of which makes one more variable right."""
    flow, z = block((5,), reverse=reverse), normal(BATCH, 5)
    x = torch.zeros_like(z)
    for _ in range(5):
        ordered = x.flip(1) if reverse else x
        s, t = flow.network(ordered).unbind(2)
        x = (z.flip(1) if reverse else z) * torch.exp(s) + t
        x = x.flip(1) if reverse else x
    assert_close(flow(z)[0], x, rtol=0, atol=1e-11)


def test_each_draw_computes_every_unit_once():
    calls = []

    def counting(x):
        calls.append(x.shape[1])
        return torch.tanh(x)

    block((6,), hidden=(10, 7), activation=counting)(normal(BATCH, 6))
    assert sum(calls) == 10 + 7


@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision(shape):
    flow, z = randomised(autoregressive_flow(shape, blocks=2, hidden=(6,))), normal(BATCH, *shape)
    exact, exact_log_det = flow(z)
    x, log_det = flow.float()(z.float())
    assert x.dtype == torch.float32
    assert_close(x.double(), exact, rtol=1e-4, atol=1e-4)
    assert_close(log_det, exact_log_det, rtol=0, atol=1e-4)
    assert_close(flow.inverse(x)[0], z.float(), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- zuko


def as_zuko(flow, variables, hidden):
    """Return zuko's transform with the weights and masks of a block, and the same map of one variable.

    zuko's own affine map clips the scale softly and is its inverse, so it is replaced by torch's.
    """

    def affine(s, t):
        return torch.distributions.AffineTransform(t, s.exp(), cache_size=1).inv

    order = torch.arange(variables)
    order = order.flip(0) if flow.reverse else order
    transform = zuko.flows.MaskedAutoregressiveTransform(
        variables, order=order, univariate=affine, shapes=((), ()), hidden_features=hidden, activation=nn.Tanh
    ).double()
    linears = [module for module in transform.hyper if isinstance(module, nn.Linear)]
    for mine, theirs in zip(flow.network.layers, linears, strict=True):
        weight, mask, bias = mine.weight, mine.mask, mine.bias
        if flow.reverse and mine is flow.network.layers[0]:
            weight, mask = weight.flip(1), mask.flip(1)
        if flow.reverse and mine is flow.network.layers[-1]:
            weight, mask, bias = (one.unflatten(0, (-1, 2)).flip(0).flatten(0, 1) for one in (weight, mask, bias))
        assert mask.shape == theirs.mask.shape
        theirs.weight, theirs.bias, theirs.mask = nn.Parameter(weight), nn.Parameter(bias), mask
    return transform


@pytest.mark.parametrize("variables", [2, 5])
def test_log_densities_are_those_of_zuko(variables):
    hidden = (12, 8)
    flow = randomised(autoregressive_flow((variables,), blocks=3, hidden=hidden))
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(variables).double(), torch.ones(variables).double(), buffer=True
    )
    theirs = zuko.flows.Flow([as_zuko(layer, variables, hidden) for layer in reversed(flow.layers)], base)()
    x = flow(normal(200, variables))[0].detach()
    z, log_det = flow.inverse(x)
    mine = -0.5 * (z**2).sum(1) - variables / 2 * math.log(2 * math.pi) + log_det
    assert_close(mine, theirs.log_prob(x), rtol=0, atol=1e-10)
    assert_close(theirs.transform.inv(z), x, rtol=0, atol=1e-9)
    assert (z - x).abs().max() > 1


@pytest.mark.parametrize("variables", [2, 5])
def test_masks_connect_what_those_of_zuko_do(variables):
    theirs = zuko.flows.MaskedAutoregressiveTransform(variables, hidden_features=(12, 8)).hyper
    mine = MaskedNetwork(variables, (12, 8), torch.tanh)
    paths = []
    for masks in ([layer.mask for layer in mine.layers], [m.mask for m in theirs if isinstance(m, nn.Linear)]):
        paths.append(torch.linalg.multi_dot([mask.double() for mask in reversed(masks)]) > 0)
    assert torch.equal(*paths)


# ---------------------------------------------------------------- one variable, start and state


def test_one_variable_is_an_affine_map_with_no_hidden_layers():
    flow = MaskedAutoregressive((1,)).double()
    with torch.no_grad():
        flow.network.layers[0].bias.copy_(torch.tensor([0.4, -1.5]))
    z = normal(BATCH, 1)
    x, log_det = flow(z)
    assert len(flow.network.layers) == 1
    assert_close(x, z * math.exp(0.4) - 1.5)
    assert_close(log_det, torch.full((BATCH,), 0.4).double())


@pytest.mark.parametrize("shape", SHAPES)
def test_starts_near_the_identity(shape):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        flow = autoregressive_flow(shape).double()
    z = normal(100, *shape)
    x, log_det = flow(z)
    assert (x - z).abs().max() < 0.2
    assert log_det.abs().max() < 0.2
    assert (x - z).abs().max() > 0 or shape == (1,)


def test_order_is_reversed_in_turn():
    flow = autoregressive_flow((3,), blocks=5)
    assert [layer.reverse for layer in flow.layers] == [False, True, False, True, False]
    assert [layer.out_features for layer in flow.layers[0].network.layers] == [50, 50, 6]
    assert len(autoregressive_flow((3,)).layers) == 6


def test_state_dict_round_trip():
    """The masks are no part of it."""
    flow, other = (randomised(autoregressive_flow((2, 2), blocks=2, hidden=(5,)), seed) for seed in (4, 5))
    z = normal(BATCH, 2, 2)
    assert not torch.equal(other(z)[0], flow(z)[0])
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(z)[0], flow(z)[0])
    assert set(flow.state_dict()) == {name for name, _ in flow.named_parameters()}


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tan"}, "one of elu, gelu, relu, silu, softplus, tanh, or a function, got 'tan'"),
        ({"activation": nn.Tanh}, "a name, a function or a module instance"),
        ({"activation": 3}, "a name, a function or a module instance, got 3"),
        ({"hidden": (4, 0)}, r"positive integers, got \[4, 0\]"),
        ({"hidden": (4.0,)}, r"positive integers, got \[4.0\]"),
        ({"hidden": (True,)}, r"positive integers, got \[True\]"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    for build in (MaskedAutoregressive, autoregressive_flow):
        with pytest.raises(ValueError, match=message):
            build((3,), **options)


def test_no_blocks_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        autoregressive_flow((3,), blocks=0)


@pytest.mark.parametrize("shape", [(0,), (), (2, -1)])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(ValueError, match="positive integers"):
        MaskedAutoregressive(shape)


def test_fields_of_another_shape_are_refused():
    flow = block((2, 3))
    for run in (flow.forward, flow.inverse):
        with pytest.raises(ValueError, match=r"shape \[2, 3\] was given fields of shape \[4, 3, 2\]"):
            run(normal(4, 3, 2))
