"""Weights learned on a small lattice, moved to the nearest images of mask cells."""

import pytest
import torch

from latticeflow.flows import PlaquetteCoupling, gauge_flow, weights_for
from latticeflow.flows.masks import StripeMask


def flow_of(shape, **changes):
    settings = {"layers": 8, "bins": 3, "hidden": [5, 5], "conditioner": "local"} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        flow = gauge_flow(shape, **settings).double()
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return flow


def first_window(flow):
    """Return which of the 3 x 3 cells around each have weight in the first layer, `(9 = window, feature)`."""
    coupling = next(part for part in flow.modules() if isinstance(part, PlaquetteCoupling))
    return coupling.network.layers[0].linear.weight.view(5, 9, 8)[0].detach() != 0


@pytest.mark.parametrize("changes", [{}, {"dilations": [1, 2, 3]}, {"kernel": 5}, {"keep_charge": True}])
def test_the_map_on_the_lattice_itself_stays(changes):
    flow = flow_of((8, 8), **changes)
    z = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = flow(z)
    weights_for(flow, flow)
    after = flow(z)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-10)


def test_weight_is_with_the_nearest_cells():
    """Rows are a step along mu and two along nu from each other; frozen loops are two sites ahead of the pair."""
    flow = flow_of((8, 8))
    weights_for(flow, flow)
    window = first_window(flow)
    assert window[:, 0].tolist() == [False, True, True, True, True, True, True, True, False]
    assert window[:, 1].tolist() == [True, True, True, True, True, False, True, True, False]


@pytest.mark.parametrize(("shape", "conditioner"), [((12, 12), "local"), ((8, 8), "global")])
def test_without_images_nothing_changes(shape, conditioner):
    flow = flow_of(shape, conditioner=conditioner)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    weights_for(flow, flow)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


@pytest.mark.parametrize("larger", [(16, 16), (16, 8), (8, 24)])
@pytest.mark.parametrize("changes", [{}, {"conditioner": "global"}, {"conditioner": "global", "polyakov": True}])
def test_on_a_larger_lattice_a_repeated_field_is_mapped_alike(larger, changes):
    """Whatever the images, their weights add up; the context, a charge that grows with the lattice, is left out."""
    small, large = flow_of((8, 8), **changes), flow_of(larger, **changes)
    with torch.no_grad():
        for part in small.modules():
            if isinstance(part, PlaquetteCoupling):
                part.network.context.weight.zero_()
                part.network.layers[0].linear.weight.view(5, -1, part.features)[..., 8:] = 0  # other loops there
    large.load_state_dict(weights_for(large, small))
    z = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    times = (1, 1, larger[0] // 8, larger[1] // 8)
    x, log_det = small(z)
    repeated, log_det_repeated = large(z.repeat(times))
    turned = torch.remainder(repeated - x.repeat(times) + 1, 2 * torch.pi) - 1
    torch.testing.assert_close(turned, torch.zeros_like(turned), rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_repeated, log_det * times[2] * times[3], rtol=1e-9, atol=1e-9)


def test_all_cells_of_a_larger_lattice_get_the_weight_of_the_nearest():
    """Of the features of the pair, cells half of 8 sites away share theirs with that on the other side."""
    mask, larger = StripeMask((8, 8), 0, 0), StripeMask((16, 16), 0, 0)
    weight = mask.nearest((16, 16), 0)
    assert weight.sum(0).tolist() == [1] * 16
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(4), indexing="ij")
    steps = torch.stack([rows, 2 * rows + 4 * columns], dim=-1).flatten(0, 1)
    away = torch.minimum(steps % 16, -steps % 16)[weight.any(1)]
    assert away.max() == 4
    assert (weight[weight > 0] == 0.5 ** (away == 4).sum(1)).all()
    assert torch.equal(mask.nearest((8, 8), 0), torch.eye(16))
    assert larger.cells == (16, 4)
