"""The hand-written gradient of `log|det M|` against autograd through the dense determinant, and what it stores."""

import math

import pytest
import torch

from latticeflow.dirac import adjoint, log_abs_det
from latticeflow.dirac.reduction import plain_log_abs_det

SHAPES = [(1, 1), (1, 5), (5, 1), (2, 2), (2, 3), (3, 2), (3, 8), (8, 3), (5, 8), (8, 5)]
TWISTS = torch.tensor([0.0, 0.7, -2.5], dtype=torch.float64)


def random_links(shape, *, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(batch, 2, *shape, dtype=torch.float64, generator=generator)


def gradient(links, kappa, method="cyclic", *, twists=None):
    """Gradient in the links alone of a sum with different weights."""
    leaf = links.clone().requires_grad_()
    value = log_abs_det(leaf, kappa, method, twists=twists)[0]
    weights = torch.linspace(-1, 2, value.numel(), dtype=links.dtype).reshape(value.shape)
    return torch.autograd.grad((weights * value).sum(), leaf)[0]


def close(first, second, tolerance=1e-11):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("twists", [None, TWISTS[1:2], TWISTS], ids=["plain", "one twist", "twists"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_dense_determinant(shape, twists):
    links, each = random_links(shape), torch.tensor([0.0, 0.2, 0.3], dtype=torch.float64)
    for kappa in (0.276, each):
        close(gradient(links, kappa, twists=twists), gradient(links, kappa, "dense", twists=twists))


@pytest.mark.parametrize("kappa", [0.0, -0.3, 0.45, 0.7])
def test_gradient_at_any_kappa(kappa):
    links = random_links((4, 5))
    close(gradient(links, kappa), gradient(links, kappa, "dense"), 1e-9)


@pytest.mark.parametrize("twists", [None, TWISTS], ids=["plain", "twists"])
@pytest.mark.parametrize("shape", [(3, 4), (8, 8)])
def test_single_precision(shape, twists):
    links = random_links(shape)
    single = gradient(links.float(), 0.25, twists=twists)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), gradient(links, 0.25, twists=twists), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("twists", [None, TWISTS], ids=["plain", "twists"])
def test_first_and_second_derivatives_by_finite_differences(twists):
    leaf = random_links((3, 2), batch=1).requires_grad_()

    def value(links):
        return log_abs_det(links, 0.25, twists=twists)[0]

    assert torch.autograd.gradcheck(value, leaf)
    assert torch.autograd.gradgradcheck(value, leaf)


def test_mixed_second_derivative_is_that_of_the_dense_determinant():
    found = []
    for method in ("cyclic", "dense"):
        leaf, kappa = random_links((3, 4)).requires_grad_(), torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(log_abs_det(leaf, kappa, method)[0].sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (leaf, kappa)))
    for cyclic, dense in zip(*found, strict=True):
        close(cyclic, dense, 1e-10)


@pytest.mark.parametrize("twists", [None, TWISTS], ids=["plain", "twists"])
def test_signs_and_values_do_not_depend_on_the_gradient(twists):
    links = random_links((4, 3), batch=64, seed=8)
    value, sign = log_abs_det(links, 0.45, twists=twists)
    with_gradient, sign_too = log_abs_det(links.clone().requires_grad_(), 0.45, twists=twists)
    angles = torch.zeros(1, dtype=torch.float64) if twists is None else twists
    plain, plain_sign = (part.reshape(value.shape) for part in plain_log_abs_det(links, 0.45, angles))
    assert with_gradient.requires_grad
    assert not sign_too.requires_grad
    assert torch.equal(with_gradient, value)
    close(plain, value, 1e-12)
    assert torch.equal(sign, sign_too)
    assert torch.equal(sign, plain_sign)
    assert torch.equal(sign, log_abs_det(links, 0.45, "dense", twists=twists)[1])
    assert {-1.0, 1.0} == set(sign.flatten().tolist())


@pytest.mark.parametrize("kept", [0, 2**14, 2**28])
@pytest.mark.parametrize("twists", [None, TWISTS], ids=["plain", "twists"])
def test_groups_of_configurations_change_nothing(monkeypatch, twists, kept):
    links, kappa = random_links((5, 4), batch=7), torch.linspace(0.1, 0.3, 7, dtype=torch.float64)
    values, expected = log_abs_det(links, kappa, twists=twists), gradient(links, kappa, twists=twists)
    matrices = adjoint.MATRICES * 5 + adjoint.CLOSING_MATRICES * (1 if twists is None else 3)
    monkeypatch.setitem(adjoint.WORKING_MEMORY, "cpu", 3 * 16 * 4**2 * matrices)
    monkeypatch.setattr(adjoint, "KEPT_MEMORY", kept)
    angles = torch.zeros(1) if twists is None else twists
    assert adjoint.groups(links, angles) == [slice(0, 3), slice(3, 6), slice(6, 9)]
    for found, value in zip(log_abs_det(links, kappa, twists=twists), values, strict=True):
        close(found, value, 1e-13)
    close(gradient(links, kappa, twists=twists), expected, 1e-12)


def test_one_configuration_is_always_taken(monkeypatch):
    monkeypatch.setitem(adjoint.WORKING_MEMORY, "cpu", 1)
    assert adjoint.groups(random_links((2, 2)), TWISTS) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert [part.shape for part in log_abs_det(torch.zeros(0, 2, 3, 4), 0.2)] == [(0,), (0,)]


def test_no_graph_is_stored(monkeypatch):
    """Links and gradient for one value of a configuration; with twists, no more than the budget."""
    links, saved = random_links((8, 8), batch=16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        value = log_abs_det(links, 0.25)[0]
    assert sum(saved) <= 2 * links.nbytes
    monkeypatch.setitem(adjoint.WORKING_MEMORY, "cpu", 2**19)
    monkeypatch.setattr(adjoint, "KEPT_MEMORY", 2**18)
    value = log_abs_det(links, 0.25, twists=TWISTS)[0]
    kept = value.grad_fn.kept.values()
    assert 0 < sum(reduction.nbytes for reduction in kept) <= 2**18
    assert len(kept) < len(adjoint.groups(links, TWISTS))


def test_backward_twice_through_one_value():
    leaf = random_links((3, 4)).requires_grad_()
    for twists in (None, TWISTS):
        value = log_abs_det(leaf, 0.25, twists=twists)[0].sum()
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        assert torch.equal(first, torch.autograd.grad(value, leaf)[0])


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    monkeypatch.setattr(adjoint, "links_gradient", None)
    monkeypatch.setattr(adjoint, "_transfer", None)
    leaf = random_links((3, 4)).requires_grad_()
    with torch.no_grad():
        log_abs_det(leaf, 0.25)
    log_abs_det(leaf.detach(), 0.25)
