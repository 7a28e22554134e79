"""Correlators on a periodic axis against their definition."""

import pytest
import torch

from latticeflow.observables.correlation import autocorrelation, fold


def random_series(extent, *, seed=1):
    return torch.randn(3, extent, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("extent", [1, 2, 3, 4, 7, 8])
def test_autocorrelation_by_loops(extent):
    series = random_series(extent)
    found = autocorrelation(series)
    assert found.shape == (3, extent // 2 + 1)
    for t in range(extent // 2 + 1):
        expected = sum(series[:, (s + t) % extent] * series[:, s] for s in range(extent))
        torch.testing.assert_close(found[:, t], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("extent", [1, 2, 3, 4, 7, 8])
def test_fold_by_loops(extent, sign):
    series = random_series(extent)
    found = fold(series, sign)
    assert found.shape == (3, extent // 2 + 1)
    for t in range(extent // 2 + 1):
        expected = (series[:, t] + sign * series[:, (extent - t) % extent]) / 2
        torch.testing.assert_close(found[:, t], expected, rtol=0, atol=0)
