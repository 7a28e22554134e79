"""The stabilised sampler: a normalised density, its symmetry, finite numbers at any depth, weights for any volume."""

import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions.densities import MultivariateStudentT
from latticeflow.flows import LOFT, Clamp, Coupling, ElementwiseAffine, SplineMap
from latticeflow.flows.networks import Conditioner
from latticeflow.priors import FreeField, Normal, StudentT
from latticeflow.samplers import FlowSampler, StabilisedSampler
from latticeflow.training import make_estimator

BATCH = 50
DENSE = {"conditioner": "dense"}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def fields(*shape, seed=1, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def randomised(sampler, seed=3, *, strength):
    """Move all weights, the degrees of freedom to a few, so that every network's output is of order `strength`."""
    draws = generator(seed)
    with torch.no_grad():
        for parameter in sampler.flow.parameters():
            parameter.copy_(strength * torch.randn(parameter.shape, generator=draws))
        for network in (module for module in sampler.modules() if isinstance(module, Conditioner)):
            for layer in network.layers:
                layer.linear.weight.div_(strength * math.sqrt(layer.linear.in_features))
            network.layers[-1].linear.weight.mul_(2 * strength)
        if isinstance(sampler.prior, StudentT):
            log_nu = sampler.prior.log_degrees_of_freedom
            log_nu.copy_(math.log(5) + 0.5 * torch.randn(log_nu.shape, generator=draws))
    return sampler.double()


def stabilised(shape, *, strength=0.2, **options):
    settings = {"layers": 4, "hidden": [6], "tau": 2.0, **options}
    return randomised(StabilisedSampler(shape, **settings), strength=strength)


CASES = {
    "dense": ((3,), DENSE),
    "spline": ((3,), {**DENSE, "transform": "spline", "bins": 4}),
    "random masks": ((5,), {**DENSE, "mask": "random", "tau": 0.5}),
    "convolution": ((4, 4), {}),
    "stripes of splines": ((4, 6), {"mask": "stripes", "transform": "spline", "kernel": 5, "inner_kernel": 3}),
    "shared": ((4, 4), {"shared": True, "clamp": Clamp("tanh", negative=0.5)}),
    "three dimensions": ((2, 4, 2), {"hidden": []}),
    "normal base": ((2, 4), {"prior": Normal((2, 4), scale=2.0)}),
    "free base": ((4, 4), {"prior": FreeField((4, 4), 0.3), "shared": True}),
    "one coupling": ((3,), {**DENSE, "layers": 1}),
}


@pytest.fixture(params=list(CASES))
def built(request):
    shape, options = CASES[request.param]
    return shape, options


# ---------------------------------------------------------------- what it is


def test_couplings_then_loft_then_an_affine_map():
    sampler = StabilisedSampler((4, 4), layers=3, tau=7.0, transform="spline", bins=5, bound=2.0)
    assert isinstance(sampler, FlowSampler)
    assert [type(layer) for layer in sampler.flow.layers] == [Coupling] * 3 + [LOFT, ElementwiseAffine]
    assert sampler.flow.layers[-2].tau == 7.0
    assert all(isinstance(layer.site_map, SplineMap) and layer.site_map.bins == 5 for layer in sampler.flow.layers[:3])
    assert sampler.flow.layers[-1].shift.shape == (4, 4)


def test_settings_where_none_are_given():
    sampler = StabilisedSampler((2, 2))
    assert len(sampler.flow.layers) == 64 + 2
    assert sampler.flow.layers[-2].tau == 100.0
    assert sampler.flow.layers[0].site_map.clamp == Clamp("asymmetric", positive=0.1, negative=2.0)
    assert torch.equal(sampler.flow.layers[0].active, torch.tensor([0, 3]))
    assert not sampler.flow.layers[0].network.dense


@pytest.mark.parametrize(("shared", "per_site"), [(False, (3, 2)), (True, ())])
def test_default_prior_is_a_student_t_of_thirty_degrees_of_freedom(shared, per_site):
    sampler = StabilisedSampler((3, 2), layers=1, shared=shared, **DENSE)
    assert isinstance(sampler.prior, StudentT)
    assert sampler.prior.log_degrees_of_freedom.requires_grad
    assert_close(sampler.prior.degrees_of_freedom, torch.full(per_site, 30.0, dtype=torch.float64))
    assert "prior.log_degrees_of_freedom" in sampler.state_dict()
    assert sampler.flow.layers[-1].log_scale.shape == per_site


def test_a_given_prior_is_taken():
    prior = Normal((4,), scale=3.0)
    assert StabilisedSampler((4,), layers=1, prior=prior, **DENSE).prior is prior


# ---------------------------------------------------------------- the density


def test_log_prob_is_the_log_q_of_the_draws(built):
    shape, options = built
    sampler = stabilised(shape, **options)
    x, log_q = sampler.sample(BATCH, generator(4))
    assert x.shape == (BATCH, *shape)
    assert x.dtype == log_q.dtype == torch.float64
    assert_close(sampler.log_prob(x), log_q, rtol=0, atol=1e-9)
    assert log_q.std() > 0.1


def test_sampling_again_with_the_same_generator_gives_the_same(built):
    shape, options = built
    sampler = stabilised(shape, **options)
    first, again, other = (sampler.sample(BATCH, generator(seed)) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("prior", [None, Normal((2,))])
@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_density_integrates_to_one(transform, prior):
    """By the trapezoid rule in `x = 0.7 sinh u`; with LOFT from 0.5 on, the tails fall off exponentially in x."""
    sampler = stabilised((2,), strength=0.1, transform=transform, prior=prior, tau=0.5, **DENSE)
    u = torch.linspace(-4, 4, 601, dtype=torch.float64)
    x, weight = 0.7 * u.sinh(), 0.7 * u.cosh() * (u[1] - u[0])
    with torch.no_grad():
        density = sampler.log_prob(torch.cartesian_prod(x, x)).exp().reshape(601, 601)
    assert (weight @ density @ weight).item() == pytest.approx(1, abs=1e-3)
    assert density.max() > 0.05


@pytest.mark.parametrize(("shape", "options"), CASES.values())
def test_odd_samplers_are_symmetric(shape, options):
    sampler = stabilised(shape, odd=True, **options)
    x = fields(BATCH, *shape, scale=2.0)
    assert_close(sampler.log_prob(-x), sampler.log_prob(x), rtol=0, atol=1e-9)
    assert sampler.flow.layers[-1].shift is None
    general = stabilised(shape, **options)
    assert (general.log_prob(-x) - general.log_prob(x)).abs().max() > 0.1


def test_single_precision_flow_has_weights_in_double_precision():
    sampler = stabilised((4, 4))
    exact = sampler.sample(BATCH, generator(6))
    sampler.flow.float()
    x, log_q = sampler.sample(BATCH, generator(6))
    assert x.dtype == torch.float32
    assert log_q.dtype == sampler.log_prob(x).dtype == torch.float64
    assert_close(x.double(), exact[0], rtol=1e-3, atol=1e-3)
    assert_close(log_q, exact[1], rtol=0, atol=1e-3)


# ---------------------------------------------------------------- training and stability


@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_path_estimator_trains_every_weight(transform):
    sampler = stabilised((4,), transform=transform, **DENSE)
    surrogate, log_weight = make_estimator("path")(sampler, MultivariateStudentT(4), 64, generator(7))
    surrogate.backward()
    trained = dict(sampler.named_parameters())
    for name in ("prior.log_degrees_of_freedom", "flow.layers.5.log_scale", "flow.layers.5.shift"):
        assert (trained[name].grad.abs() > 1e-6).all()
    assert all(torch.isfinite(weight.grad).all() and weight.grad.abs().max() > 0 for weight in trained.values())
    assert torch.isfinite(log_weight).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"transform": "spline"}, {"odd": True}])
def test_numbers_and_gradients_stay_finite_far_out(options, dtype):
    """Latents up to 1e8, where one that is not chosen in a `where`, or a square, would give NaN."""
    flow = stabilised((4, 2), layers=16, tau=100.0, **options).flow.to(dtype)
    z = torch.cat([scale * fields(2, 4, 2) for scale in (0.0, 1e-8, 1.0, 1e2, 1e4, 1e8)]).to(dtype).requires_grad_()
    x, log_det = flow(z)
    back, log_det_back = flow.inverse(x.detach())
    for result, log_volume in ((x, log_det), (back, log_det_back)):
        assert torch.isfinite(result).all()
        assert torch.isfinite(log_volume).all()
        loss = result.sum() + log_volume.sum()
        for gradient in torch.autograd.grad(loss, tuple(flow.parameters()), retain_graph=True):
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0
    assert x.abs().max() < 500


@pytest.mark.parametrize("clamp", ["asymmetric", "none"])
def test_depth_explodes_without_the_clamps_alone(clamp):
    """64 couplings of weights that ask each for scales of a few: only the soft clamp keeps them in range."""
    sampler = randomised(StabilisedSampler((8,), layers=64, hidden=[20], clamp=Clamp(clamp), **DENSE), strength=2.0)
    z = sampler.prior.sample(BATCH, generator(8))
    for layer in sampler.flow.layers[:-2]:
        z, _ = layer(z)
    explodes = not torch.isfinite(z).all() or bool(z.abs().max() > 1e60)
    assert explodes == (clamp == "none")


def test_density_and_its_gradient_are_finite_beyond_tau():
    sampler = stabilised((4,), tau=100.0, **DENSE)
    x = fields(20, 4, scale=200.0).requires_grad_()
    log_prob = sampler.log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    assert x.abs().max() > 400
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, DENSE, {**DENSE, "transform": "spline"}, {"layers": 8, "clamp": Clamp(positive=0.3)}]
)
@pytest.mark.parametrize("prior", [None, Normal((4,))])
def test_density_far_beyond_tau_is_finite_or_zero(options, prior, dtype):
    """No draw is there, but a chain may come and ask; a log-determinant that grows alone would make it 1e37."""
    sampler = StabilisedSampler((4,), prior=prior, **{"layers": 2, **options}).to(dtype)
    for far in (1e3, 1e5, 1e20, 1e37):
        for x in (torch.full((1, 4), far), torch.tensor([[far, 0.0, -far, 1.0]])):
            assert (sampler.log_prob(x.to(dtype)) < -100).all()  # NaN is not


# ---------------------------------------------------------------- weights for any volume


@pytest.mark.parametrize("options", [{}, {"mask": "stripes", "transform": "spline", "kernel": 5, "inner_kernel": 3}])
@pytest.mark.parametrize("free", [False, True])
def test_weights_of_convolutions_fit_a_larger_lattice(free, options):
    """On a field that repeats, the larger flow repeats the smaller one."""
    settings = {"layers": 6, "shared": True, "odd": True, **options}
    small, large = (
        stabilised(shape, prior=FreeField(shape, 0.5) if free else None, **settings) for shape in ((8, 8), (16, 16))
    )
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.zero_()
    large.load_state_dict(small.state_dict())
    z = fields(3, 8, 8, seed=9)
    for there, tiled in ((small.flow.forward, large.flow.forward), (small.flow.inverse, large.flow.inverse)):
        moved, log_det = there(z)
        moved_tiled, log_det_tiled = tiled(z.repeat(1, 2, 2))
        assert_close(moved_tiled, moved.repeat(1, 2, 2), rtol=0, atol=1e-9)
        assert_close(log_det_tiled, 4 * log_det, rtol=0, atol=1e-8)
    if not free:
        assert_close(large.log_prob(z.repeat(1, 2, 2)), 4 * small.log_prob(z), rtol=0, atol=1e-7)
    x, log_q = large.sample(3, generator(10))
    assert_close(large.log_prob(x), log_q, rtol=0, atol=1e-8)


def test_weights_of_every_site_do_not_fit_another_lattice():
    small, large = (StabilisedSampler(shape, layers=2) for shape in ((4, 4), (4, 6)))
    with pytest.raises(RuntimeError, match=r"size mismatch for flow\.layers\.3\.log_scale"):
        large.load_state_dict(small.state_dict())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((4,), {"tau": 0.0}, "tau must be positive and finite, got 0.0"),
        ((4,), {"mask": "chess"}, "mask must be one of .*, got 'chess'"),
        ((4,), {"transform": "cubic"}, "transform must be one of affine, spline, got 'cubic'"),
        ((4,), {"transform": "spline", "bins": 1}, "bins must be from 2 to 64, got 1"),
        ((4,), {"conditioner": "local"}, "conditioner must be 'convolution' or 'dense', got 'local'"),
        ((5,), {}, r"mask does not look the same from all of its sites on the lattice \[5\]"),
        ((4,), {"kernel": 1}, "kernel = 1 sees none of the sites"),
        ((4,), {"kernel": 4}, "kernel must be odd and positive, got 4"),
        ((1,), DENSE, "nothing is left to condition on"),
        ((0, 4), {}, "must hold positive integers"),
    ],
)
def test_settings_out_of_range_are_refused(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        StabilisedSampler(shape, **{"layers": 2, **settings})


@pytest.mark.parametrize("layers", [0, -1])
def test_fewer_than_one_layer_is_refused(layers):
    with pytest.raises(ValueError, match=f"layers must be at least 1, got {layers}"):
        StabilisedSampler((4,), layers=layers)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="kernels"):
        StabilisedSampler((4, 4), layers=1, kernels=3)
