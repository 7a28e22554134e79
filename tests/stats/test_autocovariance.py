import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latticeflow.stats.autocovariance import autocovariance


def direct_autocovariance(chains, max_lag):
    products = [sum(float(c[: c.size - t] @ c[t:]) for c in chains if c.size > t) for t in range(max_lag + 1)]
    return np.array(products) / [sum(max(c.size - t, 0) for c in chains) for t in range(max_lag + 1)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4), data=st.data())
def test_equals_the_direct_sum_for_any_lengths_and_lags(sizes, data):
    max_lag = data.draw(st.integers(0, max(sizes) - 1))
    chains = [np.random.default_rng(size).normal(size=size) for size in sizes]
    expected = direct_autocovariance(chains, max_lag)
    np.testing.assert_allclose(autocovariance(chains, max_lag), expected, rtol=0, atol=1e-12)


def test_short_lag_range_of_a_long_chain_agrees_with_the_long_range():
    chain = np.random.default_rng(0).normal(size=5000)
    short, long = autocovariance([chain], 40), autocovariance([chain], 2500)
    np.testing.assert_allclose(short, long[:41], rtol=0, atol=1e-13)
