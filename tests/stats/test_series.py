import numpy as np
import pytest

from latticeflow.stats.series import as_replica, pooled_mean


@pytest.mark.parametrize(
    ("series", "lengths"),
    [
        (np.arange(6), [6]),
        ([1, 2, 3, 4, 5], [5]),
        (np.ones((3, 4)), [4, 4, 4]),
        ([np.ones(4), np.ones(7)], [4, 7]),
        (([1.0, 2, 3, 4], [1.0, 2, 3, 4, 5]), [4, 5]),
    ],
)
def test_accepts_one_chain_equal_chains_and_lists(series, lengths):
    chains = as_replica(series)
    assert [chain.size for chain in chains] == lengths
    assert all(chain.dtype == np.float64 for chain in chains)


def test_replica_lengths_cut_one_chain():
    chains = as_replica(np.arange(11), [4, 7])
    assert chains[0].tolist() == [0, 1, 2, 3]
    assert chains[1].tolist() == list(range(4, 11))


def test_pooled_mean_weights_by_length():
    assert pooled_mean([np.zeros(4), np.ones(12)]) == pytest.approx(0.75)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_index(bad):
    chain = np.ones(20)
    chain[13] = bad
    with pytest.raises(ValueError, match=rf"{bad}, found at index 13$"):
        as_replica(chain)
    with pytest.raises(ValueError, match=r"replica 1, .* index 13$"):
        as_replica([np.ones(5), chain])


@pytest.mark.parametrize(
    ("series", "replica", "message"),
    [
        (np.ones(3), None, "at least 4 samples, found 3"),
        ([], None, "at least 4 samples, found 0"),
        (1.0, None, r"shape \(\)"),
        (np.ones((2, 5, 5)), None, r"replica 0, .* shape \(5, 5\)"),
        (np.ones(8) * 1j, None, "must be real"),
        (np.ones(8), [4, 5], r"\(4, 5\) must add up"),
        (np.ones((2, 4)), [4, 4], "must add up"),
    ],
)
def test_other_shapes_are_refused(series, replica, message):
    with pytest.raises(ValueError, match=message):
        as_replica(series, replica)
