from dataclasses import asdict

import numpy as np
import pytest

from latticeflow.stats import gamma_many, gamma_method
from latticeflow.stats.fluctuations import chunks


@pytest.fixture(scope="module")
def tables(ar1):
    """Eleven observables of memory from antithetic to long, on three replica."""
    memories = [-0.9, -0.5, 0.0, 0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99]
    return np.stack([k + ar1(a, (3, 3000), seed=60 + k) for k, a in enumerate(memories)], axis=-1)


def same(result, expected):
    """Compare all fields to 1e-13; NaN equals NaN."""
    result, expected = asdict(result), asdict(expected)
    for name, value in expected.items():
        if isinstance(value, float | np.ndarray):
            np.testing.assert_allclose(result[name], value, rtol=1e-13, atol=1e-13, err_msg=name)
        else:
            assert result[name] == value, name


@pytest.mark.parametrize("settings", [{}, {"s": 1.2}, {"tau_exp": 30.0}, {"window_max": 7}])
def test_agrees_with_single_calls(tables, settings):
    for k, result in enumerate(gamma_many(tables, **settings)):
        same(result, gamma_method(tables[..., k], **settings))


def test_agrees_with_single_calls_on_one_chain_and_on_unequal_ones(tables):
    for k, result in enumerate(gamma_many(tables[0])):
        same(result, gamma_method(tables[0, :, k]))
    cut = [tables[0, :700], tables[1], tables[2, :1301]]
    for k, result in enumerate(gamma_many(cut)):
        same(result, gamma_method([table[:, k] for table in cut]))


def test_long_series_take_the_long_range_of_lags_one_by_one(ar1):
    table = np.stack([ar1(a, 40_000, seed=80) for a in (0.5, 0.999, 0.9)], axis=-1)
    results = gamma_many(table)
    assert results[1].window > 40_000 // 50 > results[2].window
    for k, result in enumerate(results):
        same(result, gamma_method(table[:, k]))


def test_constants_are_constant_results_in_their_place(tables):
    table = tables.copy()
    table[..., 4], table[..., 10] = 0.1, -7.0
    results = gamma_many(table)
    assert [result.error == 0 for result in results] == [k in (4, 10) for k in range(11)]
    assert (results[4].mean, results[10].mean) == (0.1, -7.0)
    same(results[4], gamma_method(table[..., 4]))
    same(results[5], gamma_method(table[..., 5]))
    assert all("constant" in result.warnings[0] for result in gamma_many(np.ones((9, 2))))


def test_chunks_bound_the_memory_and_cover_everything():
    parts = list(chunks(50, 10**6))
    assert [k for part in parts for k in range(50)[part]] == list(range(50))
    assert max(part.stop - part.start for part in parts) == 8
    assert len(list(chunks(50, 100))) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(tables, bad):
    table = tables.copy()
    table[2, 17, 5] = bad
    with pytest.raises(ValueError, match=f"replica 2, series must not hold {bad}, found at sample 17, observable 5$"):
        gamma_many(table)
    with pytest.raises(ValueError, match=f"^series must not hold {bad}, found at sample 17, observable 5$"):
        gamma_many(table[2])


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (np.ones(8), r"found \[\(8,\)\]"),
        (np.ones((8, 0)), "with one K"),
        ([np.ones((8, 2)), np.ones((8, 3))], "with one K"),
        (np.ones((3, 2)), "at least 4 samples, found 3"),
        ([np.ones((8, 2)), np.ones((2, 2))], "replica 1, a chain needs at least 4 samples, found 2"),
        (np.ones((8, 2)) * 1j, "must be real"),
    ],
)
def test_other_input_is_refused(series, message):
    with pytest.raises(ValueError, match=message):
        gamma_many(series)


def test_settings_must_be_positive_even_for_constants():
    with pytest.raises(ValueError, match="s must be positive"):
        gamma_many(np.ones((8, 2)), s=-1.0)
    with pytest.raises(ValueError, match="s must be positive"):
        gamma_method(np.ones(8), s=-1.0)
