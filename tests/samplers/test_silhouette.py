"""Silhouette scores against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from latticeflow.samplers.silhouette import silhouettes


def test_scores_are_those_of_scikit_learn():
    """Several labellings at once, one with a point alone, and more points than fit one block of rows."""
    generator = np.random.default_rng(1)
    points = generator.standard_normal((1203, 3)) + 4 * generator.integers(0, 2, (1203, 1))
    halves, thirds = (points[:, 0] > 2).astype(int), generator.integers(0, 3, 1203)
    alone = halves.copy()
    alone[7] = 5
    found = silhouettes(points, [halves, thirds, alone])
    expected = [silhouette_score(points, labels) for labels in (halves, thirds, alone)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] > 0.3 > found[1]


def test_scores_by_hand():
    """Pairs at distance 1, 3 and 4 from each other: `a = 1`, `b` = 3.5, 3.5, 2.5, 2.5."""
    points = np.array([[0.0], [1.0], [3.0], [4.0]])
    labels = np.array([0, 0, 1, 1])
    expected = np.mean([1 - 1 / 3.5, 1 - 1 / 2.5, 1 - 1 / 2.5, 1 - 1 / 3.5])
    assert silhouettes(points, [labels]) == [pytest.approx(expected, rel=1e-14)]


def test_points_that_coincide():
    points = np.array([[0.0], [0.0], [1.0], [1.0]])
    assert silhouettes(points, [np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])]) == [1.0, pytest.approx(-0.0, abs=0.51)]
    assert silhouettes(np.zeros((4, 1)), [np.array([0, 0, 1, 1])]) == [0.0]


def test_nothing_to_score():
    assert silhouettes(np.zeros((4, 1)), []) == []


def test_one_cluster_has_no_score():
    with pytest.raises(ValueError, match="two clusters or more, got 1"):
        silhouettes(np.zeros((4, 1)), [np.zeros(4, dtype=int)])
