"""The drift of the action, and names of components."""

import numpy as np
import pytest
from scipy.signal import lfilter

from latticeflow.cli.analysis import analyse_observable, drift, labels, mixing


def ar1(shape, *, seed, a=0.9):
    """Stationary series `(chain, draw)`, `tau_int = (1 + a) / (2 (1 - a))`."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise[:, 0] /= np.sqrt(1 - a**2)
    return lfilter([1.0], [1.0, -a], noise, axis=1)


@pytest.mark.parametrize(("shape", "a"), [((8, 64), 0.0), ((8, 64), 0.9), ((16, 256), 0.97)])
def test_stationary_series_are_not_flagged(shape, a):
    """200 series each: at most 2% false alarms (1% were seen for the second, less for the others)."""
    assert sum(bool(drift(ar1(shape, seed=seed, a=a))) for seed in range(200)) <= 4


def test_one_stationary_chain_is_rarely_flagged():
    """20 tau_int long, the shortest that is thought to converge: at most 10% of 200 (6% were seen)."""
    assert sum(bool(drift(ar1((1, 200), seed=seed))) for seed in range(200)) <= 20


@pytest.mark.parametrize("tau", [5, 20, 60])
def test_an_action_that_relaxes_is_flagged(tau):
    """Six standard deviations off at first: always found."""
    relaxing = 7 * np.exp(-np.arange(256) / tau)
    for seed in range(20):
        (text,) = drift(ar1((8, 256), seed=seed, a=0.5) + relaxing)
        cut = int(text.split(" draws")[0].rpartition(" ")[2])
        assert 0.5 * tau < cut <= 128
        assert "chain.thermalisation" in text


@pytest.mark.parametrize("draws", [1, 4, 7])
def test_very_short_series_are_not_judged(draws):
    assert drift(np.arange(8.0 * draws).reshape(8, draws)) == []


def test_a_constant_action_does_not_drift():
    assert drift(np.full((4, 50), 3.0)) == []


def test_labels_begin_where_the_observable_does():
    assert labels("plaquette", ()) == ["plaquette"]
    assert labels("pion_correlator", (2,)) == ["pion_correlator[0]", "pion_correlator[1]"]
    assert labels("wilson_loops", (1, 2)) == ["wilson_loops[1,1]", "wilson_loops[1,2]"]


def test_components_are_analysed_one_by_one():
    values = np.stack([ar1((4, 100), seed=1, a=0.0), np.full((4, 100), 2.0)], axis=-1)
    found = analyse_observable("polyakov_correlator", values, s=2.0)
    assert found["polyakov_correlator[0]"].mean == pytest.approx(values[..., 0].mean())
    assert found["polyakov_correlator[1]"].error == 0
    assert mixing("polyakov_correlator", values)["polyakov_correlator[1]"] == 1.0
