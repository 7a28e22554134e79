"""Energy-based flows: `-E - log Z` is the density of the draws, exact and normalised, in every architecture."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import (
    ActNorm,
    Cubic,
    Dense,
    Logit,
    Sequential,
    SmoothLeakyReLU,
    Softplus,
    coupling_flow,
    glow,
    linear_flow,
)
from latticeflow.priors import FreeField, Normal
from latticeflow.samplers import EBFlowSampler, FlowSampler

SHAPE = (4, 4)
ARCHITECTURES = {
    "dense": lambda: linear_flow(SHAPE),
    "lu": lambda: linear_flow(SHAPE, linear="lu", layers=3, activation="cubic"),
    "convolution": lambda: linear_flow(SHAPE, linear="convolution", kernel=3),
    "odd": lambda: linear_flow(SHAPE, activation="cubic", odd=True),
    "glow": lambda: glow(SHAPE, levels=2, steps=1, hidden=5),
    "couplings after a normalisation": lambda: Sequential(
        [*coupling_flow(SHAPE, layers=2, hidden=[4]).layers, ActNorm(SHAPE)]
    ),
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def built(build, *, seed=1, strength=0.1):
    """Build under a seed of the global generator, in double precision and with noise on all weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build().double().eval()
    draws = generator(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(strength * torch.randn(weight.shape, generator=draws, dtype=torch.float64))
    return module


def logit():
    return Logit(-1, 2, margin=0.01)


@pytest.fixture(params=[(name, bounded) for name in ARCHITECTURES for bounded in (False, True)], ids=str)
def case(request):
    """Return a sampler, and fields that it may be asked about."""
    name, bounded = request.param
    flow, preprocessing = built(ARCHITECTURES[name]), logit() if bounded else None
    uniform = torch.rand(7, *SHAPE, generator=generator(2), dtype=torch.float64)
    return EBFlowSampler(Normal(SHAPE), flow, preprocessing=preprocessing), 3 * uniform - 1


def dense(size, *, layers=2, preprocessing=None, **options):
    """Return a flow of one or two variables."""
    flow = built(lambda: linear_flow((size,), layers=layers, **options), strength=0.3)
    return EBFlowSampler(Normal((size,)), flow, preprocessing=preprocessing)


# ---------------------------------------------------------------- the density


def test_density_is_that_of_the_direct_change_of_variables(case):
    sampler, x = case
    direct = FlowSampler(sampler.prior, sampler.flow)
    expected = direct.log_prob(x)
    assert_close(sampler.log_prob(x), expected, rtol=0, atol=1e-10)
    assert_close(-sampler.energy(x) - sampler.log_z(), expected, rtol=0, atol=1e-10)
    assert sampler.log_prob(x).dtype == sampler.log_z().dtype == torch.float64
    with torch.no_grad():
        assert_close(sampler.log_prob(x), expected, rtol=0, atol=1e-10)


def test_log_determinants_are_split_between_energy_and_partition_function(case):
    """So that the test above compares more than zeros."""
    sampler, x = case
    assert sampler.log_z().abs() > 1e-3
    assert not sampler.flow.constant_jacobian
    assert (sampler.energy(x) + sampler.prior.log_prob(sampler.flow.inverse(x)[0])).std() > 1e-3


def test_score_is_the_gradient_of_the_density(case):
    sampler, x = case
    leaf = x.clone().requires_grad_()
    (of_energy,) = torch.autograd.grad(sampler.energy(leaf).sum(), leaf)
    (of_density,) = torch.autograd.grad(sampler.log_prob(leaf).sum(), leaf)
    assert_close(of_energy, -of_density, rtol=1e-10, atol=1e-10)
    assert of_energy.abs().min() > 0


def test_energies_compute_no_determinant(case, monkeypatch):
    sampler, x = case

    def refuse(*args, **options):
        raise AssertionError("a determinant was computed")

    for name in ("slogdet", "lu_factor_ex", "det", "solve"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    leaf = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(sampler.energy(leaf).sum(), leaf, create_graph=True)
    score.square().sum().backward()


def test_draws_have_the_density_that_they_say(case):
    sampler, _ = case
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            x, log_q = sampler.sample(50, generator(3))
            assert log_q.dtype == torch.float64
            assert_close(log_q, sampler.log_prob(x), rtol=0, atol=1e-8)
    if sampler.preprocessed:
        assert -1.1 < x.min() < x.max() < 2.1


def test_a_normalisation_is_set_by_the_first_batch_of_densities():
    """As in any flow, and its scale belongs to the partition function already then."""
    flow = built(ARCHITECTURES["glow"])
    with torch.no_grad():
        [layer.layer.initialised.fill_(value=False) for layer in flow.layers if isinstance(layer.layer, ActNorm)]
    other, x = copy.deepcopy(flow), 3 + 2 * torch.randn(20, *SHAPE, generator=generator(4), dtype=torch.float64)
    found = EBFlowSampler(Normal(SHAPE), flow).train().log_prob(x)
    assert_close(found, FlowSampler(Normal(SHAPE), other).train().log_prob(x), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- integrals


def grid(low, high, points, size):
    """Return the midpoints of a grid of boxes, `(points^size, size)`, and the logarithm of a box's volume."""
    width = (high - low) / points
    axis = low + width * (torch.arange(points, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(*[axis] * size).reshape(-1, size), size * torch.tensor(width).double().log()


@pytest.mark.parametrize("options", [{}, {"linear": "lu", "activation": "cubic"}, {"layers": 3, "slope": 0.6}], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_partition_function_is_the_integral(size, options):
    """By midpoints, which for smooth densities that vanish at the edges are exact to many digits."""
    sampler = dense(size, **options)
    x, log_volume = grid(-40, 40, 20_000 if size == 1 else 700, size)
    with torch.no_grad():
        log_integral = torch.logsumexp(-sampler.energy(x), 0) + log_volume
        log_total = torch.logsumexp(sampler.log_prob(x), 0) + log_volume
        assert_close(log_integral, sampler.log_z(), rtol=0, atol=1e-6)
        assert_close(log_total, torch.zeros(()).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_density_of_bounded_fields_is_normalised(size):
    """Between the bounds of a logit without margin; its density vanishes there, though not smoothly."""
    sampler = dense(size, preprocessing=Logit(-1, 2), activation="cubic")
    x, log_volume = grid(-1, 2, 20_000 if size == 1 else 700, size)
    with torch.no_grad():
        log_total = torch.logsumexp(sampler.log_prob(x), 0) + log_volume
    assert_close(log_total, torch.zeros(()).double(), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- preprocessing


def test_what_is_matched_is_the_preprocessed_variable():
    flow, x = built(ARCHITECTURES["dense"]), torch.rand(5, *SHAPE, generator=generator(5), dtype=torch.float64)
    sampler = EBFlowSampler(Normal(SHAPE), flow, preprocessing=logit())
    inner, data = sampler.matched(x)
    assert_close(data, logit().inverse(x)[0])
    plain = EBFlowSampler(Normal(SHAPE), flow)
    assert torch.equal(inner.energy(data), plain.energy(data))
    assert_close(sampler.log_prob(x), plain.log_prob(data) + logit().inverse(x)[1], rtol=0, atol=1e-10)
    assert {id(weight) for weight in inner.parameters()} == {id(weight) for weight in sampler.parameters()}


def test_without_preprocessing_the_sampler_itself_is_matched():
    sampler, x = dense(2), torch.randn(5, 2)
    inner, data = sampler.matched(x)
    assert inner is sampler
    assert data is x


def test_preprocessing_is_no_linear_layer_of_the_energy():
    """An affine map next to the data counts for Z, a logit for E."""
    flow = built(lambda: linear_flow((2,)))
    affine = built(lambda: Dense((2,)))
    plain, scaled = (EBFlowSampler(Normal((2,)), flow, preprocessing=each) for each in (logit(), affine))
    constant = flow.constant_log_det((2,))
    assert_close(plain.log_z(), constant)
    assert_close(scaled.log_z(), constant + affine.log_det((2,)))


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([], "no layers"),
        ([Cubic(), SmoothLeakyReLU(), Cubic()], "Cubic, SmoothLeakyReLU"),
        ([Softplus()], "Softplus"),
        (list(coupling_flow((4,), layers=2, conditioner="dense", hidden=[3]).layers), "Coupling"),
    ],
)
def test_flows_without_linear_layers_are_refused_by_their_names(layers, named):
    with pytest.raises(ValueError, match=f"an energy-based flow needs linear layers.*; got {named}$"):
        EBFlowSampler(Normal((4,)), Sequential(layers))


def test_a_linear_preprocessing_does_not_make_up_for_them():
    with pytest.raises(ValueError, match="needs linear layers"):
        EBFlowSampler(Normal((4,)), Sequential([Cubic()]), preprocessing=Dense((4,)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_copies_draw_and_judge_alike_and_are_independent(case, copied):
    sampler, x = case
    with torch.no_grad():
        before = sampler.log_prob(x), *sampler.sample(5, generator(6))
        other = copied(sampler)
        for found, expected in zip((other.log_prob(x), *other.sample(5, generator(6))), before, strict=True):
            assert torch.equal(found, expected)
        for weight in other.parameters():
            weight.mul_(1.1)
        assert not torch.equal(other.log_prob(x), before[0])
        assert torch.equal(sampler.log_prob(x), before[0])
        assert_close(other.log_prob(x), FlowSampler(other.prior, other.flow).log_prob(x), rtol=0, atol=1e-10)


def test_single_precision_agrees_with_double(case):
    sampler, x = case
    x = 0.5 + 0.9 * (x - 0.5)  # off the bounds, where a logit loses digits
    exact = sampler.energy(x), sampler.log_prob(x), sampler.log_z()
    single = sampler.float()
    for found, expected in zip(
        (single.energy(x.float()), single.log_prob(x.float()), single.log_z()), exact, strict=True
    ):
        assert found.dtype == torch.float64
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
    drawn, log_q = single.sample(5, generator(7))
    assert drawn.dtype == torch.float32
    assert log_q.dtype == torch.float64


def test_priors_may_be_correlated():
    sampler = EBFlowSampler(FreeField(SHAPE, 0.5), built(ARCHITECTURES["convolution"]))
    x, log_q = sampler.sample(20, generator(8))
    assert_close(log_q, FlowSampler(sampler.prior, sampler.flow).log_prob(x), rtol=0, atol=1e-9)
    assert_close(sampler.log_prob(x), log_q, rtol=0, atol=1e-9)
