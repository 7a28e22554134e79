"""The networks of couplings of real fields: what a dense one knows of the size of the frozen sites."""

import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import AffineMap, Clamp, Coupling
from latticeflow.flows.networks import Conditioner, SiteConditioner
from latticeflow.flows.site_masks import checkerboard

MASK = checkerboard((6,), 0)


def dense(*, seed=1, hidden=(8,), **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SiteConditioner(MASK, 2, hidden=hidden, conditioner="dense", **options).double()


def frozen(n=20, *, scale=1.0):
    return scale * torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def blind(network):
    """Leave the context alone as input, and make its effect visible."""
    network.network.layers[0].linear.weight.zero_()
    network.network.layers[-1].linear.weight.mul_(100)
    return network


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_context_is_the_logarithm_of_the_size(scale):
    network, fields, seen = dense(), frozen(scale=scale), []
    network.network.context.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(fields)
    expected = [[math.log1p(sum(value**2 for value in row))] for row in fields.tolist()]
    assert_close(seen[0], torch.tensor(expected, dtype=torch.float64))


def test_its_weight_is_not_near_zero():
    """Of the usual size for one input, between -1 and 1, in every network anew."""
    weights = torch.cat([dense(seed=seed, hidden=(50,)).network.context.weight for seed in range(4)])
    assert weights.shape == (200, 1)
    assert weights.abs().max() <= 1
    assert 0.45 < weights.std() < 0.7
    assert weights.unique().numel() == 200


def test_equal_sizes_give_equal_contexts_and_others_do_not():
    network, fields = blind(dense()), frozen()
    turned = fields.roll(1, dims=1) * torch.tensor([-1.0, 1.0, 1.0])
    assert_close(network(turned), network(fields))
    assert (network(10 * fields) - network(fields)).abs().amax(dim=(1, 2)).min() > 0.01


def test_the_context_is_trained():
    network = dense()
    (gradient,) = torch.autograd.grad(network(frozen()).square().sum(), network.network.context.weight)
    assert (gradient.abs() > 0).all()


def test_without_hidden_layers_the_context_enters_the_output():
    network = dense(hidden=())
    assert network.network.context.weight.shape == (6, 1)
    assert network(frozen()).shape == (20, 3, 2)


def test_convolutions_have_no_context():
    """Their weights fit a lattice of any size, on which the size of a field is another."""
    network = SiteConditioner(MASK, 2, hidden=[4])
    assert network.network.context is None
    assert not [name for name in network.state_dict() if "context" in name]


def test_contexts_of_other_networks_start_at_zero():
    network = Conditioner([1, 4, 2], [torch.zeros(1, 1, dtype=torch.int64)] * 2, contexts=3)
    assert not network.context.weight.any()


def test_a_coupling_is_near_the_identity_all_the_same():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = Coupling(MASK, AffineMap(Clamp()), hidden=[64], conditioner="dense").double()
    z = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x, log_det = layer(z)
    assert 0 < (x - z).abs().max() < 0.1
    assert log_det.abs().max() < 0.1


def test_the_context_keeps_an_odd_coupling_odd():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = Coupling(MASK, AffineMap(Clamp()), odd=True, hidden=[8], conditioner="dense").double()
    blind(layer.network)
    z = 5 * torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x, log_det = layer(z)
    mirrored, log_det_mirrored = layer(-z)
    assert_close(mirrored, -x)
    assert_close(log_det_mirrored, log_det)
    assert log_det.std() > 1e-3


def test_sizes_that_overflow_are_not_silent():
    """Up to the square root of the largest number the context is a number."""
    assert torch.isfinite(dense()(frozen(scale=1e150))).all()
