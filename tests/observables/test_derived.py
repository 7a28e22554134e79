"""Derived quantities on synthetic means: closed forms, and NaN without warnings where they are not defined."""

import math

import numpy as np
import pytest
import torch

from latticeflow.actions import HolonomyMarginal, ScalarAction, SchwingerAction, U1Action
from latticeflow.observables import derived, effective_mass, first_index, measure, observable_names, observables
from latticeflow.observables.derived import creutz_ratios, pcac_mass, second_moment_length
from latticeflow.priors import HaarUniform, Normal
from latticeflow.stats import gamma_derived

SCALAR = ["susceptibility", "binder_cumulant", "schwinger_dyson", "correlation_length", "effective_mass"]
FERMION = [
    "chiral_susceptibility_disconnected",
    "eta_correlator",
    "pion_effective_mass",
    "eta_effective_mass",
    "pcac_mass",
]
THEORIES = {
    "scalar": (ScalarAction(-4.0, 8.0), SCALAR),
    "u1": (U1Action(2.0), ["creutz_ratios"]),
    "schwinger": (SchwingerAction(2.0, 0.25), ["creutz_ratios", *FERMION]),
    "marginal": (HolonomyMarginal(SchwingerAction(2.0, 0.25), (2, 2)), ["creutz_ratios", *FERMION]),
}
SHAPES = [(1, 1), (1, 4), (2, 3), (3, 2), (4, 6), (5, 4)]


def stored(action, shape, *, chains=2, draws=6):
    """All observables of random fields as they are stored, `(chain, draw, *own_shape)`."""
    prior = Normal(shape) if action.field_name == "phi" else HaarUniform(shape)
    field = prior.sample(chains * draws, torch.Generator().manual_seed(1))
    values = measure(field, observables(action, observable_names(action)))
    return {name: value.reshape(chains, draws, *value.shape[1:]).numpy() for name, value in values.items()}


def evaluate(quantity, data):
    """The value at the means of the stored arrays."""
    series = quantity.series(*(data[name] for name in quantity.inputs))
    assert all(array.shape == series[0].shape and array.ndim == 2 for array in series)
    return quantity.function(np.array([array.mean() for array in series]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("theory", THEORIES)
def test_every_quantity_works_on_what_is_measured(theory, shape):
    action, names = THEORIES[theory]
    data, found = stored(action, shape), derived(action, shape)
    masses = [name for name in names if name.endswith("mass")]
    assert list(found) == [name for name in names if shape[0] > 1 or name not in masses]
    for name, quantity in found.items():
        value = evaluate(quantity, data)
        assert isinstance(value, np.ndarray)
        if name in masses:
            assert value.shape == (shape[0] // 2,)


@pytest.mark.parametrize("mean", [-1.0, 0.0, math.nan, math.inf, 1e-320])
@pytest.mark.parametrize("theory", THEORIES)
def test_undefined_values_are_nan_without_warnings(theory, mean):
    action, _ = THEORIES[theory]
    data = stored(action, (6, 4))
    for quantity in derived(action, (6, 4)).values():
        series = quantity.series(*(data[name] for name in quantity.inputs))
        value = quantity.function(np.full(len(series), mean))
        assert value.shape == quantity.function(np.ones(len(series))).shape
        assert not np.isinf(value).any()
        if math.isnan(mean):
            assert np.isnan(value).all()


@pytest.mark.parametrize("theory", THEORIES)
def test_first_index_counts_from_the_last_distance(theory):
    """The last element of a correlator, mass or loop belongs to half the extent."""
    action, _ = THEORIES[theory]
    data = stored(action, (6, 6))
    values = {name: array.mean((0, 1)) for name, array in data.items()}
    values |= {name: evaluate(quantity, data) for name, quantity in derived(action, (6, 6)).items()}
    arrays = {name: value for name, value in values.items() if value.ndim}
    assert len(arrays) >= 2
    for name, value in arrays.items():
        assert first_index(name) + value.shape[0] - 1 == 3


def test_derived_quantities_have_errors():
    """Through `gamma_derived`, here the disconnected susceptibility `V var(c)`."""
    rng = np.random.default_rng(1)
    quantity = derived(SchwingerAction(2.0, 0.25), (4, 6))["chiral_susceptibility_disconnected"]
    condensate = rng.normal(1.5, 0.1, (4, 5000))
    result = gamma_derived(lambda means: float(quantity.function(means)), quantity.series(condensate))
    assert result.mean == pytest.approx(24 * condensate.var(), rel=1e-9)
    expected = 24 * 0.01 * math.sqrt(2 / 20_000)  # the error of the variance of a normal law
    assert result.error == pytest.approx(expected, rel=0.1)


# ---------------------------------------------------------------- scalar


def test_susceptibility_and_binder_cumulant():
    quantities = derived(ScalarAction(1.0, 0.0), (4, 6))
    data = {"magnetisation": np.array([[0.5, -0.5, 1.0], [-1.0, 0.0, 0.3]])}
    m = data["magnetisation"]
    expected = 24 * ((m**2).mean() - np.abs(m).mean() ** 2)
    assert evaluate(quantities["susceptibility"], data) == pytest.approx(expected, rel=1e-14)
    expected = 1 - (m**4).mean() / (3 * (m**2).mean() ** 2)
    assert evaluate(quantities["binder_cumulant"], data) == pytest.approx(expected, rel=1e-14)
    assert evaluate(quantities["binder_cumulant"], {"magnetisation": np.sign(m + 0.1)}) == pytest.approx(2 / 3)
    assert math.isnan(evaluate(quantities["binder_cumulant"], {"magnetisation": 0 * m}))


@pytest.mark.parametrize("shape", [(6,), (8, 8), (4, 4, 4), (6, 10), (3, 5, 16), (8, 1)])
@pytest.mark.parametrize("mass2", [0.01, 0.5, 30.0])
def test_second_moment_length_of_one_pole(mass2, shape):
    squares = [4 * math.sin(math.pi / extent) ** 2 if extent > 1 else 0.0 for extent in shape]
    smallest = np.mean([1 / (mass2 + square) for square in squares])
    length = second_moment_length(1 / mass2, smallest, shape)
    assert length == pytest.approx(1 / math.sqrt(mass2), rel=1e-8)
    if len(set(shape)) == 1:
        formula = math.sqrt(1 / mass2 / smallest - 1) / (2 * math.sin(math.pi / shape[0]))
        assert length == pytest.approx(formula, rel=1e-8)
    assert second_moment_length(1.0, 1.0, shape) == 0


@pytest.mark.parametrize(
    ("zero", "smallest"), [(1.0, 1.1), (1.0, -0.1), (1.0, 0.0), (0.0, 1.0), (-1.0, -0.5), (math.nan, 1.0)]
)
def test_second_moment_length_is_nan_where_it_is_not_defined(zero, smallest):
    for shape in ((8, 8), (4, 6), (1, 1)):
        assert math.isnan(second_moment_length(zero, smallest, shape))


@pytest.mark.parametrize("shape", [(8,), (7,), (6, 4), (2, 3)])
def test_free_scalar(shape):
    """Both masses are exact at any extent: `sinh(m/2) = sqrt(m2)/2` from the two-point function, `xi = 1/sqrt(m2)`."""
    m2, volume = 0.7, math.prod(shape)
    form = m2 * np.eye(volume)
    site = np.arange(volume).reshape(shape)
    for mu in range(len(shape)):
        difference = np.eye(volume)[np.roll(site, -1, axis=mu).ravel()] - np.eye(volume)
        form += difference.T @ difference
    root = np.linalg.cholesky(np.linalg.inv(2 * form))
    modes = torch.from_numpy(math.sqrt(volume) * root.T.copy()).reshape(volume, *shape)  # their mean is the covariance
    action = ScalarAction(m2, 0.0)
    found = derived(action, shape)
    data = {
        name: value[None].numpy()
        for name, value in measure(modes, observables(action, observable_names(action))).items()
    }
    masses = evaluate(found["effective_mass"], data)
    np.testing.assert_allclose(masses, 2 * math.asinh(math.sqrt(m2) / 2), rtol=1e-9)
    assert evaluate(found["correlation_length"], data) == pytest.approx(1 / math.sqrt(m2), rel=1e-9)


# ---------------------------------------------------------------- masses


@pytest.mark.parametrize("extent", [2, 3, 8, 9])
@pytest.mark.parametrize("mass", [0.05, 0.7, 3.0])
def test_effective_mass_of_a_cosh(mass, extent):
    t = np.arange(extent // 2 + 1)
    correlator = np.cosh(mass * (t - extent / 2)) * np.array([[1.0], [2.5]])
    found = effective_mass(correlator, extent=extent)
    assert found.shape == (2, extent // 2)
    np.testing.assert_allclose(found, mass, rtol=1e-9)
    if extent % 2 == 0:
        np.testing.assert_array_equal(effective_mass(correlator), found)


def test_effective_mass_is_nan_where_it_is_not_defined():
    found = effective_mass([5.0, 1.0, 2.0, -1.0, 0.0, 1.0, math.nan, 1.0, 1.0])
    assert np.isfinite(found).tolist() == [True, False, False, False, False, False, False, True]
    assert effective_mass([1.0]).shape == (0,)


@pytest.mark.parametrize("extent", [5, 8])
def test_effective_mass_checks_the_extent(extent):
    with pytest.raises(ValueError, match=f"4 distances belong to extents 6, 7, got {extent}"):
        effective_mass([4.0, 3.0, 2.0, 1.0], extent=extent)


def test_pcac_mass_by_hand():
    pion, axial = np.array([9.0, 4.0, 2.0, 1.0]), np.array([0.0, 3.0, 1.0, 0.0])
    np.testing.assert_allclose(pcac_mass(pion, axial, extent=6), [-1 / 16, 3 / 8, 2 / 4])
    axial[3] = 0.5  # nothing is in the middle of an odd extent
    np.testing.assert_allclose(pcac_mass(pion, axial, extent=7), [-1 / 16, 2.5 / 8, 1.5 / 4])
    assert np.isnan(pcac_mass(-pion, axial, extent=7)).all()


@pytest.mark.parametrize("shape", [(2, 3), (4, 6), (5, 4), (3, 3)])
def test_fermionic_quantities_from_the_stored_correlators(shape):
    action = SchwingerAction(2.0, 0.25, flavours=3)
    data, found = stored(action, shape), derived(action, shape)
    pion, axial, disconnected = (
        data[name].mean((0, 1)) for name in ("pion_correlator", "axial_correlator", "eta_disconnected")
    )
    eta = pion - 3 * disconnected
    expected = {
        "eta_correlator": eta,
        "pion_effective_mass": effective_mass(pion, extent=shape[0]),
        "eta_effective_mass": effective_mass(eta, extent=shape[0]),
        "pcac_mass": pcac_mass(pion, axial, extent=shape[0]),
        "chiral_susceptibility_disconnected": math.prod(shape) * data["condensate"].var(),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(evaluate(found[name], data), values, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- gauge


def test_creutz_ratios_of_an_area_and_perimeter_law():
    r, t = np.arange(1, 5)[:, None], np.arange(1, 4)
    area, perimeter = np.exp(-0.3 * r * t), np.exp(-0.1 * (r + t))
    np.testing.assert_allclose(creutz_ratios(area), 0.3, rtol=1e-12)
    found = creutz_ratios(area * perimeter)
    np.testing.assert_allclose(found[1:, 1:], 0.3, rtol=1e-12)
    np.testing.assert_allclose(found[0, 0], 0.5, rtol=1e-12)


def test_creutz_ratios_are_nan_where_loops_are_not_positive():
    found = creutz_ratios([[0.5, 0.3, 0.2], [0.3, -0.1, 0.0], [0.2, 0.1, 0.1]])
    assert np.isfinite(found).tolist() == [[True, True, True], [True, False, False], [True, False, False]]


def test_creutz_ratios_of_the_stored_loops():
    action = U1Action(2.0)
    data = stored(action, (4, 6))
    found = evaluate(derived(action, (4, 6))["creutz_ratios"], data)
    np.testing.assert_allclose(found, creutz_ratios(data["wilson_loops"].mean((0, 1))), rtol=1e-12)
