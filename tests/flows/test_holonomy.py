"""Couplings of the holonomies, and couplings that see Polyakov loops: exact contracts, far from the identity."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from latticeflow.flows import HolonomyCoupling, PlaquetteCoupling, SectorCoupling, Sequential, gauge_flow
from latticeflow.flows.holonomy import green_function, holonomy_angle
from latticeflow.flows.masks import StripeMask
from latticeflow.flows.networks import Conditioner
from latticeflow.priors import HaarUniform, links_from_plaquettes
from latticeflow.samplers import PartwiseSampler
from latticeflow.u1 import (
    gauge_transform,
    plaquette,
    polyakov_loop,
    sawtooth,
    shift_holonomies,
    topological_charge,
    wrap,
)

SHAPE, BATCH = (4, 4), 5


def randomised(flow, seed, strength=0.5):
    """Fill all weights so that the parameters of the maps are of order `strength`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, nn.Linear):
                for parameter in module.parameters():
                    scale = 1.5 / math.sqrt(module.in_features)
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for module in flow.modules():
            last = {Conditioner: lambda m: m.layers[-1].linear, HolonomyCoupling: lambda m: m.network.dense[-1]}
            if type(module) in last:
                linear = last[type(module)](module)
                linear.weight.mul_(2 * strength)
                linear.bias.copy_(strength * torch.randn(linear.bias.shape, generator=generator))
    return flow.double()


def uniform(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return math.pi * (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1)


def seeing(mu, offset, shape=SHAPE, kind=PlaquetteCoupling, **options):
    mask = StripeMask(shape, mu=mu, offset=offset)
    return kind(mask, **{"bins": 4, "hidden": [6], "polyakov": True, **options})


CASES = {
    **{f"holonomy {mu}": lambda m=mu: HolonomyCoupling(SHAPE, m, bins=4, hidden=[6, 5]) for mu in (0, 1)},
    "holonomy, one hidden layer": lambda: HolonomyCoupling(SHAPE, 0, bins=2, hidden=[4], kernel=1),
    **{f"polyakov {mu} {offset}": lambda m=mu, o=offset: seeing(m, o) for mu in (0, 1) for offset in (0, 3)},
    "polyakov, local": lambda: seeing(1, 2, conditioner="local"),
    "polyakov, charge kept": lambda: seeing(0, 1, kind=SectorCoupling),
    "flow": lambda: gauge_flow(SHAPE, layers=3, bins=4, hidden=[6], polyakov=True, holonomy_pairs=2),
}


@pytest.fixture(params=list(CASES))
def flow(request):
    return randomised(CASES[request.param](), seed=len(request.param), strength=0.2 if request.param == "flow" else 0.5)


@pytest.fixture
def links():
    return uniform(BATCH, 2, *SHAPE, seed=1)


def assert_same_links(a, b, tolerance=1e-11):
    assert wrap(a - b).abs().max().item() < tolerance


def test_far_from_the_identity_and_not_blind(flow, links):
    moved, log_det = flow(links)
    assert wrap(moved - links).abs().max() > 0.3
    assert log_det.std() > 0.05
    shift = uniform(BATCH, 2, seed=2)
    other, log_det_other = flow(shift_holonomies(links, shift))
    assert wrap(other - shift_holonomies(moved, shift)).abs().max() > 0.01
    assert (log_det_other - log_det).abs().max() > 0.01


def test_round_trip_to_rounding(flow, links):
    for there, back in [(flow.forward, flow.inverse), (flow.inverse, flow.forward)]:
        moved, log_det = there(links)
        same, log_det_back = back(moved)
        assert_same_links(same, links, 1e-12 if not isinstance(flow, Sequential) else 1e-11)
        assert_close(log_det_back, -log_det, rtol=0, atol=1e-11)


def test_log_determinant_is_that_of_the_autograd_jacobian(flow, links):
    for direction in (flow.forward, flow.inverse):
        for one in links[:1]:
            jacobian = torch.autograd.functional.jacobian(lambda x, run=direction: run(x[None])[0][0], one)
            expected = torch.linalg.slogdet(jacobian.reshape(32, 32)).logabsdet
            assert_close(direction(one[None])[1][0].double(), expected, rtol=0, atol=1e-9)


def test_gauge_equivariance_and_periodicity(flow, links):
    angles, turns = uniform(BATCH, *SHAPE, seed=3), torch.round(uniform(*links.shape, seed=4))
    for direction in (flow.forward, flow.inverse):
        moved, log_det = direction(links)
        for changed, expected in [
            (gauge_transform(links, angles), gauge_transform(moved, angles)),
            (links + 2 * math.pi * turns, moved),
        ]:
            found, log_det_found = direction(changed)
            assert_same_links(found, expected, 1e-10)
            assert_close(log_det_found, log_det, rtol=0, atol=1e-10)
            assert found.abs().max() <= math.pi


def test_all_parameters_receive_finite_gradients(flow, links):
    moved, log_det = flow(links)
    (torch.cos(plaquette(moved)).sum() + torch.cos(polyakov_loop(moved, 0) - 0.3).sum() + log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("mu", [0, 1])
def test_a_holonomy_coupling_moves_one_holonomy_alone(mu):
    shape = (4, 6)
    flow = randomised(HolonomyCoupling(shape, mu, hidden=[6, 6]), seed=5)
    links = uniform(BATCH, 2, *shape, seed=6)
    for direction in (flow.forward, flow.inverse):
        moved, _ = direction(links)
        assert_same_links(plaquette(moved), plaquette(links))
        assert_same_links(polyakov_loop(moved, 1 - mu), polyakov_loop(links, 1 - mu))
        turned = wrap(polyakov_loop(moved, mu) - polyakov_loop(links, mu))
        assert turned.abs().min() > 1e-3
        assert_same_links(turned, turned[:, :1].expand_as(turned))


@pytest.mark.parametrize("mu", [0, 1])
def test_the_conditions_do_not_turn_with_the_holonomy(mu):
    flow = randomised(HolonomyCoupling((4, 8), mu, hidden=[6, 6]), seed=7)
    links, shift = uniform(BATCH, 2, 4, 8, seed=8), uniform(BATCH, 2, seed=9)
    angle, parameters = flow._seen(links)
    turned, same = flow._seen(shift_holonomies(links, shift * torch.eye(2, dtype=torch.float64)[mu]))
    assert_same_links(turned, angle + shift[:, mu])
    assert_close(same, parameters, rtol=0, atol=1e-12)
    _, other = flow._seen(shift_holonomies(links, shift * torch.eye(2, dtype=torch.float64)[1 - mu]))
    assert (other - parameters).abs().max() > 0.01


@pytest.mark.parametrize("mu", [0, 1])
def test_the_angle_is_the_constant_mode_on_smooth_fields(mu):
    """A plane wave on top of a constant field: the constant is found, up to the slope of the sawtooth at 0."""
    x = torch.arange(8, dtype=torch.float64)
    constant, wave = 2.0, 1e-3 * torch.sin(2 * math.pi * (x + 1) / 8)
    field = (constant / 8 + wave).expand(8, 8)
    links = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    links[0, mu] = field if mu == 0 else field.T
    loops = plaquette(links)
    angle = holonomy_angle(links, loops, mu)  # exact with the plaquettes themselves
    assert_same_links(angle, torch.tensor([constant]), 1e-12)
    angle = holonomy_angle(links, sawtooth(torch.cos(loops), torch.sin(loops)), mu)
    assert_same_links(angle, torch.tensor([constant]), 0.2 * 8e-3)


def test_the_potential_solves_the_lattice_poisson_equation():
    flux = uniform(4, 6, seed=15)
    potential = (green_function((4, 6)) @ flux.flatten()).reshape(4, 6)
    laplacian = sum(potential.roll(step, axis) for axis in (0, 1) for step in (1, -1)) - 4 * potential
    assert_close(-laplacian, flux - flux.mean(), rtol=0, atol=1e-13)
    assert potential.mean().abs() < 1e-14


@pytest.mark.parametrize("mu", [0, 1])
def test_nothing_diverges_where_the_circular_mean_vanishes(mu):
    """A constant flux: the Polyakov loops go around the whole circle."""
    plaquettes = torch.full((1, 8, 8), 2 * math.pi / 64, dtype=torch.float64)
    links = links_from_plaquettes(plaquettes, torch.tensor([[0.3, -0.4]], dtype=torch.float64)).requires_grad_()
    assert topological_charge(links).item() == 1
    assert torch.exp(1j * polyakov_loop(links, mu)).sum().abs() < 1e-12
    flow = randomised(HolonomyCoupling((8, 8), mu), seed=10)
    moved, log_det = flow(links)
    (gradient,) = torch.autograd.grad(torch.cos(polyakov_loop(moved, mu)).sum() + log_det.sum(), links)
    assert gradient.abs().max() < 100


@pytest.mark.parametrize(("mu", "offset"), list(itertools.product((0, 1), range(4))))
def test_the_loops_that_a_coupling_sees_are_frozen_and_beside_it(mu, offset):
    mask = StripeMask((8, 4), mu=mu, offset=offset)
    links = uniform(BATCH, 2, 8, 4, seed=11)
    flow = randomised(PlaquetteCoupling(mask, polyakov=True, hidden=[4]), seed=12)
    seen, seen_after = (torch.cat(flow._polyakov(x), dim=-1) for x in (links, flow(links)[0]))
    assert seen.shape == (BATCH, 8, 4)
    assert_close(seen, seen_after, rtol=0, atol=1e-12)
    site = mask.sites(0)
    along_mu, along_nu = (site // 4, site % 4) if mu == 0 else (site % 4, site // 4)
    across, along = mask.frozen_windings()
    assert torch.equal(across, along_mu)
    assert torch.equal(along, (along_nu + 1) % mask.shape[1 - mu])


def test_starts_near_the_identity():
    with torch.random.fork_rng():
        torch.manual_seed(13)
        flow = gauge_flow((8, 8), layers=8, polyakov=True, holonomy_pairs=1).double()
    links = uniform(BATCH, 2, 8, 8, seed=14)
    moved, log_det = flow(links)
    assert 0 < wrap(moved - links).abs().max() < 0.2
    assert log_det.abs().max() < 1


def test_holonomy_couplings_belong_to_the_layers_before_them():
    flow = gauge_flow(SHAPE, layers=18, hidden=[4], bins=2, holonomy_pairs=2)
    kinds = [type(layer) for layer in flow.layers]
    assert [place for place, kind in enumerate(kinds) if kind is Sequential] == [7, 15, 17]
    assert [(type(one), getattr(one, "mu", None)) for one in flow.layers[7].layers[1:]] == [
        (HolonomyCoupling, mu) for mu in (0, 1, 0, 1)
    ]
    parts = PartwiseSampler(HaarUniform(SHAPE), flow, [8, 10]).parts
    assert isinstance(parts[0].layers[-1].layers[-1], HolonomyCoupling)
    with pytest.raises(ValueError, match="cut a cycle of 8 masks"):
        flow.cut([4, 14])


def test_a_flow_without_them_is_the_same_as_ever():
    plain = gauge_flow(SHAPE, layers=2, hidden=[4])
    assert not any("winding" in name or "holonomy" in name for name, _ in plain.named_buffers())
    assert plain.layers[0].network.layers[0].linear.in_features == 4 * 8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HolonomyCoupling(SHAPE, 2), "mu must be 0 or 1, got 2"),
        (lambda: HolonomyCoupling((4, 4, 4), 0), "expected 2"),
        (lambda: HolonomyCoupling(SHAPE, 0, hidden=[]), "hidden must hold"),
        (lambda: gauge_flow(SHAPE, layers=2, holonomy_pairs=-1), "holonomy_pairs must be an integer of at least 0"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
