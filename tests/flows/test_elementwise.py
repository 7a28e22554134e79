"""Layers that act on each variable by itself: what they are, how they start, and what a checkpoint keeps of them."""

import io

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import ActNorm, ElementwiseAffine, Permutation, Reflection, Softplus

SHAPE = (3, 2)


def batch(n=200, *, shape=SHAPE, seed=1):
    """Return fields whose sites have different means and widths."""
    draws = torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    site = torch.arange(1.0, 1 + draws[0].numel(), dtype=torch.float64).reshape(shape)
    return 3 * site * draws - site


def moments(field, *, shared):
    values = field.flatten() if shared else field
    return values.mean(0), values.std(0, unbiased=False)


def saved_and_loaded(module, other):
    """Carry the state over by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


# ---------------------------------------------------------------- affine


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_affine_starts_as_the_identity_with_weights_of_the_right_shape(shared, shift):
    layer = ElementwiseAffine(SHAPE, shared=shared, shift=shift).double()
    assert [tuple(parameter.shape) for parameter in layer.parameters()] == [() if shared else SHAPE] * (1 + shift)
    for direction in (layer.forward, layer.inverse):
        moved, log_det = direction(batch())
        assert torch.equal(moved, batch())
        assert not log_det.any()


def test_affine_is_the_formula():
    layer = ElementwiseAffine(SHAPE).double()
    with torch.no_grad():
        layer.log_scale.copy_(batch(1, seed=2)[0] / 10)
        layer.shift.copy_(batch(1, seed=3)[0])
    x, log_det = layer(batch())
    assert_close(x, batch() * layer.log_scale.exp() + layer.shift)
    assert_close(log_det, layer.log_scale.sum().expand(200))


def test_shared_affine_counts_every_site_and_fits_every_lattice():
    small, large = (ElementwiseAffine(shape, shared=True).double() for shape in (SHAPE, (4, 4, 4)))
    with torch.no_grad():
        small.log_scale.fill_(0.3)
        small.shift.fill_(-1.0)
    large.load_state_dict(small.state_dict())
    x, log_det = large(batch(5, shape=(4, 4, 4)))
    assert_close(x, batch(5, shape=(4, 4, 4)) * torch.tensor(0.3).double().exp() - 1)
    assert_close(log_det, torch.full((5,), 64 * 0.3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 2), (1,), (2, 1), (4,)])
@pytest.mark.parametrize("shared", [False, True])
def test_affine_refuses_fields_of_another_shape(shared, shape):
    """Also where they would broadcast."""
    layer = ElementwiseAffine((2,), shared=shared)
    for direction in (layer.forward, layer.inverse):
        with pytest.raises(ValueError, match=rf"affine map of shape \[2\] was given fields of \[5, {shape[0]}"):
            direction(torch.zeros(5, *shape))


@pytest.mark.parametrize(
    ("shared", "own"), [((1, 2), (4, 1, 1)), ((0,), (1, 3, 2)), ([0, 1, 2], (1, 1, 1)), ((), (4, 3, 2))]
)
def test_axes_along_which_the_affine_map_is_the_same(shared, own):
    """Its log-determinant counts every variable."""
    layer = ElementwiseAffine((4, 3, 2), shared=shared).double()
    assert layer.log_scale.shape == layer.shift.shape == own
    with torch.no_grad():
        layer.log_scale.copy_(batch(1, shape=own, seed=2)[0] / 10)
        layer.shift.copy_(batch(1, shape=own, seed=3)[0])
    scale, shift = (weight.expand(4, 3, 2) for weight in (layer.log_scale, layer.shift))
    fields = batch(5, shape=(4, 3, 2))
    x, log_det = layer(fields)
    assert_close(x, fields * scale.exp() + shift)
    assert_close(log_det, scale.sum().expand(5))


@pytest.mark.parametrize("shared", [(2,), (-1,), (0, 3), [0.5]])
def test_axes_that_the_shape_lacks_are_refused(shared):
    for layer in (ElementwiseAffine, ActNorm):
        with pytest.raises(ValueError, match=r"shared axes \[.*\] must be from 0 to 1"):
            layer(SHAPE, shared=shared)


# ---------------------------------------------------------------- act norm


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_first_batch_comes_out_standard(direction, shared):
    layer = ActNorm(SHAPE, shared=shared).double()
    assert not layer.initialised
    moved, log_det = getattr(layer, direction)(batch())
    mean, width = moments(moved, shared=shared)
    assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    assert_close(width, torch.ones_like(width), rtol=1e-12, atol=0)
    widths = moments(batch(), shared=shared)[1].expand(SHAPE)
    assert_close(log_det, -widths.log().sum().expand(200), rtol=1e-12, atol=0)
    assert layer.initialised


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_later_batches_change_nothing(direction):
    layer = ActNorm(SHAPE).double()
    getattr(layer, direction)(batch())
    weights = {name: weight.clone() for name, weight in layer.state_dict().items()}
    for other in ("forward", "inverse"):
        getattr(layer, other)(5 + 7 * batch(seed=2))
    assert all(torch.equal(weight, weights[name]) for name, weight in layer.state_dict().items())


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_evaluation_does_not_initialise(direction):
    layer = ActNorm(SHAPE).double().eval()
    moved, log_det = getattr(layer, direction)(batch())
    assert torch.equal(moved, batch())
    assert not log_det.any()
    assert not layer.initialised
    getattr(layer.train(), direction)(batch())
    assert layer.initialised


@pytest.mark.parametrize("shared", [False, True])
def test_the_flag_is_saved_and_loaded(shared):
    layer = ActNorm(SHAPE, shared=shared).double()
    assert set(layer.state_dict()) == {"log_scale", "shift", "initialised"}
    fresh = saved_and_loaded(layer, ActNorm(SHAPE, shared=shared).double())
    assert not fresh.initialised
    expected = layer(batch())
    again = saved_and_loaded(layer, ActNorm(SHAPE, shared=shared).double())
    assert again.initialised
    assert again.training
    moved, log_det = again(batch())
    assert torch.equal(moved, expected[0])
    assert torch.equal(log_det, expected[1])
    other, _ = again(10 * batch())
    assert moments(other, shared=shared)[1].min() > 9


def test_initialisation_leaves_trainable_weights_and_gradients_of_the_batch():
    layer, z = ActNorm(SHAPE).double(), batch().requires_grad_()
    x, log_det = layer(z)
    gradients = torch.autograd.grad((x**3).sum() + log_det.sum(), (layer.log_scale, layer.shift, z))
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for gradient in gradients)
    assert_close(gradients[2], 3 * x**2 * layer.log_scale.exp())


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_first_batch_of_one_is_refused_and_sets_nothing(direction):
    """Unless the moments are over all sites, or it is not the first."""
    layer = ActNorm(SHAPE).double()
    with pytest.raises(ValueError, match="first batch of an ActNorm has one configuration, which has no variance"):
        getattr(layer, direction)(batch(1))
    assert not layer.initialised
    getattr(layer, direction)(batch())
    getattr(layer, direction)(batch(1))
    getattr(ActNorm(SHAPE, shared=True).double(), direction)(batch(1))
    with pytest.raises(ValueError, match="has no variance"):
        getattr(ActNorm((1,), shared=True), direction)(torch.ones(1, 1))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("shared", [False, True, (1,)])
def test_a_first_batch_of_another_shape_is_refused_and_sets_nothing(shared, direction):
    layer = ActNorm(SHAPE, shared=shared)
    for shape in [(3,), (2, 3), (3, 1), (3, 2, 1)]:
        with pytest.raises(ValueError, match=r"affine map of shape \[3, 2\] was given fields of \[5, "):
            getattr(layer, direction)(torch.randn(5, *shape))
    assert not layer.initialised
    assert not layer.shift.any()


def test_a_site_that_never_varies_stays_finite():
    constant = batch()
    constant[:, 0, 0] = 4.0
    layer = ActNorm(SHAPE).double()
    for result in layer(constant):
        assert torch.isfinite(result).all()


# ---------------------------------------------------------------- permutation


@pytest.mark.parametrize("shape", [(6, 1), (3, 2), (1, 2, 3)])
def test_permutation_is_the_order_given(shape):
    order = [3, 0, 2, 5, 1, 4]
    z = batch(4, shape=shape)
    x, log_det = Permutation(order)(z)
    assert torch.equal(x.flatten(1), z.flatten(1)[:, order])
    assert torch.equal(Permutation(order).inverse(x)[0], z)
    assert torch.equal(log_det, torch.zeros(4, dtype=torch.float64))


def test_permutation_of_the_variables_of_a_density():
    x, log_det = Permutation([1, 2, 0])(batch(4, shape=(3,)))
    assert torch.equal(x, batch(4, shape=(3,))[:, [1, 2, 0]])
    assert torch.equal(log_det, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 2, 3], [-1, 0, 1], [2]])
def test_orders_that_are_none_are_refused(order):
    with pytest.raises(ValueError, match=rf"order must hold each of 0 to {len(order) - 1} once, got \[{order[0]}"):
        Permutation(order)


def test_permutation_refuses_fields_of_another_size():
    for direction in (Permutation([1, 0, 2]).forward, Permutation([1, 0, 2]).inverse):
        with pytest.raises(ValueError, match=r"permutation of 3 variables was given fields of shape \[4, 2, 2\]"):
            direction(torch.zeros(4, 2, 2))


# ---------------------------------------------------------------- softplus


def test_softplus_is_the_formula_and_positive():
    z = torch.linspace(-700, 700, 1401, dtype=torch.float64)[:, None]
    x, log_det = Softplus()(z)
    assert (x > 0).all()
    assert_close(x, torch.logaddexp(z, torch.zeros_like(z)), rtol=1e-12, atol=1e-300)
    assert_close(log_det, torch.nn.functional.logsigmoid(z)[:, 0], rtol=1e-12, atol=1e-300)
    back, log_det_back = Softplus().inverse(x)
    assert_close(back, z, rtol=1e-12, atol=1e-12)
    assert_close(log_det_back, -log_det, rtol=1e-12, atol=1e-12)


def test_the_log_determinant_of_a_reflection_is_on_the_device_of_the_field():
    for direction in (Reflection().forward, Reflection().inverse):
        moved, log_det = direction(torch.empty(2, 3, device="meta"))
        assert log_det.device == moved.device
        assert log_det.shape == (2,)
