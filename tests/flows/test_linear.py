"""Linear layers of all variables: what they are, what is kept of their weights, singular ones, and flows of them.

Round trips and log-determinants of more cases are in `test_real_bijections.py`.
"""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import (
    Bijection,
    Cubic,
    Dense,
    LUDense,
    PeriodicConvolution,
    Sequential,
    SingularWeightsError,
    SmoothLeakyReLU,
    linear_flow,
)
from latticeflow.flows.linear import TriangularFactors
from latticeflow.priors import Normal
from latticeflow.samplers import EBFlowSampler

DIRECTIONS = ("forward", "inverse")
BATCH = 4


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(module, *, seed=2, strength=0.1):
    """Return the module in double precision, noise added to every weight."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.double().parameters():
            weight.add_(strength * torch.randn(weight.shape, generator=draws, dtype=torch.float64))
    return module


def seeded(build, seed=3):
    """Build under a seed of the global generator and leave that as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


LAYERS = {
    "dense": (lambda: Dense((2, 3)), (2, 3)),
    "lu": (lambda: LUDense((2, 3)), (2, 3)),
    "convolution": (lambda: PeriodicConvolution((4, 3), kernel=3), (4, 3)),
    "convolution of channels": (lambda: PeriodicConvolution((5,), channels=2), (2, 5)),
}


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return perturbed(seeded(LAYERS[request.param][0]))


def shape_of(layer):
    return layer.shape if getattr(layer, "channels", None) is None else (layer.channels, *layer.shape)


def matrix_of(layer):
    """Return the Jacobian dz/dx, as rows of all variables."""
    shape = shape_of(layer)
    zero = torch.zeros(math.prod(shape), dtype=torch.float64)
    return torch.autograd.functional.jacobian(lambda x: layer.to_latent(x.reshape(1, *shape)).flatten(), zero)


def results(layer, field):
    """Return both directions and the constant, with gradients where they are asked for."""
    return [*layer(field), *layer.inverse(field), layer.constant_log_det(field.shape[1:])]


class Way(torch.nn.Module):
    """One direction of a layer as a function of its weights."""

    def __init__(self, layer, direction):
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, field):
        return getattr(self.layer, self.direction)(field)


# ---------------------------------------------------------------- what they are


def test_dense_is_the_formula():
    layer, x = perturbed(Dense((2, 3))), normal(BATCH, 2, 3)
    z, log_det = layer.inverse(x)
    assert_close(z.flatten(1), x.flatten(1) @ layer.weight.T + layer.shift)
    assert_close(log_det, torch.linalg.slogdet(layer.weight).logabsdet.expand(BATCH))


def test_triangular_dense_is_the_product_of_its_factors():
    layer, x = perturbed(seeded(lambda: LUDense((2, 3)))), normal(BATCH, 2, 3)
    factors, signs, pivots = layer.matrix.factors, layer.matrix.signs, layer.matrix.pivots
    lower = factors.tril(-1) + torch.eye(6).double()
    upper = factors.triu(1) + torch.diag(signs * factors.diagonal().exp())
    matrix = (lower @ upper)[pivots]
    z, log_det = layer.inverse(x)
    assert_close(z.flatten(1), x.flatten(1) @ matrix.T + layer.shift)
    assert_close(log_det, torch.linalg.slogdet(matrix).logabsdet.expand(BATCH), rtol=0, atol=1e-12)


def periodic_convolution(x, weight, shift):
    """Return `b_a + sum_{c, r} w_ac(r) x_c(y - r)` by rolling the field, the window being centred."""
    window, axes = weight.shape[2:], tuple(range(-weight.dim() + 2, 0))
    total = torch.zeros_like(x) + shift.reshape(-1, *[1] * len(window))
    for place in itertools.product(*map(range, window)):
        steps = tuple(i - extent // 2 for i, extent in zip(place, window, strict=True))
        total = total + torch.einsum("ac,nc...->na...", weight[(..., *place)], x.roll(steps, axes))
    return total


CONVOLUTIONS = [
    ((5,), {}),
    ((6,), {}),
    ((6,), {"kernel": 3}),
    ((4, 4), {"kernel": 3}),
    ((3, 6), {"kernel": 5}),
    ((4, 5), {"channels": 3}),
    ((2, 3, 4), {"kernel": 3, "channels": 2}),
]


@pytest.mark.parametrize(("shape", "options"), CONVOLUTIONS)
def test_convolution_is_the_sum_over_its_window(shape, options):
    layer = perturbed(PeriodicConvolution(shape, **options))
    channels = options.get("channels")
    x = normal(BATCH, channels or 1, *shape)
    expected = periodic_convolution(x, layer.weight, layer.shift)
    z, _ = layer.inverse(x if channels else x[:, 0])
    assert_close(z, expected if channels else expected[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "options"), CONVOLUTIONS)
def test_convolution_commutes_with_translations(shape, options):
    layer = perturbed(PeriodicConvolution(shape, **options))
    field, axes = normal(BATCH, *shape_of(layer)), tuple(range(-len(shape), 0))
    for direction in DIRECTIONS:
        run = getattr(layer, direction)
        for steps in itertools.product((0, 1, -2), repeat=len(shape)):
            assert_close(run(field.roll(steps, axes))[0], run(field)[0].roll(steps, axes), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("shape", "options"), CONVOLUTIONS)
def test_spectrum_is_the_sum_of_plane_waves(shape, options):
    """And its determinants are those of the whole matrix, `log|det| = sum_k log|det w(k)|`."""
    layer = perturbed(PeriodicConvolution(shape, **options))
    window = layer.weight.shape[2:]
    spectrum = layer.spectrum()
    for momentum in itertools.product(*map(range, shape)):
        expected = 0
        for place in itertools.product(*map(range, window)):
            offsets = [i - extent // 2 for i, extent in zip(place, window, strict=True)]
            phase = sum(2 * math.pi * n * r / size for n, r, size in zip(momentum, offsets, shape, strict=True))
            expected = expected + layer.weight[(..., *place)] * complex(math.cos(phase), -math.sin(phase))
        assert_close(spectrum[momentum], expected, rtol=0, atol=1e-12)
    determinant = torch.linalg.slogdet(matrix_of(layer)).logabsdet
    assert_close(layer.constant_log_det(shape), -determinant, rtol=0, atol=1e-11)


def test_convolutions_start_as_the_identity():
    for shape, options in CONVOLUTIONS:
        layer = PeriodicConvolution(shape, **options).double()
        field = normal(BATCH, *shape_of(layer))
        for direction in DIRECTIONS:
            moved, log_det = getattr(layer, direction)(field)
            assert_close(moved, field, rtol=0, atol=1e-14)
            assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [Dense, LUDense])
def test_matrices_start_as_rotations_or_reflections(kind):
    layers = seeded(lambda: [kind((2, 3)).double() for _ in range(20)])
    for layer in layers:
        matrix = matrix_of(layer)
        assert_close(matrix @ matrix.T, torch.eye(6).double(), rtol=0, atol=1e-5)
        assert_close(layer.constant_log_det((2, 3)), torch.zeros(()).double(), rtol=0, atol=1e-5)
    assert {torch.linalg.det(matrix_of(layer)).round().item() for layer in layers} == {-1.0, 1.0}


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_no_weights_make_triangular_factors_singular(strength):
    """Whatever they are, the determinant is the product of the |s|, and the start's sign stays."""
    factors = seeded(lambda: TriangularFactors(5))
    start = torch.linalg.det(factors.double().multiply(torch.eye(5).double())).sign()
    for seed in range(20):
        drawn = perturbed(copy.deepcopy(factors), seed=seed, strength=strength)
        sign, log_size = torch.linalg.slogdet(drawn.multiply(torch.eye(5).double()))
        assert sign == start
        assert_close(log_size, drawn.log_det(), rtol=0, atol=1e-5)
        v = normal(5, 2, seed=seed)
        if strength == 1.0:
            assert_close(drawn.solve(drawn.multiply(v)), v, rtol=0, atol=1e-8)
    with torch.no_grad():
        factors.factors.zero_()
    assert torch.linalg.det(factors.multiply(torch.eye(5).double())).abs() == 1


def test_without_shift_zero_stays_zero():
    for build in (Dense, LUDense, PeriodicConvolution):
        layer, zero = perturbed(build((2, 3), shift=False)), torch.zeros(1, 2, 3).double()
        assert layer.shift is None
        for direction in DIRECTIONS:
            assert not getattr(layer, direction)(zero)[0].any()


# ---------------------------------------------------------------- what is kept


def test_numbers_are_the_same_with_and_without_gradients(layer):
    field = normal(BATCH, *shape_of(layer))
    recorded = results(layer, field)
    with torch.no_grad():
        for _ in range(2):  # made, then kept
            for value, expected in zip(results(layer, field), recorded, strict=True):
                assert_close(value, expected.detach(), rtol=1e-11, atol=1e-11)


def spied(monkeypatch, *names):
    """Return a list to which each call of these functions of torch.linalg adds its name."""
    calls = []
    for name in names:
        original = getattr(torch.linalg, name)

        def spy(*args, run=original, called=name, **options):
            calls.append(called)
            return run(*args, **options)

        monkeypatch.setattr(torch.linalg, name, spy)
    return calls


@pytest.mark.parametrize(("name", "factorisation"), [("dense", "lu_factor_ex"), ("convolution", "slogdet")])
def test_one_factorisation_serves_all_draws_and_densities(monkeypatch, name, factorisation):
    layer, field = perturbed(seeded(LAYERS[name][0])), normal(BATCH, *LAYERS[name][1])
    calls = spied(monkeypatch, "lu_factor_ex", "slogdet", "solve")
    with torch.no_grad():
        for _ in range(3):
            results(layer, field)
    assert calls.count(factorisation) == 1
    assert name != "dense" or len(calls) == 1
    with torch.no_grad():
        layer.weight.mul_(2)
        results(layer, field)
        results(layer, field)
    assert calls.count(factorisation) == 2


def in_place(layer):
    layer.weight.mul_(1.5)


def by_optimizer(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.weight.grad = normal(*layer.weight.shape, seed=5)
    optimizer.step()


def through_data(layer):
    layer.weight.data.mul_(1.5)


def through_new_data(layer):
    layer.weight.data = layer.weight.data * 1.5


def another_parameter(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def load_state(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


def assign_state(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()}, assign=True)


def rounded(layer):
    layer.float().double()


def from_vector(layer):
    vector = torch.nn.utils.parameters_to_vector(layer.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.5, layer.parameters())


CHANGES = [
    in_place,
    by_optimizer,
    through_data,
    through_new_data,
    another_parameter,
    load_state,
    assign_state,
    rounded,
    from_vector,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["dense", "convolution", "convolution of channels"])
def test_nothing_stale_is_used_after_a_change_of_the_weights(name, change):
    layer, field = perturbed(seeded(LAYERS[name][0])), normal(BATCH, *LAYERS[name][1])
    for _ in range(3):
        with torch.no_grad():
            before = results(layer, field)
            change(layer)
            found = results(layer, field)
            found_again = results(layer, field)
        for value, again, expected in zip(found, found_again, results(layer, field), strict=True):
            assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
            assert torch.equal(again, value)
        assert change is rounded or (found[-1] - before[-1]).abs() > 1e-3


def test_another_precision_has_numbers_of_its_own(layer):
    field = normal(BATCH, *shape_of(layer))
    with torch.no_grad():
        exact = results(layer, field)
        single = results(layer.float(), field.float())
        double = results(layer.double(), field)
    for a, b, c in zip(exact, single, double, strict=True):
        assert_close(b.double(), a, rtol=1e-4, atol=1e-4)
        assert_close(c, a, rtol=1e-5, atol=1e-5)
    assert single[0].dtype == torch.float32
    assert single[1].dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_weights_of_their_own(layer, copied):
    field = normal(BATCH, *shape_of(layer))
    with torch.no_grad():
        before = results(layer, field)
        other = copied(layer)
        assert all(map(torch.equal, results(other, field), before))
        next(iter(other.parameters())).mul_(2)
        assert all(map(torch.equal, results(layer, field), before))
        moved = results(other, field)
        assert_close(moved[1], other.inverse(other(field)[0])[1].neg(), rtol=0, atol=1e-11)


def test_what_is_kept_is_not_in_the_state():
    layer = seeded(lambda: Dense((2, 3)))
    with torch.no_grad():
        layer.log_det((2, 3))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert set(torch.load(file, weights_only=True)) == {"weight", "shift"}


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_both_directions(layer, direction):
    """By finite differences, with respect to field and parameters, of values and log-determinants."""
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in layer.named_parameters()}

    def run(field, *values):
        given = {f"layer.{name}": value for name, value in zip(weights, values, strict=True)}
        return torch.func.functional_call(Way(layer, direction), given, (field,))

    inputs = (normal(2, *shape_of(layer)).requires_grad_(), *weights.values())
    assert torch.autograd.gradcheck(run, inputs)


def test_the_field_carries_gradients_where_weights_are_frozen(layer):
    layer.requires_grad_(requires_grad=False)
    for direction in DIRECTIONS:
        field = normal(2, *shape_of(layer)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, way=direction: getattr(layer, way)(x)[0], (field,))


# ---------------------------------------------------------------- singular weights


def zero_row(weight):
    weight[1].zero_()


def zero_weight(weight):
    weight.zero_()


def blind_at_zero_momentum(weight):
    """`w(k) = 1 - cos(k)`."""
    weight[0, 0].copy_(torch.tensor([-0.5, 1.0, -0.5]))


def blind_to_one_mix_of_channels(weight):
    weight[1].copy_(weight[0])


SINGULAR = {
    "dense, zero row": (lambda: Dense((2, 2)), zero_row, "Dense"),
    "dense, zero": (lambda: Dense((2, 2)), zero_weight, "Dense"),
    "convolution, zero": (lambda: PeriodicConvolution((2, 2)), zero_weight, "PeriodicConvolution"),
    "convolution, one momentum": (
        lambda: PeriodicConvolution((4,), kernel=3),
        blind_at_zero_momentum,
        "PeriodicConvolution",
    ),
    "convolution, channels": (
        lambda: PeriodicConvolution((2,), channels=2),
        blind_to_one_mix_of_channels,
        "PeriodicConvolution",
    ),
}
USES = {
    "forward": lambda sampler, x: sampler.flow(x),
    "inverse": lambda sampler, x: sampler.flow.inverse(x),
    "log_prob": lambda sampler, x: sampler.log_prob(x),
    "log_z": lambda sampler, x: sampler.log_z(),
    "sample": lambda sampler, x: sampler.sample(3, torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("use", list(USES))
@pytest.mark.parametrize("case", list(SINGULAR))
def test_singular_weights_are_refused_by_the_name_of_their_layer(case, use, gradients):
    build, spoil, kind = SINGULAR[case]
    spoilt, sound = seeded(build).double(), seeded(build).double()
    shape = shape_of(spoilt)
    sampler = EBFlowSampler(Normal(shape), Sequential([sound, SmoothLeakyReLU(), spoilt]))
    x = normal(3, *shape)
    with torch.set_grad_enabled(gradients):
        assert all(torch.isfinite(value).all() for value in sampler.sample(3, torch.Generator().manual_seed(1)))
        with torch.no_grad():
            spoil(spoilt.weight)
        with pytest.raises(SingularWeightsError, match=rf"the weights of layers\.2, {kind}, are singular"):
            USES[use](sampler, x)


def test_singular_weights_of_nested_flows_are_named_in_full():
    dense = Dense((3,)).double()
    flow = Sequential([Cubic(), Sequential([Sequential([Cubic(), dense]), SmoothLeakyReLU()])]).double()
    with torch.no_grad():
        dense.weight.zero_()
    for use in (flow, flow.inverse, lambda x: flow.constant_log_det((3,))):
        with pytest.raises(SingularWeightsError, match=r"layers\.1\.layers\.0\.layers\.1, Dense") as caught:
            use(normal(2, 3))
        assert caught.value.layer is dense


def test_a_layer_by_itself_has_no_name():
    layer = Dense((3,))
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(SingularWeightsError, match=r"^the weights of Dense are singular: their determinant is 0$"):
        layer.log_det((3,))


def test_energies_and_scores_do_not_mind_singular_weights():
    """They need no inverse, so that training may pass through such weights."""
    dense = Dense((3,)).double()
    sampler = EBFlowSampler(Normal((3,)), Sequential([Cubic().double(), dense]))
    with torch.no_grad():
        dense.weight[0].zero_()
    x = normal(2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(sampler.energy(x).sum(), x)
    assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------- flows of them


@pytest.mark.parametrize(("linear", "kind"), [("dense", Dense), ("lu", LUDense), ("convolution", PeriodicConvolution)])
@pytest.mark.parametrize(("activation", "between"), [("leaky_relu", SmoothLeakyReLU), ("cubic", Cubic)])
def test_flows_alternate_linear_layers_and_activations(linear, kind, activation, between):
    for layers in (1, 2, 4):
        flow = linear_flow((2, 2), layers=layers, linear=linear, activation=activation, slope=0.4)
        assert [type(layer) for layer in flow.layers] == [kind, *[between, kind] * (layers - 1)]
        assert flow.constant_jacobian == (layers == 1)
        assert all(layer.slope == 0.4 for layer in flow.layers if isinstance(layer, SmoothLeakyReLU))


@pytest.mark.parametrize("linear", ["dense", "lu", "convolution"])
def test_odd_flows_commute_with_the_reflection(linear):
    flow = perturbed(linear_flow((2, 3), layers=3, linear=linear, activation="cubic", odd=True))
    field = normal(BATCH, 2, 3)
    for direction in DIRECTIONS:
        moved, log_det = getattr(flow, direction)(field)
        reflected, log_det_reflected = getattr(flow, direction)(-field)
        assert_close(reflected, -moved, rtol=0, atol=1e-11)
        assert_close(log_det_reflected, log_det, rtol=0, atol=1e-11)


def test_the_kernel_is_the_window():
    flow = linear_flow((6, 4), linear="convolution", kernel=5)
    assert [layer.weight.shape[2:] for layer in flow.layers if isinstance(layer, PeriodicConvolution)] == [(5, 4)] * 2


def test_every_layer_is_a_bijection_with_weights_of_its_own():
    flow = linear_flow((3,), layers=3)
    assert all(isinstance(layer, Bijection) for layer in flow.layers)
    assert len({weight.data_ptr() for weight in flow.parameters()}) == len(list(flow.parameters())) == 6


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be an integer of at least 1, got 0"),
        ({"layers": 1.5}, "layers must be an integer of at least 1, got 1.5"),
        ({"linear": "sparse"}, "linear must be one of dense, lu, convolution, got 'sparse'"),
        ({"activation": "relu"}, "activation must be one of leaky_relu, cubic, got 'relu'"),
        ({"kernel": 3}, "kernel is the window of convolutions, got it with linear = 'dense'"),
        ({"odd": True}, "an odd flow needs the cubic activation, got 'leaky_relu'"),
        ({"slope": 1.0}, "slope must be between 0 and 1, got 1.0"),
        ({"linear": "convolution", "kernel": 4}, "kernel must be odd, got 4"),
        ({"shape": (0, 2)}, r"lattice shape \[0, 2\] must hold positive integers"),
    ],
)
def test_settings_that_make_no_flow_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear_flow(**{"shape": (2, 2), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 2}, "kernel must be odd, got 2"),
        ({"kernel": 0}, "kernel must be an integer of at least 1, got 0"),
        ({"kernel": 1.0}, "kernel must be an integer of at least 1, got 1.0"),
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
    ],
)
def test_settings_that_make_no_convolution_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PeriodicConvolution((4, 4), **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fields_of_another_shape_are_refused(direction):
    for layer, shape, message in [
        (Dense((2, 3)), (4, 3, 2), r"a linear map of shape \[2, 3\] was given fields of \[4, 3, 2\]"),
        (LUDense((2, 3)), (4, 6), r"a linear map of shape \[2, 3\] was given fields of \[4, 6\]"),
        (PeriodicConvolution((4,)), (2, 5), r"a convolution of shape \[4\] was given fields of \[2, 5\]"),
        (PeriodicConvolution((4,), channels=2), (2, 4), r"a convolution of shape \[2, 4\] was given fields"),
    ]:
        with pytest.raises(ValueError, match=message):
            getattr(layer, direction)(torch.zeros(shape))
