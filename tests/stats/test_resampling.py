import numpy as np
import pytest

from latticeflow.stats import blocking, jackknife


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(1).normal(size=200) + 4


@pytest.mark.parametrize("of_mean", [True, False])
def test_mean_has_the_standard_error(samples, of_mean):
    value, error = jackknife(np.mean, samples, of_mean=of_mean)
    assert value == pytest.approx(samples.mean())
    assert error == pytest.approx(samples.std(ddof=1) / np.sqrt(200), rel=1e-10)


@pytest.mark.parametrize("of_mean", [True, False])
def test_blocked_mean_has_the_standard_error_of_block_means(samples, of_mean):
    means = samples.reshape(20, 10).mean(axis=1)
    _, error = jackknife(np.mean, samples, block=10, of_mean=of_mean)
    assert error == pytest.approx(means.std(ddof=1) / np.sqrt(20), rel=1e-10)


def test_square_of_the_mean_in_closed_form():
    """Data 0, 1, 2: the means without one are 3/2, 1, 1/2, their squares 9/4, 1, 1/4."""
    value, error = jackknife(np.square, [0.0, 1.0, 2.0], of_mean=True)
    squares = np.array([2.25, 1.0, 0.25])
    assert value == pytest.approx(1)
    assert error == pytest.approx(np.sqrt(2 / 3 * np.sum((squares - squares.mean()) ** 2)))


def test_function_of_the_samples_that_is_no_function_of_the_mean(samples):
    """The error of the variance of normal data is ``sigma^2 sqrt(2/n)``, here known to some ten per cent."""
    value, error = jackknife(np.var, samples)
    assert value == pytest.approx(samples.var())
    assert error == pytest.approx(samples.var() * np.sqrt(2 / 200), rel=0.4)


def test_arrays_in_and_out():
    correlator = np.random.default_rng(2).normal(size=(100, 6)) * 0.01 + np.exp(-0.5 * np.arange(6))

    def effective_mass(mean):
        return np.log(mean[:-1] / mean[1:])

    value, error = jackknife(effective_mass, correlator, of_mean=True, block=3)
    slow_value, slow_error = jackknife(lambda data: effective_mass(data.mean(axis=0)), correlator, block=3)
    assert value.shape == error.shape == (5,)
    np.testing.assert_allclose(value, slow_value, rtol=1e-12)
    np.testing.assert_allclose(error, slow_error, rtol=1e-9)
    expected = np.hypot(0.001 / np.exp(0), 0.001 / np.exp(-0.5))
    assert error[0] == pytest.approx(expected, rel=0.4)


def test_blocks_cover_all_samples_where_the_length_does_not_divide():
    """Seven samples in blocks of 3: two blocks, of 3 and 4 samples."""
    data = np.array([1.0, 2, 3, 5, 7, 11, 13])
    value, error = jackknife(np.mean, data, block=3, of_mean=True)
    assert value == pytest.approx(6)
    without = np.array([data[3:].mean(), data[:3].mean()])
    assert error == pytest.approx(np.sqrt(without.var()))


def test_correlated_data_need_blocks(ar1):
    """tau_int = 9.5; blocks of 200 know the error to 7 per cent (100 blocks), the band is five times that."""
    series = ar1(0.9, 20_000, seed=3)
    exact = np.sqrt(2 * 9.5 / 20_000)
    assert jackknife(np.mean, series, of_mean=True)[1] < 0.4 * exact
    assert jackknife(np.mean, series, block=200, of_mean=True)[1] == pytest.approx(exact, rel=0.35)


def test_blocking_rises_to_the_true_error(ar1):
    series = ar1(0.9, 100_000, seed=4)
    exact = np.sqrt(2 * 9.5 / 100_000)
    curve = blocking(series)
    assert curve.error[0] == pytest.approx(series.std(ddof=1) / np.sqrt(100_000), rel=1e-10)
    plateau = int(np.flatnonzero(curve.block == 256)[0])
    assert abs(curve.error[plateau] - exact) < 5 * curve.error_error[plateau]
    assert curve.error[0] < 0.4 * exact


def test_blocking_in_closed_form():
    curve = blocking([1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 6.0, 8.0, 100.0])
    assert curve.block.tolist() == [1, 2]
    assert curve.error[1] == pytest.approx(np.std([2.0, 6.0, 3.0, 7.0]) / np.sqrt(3))
    assert curve.error_error[1] == pytest.approx(curve.error[1] / np.sqrt(6))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least two blocks of 6"):
        jackknife(np.mean, np.zeros(11), block=6)
    with pytest.raises(ValueError, match=">= 1"):
        jackknife(np.mean, np.zeros(11), block=0)
    with pytest.raises(ValueError, match=r"data must not hold nan, found at index \(1, 0\)"):
        jackknife(np.mean, [[0.0], [np.nan], [1.0]])
    with pytest.raises(ValueError, match="series must not hold inf, found at index 2"):
        blocking([0.0, 1.0, np.inf, 1.0])
    with pytest.raises(ValueError, match=r"found shape \(3,\)"):
        blocking(np.zeros(3))
