"""What every bijection of real fields must fulfil, over a registry of them with weights far from the identity."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import (
    LOFT,
    ActNorm,
    AffineMap,
    AtLevel,
    ChannelCoupling,
    Clamp,
    Coupling,
    Cubic,
    Dense,
    ElementwiseAffine,
    InvertibleConvolution,
    Logit,
    LUDense,
    MaskedAutoregressive,
    PeriodicConvolution,
    Permutation,
    Reflection,
    Sequential,
    SmoothLeakyReLU,
    Softplus,
    SplineMap,
    autoregressive_flow,
    coupling_flow,
    glow,
    linear_flow,
)
from latticeflow.flows.autoregressive import MaskedNetwork
from latticeflow.flows.clamps import CLAMPS
from latticeflow.flows.linear import TriangularFactors
from latticeflow.flows.networks import Conditioner
from latticeflow.flows.site_masks import MASKS, mask_cycle
from latticeflow.samplers import StabilisedSampler

BATCH = 6
DENSE = {"conditioner": "dense", "hidden": [6]}
LOCAL = {"conditioner": "convolution", "hidden": [5]}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(flow, seed, *, strength=0.5):
    """Fill all weights so that every network's output, and every other parameter, is of order `strength`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
        for network in (module for module in flow.modules() if isinstance(module, Conditioner)):
            for layer in network.layers:
                layer.linear.weight.div_(strength * math.sqrt(layer.linear.in_features))
            network.layers[-1].linear.weight.mul_(2 * strength)
        for network in (module for module in flow.modules() if isinstance(module, MaskedNetwork)):
            for layer in network.layers:
                layer.weight.div_(strength * layer.mask.sum(1, keepdim=True).clamp(min=1).sqrt())
            network.layers[-1].weight.mul_(2 * strength)
        for coupling in (module for module in flow.modules() if isinstance(module, ChannelCoupling)):
            for layer in coupling.network[::2]:
                layer.weight.div_(strength * math.sqrt(layer.weight[0].numel()))
            coupling.network[-1].weight.mul_(2 * strength)
        for matrix in (module for module in flow.modules() if isinstance(module, TriangularFactors)):
            matrix.factors.div_(math.sqrt(len(matrix.factors)))
            matrix.factors.diagonal().add_(0.3)
        for dense in (module for module in flow.modules() if isinstance(module, Dense)):
            dense.weight.div_(math.sqrt(len(dense.weight))).diagonal().add_(1.5)
        for convolution in (module for module in flow.modules() if isinstance(module, PeriodicConvolution)):
            weight = convolution.weight.div_(math.sqrt(convolution.weight[0].numel()))
            weight[(..., *(extent // 2 for extent in weight.shape[2:]))].diagonal().add_(1.5)
    return flow.double()


def site_map(transform, clamp="asymmetric"):
    return AffineMap(Clamp(clamp)) if transform == "affine" else SplineMap(Clamp(clamp), bins=4, bound=2.5)


def coupling(shape, *, kind="checkerboard", layer=0, transform="affine", clamp="asymmetric", **options):
    return Coupling(mask_cycle(kind, shape, layer + 1)[layer], site_map(transform, clamp), **options)


COUPLINGS = [
    *(
        ((6,), {"clamp": clamp, "transform": transform, **DENSE})
        for clamp in CLAMPS
        for transform in ("affine", "spline")
    ),
    ((5,), {"layer": 1, **DENSE, "hidden": []}),
    ((2, 4, 2), {"kind": "random", "layer": 2, **DENSE}),
    ((3, 1, 2), {"kind": "random", "transform": "spline", **DENSE, "hidden": [4, 4]}),
    ((2, 6), {"kind": "stripes", "layer": 3, **DENSE}),
    ((6,), {"layer": 1, **LOCAL}),
    ((4, 4), {"kernel": 3, **LOCAL}),
    ((4, 4), {"kernel": 5, "inner_kernel": 3, "transform": "spline", **LOCAL}),
    ((6, 4), {"layer": 1, "inner_kernel": 3, "clamp": "tanh", **LOCAL, "hidden": [4, 3]}),
    ((2, 6), {"kind": "stripes", "layer": 1, **LOCAL}),
    ((2, 6), {"kind": "stripes", "layer": 2, "kernel": 5, "clamp": "symmetric", **LOCAL, "hidden": []}),
    ((2, 4, 2), {"transform": "spline", **LOCAL}),
    ((2, 4, 2), {"kind": "stripes", "layer": 3, "inner_kernel": 3, **LOCAL}),
    ((2, 2, 2, 4), {"layer": 1, "kernel": 3, "inner_kernel": 3, **LOCAL, "hidden": [2]}),
]

AUTOREGRESSIVE = [
    ((2,), {"hidden": (6,)}),
    ((5,), {"reverse": True}),
    ((4,), {"hidden": ()}),
    ((3, 2), {"hidden": (7, 5), "activation": "silu", "reverse": True, "clamp": Clamp("tanh", negative=0.5)}),
    ((2, 2, 2), {"hidden": (3, 4, 3), "activation": "elu", "clamp": Clamp()}),
]


GLOW = [
    ((1, 2, 2), {"levels": 1, "steps": 2}),
    ((1, 4, 4), {"levels": 2, "steps": 2, "parts": 2, "periodic": True}),
    ((3, 4, 2), {"levels": 1, "steps": 1, "clamp": Clamp("tanh", negative=0.5)}),
    ((2, 4, 4), {"levels": 2, "steps": 1}),
    ((4, 4), {"levels": 2, "steps": 1, "periodic": True}),
]

CONVOLUTIONS = [
    ((5,), {}),
    ((6,), {"kernel": 3}),
    ((4, 3), {"kernel": 5}),
    ((3, 4), {"channels": 3}),
    ((2, 4, 4), {"kernel": 3, "channels": 2}),
    ((2, 3, 4), {"kernel": 3}),
]

LINEAR_FLOWS = [
    ((3, 2), {"activation": "cubic"}),
    ((5,), {"linear": "lu", "activation": "cubic"}),
    ((4, 4), {"linear": "convolution", "activation": "cubic", "kernel": 3, "layers": 3}),
]


def stabilised(shape, **options):
    return StabilisedSampler(shape, **{"layers": 4, "hidden": [6], "tau": 1.0, **options}).flow


def convolution(shape, **options):
    """Return one for fields of this shape, the channels included."""
    return PeriodicConvolution(shape[1:] if "channels" in options else shape, **options)


def seeded(build, seed):
    """Build under a seed of the global generator and leave that as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def linear_layers():
    """Return constructors `(shape, build(odd))` of those of all variables, the activations and the flows of both."""
    for shape in [(1,), (5,), (2, 3)]:
        yield f"dense {shape}", shape, lambda odd, s=shape: Dense(s, shift=not odd)
        yield f"triangular dense {shape}", shape, lambda odd, s=shape: LUDense(s, shift=not odd)
    for shape, options in CONVOLUTIONS:
        name = f"periodic convolution {shape} {options}"
        yield name, shape, lambda odd, s=shape, o=options: convolution(s, shift=not odd, **o)
    for shape, options in LINEAR_FLOWS:
        yield f"linear flow {shape} {options}", shape, lambda odd, s=shape, o=options: linear_flow(s, odd=odd, **o)


def act_norm(shape, **options):
    """Return a layer that has seen a batch of mean 1 and width 3."""
    layer = ActNorm(shape, **options).double()
    layer(1 + 3 * normal(50, *shape, seed=1))
    return layer.eval()


def registry():
    cases = {}
    for (shape, options), odd in itertools.product(COUPLINGS, (False, True)):
        name = f"{'odd ' if odd else ''}coupling {shape} " + " ".join(
            f"{key}={value}" for key, value in options.items()
        )
        cases[name] = shape, lambda s=shape, o=options, z2=odd: randomised(coupling(s, odd=z2, **o), seed=3)
    cases["odd LOFT"] = (3, 2), lambda: LOFT(0.5).double()
    for shared, shift in itertools.product((False, True), (False, True)):
        name = f"{'' if shift else 'odd '}elementwise affine shared={shared}"
        options = {"shared": shared, "shift": shift}
        cases[name] = (2, 3), lambda o=options: randomised(ElementwiseAffine((2, 3), **o), seed=4)
    for shared in (False, True, (1,)):
        cases[f"act norm shared={shared}"] = (4, 2), lambda s=shared: act_norm((4, 2), shared=s)
    cases["odd reflection"] = (2, 3), Reflection
    cases["odd permutation"] = (2, 3), lambda: Permutation([3, 0, 2, 5, 1, 4])
    cases["softplus"] = (2, 3), Softplus
    for shape, options in [
        ((5,), {"conditioner": "dense"}),
        ((4, 4), {"shared": True}),
        ((2, 4), {"mask": "stripes", "transform": "spline"}),
        ((2, 2, 2), {"mask": "random", "conditioner": "dense", "clamp": Clamp("tanh", negative=0.5)}),
    ]:
        for odd in (False, True):
            cases[f"{'odd ' if odd else ''}stabilised flow {shape} {options}"] = (
                shape,
                lambda s=shape, o=options, z2=odd: randomised(stabilised(s, odd=z2, **o), seed=5, strength=0.2),
            )
    cases["coupling flow"] = (4, 4), lambda: randomised(coupling_flow((4, 4), layers=4, hidden=[6]), seed=6)
    spline = {"layers": 4, "hidden": [6], "mask": "stripes", "transform": "spline"}
    cases["coupling flow of splines"] = (4, 4), lambda: randomised(coupling_flow((4, 4), **spline), seed=7)
    for shape, options in AUTOREGRESSIVE:
        name = f"autoregressive {shape} " + " ".join(f"{key}={value}" for key, value in options.items())
        cases[name] = shape, lambda s=shape, o=options: randomised(MaskedAutoregressive(s, **o), seed=10)
    cases["autoregressive flow"] = (2, 3), lambda: randomised(autoregressive_flow((2, 3), hidden=(8,)), seed=11)
    for shape in [(3,), (1, 2), (4, 2, 2)]:
        cases[f"odd 1x1 convolution {shape}"] = shape, lambda s=shape: randomised(InvertibleConvolution(s[0]), seed=12)
    for shape, periodic in itertools.product([(2, 1, 1), (4, 2, 3)], (False, True)):
        cases[f"channel coupling {shape} periodic={periodic}"] = (
            shape,
            lambda s=shape, p=periodic: randomised(ChannelCoupling(s[0], hidden=5, periodic=p), seed=17),
        )
    cases["convolution at a level"] = (
        (1, 4, 4),
        lambda: AtLevel(randomised(InvertibleConvolution(8), seed=14), (1, 4, 4), level=2),
    )
    for shape, options in GLOW:
        name = f"glow {shape} " + " ".join(f"{key}={value}" for key, value in options.items())
        cases[name] = shape, lambda s=shape, o=options: randomised(glow(s, hidden=5, **o), seed=15).eval()
    for name, shape, build in linear_layers():
        for odd in (False, True):
            cases[f"{'odd ' if odd else ''}{name}"] = (
                shape,
                lambda b=build, z2=odd: randomised(seeded(lambda: b(z2), seed=18), seed=18),
            )
    leaky = {"layers": 3, "linear": "lu"}
    cases["linear flow, leaky"] = (
        (2, 3),
        lambda: randomised(seeded(lambda: linear_flow((2, 3), **leaky), seed=19), seed=19),
    )
    cases["odd cubic"] = (3, 2), lambda: randomised(Cubic(), seed=20)
    for slope in (0.3, 0.9):
        cases[f"smooth leaky slope={slope}"] = (3, 2), lambda a=slope: SmoothLeakyReLU(a)
    for margin in (0.0, 0.05):
        cases[f"logit margin={margin}"] = (3, 2), lambda m=margin: Logit(-1, 3, margin=m)
    cases["flow of every kind"] = (4, 2), every_kind
    return cases


def every_kind():
    order = [5, 3, 0, 7, 1, 6, 2, 4]
    couplings = randomised(coupling_flow((4, 2), layers=2, hidden=[4]), seed=8)
    return Sequential([act_norm((4, 2)), Sequential([couplings, Permutation(order)]), LOFT(0.5), Softplus()])


REGISTRY = registry()
LINEAR_BY_CHANCE = "odd coupling (2, 6) kind=stripes layer=2 kernel=5 clamp=symmetric conditioner=convolution hidden=[]"
"""Without hidden layers its scale, which is even, is the same everywhere."""
ODD = [name for name in REGISTRY if name.startswith("odd")]


@pytest.fixture(scope="module", params=list(REGISTRY))
def case(request):
    return built(request.param)


def built(name):
    shape, build = REGISTRY[name]
    return build(), 1.5 * normal(BATCH, *shape, seed=2)


def both_ways(flow, z):
    """Return each direction with a batch in its domain: for a softplus positive fields, for a logit bounded ones."""
    last = flow.layers[-1] if isinstance(flow, Sequential) and len(flow.layers) else flow
    match last:
        case Softplus():
            fields = z.exp()
        case Logit():
            fields = torch.sigmoid(z) / last.scale * (1 - 2 * last.margin) + last.low
        case _:
            fields = z
    return {"forward": (flow.forward, z), "inverse": (flow.inverse, fields)}


def test_registry_is_far_from_the_identity(case):
    """So that the contracts below have something to find."""
    flow, z = case
    x, log_det = flow(z)
    assert (x - z).abs().max() > 0.15
    assert log_det.abs().max() > 0.1 or isinstance(flow, Permutation | Reflection)


def test_round_trip_and_opposite_log_determinants(case):
    """Within rounding, which the way back amplifies as it does any small change: a wild flow by up to 1e7."""
    flow, z = case
    for there, back in itertools.permutations(both_ways(flow, z).values()):
        with torch.no_grad():
            moved, log_det = there[0](there[1])
            returned, log_det_back = back[0](moved)
            beside = back[0](moved * (1 + 1e-9 * normal(*moved.shape, seed=3)))
        amplified = [float((a - b).abs().max()) / 1e-9 for a, b in zip(beside, (returned, log_det_back), strict=True)]
        assert_close(returned, there[1], rtol=1e-9, atol=max(1e-9, 1e-14 * amplified[0]))
        assert_close(log_det_back.double(), -log_det.double(), rtol=0, atol=max(1e-8, 1e-14 * amplified[1]))


def test_log_determinant_is_that_of_the_autograd_jacobian(case):
    flow, z = case
    for direction, batch in both_ways(flow, z).values():
        for one in batch[:3]:
            jacobian = torch.autograd.functional.jacobian(lambda x, run=direction: run(x[None])[0][0], one)
            expected = torch.linalg.slogdet(jacobian.reshape(one.numel(), -1)).logabsdet
            assert_close(direction(one[None])[1][0].double(), expected, rtol=0, atol=1e-8)


def test_inverse_is_its_varying_part_and_the_constant(case):
    flow, z = case
    _, fields = both_ways(flow, z)["inverse"]
    latent, log_det = flow.inverse(fields)
    same, varying = flow.varying_inverse(fields)
    constant = flow.constant_log_det(fields.shape[1:])
    assert constant.dtype == torch.float64
    assert constant.shape == ()
    assert torch.equal(same, latent)
    assert_close(log_det.double(), varying.double() - constant, rtol=0, atol=1e-10)
    if flow.constant_jacobian:
        assert not varying.any()


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != LINEAR_BY_CHANCE])
def test_the_jacobian_is_constant_where_it_says_so_and_nowhere_else(name):
    """Against autograd at two points of each direction."""
    flow, z = built(name)
    for direction, batch in both_ways(flow, z).values():
        first, second = (
            torch.autograd.functional.jacobian(lambda x, run=direction: run(x[None])[0][0], one) for one in batch[:2]
        )
        assert flow.constant_jacobian == ((first - second).abs().max() < 1e-9)


def test_shapes_dtypes_and_independence_of_the_batch(case):
    flow, z = case
    for direction, batch in both_ways(flow, z).values():
        moved, log_det = direction(batch)
        assert moved.shape == batch.shape
        assert moved.dtype == log_det.dtype == torch.float64
        assert log_det.shape == (BATCH,)
        alone, log_det_alone = direction(batch[2:3])
        assert_close(alone, moved[2:3])
        assert_close(log_det_alone, log_det[2:3])
        assert direction(batch[:0])[0].shape == batch[:0].shape


def test_single_precision_agrees_with_double(case):
    flow, z = case
    exact = {name: direction(batch) for name, (direction, batch) in both_ways(flow, z).items()}
    try:
        for name, (direction, batch) in both_ways(flow.float(), z).items():
            moved, log_det = direction(batch.float())
            assert moved.dtype == torch.float32
            assert_close(moved.double(), exact[name][0], rtol=1e-3, atol=1e-3)
            assert_close(log_det.double(), exact[name][1].double(), rtol=0, atol=1e-3)
    finally:
        flow.double()


def test_all_parameters_receive_finite_gradients(case):
    flow, z = case
    for direction, batch in both_ways(flow, z).values():
        moved, log_det = direction(batch)
        parameters = tuple(flow.parameters())
        loss = (moved**2).sum() + moved.sum() + log_det.sum()
        for gradient in torch.autograd.grad(loss, parameters) if parameters else ():
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ODD)
def test_odd_layers_commute_with_the_reflection_of_the_field(name):
    flow, z = built(name)
    for direction, batch in both_ways(flow, z).values():
        moved, log_det = direction(batch)
        reflected, log_det_reflected = direction(-batch)
        assert_close(reflected, -moved, rtol=0, atol=1e-10)
        assert_close(log_det_reflected, log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in REGISTRY if f"odd {name}" in REGISTRY])
def test_layers_that_are_not_odd_do_not(name):
    """So that the test above means something."""
    flow, z = built(name)
    assert (flow(-z)[0] + flow(z)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("shape", "options"), COUPLINGS)
def test_a_coupling_moves_its_active_sites_alone(shape, options):
    layer = randomised(coupling(shape, **options), seed=9)
    mask = mask_cycle(options.get("kind", "checkerboard"), shape, 4)[options.get("layer", 0)]
    z = normal(BATCH, *shape, seed=10)
    for direction, batch in both_ways(layer, z).values():
        moved = direction(batch)[0] - batch
        assert not moved[:, ~mask].any()
        assert (moved[:, mask].abs().amax(0) > 1e-3).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_a_pair_of_couplings_moves_every_site(kind, transform):
    options = {"mask": kind, "transform": transform, "conditioner": "dense"}
    z = normal(BATCH, 3, 4, seed=11)
    moved, _ = randomised(coupling_flow((3, 4), layers=2, **options), seed=12)(z)
    assert ((moved - z).abs().amax(0) > 1e-3).all()


# ---------------------------------------------------------------- translations


@pytest.mark.parametrize("transform", ["affine", "spline"])
@pytest.mark.parametrize("sizes", [{"kernel": 3}, {"kernel": 5, "inner_kernel": 3}])
@pytest.mark.parametrize("kind", ["checkerboard", "stripes"])
@pytest.mark.parametrize("shape", [(6,), (4, 4), (2, 6), (8, 6), (2, 4, 2), (2, 2, 2, 4)])
def test_convolutions_commute_with_the_translations_of_their_mask(shape, kind, sizes, transform):
    """Those that map active sites to active ones, and no other."""
    mask = mask_cycle(kind, shape, 1)[0]
    layer = randomised(coupling(shape, kind=kind, transform=transform, **LOCAL, **sizes), seed=13)
    z, axes = normal(BATCH, *shape, seed=14), tuple(range(-len(shape), 0))
    inside = outside = 0
    for direction, batch in both_ways(layer, z).values():
        moved, log_det = direction(batch)
        for steps in itertools.product((-2, -1, 0, 1), repeat=len(shape)):
            translated, log_det_translated = direction(torch.roll(batch, steps, axes))
            if torch.equal(torch.roll(mask, steps, axes), mask):
                inside += 1
                assert_close(translated, torch.roll(moved, steps, axes), rtol=0, atol=1e-10)
                assert_close(log_det_translated, log_det, rtol=0, atol=1e-9)
            else:
                outside += 1
                assert (translated - torch.roll(moved, steps, axes)).abs().max() > 1e-2
    assert inside >= outside > 0


def test_dense_conditioners_know_every_site():
    layer, z = randomised(coupling((4, 4), **DENSE), seed=13), normal(BATCH, 4, 4, seed=14)
    assert (layer(z.roll((1, 1), (1, 2)))[0] - layer(z)[0].roll((1, 1), (1, 2))).abs().max() > 0.1


@pytest.mark.parametrize(("inner_kernel", "reach"), [(1, 1), (3, 2)])
def test_convolutions_are_local(inner_kernel, reach):
    """A window of three sites reaches one step, an inner one more; the site itself stays."""
    layer = randomised(coupling((12, 12), inner_kernel=inner_kernel, **LOCAL), seed=15)
    z = normal(1, 12, 12, seed=16)
    touched = z.clone()
    touched[0, 5, 6] += 1.0  # a frozen site
    changed = (layer(touched)[0] - layer(z)[0])[0].abs() > 1e-12
    steps = (changed.nonzero() - torch.tensor([5, 6])).abs().amax(1)
    assert steps.max() == reach
    assert changed[5, 6]


# ---------------------------------------------------------------- the start, composition and state


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(
    ("shape", "options"), [((4, 4), {}), ((5,), {"conditioner": "dense"}), ((4, 4), {"transform": "spline"})]
)
def test_flows_start_near_the_identity(shape, options, odd):
    with torch.random.fork_rng():
        torch.manual_seed(17)
        flow = StabilisedSampler(shape, layers=16, odd=odd, **options).double().flow
    z = normal(BATCH, *shape, seed=18)
    moved, log_det = flow(z)
    assert 0 < (moved - z).abs().max() < 0.2
    assert 0 < log_det.abs().max() / math.prod(shape) < 0.02


@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_zero_last_layer_is_exactly_the_identity(transform):
    flow = randomised(coupling_flow((4, 4), layers=8, transform=transform), seed=19)
    with torch.no_grad():
        for layer in flow.layers:
            for parameter in layer.network.network.layers[-1].parameters():
                parameter.zero_()
    z = normal(BATCH, 4, 4, seed=20)
    moved, log_det = flow(z)
    assert_close(moved, z, rtol=0, atol=1e-13)
    assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-12)


def test_sequential_is_the_composition_in_order():
    flow = every_kind()
    z = normal(BATCH, 4, 2, seed=21)
    x, total = z, torch.zeros(BATCH, dtype=torch.float64)
    for layer in flow.layers:
        x, log_det = layer(x)
        total = total + log_det
    moved, log_det = flow(z)
    assert torch.equal(moved, x)
    assert_close(log_det, total)


def test_coupling_flow_takes_the_masks_in_turn():
    flow = coupling_flow((4, 6), layers=5, mask="stripes", hidden=[3])
    for layer, mask in zip(flow.layers, mask_cycle("stripes", (4, 6), 5), strict=True):
        assert layer.active.tolist() == mask.flatten().nonzero().flatten().tolist()


def test_state_dict_holds_weights_alone(case):
    """The masks are rebuilt from the configuration, so a checkpoint cannot disagree with it.

    Besides weights there is whether an ActNorm has begun, and what triangular factors drew at their start and keep.
    """
    flow, _ = case
    flags = {name for name, _ in flow.named_buffers() if name.endswith("initialised")}
    drawn = {name for name, _ in flow.named_buffers() if name.endswith(("pivots", "signs"))}
    assert set(flow.state_dict()) == {name for name, _ in flow.named_parameters()} | flags | drawn
    assert bool(flags) == any(isinstance(module, ActNorm) for module in flow.modules())
    assert bool(drawn) == any(isinstance(module, TriangularFactors) for module in flow.modules())
