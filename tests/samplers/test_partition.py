"""Partitions: how many pieces are found, which samples are in them, and what is refused."""

import re

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import DBSCAN
from sklearn.mixture import GaussianMixture as MixtureClusterer

from latticeflow.actions import CircleOfGaussians, TwoMoons, TwoRings
from latticeflow.samplers import from_labels, partition
from latticeflow.samplers.partition import SCORED


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def blobs(*sizes, spread=0.1, seed=1):
    """Samples around 0, 10, 20, ... on a line, and the blob of each, in random order."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    noise = spread * torch.randn(len(labels), 2, dtype=torch.float64, generator=seeded(seed + 1))
    return noise + torch.tensor([10.0, 0.0]) * labels[:, None], labels


def same_pieces(one, other):
    """Whether two labellings differ by the names of the pieces alone."""
    pairs = torch.unique(torch.stack([one, other]), dim=1)
    return pairs.shape[1] == len(torch.unique(one)) == len(torch.unique(other))


class Fixed:
    """A clusterer with a given answer."""

    def __init__(self, answer):
        self.answer = answer

    def fit_predict(self, X):
        return self.answer


# ---------------------------------------------------------------- the densities of the paper


@pytest.mark.parametrize(
    ("density", "samples", "pieces"),
    [(TwoMoons(), 5000, {2}), (CircleOfGaussians(), 5000, {8}), (TwoRings(), 6000, set(range(13, 21)))],
    ids=["two_moons", "circle_of_gaussians", "two_rings"],
)
def test_pieces_of_the_planar_densities(density, samples, pieces):
    x = density.sample(samples, seeded(1))
    found = partition(x)
    assert found.pieces in pieces
    assert found.labels.shape == (samples,)
    assert found.labels.dtype == torch.int64
    assert sum(found.sizes) == samples
    assert min(found.sizes) >= 100
    assert torch.bincount(found.labels).tolist() == list(found.sizes)
    assert sorted(found.silhouettes) == list(range(2, 21))
    assert found.silhouettes[found.pieces] == max(found.silhouettes.values())


def test_pieces_of_the_circle_are_its_gaussians():
    density = CircleOfGaussians()
    x = density.sample(2000, seeded(2))
    found = partition(x, most=10)
    centres = torch.stack([x[found.labels == k].mean(0) for k in range(found.pieces)])
    distances = torch.cdist(centres, density.means).numpy()
    assert distances[linear_sum_assignment(distances)].max() < 0.1
    assert found.weights == pytest.approx([1 / 8] * 8, abs=0.04)


# ---------------------------------------------------------------- the number of pieces


def test_blobs_are_found_with_their_members():
    features, labels = blobs(150, 200, 130)
    found = partition(features)
    assert same_pieces(found.labels, labels)
    assert sorted(found.sizes) == [130, 150, 200]
    assert sum(found.weights) == pytest.approx(1.0)


def test_a_small_cluster_makes_it_fewer_pieces():
    """Three blobs, one of 60: two pieces where 100 are wanted in each, three where 60 are."""
    features, labels = blobs(150, 200, 60)
    fewer, all_of_them = partition(features), partition(features, smallest=60)
    assert (fewer.pieces, all_of_them.pieces) == (2, 3)
    assert fewer.silhouettes == all_of_them.silhouettes
    assert fewer.silhouettes[3] > fewer.silhouettes[2]
    assert same_pieces(all_of_them.labels, labels)


def test_too_few_samples_for_two_pieces_are_one():
    features, _ = blobs(80, 80)
    found = partition(features)
    assert found.sizes == (160,)
    assert found.silhouettes[2] > 0.9


def test_more_samples_than_are_scored():
    """The score is that of some, the same every time; the labels are those of all."""
    features, labels = blobs(SCORED, 300, spread=1.0)
    one, other, third = partition(features, most=3), partition(features, most=3), partition(features, most=3, seed=1)
    assert same_pieces(one.labels, labels)
    assert one.silhouettes == other.silhouettes
    assert torch.equal(one.labels, other.labels)
    assert one.silhouettes[2] != third.silhouettes[2]
    assert one.silhouettes[2] == pytest.approx(third.silhouettes[2], abs=0.01)


def test_the_number_may_be_fixed():
    features, _ = blobs(150, 150, 150, 150)
    for k in (1, 2, 4):
        found = partition(features, clusters=k)
        assert found.pieces == k
        assert list(found.silhouettes) == ([k] if k > 1 else [])
    assert partition(features, clusters=4).silhouettes[4] == partition(features).silhouettes[4]


def test_charges_are_clusters_of_their_own():
    """As many pieces as distinct values, without more being tried."""
    charge = torch.tensor([-1, 0, 1]).repeat(120)
    found = partition(charge)
    assert same_pieces(found.labels, charge)
    assert sorted(found.silhouettes) == [2, 3]
    assert found.silhouettes[3] == pytest.approx(1.0, abs=1e-12)


def test_features_may_be_fields_and_of_any_precision():
    features, labels = blobs(120, 120)
    fields = features.float()[:, :, None].expand(-1, 2, 3).requires_grad_()
    assert same_pieces(partition(fields, most=4).labels, labels)


# ---------------------------------------------------------------- other clusterers


def test_a_gaussian_mixture():
    features, labels = blobs(150, 150, 120)
    found = partition(features, clusterer=MixtureClusterer(3, random_state=0))
    assert same_pieces(found.labels, labels)
    assert list(found.silhouettes) == [3]


def test_noise_of_dbscan_is_refused_or_goes_to_the_nearest():
    features, labels = blobs(150, 150)
    lonely = torch.tensor([[3.0, 3.0], [7.0, -3.0], [60.0, 0.0]], dtype=torch.float64)
    features = torch.cat([lonely, features])
    with pytest.raises(ValueError, match=re.escape("DBSCAN leaves 3 of 303 samples without a cluster (label -1)")):
        partition(features, clusterer=DBSCAN(eps=0.5))
    found = partition(features, clusterer=DBSCAN(eps=0.5), noise="nearest")
    assert same_pieces(found.labels, torch.cat([torch.tensor([0, 1, 1]), labels]))


def test_numbers_of_a_clusterer_are_counted_from_zero():
    features, labels = blobs(120, 130)
    found = partition(features, clusterer=Fixed(np.where(labels.numpy() == 0, 7, 3)))
    assert torch.equal(found.labels, 1 - labels)
    assert found.sizes == (130, 120)


# ---------------------------------------------------------------- known labels


def test_known_labels():
    labels = torch.tensor([1, 0, 2, 2, 1, 1], dtype=torch.int32)
    found = from_labels(labels)
    assert found.labels.tolist() == labels.tolist()
    assert found.labels.dtype == torch.int64
    assert (found.sizes, found.silhouettes) == ((1, 3, 2), {})


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (torch.tensor([0, 2]), {}, "labels must be 0..k-1, each there, got [0, 2]"),
        (torch.tensor([-1, 0, 1]), {}, "labels must be 0..k-1, each there, got [-1, 0, 1]"),
        (
            torch.arange(1, 15),
            {},
            "labels must be 0..k-1, each there, got [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ...]",
        ),
        (torch.tensor([0.0, 1.0]), {}, "labels must be integers of shape (n,), n > 0, got torch.float32 of shape (2,)"),
        (torch.tensor([[0, 1]]), {}, "labels must be integers of shape (n,), n > 0, got torch.int64 of shape (1, 2)"),
        (torch.arange(0), {}, "labels must be integers of shape (n,), n > 0, got torch.int64 of shape (0,)"),
        (torch.tensor([0, 0, 1]), {"smallest": 2}, "cluster 1 of 2 has 1 samples, expected at least 2"),
        (torch.tensor([0, 0, 1]), {"smallest": 0}, "smallest must be an integer of at least 1, got 0"),
    ],
)
def test_bad_labels_are_named(labels, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_labels(labels, **settings)


# ---------------------------------------------------------------- errors

GOOD, _ = blobs(150, 150)
WITH_NAN = GOOD.clone()
WITH_NAN[3, 1], WITH_NAN[8, 0] = torch.nan, torch.inf
WITH_CONSTANT = torch.cat([GOOD, torch.ones(300, 2)], dim=1)


@pytest.mark.parametrize(
    ("features", "settings", "message"),
    [
        (WITH_NAN, {}, "features must be finite, 2 of 300 samples are not, the first is 3"),
        (WITH_CONSTANT, {}, "features must vary: of 4 columns [2, 3] are constant"),
        (WITH_CONSTANT, {"clusters": 2}, "features must vary: of 4 columns [2, 3] are constant"),
        (torch.zeros(300), {}, "features must vary: of 1 columns [0] are constant"),
        (torch.zeros(0, 2), {}, "features must be a real tensor (n, d) or (n,), none of them 0, got shape (0, 2)"),
        (torch.zeros(()), {}, "features must be a real tensor (n, d) or (n,), none of them 0, got shape ()"),
        (GOOD.numpy(), {}, "features must be a real tensor (n, d) or (n,), none of them 0, got ndarray"),
        (GOOD[:60], {}, "60 samples, expected at least 100, the smallest cluster"),
        (GOOD, {"clusters": 0}, "clusters must be an integer of 1 to 300, the number of samples, got 0"),
        (GOOD, {"clusters": 301}, "clusters must be an integer of 1 to 300, the number of samples, got 301"),
        (GOOD, {"clusters": 2.0}, "clusters must be an integer of 1 to 300, the number of samples, got 2.0"),
        (
            torch.arange(3).repeat(100),
            {"clusters": 4},
            "4 clusters of 3 distinct samples, expected at most 3",
        ),
        (GOOD, {"smallest": 0}, "smallest must be an integer of at least 1, got 0"),
        (GOOD, {"most": 1}, "most must be an integer of at least 2, got 1"),
        (GOOD, {"noise": "drop"}, "noise must be 'refuse' or 'nearest', got 'drop'"),
        (GOOD, {"clusterer": object()}, "clusterer must have the method fit_predict, object has none"),
        (GOOD, {"clusterer": Fixed([0]), "clusters": 2}, "clusters or clusterer, not both: got 2 and Fixed"),
        (GOOD, {"clusterer": Fixed([0, 1])}, "Fixed.fit_predict must return 300 integers, got int64 of shape (2,)"),
        (
            GOOD,
            {"clusterer": Fixed(np.zeros(300))},
            "Fixed.fit_predict must return 300 integers, got float64 of shape (300,)",
        ),
        (
            GOOD,
            {"clusterer": Fixed(np.full(300, -1)), "noise": "nearest"},
            "Fixed puts none of 300 samples into a cluster",
        ),
        (
            GOOD,
            {"clusterer": Fixed(np.arange(300) // 250)},
            "cluster 1 of 2 has 50 samples, expected at least 100",
        ),
    ],
)
def test_what_cannot_be_clustered_is_named(features, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        partition(features, **settings)


def test_a_fixed_number_with_a_small_cluster_is_refused():
    features, _ = blobs(150, 200, 60)
    with pytest.raises(ValueError, match=r"cluster \d of 3 has 60 samples, expected at least 100"):
        partition(features, clusters=3)


def test_one_piece_may_be_constant():
    assert partition(torch.zeros(200), clusters=1).sizes == (200,)
