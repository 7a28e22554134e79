"""Weights learned on a small lattice, moved to the nearest images of mask cells."""

import pytest
import torch

from latticeflow.flows import PlaquetteCoupling, gauge_flow, use_nearest_images


def local_flow(shape, **changes):
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
    flow = local_flow((8, 8), **changes)
    z = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = flow(z)
    use_nearest_images(flow)
    after = flow(z)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-10)


def test_weight_is_with_the_nearest_cells():
    """Rows are a step along mu and two along nu from each other; frozen loops are two sites ahead of the pair."""
    flow = local_flow((8, 8))
    use_nearest_images(flow)
    window = first_window(flow)
    assert window[:, 0].tolist() == [False, True, True, True, True, True, True, True, False]
    assert window[:, 1].tolist() == [True, True, True, True, True, False, True, True, False]


@pytest.mark.parametrize(("shape", "conditioner"), [((12, 12), "local"), ((8, 8), "global")])
def test_without_images_nothing_changes(shape, conditioner):
    flow = local_flow(shape, conditioner=conditioner)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    use_nearest_images(flow)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
