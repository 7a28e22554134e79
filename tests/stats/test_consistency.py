import numpy as np
import pytest
from scipy.stats import chi2

from latticeflow.stats import compare_means, equal_means


def test_pulls_and_probability_in_closed_form():
    """Two degrees of freedom: the probability is ``exp(-chi^2 / 2)``."""
    pulls, chi2, p_value = compare_means([1.0, 5.0], [3.0, 1.0], reference=[6.0, 5.5], reference_errors=[4.0, 0.0])
    assert pulls == pytest.approx([-1.0, -0.5])
    assert chi2 == pytest.approx(1.25)
    assert p_value == pytest.approx(np.exp(-0.625))


def test_probability_is_uniform():
    """4000 comparisons of six results: the share below 0.1 is known to 0.005; the band is five times that."""
    rng = np.random.default_rng(1)
    values, expected = rng.normal(size=(2, 4000, 6)) * np.array([1.0, 2.0])[:, None, None]
    p_values = [
        compare_means(v, 1.0, reference=r, reference_errors=2.0)[2] for v, r in zip(values, expected, strict=True)
    ]
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.025)


def test_one_number_against_an_exact_one():
    pulls, chi2, p_value = compare_means(1.0, 0.5, reference=2.0)
    assert (float(pulls), chi2) == (-2.0, 4.0)
    assert p_value == pytest.approx(0.0455, abs=1e-4)


def test_equal_values_without_errors_are_not_counted():
    pulls, chi2, p_value = compare_means([3.0, 1.0, 4.0], [0.0, 1.0, 1.0], reference=[3.0, 2.0, 4.0])
    assert pulls.tolist() == [0, -1, 0]
    assert chi2 == 1
    assert p_value == pytest.approx(np.exp(-0.5))
    assert compare_means([3.0], [0.0], reference=[3.0])[2] == 1


def test_unequal_values_without_errors_contradict_each_other():
    pulls, chi2, p_value = compare_means([3.0, 1.0], [0.0, 1.0], reference=[3.5, 1.0])
    assert pulls.tolist() == [-np.inf, 0]
    assert (chi2, p_value) == (np.inf, 0)


def test_arrays_are_broadcast():
    assert compare_means(np.ones((2, 3)), 1.0, reference=np.zeros(3))[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, np.nan], 1.0, 0.0, 0.0), "values must not hold nan, found at index 1"),
        (([1.0], [-1.0], 0.0, 0.0), r"errors must not hold -1.0, found at index 0"),
        (([1.0], [1.0], np.inf, 0.0), "reference must not hold inf"),
        (([1.0], [1.0], 0.0, np.nan), "reference_errors must not hold nan"),
        (([], [], [], []), "at least one result"),
        (([1.0, 2.0], [1.0, 1.0, 1.0], 0.0, 0.0), "shape"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    values, errors, reference, reference_errors = arguments
    with pytest.raises(ValueError, match=message):
        compare_means(values, errors, reference=reference, reference_errors=reference_errors)


def test_equal_means_in_closed_form():
    """Two results: ``chi^2 = difference^2 / (sum of squared errors)``; three about their weighted mean."""
    assert equal_means([1.0, 5.0], [3.0, 4.0]) == pytest.approx(chi2.sf(16 / 25, 1))
    assert equal_means([0.0, 1.0, 5.0], [1.0, 1.0, 2.0]) == pytest.approx(chi2.sf(1 + 0 + 4, 2))


@pytest.mark.parametrize(
    ("values", "errors", "words"),
    [([1.0], [1.0], "n > 1"), ([1.0, 2.0], [1.0, 0.0], "index 1"), ([1.0, np.nan], [1.0, 1.0], "index 1")],
)
def test_equal_means_refuses(values, errors, words):
    with pytest.raises(ValueError, match=words):
        equal_means(values, errors)
