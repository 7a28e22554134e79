"""What every bijection of links must fulfil, over a registry of them with weights far from the identity."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from latticeflow.flows import Bijection, PlaquetteCoupling, SectorCoupling, Sequential, gauge_flow
from latticeflow.flows.gauge import frozen_charge
from latticeflow.flows.masks import StripeMask
from latticeflow.flows.networks import CellConvolution, Conditioner
from latticeflow.priors import links_from_plaquettes
from latticeflow.u1 import gauge_transform, plaquette, shift_holonomies, topological_charge, wilson_loop, wrap

BATCH = 6
PERIOD = 4  # every mask is periodic under translations by four sites


def randomised(flow, seed, *, strength=0.5):
    """Fill all weights so that every convolution's output, spline parameters included, is of order `strength`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, nn.Linear):
                scale = 1.5 / math.sqrt(module.in_features)
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for module in flow.modules():
            if isinstance(module, Conditioner):
                module.context.weight.mul_(0.3)
                last = module.layers[-1].linear
                last.weight.mul_(2 * strength)
                last.bias.copy_(strength * torch.randn(last.bias.shape, generator=generator))
    return flow.double()


def coupling(shape, mu, offset, **options):
    return PlaquetteCoupling(StripeMask(shape, mu=mu, offset=offset), **{"bins": 4, "hidden": [6], **options})


def sector_coupling(shape, mu, offset):
    return SectorCoupling(StripeMask(shape, mu=mu, offset=offset), bins=4, hidden=[6])


def registry():
    cases = {
        f"coupling mu={mu} offset={offset} {shape}": (shape, lambda s=shape, m=mu, o=offset: coupling(s, m, o))
        for shape, mu, offset in [
            *itertools.product([(4, 4)], (0, 1), range(4)),
            *itertools.product([(4, 8), (8, 8)], (0, 1), (1, 2)),
        ]
    }
    local = {"conditioner": "local", "hidden": [8, 6], "dilations": [1, 2, 3], "bins": 5}
    keeping = {"keep_charge": True, "hidden": [8, 6], "bins": 5}
    cases["coupling without hidden layers"] = (4, 8), lambda: coupling((4, 8), 1, 3, hidden=[], bins=2)
    for shape, mu in [((4, 4), 0), ((8, 4), 1)]:
        cases[f"sector coupling {shape}"] = shape, lambda s=shape, m=mu: sector_coupling(s, m, 1)
        cases[f"local coupling {shape}"] = shape, lambda s=shape, m=mu: coupling(s, m, 3, conditioner="local")
    cases["local coupling of kernel 1"] = (
        (8, 4),
        lambda: coupling((8, 4), 0, 3, conditioner="local", kernel=1),
    )
    cases["sequential of couplings"] = (4, 4), lambda: Sequential([coupling((4, 4), 1, 2), coupling((4, 4), 0, 1)])
    cases["nested sequential"] = (4, 4), lambda: Sequential([Sequential([coupling((4, 4), 0, 0)]), Sequential()])
    for shape in [(4, 4), (4, 8), (8, 8)]:
        cases[f"gauge flow {shape}"] = shape, lambda s=shape: gauge_flow(s, layers=8, hidden=[8, 6], bins=5)
        cases[f"gauge flow, charge kept, {shape}"] = shape, lambda s=shape: gauge_flow(s, layers=8, **keeping)
        cases[f"gauge flow, local, {shape}"] = shape, lambda s=shape: gauge_flow(s, layers=8, **local)
    return cases


REGISTRY = registry()


@pytest.fixture(scope="module", params=list(REGISTRY))
def case(request):
    return built(request.param)


def built(name):
    """Return the flow and a batch of links; deep flows are weaker, for their composition is worse conditioned."""
    shape, build = REGISTRY[name]
    strength = 0.1 if name.startswith("gauge flow") else 0.5
    return randomised(build(), seed=len(name), strength=strength), uniform_links(BATCH, shape, seed=1)


def uniform_links(batch, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return math.pi * (2 * torch.rand(batch, 2, *shape, generator=generator, dtype=torch.float64) - 1)


def uniform_angles(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(*shape, generator=generator, dtype=torch.float64)


def assert_same_links(a, b, tolerance=1e-10):
    assert wrap(a - b).abs().max().item() < tolerance


def both_ways(flow):
    return {"forward": flow.forward, "inverse": flow.inverse}.items()


def test_registry_is_far_from_the_identity(case):
    """So that the contracts below have something to find."""
    flow, links = case
    moved, log_det = flow(links)
    assert wrap(moved - links).abs().max() > 0.5
    assert log_det.std() > 0.3
    assert log_det.abs().max() > 0.5


def test_round_trip_and_opposite_log_determinants(case):
    flow, links = case
    moved, log_det = flow(links)
    back, log_det_back = flow.inverse(moved)
    assert_same_links(back, links)
    assert_close(log_det_back, -log_det, rtol=0, atol=1e-8)
    latent, log_det_inverse = flow.inverse(links)
    ahead, log_det_ahead = flow(latent)
    assert_same_links(ahead, links)
    assert_close(log_det_ahead, -log_det_inverse, rtol=0, atol=1e-8)


def test_no_part_of_the_inverse_is_constant(case):
    flow, links = case
    (latent, log_det), (same, varying) = flow.inverse(links), flow.varying_inverse(links)
    assert torch.equal(same, latent)
    assert torch.equal(varying, log_det)
    assert flow.constant_log_det(links.shape[1:]) == 0
    assert not flow.constant_jacobian


def test_shapes_dtypes_and_independence_of_the_batch(case):
    flow, links = case
    for _, direction in both_ways(flow):
        moved, log_det = direction(links)
        assert moved.shape == links.shape
        assert moved.dtype == log_det.dtype == torch.float64
        assert log_det.shape == (BATCH,)
        alone, log_det_alone = direction(links[2:3])
        assert_same_links(alone, moved[2:3])
        assert_close(log_det_alone, log_det[2:3])


@pytest.mark.parametrize("name", [name for name, (shape, _) in REGISTRY.items() if shape == (4, 4)])
def test_log_determinant_is_that_of_the_autograd_jacobian(name):
    flow, links = built(name)
    for _, direction in both_ways(flow):
        for one in links[:3]:
            jacobian = torch.autograd.functional.jacobian(lambda x, run=direction: run(x[None])[0][0], one)
            expected = torch.linalg.slogdet(jacobian.reshape(32, 32)).logabsdet
            assert_close(direction(one[None])[1][0], expected, rtol=0, atol=1e-8)


def test_gauge_equivariance(case):
    flow, links = case
    angles = uniform_angles((BATCH, *links.shape[-2:]), seed=2)
    for _, direction in both_ways(flow):
        moved, log_det = direction(links)
        transformed, log_det_transformed = direction(gauge_transform(links, angles))
        assert_same_links(transformed, gauge_transform(moved, angles))
        assert_close(log_det_transformed, log_det, rtol=0, atol=1e-9)


def test_two_pi_periodicity_of_every_link(case):
    """One configuration per link, that link moved by a turn; and all links moved by random numbers of turns."""
    flow, links = case
    links = links[:1]
    count = links[0].numel()
    turns = torch.cat([torch.eye(count), torch.randint(-3, 4, (4, count), generator=torch.Generator().manual_seed(3))])
    turned = links + 2 * math.pi * turns.double().reshape(-1, *links.shape[1:])
    for _, direction in both_ways(flow):
        moved, log_det = direction(links)
        moved_turned, log_det_turned = direction(turned)
        assert_same_links(moved_turned, moved)
        assert_close(log_det_turned, log_det.expand(len(turned)), rtol=0, atol=1e-9)


def test_links_come_out_on_the_principal_branch(case):
    flow, links = case
    for _, direction in both_ways(flow):
        moved, _ = direction(links + 20 * math.pi)
        assert moved.abs().max() <= math.pi


def test_blind_to_holonomies(case):
    flow, links = case
    angles = uniform_angles((BATCH, 2), seed=4)
    for _, direction in both_ways(flow):
        moved, log_det = direction(links)
        shifted, log_det_shifted = direction(shift_holonomies(links, angles))
        assert_same_links(shifted, shift_holonomies(moved, angles))
        assert_close(log_det_shifted, log_det, rtol=0, atol=1e-9)


def test_translations_by_the_common_periods_of_the_masks(case):
    flow, links = case
    for _, direction in both_ways(flow):
        moved, log_det = direction(links)
        for steps in [(PERIOD, 0), (0, PERIOD), (PERIOD, -PERIOD)]:
            translated, log_det_translated = direction(torch.roll(links, steps, (-2, -1)))
            assert_same_links(translated, torch.roll(moved, steps, (-2, -1)))
            assert_close(log_det_translated, log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("mu", "offset"), list(itertools.product((0, 1), (0, 3))))
@pytest.mark.parametrize("shape", [(4, 4), (4, 8), (8, 4), (8, 8), (12, 8)])
@pytest.mark.parametrize("local", [False, True])
def test_coupling_commutes_with_the_translations_of_its_own_mask(local, shape, mu, offset):
    """Its periods are (1 along mu, 2 along nu) and (0, 4); a translation outside them does not commute."""
    options = {"conditioner": "local", "dilations": [1, 2, 1]} if local else {}
    flow = randomised(coupling(shape, mu, offset, hidden=[6, 6], **options), seed=5)
    links = uniform_links(BATCH, shape, seed=6)
    moved, log_det = flow(links)
    axes = (mu - 2, -1 - mu)
    for steps in [(1, 2), (0, 4), (1, -2), (-3, 2)]:
        translated, log_det_translated = flow(torch.roll(links, steps, axes))
        assert_same_links(translated, torch.roll(moved, steps, axes))
        assert_close(log_det_translated, log_det, rtol=0, atol=1e-9)
    outside, _ = flow(torch.roll(links, (0, 2), axes))
    assert wrap(outside - torch.roll(moved, (0, 2), axes)).abs().max() > 0.1


def test_a_coupling_moves_its_active_links_alone():
    mask = StripeMask((8, 4), mu=1, offset=2)
    links = uniform_links(BATCH, (8, 4), seed=7)
    flow = randomised(PlaquetteCoupling(mask), seed=8)
    for _, direction in both_ways(flow):
        moved = wrap(direction(links)[0] - links).flatten(1).abs().amax(0)
        others = torch.ones(64, dtype=torch.bool)
        others[mask.active_links()] = False
        assert (moved[others] < 1e-12).all()
        assert (moved[~others] > 1e-3).all()


def test_a_flow_of_one_cycle_moves_every_link():
    links = uniform_links(BATCH, (8, 4), seed=7)
    moved, _ = randomised(gauge_flow((8, 4), layers=8, hidden=[4]), seed=8)(links)
    assert wrap(moved - links).abs().amax(0).min() > 1e-3
    assert (topological_charge(moved) != topological_charge(links)).any()


def test_local_conditioner_is_local():
    """With no hidden layer and a 3x3 window of cells, a far plaquette does not move the active ones in one sector."""
    shape, mask = (8, 32), StripeMask((8, 32), mu=0, offset=0)
    flow = randomised(PlaquetteCoupling(mask, hidden=[], conditioner="local"), seed=9)
    links = 0.5 * uniform_links(1, shape, seed=10)
    touched = links.clone()
    touched[0, 0, 4, 16] += 1.0
    difference = wrap(plaquette(flow(touched)[0] - flow(links)[0]))[0].abs()
    assert difference[4].max() > 0.01
    assert difference[[0, 1, 7]].max() < 1e-9
    assert difference[:, :5].max() < 1e-9


def test_sequential_is_the_composition_in_order():
    first, second = (randomised(coupling((4, 4), mu, 1), seed=11 + mu) for mu in (0, 1))
    links = uniform_links(BATCH, (4, 4), seed=13)
    middle, log_det_first = first(links)
    expected, log_det_second = second(middle)
    moved, log_det = Sequential([first, second])(links)
    assert torch.equal(moved, expected)
    assert_close(log_det, log_det_first + log_det_second)


def test_empty_sequential_is_the_identity():
    links = uniform_links(BATCH, (4, 4), seed=14).float()
    for _, direction in both_ways(Sequential()):
        moved, log_det = direction(links)
        assert torch.equal(moved, links)
        assert torch.equal(log_det, torch.zeros(BATCH, dtype=torch.float64))


def test_bijection_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Bijection()


@pytest.mark.parametrize("conditioner", ["global", "local"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 8), (8, 8)])
def test_flows_start_near_the_identity(shape, conditioner):
    with torch.random.fork_rng():
        torch.manual_seed(15)
        flow = gauge_flow(shape, layers=8, conditioner=conditioner).double()
    links = uniform_links(BATCH, shape, seed=16)
    moved, log_det = flow(links)
    assert 0 < wrap(moved - links).abs().max() < 0.2
    assert 0 < (log_det.abs() / (shape[0] * shape[1])).max() < 0.02


def test_zero_last_layer_is_exactly_the_identity():
    flow = gauge_flow((4, 8), layers=8).double()
    with torch.no_grad():
        for layer in flow.layers:
            layer.network.layers[-1].linear.weight.zero_()
    links = uniform_links(BATCH, (4, 8), seed=17)
    moved, log_det = flow(links)
    assert_same_links(moved, links, 1e-13)
    assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-13)


def test_single_precision_agrees_with_double(case):
    flow, links = case
    exact = {name: direction(links) for name, direction in both_ways(flow)}
    try:
        for name, direction in both_ways(flow.float()):
            moved, log_det = direction(links.float())
            assert moved.dtype == torch.float32
            assert_same_links(moved.double(), exact[name][0], 2e-3)
            assert_close(log_det.double(), exact[name][1], rtol=0, atol=2e-3)
            assert moved.abs().max() <= math.pi + 1e-6
    finally:
        flow.double()


def test_sequential_sums_in_double_precision():
    flow = randomised(gauge_flow((4, 4), layers=8, hidden=[4]), seed=18).float()
    assert flow(uniform_links(2, (4, 4), seed=19).float())[1].dtype == torch.float64
    assert flow.layers[0](uniform_links(2, (4, 4), seed=19).float())[1].dtype == torch.float32


@pytest.mark.parametrize("conditioner", ["global", "local"])
def test_all_parameters_receive_finite_gradients(conditioner):
    flow = randomised(gauge_flow((4, 4), layers=8, hidden=[4, 4], conditioner=conditioner), seed=20)
    links = uniform_links(BATCH, (4, 4), seed=21)
    for _, direction in both_ways(flow):
        moved, log_det = direction(links)
        flow.zero_grad()
        (torch.cos(plaquette(moved)).sum() + log_det.sum()).backward()
        for parameter in flow.parameters():
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0


def test_state_dict_holds_weights_alone():
    """The masks are rebuilt from the configuration, so a checkpoint cannot disagree with it."""
    flow = gauge_flow((4, 4), layers=2, hidden=[4])
    assert set(flow.state_dict()) == {name for name, _ in flow.named_parameters()}


def test_cell_convolution_is_the_explicit_sum():
    mask = StripeMask((8, 12), mu=0, offset=3)
    table, generator = mask.neighbours(3, 2), torch.Generator().manual_seed(22)
    layer = randomised(CellConvolution(5, 4, table), seed=23)
    x = torch.randn(3, 24, 5, generator=generator, dtype=torch.float64)
    found = layer(x)
    weight = layer.linear.weight.reshape(4, 9, 5)
    assert found.shape == (3, 24, 4)
    for batch, cell, channel in itertools.product(range(3), range(24), range(4)):
        expected = layer.linear.bias[channel].clone()
        for position in range(9):
            expected += (weight[channel, position] * x[batch, table[cell, position]]).sum()
        assert_close(found[batch, cell, channel], expected)


def test_a_window_of_one_cell_is_the_cell_itself():
    layer = randomised(CellConvolution(5, 4, StripeMask((8, 8), mu=0, offset=0).neighbours(1)), seed=23)
    x = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(22), dtype=torch.float64)
    assert_close(layer(x), x @ layer.linear.weight.T + layer.linear.bias)


def test_conditioner_is_its_layers_with_the_context_in_the_first():
    mask = StripeMask((8, 8), mu=0, offset=0)
    network = randomised(Conditioner([2, 5, 3], [mask.all_cells(), mask.neighbours(1)], contexts=2), seed=24)
    draws = torch.Generator().manual_seed(25)
    cells = torch.randn(3, 16, 2, generator=draws, dtype=torch.float64)
    context = torch.randn(3, 2, generator=draws, dtype=torch.float64)
    hidden = network.layers[0](cells) + (context @ network.context.weight.T)[:, None]
    assert_close(network(cells, context), network.layers[1](hidden * torch.sigmoid(hidden)))


def test_conditioner_scales_the_last_layer_and_needs_a_table_for_each():
    table = StripeMask((8, 8), mu=0, offset=0).neighbours(3)
    network = Conditioner([2, 5, 3], [table, table], contexts=2, last_scale=1e-3)
    bound = 1 / math.sqrt(9 * 5)  # of torch's default initialisation
    assert 0.5 * bound < network.layers[1].linear.weight.abs().max() / 1e-3 <= bound * (1 + 1e-6)
    assert not network.layers[1].linear.bias.any()
    with pytest.raises(ValueError, match="zip"):
        Conditioner([2, 5, 3], [table], contexts=2)


def test_frozen_charge_sums_a_smooth_sawtooth_over_all_loops():
    """Odd, near `x / 2 pi` where smooth fields have their loops, through zero at pi; loops add up."""
    loops = uniform_links(5, (2, 3), seed=29)[:, 0]
    charge = charge_of(loops)
    assert_close(charge_of(-loops), -charge)
    single = [charge_of(loops * torch.eye(6, dtype=torch.float64)[n].reshape(2, 3)) for n in range(6)]
    assert_close(charge, sum(single))
    angles = torch.linspace(0.01, 1.5, 50, dtype=torch.float64)
    one = torch.nn.functional.pad(angles[:, None], (2, 3)).reshape(50, 2, 3)
    assert_close(charge_of(one), angles / (2 * math.pi), rtol=0.2, atol=0)
    assert charge_of(torch.full((1, 2, 3), math.pi, dtype=torch.float64)).abs().item() < 1e-14


def charge_of(loops):
    return frozen_charge(torch.cos(loops), torch.sin(loops))


@pytest.mark.parametrize("charge", [-3, -1, 0, 2])
def test_context_follows_the_topological_charge_on_smooth_fields(charge):
    """A constant-flux background: `u = R / sqrt(1 + R^2)` of the charge R and its square, but for the smoothing."""
    coupling = PlaquetteCoupling(StripeMask((8, 8), mu=1, offset=2), hidden=[4]).double()
    plaquettes = torch.full((1, 8, 8), 2 * math.pi * charge / 64, dtype=torch.float64)
    links = links_from_plaquettes(plaquettes, torch.zeros(1, 2, dtype=torch.float64))
    assert topological_charge(links).item() == charge
    (context,) = contexts_seen(coupling, lambda: coupling(links))
    assert context[0, 0].item() == pytest.approx(charge / math.sqrt(1 + charge**2), rel=0.1, abs=1e-12)
    assert context[0, 1].item() == pytest.approx(context[0, 0].item() ** 2)


def contexts_seen(coupling, act):
    seen = []
    handle = coupling.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    act()
    handle.remove()
    return seen


@pytest.mark.parametrize("conditioner", ["global", "local"])
def test_a_coupling_cannot_change_the_charge_it_is_conditioned_on_and_uses_it(conditioner):
    flow = randomised(coupling((4, 8), 1, 1, hidden=[4], conditioner=conditioner), seed=27)
    links = uniform_links(100, (4, 8), seed=28)
    before, after = contexts_seen(flow, lambda: flow.inverse(flow(links)[0]))
    assert_close(before, after, rtol=0, atol=1e-10)
    assert before[:, 0].std() > 0.3
    _, log_det = flow(links)
    with torch.no_grad():
        flow.network.context.weight.zero_()
    assert (flow(links)[1] - log_det).abs().max() > 0.1


@pytest.mark.parametrize("conditioner", ["global", "local"])
@pytest.mark.parametrize("mu", [0, 1])
def test_no_jump_where_a_loop_passes_pi(mu, conditioner):
    """Jumps of the density there would bias gradients that are taken sample by sample."""
    flow = randomised(coupling((4, 4), mu, 1, conditioner=conditioner), seed=30)
    links, velocity = uniform_links(1, (4, 4), seed=31), uniform_links(1, (4, 4), seed=32)
    loops = [partial(wilson_loop, r0=r0, r1=r1) for r0, r1 in [(1, 1), (1, 2), (2, 1)]]
    start, speed = (torch.cat([loop(x).flatten() for loop in loops]) for x in (links, velocity))
    times = (wrap(math.pi - start) / speed)[:, None, None, None]
    angle = torch.cat([loop(links + times * velocity).flatten(1) for loop in loops], dim=1).diagonal()
    assert_close(wrap(angle).abs(), torch.full_like(angle, math.pi))
    for _, direction in both_ways(flow):
        before, after = (direction(links + (times + side) * velocity) for side in (-1e-10, 1e-10))
        assert_same_links(before[0], after[0], 1e-4)
        assert_close(before[1], after[1], rtol=0, atol=1e-4)


def test_gauge_flow_refuses_lattices_that_do_not_tile():
    with pytest.raises(ValueError, match=r"\[6\]"):
        gauge_flow((6, 8), layers=1)
