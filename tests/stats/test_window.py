import numpy as np
import pytest

from latticeflow.stats.window import automatic_window, rho_error, slow_mode_window, tau_by_window

LAGS = np.arange(400)


def test_window_of_an_exact_exponential_solves_the_criterion():
    tau, n, s = 4.0, 10_000, 2.0
    a = (2 * tau - 1) / (2 * tau + 1)
    window = automatic_window(a**LAGS, n, s=s)

    def criterion(w):
        summed = 0.5 + np.sum(a ** np.arange(1, w + 1))
        decay = s / np.log((2 * summed + 1) / (2 * summed - 1))
        return np.exp(-w / decay) - decay / np.sqrt(w * n)

    assert window.closed
    assert not window.antithetic
    assert criterion(window.lag) < 0 < criterion(window.lag - 1)


@pytest.mark.parametrize("a", [-0.3, -0.6, -0.95])
def test_alternating_exponential_has_the_window_of_its_modulus(a):
    """The pair sums of ``a^t`` decay as ``|a|^t``; the window may differ by the rounding to a pair."""
    n = 10_000
    window = automatic_window(a**LAGS, n)
    assert window.closed
    assert window.antithetic
    assert abs(window.lag - automatic_window(abs(a) ** LAGS, n).lag) <= 4
    exact = 0.5 * (1 + a) / (1 - a)
    assert tau_by_window(a**LAGS, antithetic=True)[window.lag] == pytest.approx(exact, rel=0.03)


def test_memory_of_an_alternating_chain_is_that_of_its_modulus():
    window = automatic_window((-0.9) ** LAGS, 100_000)
    assert window.memory == pytest.approx(0.5 * 1.81 / 0.19 * 2, rel=0.01)


def test_a_slow_mode_behind_an_alternating_one_is_not_cut_off():
    rho = 0.5 * (-0.9) ** LAGS + 0.5 * 0.9**LAGS
    assert rho[1] == pytest.approx(0)
    window = automatic_window(rho, 10_000)
    exact = 0.25 * (0.1 / 1.9 + 1.9 / 0.1)
    assert tau_by_window(rho, antithetic=window.antithetic)[window.lag] == pytest.approx(exact, rel=0.03)


def test_without_any_decay_the_window_closes_where_the_noise_takes_over():
    """``tau_W = S W`` there, so the criterion is ``exp(-1/S) = S sqrt(W/N)``."""
    window = automatic_window(np.ones(500), 1000)
    assert window.closed
    assert window.lag == pytest.approx(1000 * np.exp(-1) / 4, rel=0.02)


def test_window_that_never_closes_is_reported():
    window = automatic_window(np.ones(50), 1000)
    assert not window.closed
    assert window.lag == 49


def test_rho_error_is_the_direct_sum():
    rho, n, lag, cutoff = 0.8 ** LAGS[:50], 1000, 6, 12
    total = sum((rho[k + lag] + rho[abs(k - lag)] - 2 * rho[k] * rho[lag]) ** 2 for k in range(1, lag + cutoff + 1))
    assert rho_error(rho, lag, n, cutoff=cutoff) == pytest.approx(np.sqrt(total / n), rel=1e-12)


def test_rho_error_is_the_spread_of_the_estimate(ar1):
    """600 chains; the spread of a normal estimate is known to 3 per cent, the band is five times that."""
    chains = ar1(0.8, (600, 4000), seed=1)
    spread = np.std(np.mean(chains[:, 5:] * chains[:, :-5], axis=1) / np.mean(chains**2, axis=1))
    assert rho_error(0.8**LAGS, 5, 4000, cutoff=50) == pytest.approx(spread, rel=0.15)


def test_slow_mode_window_ends_before_the_last_significant_lag():
    rho, n = 0.9**LAGS, 4000
    window = slow_mode_window(rho, n, cutoff=60)
    significant = [rho[t] >= 3 * rho_error(rho, t, n, cutoff=60) for t in (window.lag + 1, window.lag + 2)]
    assert significant == [True, False]
