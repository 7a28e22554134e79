"""Fitting pieces to labelled samples: each on its own, in any number of processes, nothing left out in silence."""

import math
import os
import signal
import sys

import cloudpickle
import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions.densities import GaussianMixture
from latticeflow.flows import ElementwiseAffine, MaskedAutoregressive, Sequential
from latticeflow.priors import Normal
from latticeflow.samplers import FlowSampler, PiecewiseSampler, standardised
from latticeflow.streams import stream
from latticeflow.training import LikelihoodSettings, TrainingError, fit, fit_pieces

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # processes cannot import a test
TARGET = GaussianMixture(2, radius=5.0)
QUICK = LikelihoodSettings(steps=12, batch=50, evaluate_every=4, learning_rate=0.01, seed=3)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def labelled(n=1500, seed=1):
    """Return samples of three Gaussians and which one each is from."""
    labels = torch.multinomial(torch.tensor(TARGET.weights), n, replacement=True, generator=generator(seed))
    return TARGET.means[labels] + torch.randn(n, 2, dtype=torch.float64, generator=generator(seed + 1)), labels


def network(k, data):
    """Return a piece that starts far from its samples, so that every step is an improvement."""
    layers = [MaskedAutoregressive((2,), hidden=(6,)), ElementwiseAffine((2,))]
    return FlowSampler(Normal((2,)), Sequential(layers).double())


def affine(k, data):
    return standardised(ElementwiseAffine((2,), shared=True).double(), Normal((2,)), data)


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- what comes out


def test_pieces_fit_their_clusters():
    """Gaussians far apart: the mixture is the target, up to the moments of finite samples."""
    data, labels = labelled()
    sampler, records = fit_pieces(affine, data, labels, settings=LikelihoodSettings(steps=50))
    assert isinstance(sampler, PiecewiseSampler)
    assert len(sampler.pieces) == len(records) == 3
    assert_close(sampler.weights, torch.bincount(labels).double() / 1500, rtol=1e-12, atol=0)
    for k, piece in enumerate(sampler.pieces):
        x = piece.sample(2000, generator(4))[0].detach()
        assert_close(x.mean(0), TARGET.means[k], rtol=0, atol=0.3)
    x, _ = labelled(2000, seed=5)
    assert float((-TARGET(x) - sampler.log_prob(x).detach()).mean()) == pytest.approx(0, abs=0.03)


def test_each_piece_is_that_of_a_fit_by_itself():
    """Of the samples with its label alone, from the weights that `build` gave it."""
    data, labels = labelled()
    seen, started = {}, {}

    def build(k, data_k):
        piece = network(k, data_k)
        seen[k] = data_k
        started[k] = {name: value.clone() for name, value in piece.state_dict().items()}
        return piece

    sampler, records = fit_pieces(build, data, labels, settings=QUICK)
    held_out = set()
    for k in range(3):
        assert torch.equal(seen[k], data[labels == k])
        alone = network(k, seen[k])
        alone.load_state_dict(started[k])
        assert not same(alone, sampler.pieces[k])
        again = fit(alone, seen[k], settings=LikelihoodSettings(**{**vars(QUICK), "seed": own_seed(k)}))
        assert same(alone, sampler.pieces[k])
        assert [record.held_out for record in again] == [record.held_out for record in records[k]]
        held_out.add(records[k][0].held_out)
    assert len(held_out) == 3
    assert not same(
        FlowSampler(Normal((2,)), sampler.pieces[0].flow), FlowSampler(Normal((2,)), sampler.pieces[1].flow)
    )


def own_seed(k):
    return stream(QUICK.seed, "fit piece", k).initial_seed()


def test_identical_clusters_get_seeds_of_their_own():
    """For the weights they start with and for the part held out."""
    data, _ = labelled(400)
    both, labels, started = torch.cat([data, data]), torch.arange(800) // 400, []

    def build(k, data_k):
        started.append(network(k, data_k))
        return affine(k, data_k)

    _, records = fit_pieces(build, both, labels, settings=QUICK)
    assert not same(*started)
    assert records[0][0].held_out != records[1][0].held_out


def test_processes_give_the_same_bit_for_bit():
    data, labels = labelled()
    weights = torch.rand(1500, generator=generator(6))
    one, records = fit_pieces(network, data, labels, weights=weights, settings=QUICK)
    several, same_records = fit_pieces(network, data, labels, weights=weights, settings=QUICK, processes=2)
    assert same(one, several)
    assert [[record.held_out for record in piece] for piece in records] == [
        [record.held_out for record in piece] for piece in same_records
    ]


class Counting(ElementwiseAffine):
    """Notes the number of threads that it runs on."""

    seen = None

    def inverse(self, x):
        self.seen.append(torch.get_num_threads())
        return super().inverse(x)


def test_every_fit_runs_on_one_thread():
    """Sums depend on their number; it is afterwards what it was."""
    data, _ = labelled(60000)
    labels, settings = torch.zeros(60000).long(), LikelihoodSettings(steps=3, batch=10**6, evaluate_every=3)
    found, seen, before = [], [], torch.get_num_threads()

    def build(k, data_k):
        seen.append(torch.get_num_threads())
        flow = Counting((2,)).double()
        flow.seen = seen
        return FlowSampler(Normal((2,)), Sequential([flow, network(k, data_k).flow]))

    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fit_pieces(build, data, labels, settings=settings)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same(*found)
    assert len(seen) > 10
    assert set(seen) == {1}


def test_only_the_seed_decides():
    data, labels = labelled()
    other = LikelihoodSettings(**{**vars(QUICK), "seed": 4})
    found = []
    for global_seed, settings in ((1, QUICK), (2, QUICK), (1, other)):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            before = torch.random.get_rng_state()
            found.append(fit_pieces(network, data, labels, settings=settings)[0])
            assert torch.equal(torch.random.get_rng_state(), before)
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_sample_weights_make_the_weights_of_the_pieces():
    """Their sums, and the moments of each piece."""
    data, labels = labelled()
    weights = torch.rand(1500, generator=generator(7)).double() * (1 + labels)
    settings = LikelihoodSettings(steps=0)
    sampler, records = fit_pieces(affine, data, labels.tolist(), weights=weights, settings=settings)
    sums = torch.stack([weights[labels == k].sum() for k in range(3)])
    assert_close(sampler.weights, sums / sums.sum(), rtol=1e-12, atol=0)
    assert (sampler.weights - torch.bincount(labels) / 1500).abs().max() > 0.05
    plain = fit_pieces(affine, data, labels, settings=settings)[1]
    assert all(a[0].held_out != b[0].held_out for a, b in zip(records, plain, strict=True))


def test_one_piece():
    data, _ = labelled(200)
    sampler, _ = fit_pieces(network, data, torch.zeros(200, dtype=torch.int32), settings=QUICK)
    assert sampler.weights.tolist() == [1.0]
    x, log_q = sampler.sample(5, generator(8))
    assert_close(log_q, sampler.pieces[0].log_prob(x))


# ---------------------------------------------------------------- taking it up again


@pytest.mark.parametrize("processes", [1, 2])
def test_each_piece_is_seen_once_it_is_fitted(processes):
    """In the order of k, with the weights that it ends with."""
    data, labels = labelled()
    seen = []
    sampler, records = fit_pieces(
        network, data, labels, settings=QUICK, processes=processes, on_piece=lambda *found: seen.append(found)
    )
    assert [k for k, _ in seen] == [0, 1, 2]
    for k, fitted in seen:
        assert fitted.records == records[k]
        assert fitted.cpu_seconds > 0
        assert all(torch.equal(fitted.weights[name], value) for name, value in sampler.pieces[k].state_dict().items())


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_finished_pieces_are_taken_as_they_are(done):
    """The others come out as if all had been fitted in one life, bit for bit."""
    data, labels = labelled()
    first, second = [], []
    whole, records = fit_pieces(network, data, labels, settings=QUICK, on_piece=lambda k, fitted: first.append(fitted))
    again, same_records = fit_pieces(
        network, data, labels, settings=QUICK, finished=first[:done], on_piece=lambda k, fitted: second.append(k)
    )
    assert second == list(range(done, 3))
    assert same(whole, again)
    assert same_records[:done] == records[:done]
    assert [[r.held_out for r in piece] for piece in same_records] == [[r.held_out for r in piece] for piece in records]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_raised_when_a_piece_is_seen_ends_the_fits(processes):
    data, labels = labelled()
    seen, before = [], signal.getsignal(signal.SIGINT)

    def stop(k, fitted):
        seen.append(k)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_pieces(network, data, labels, settings=QUICK, processes=processes, on_piece=stop)
    assert seen == [0]
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- failures


class Explosive(ElementwiseAffine):
    """Raises, gives NaN or ends its process when it is asked for a density."""

    fault = "raise"

    def inverse(self, x):
        if self.fault == "raise":
            raise RuntimeError("boom")
        if self.fault == "nan":
            return super().inverse(x * math.nan)
        os._exit(3)


def exploding(fault):
    def build(k, data):
        piece = network(k, data)
        if k == 1:
            piece.flow = Explosive((2,)).double()
            piece.flow.fault = fault
        return piece

    return build


@pytest.mark.parametrize(
    ("fault", "message", "processes"),
    [
        ("raise", "RuntimeError: boom", 1),
        ("raise", "RuntimeError: boom", 2),
        ("nan", "the loss of the held-out samples was never finite", 1),
    ],
)
def test_a_fit_that_fails_names_its_piece(fault, message, processes):
    data, labels = labelled(900)
    with pytest.raises(TrainingError, match=f"^piece 1: {message}"):
        fit_pieces(exploding(fault), data, labels, settings=QUICK, processes=processes)


def test_a_process_that_dies_is_told():
    data, labels = labelled(900)
    with pytest.raises(TrainingError, match=r"a process died while it fitted a piece, [01] or a later one$"):
        fit_pieces(exploding("exit"), data, labels, settings=QUICK, processes=2)


def test_a_piece_that_cannot_be_built_is_named():
    def build(k, data):
        if k == 2:
            raise ZeroDivisionError("no way")
        return network(k, data)

    data, labels = labelled()
    with pytest.raises(TrainingError, match="piece 2: ZeroDivisionError: no way"):
        fit_pieces(build, data, labels, settings=QUICK)


def test_a_constant_feature_is_named_with_its_piece():
    data, labels = labelled()
    data[labels == 1, 0] = 2.0
    with pytest.raises(ValueError, match=r"piece 1: .* features \[0\] are constant"):
        fit_pieces(affine, data, labels, settings=QUICK)


def test_pieces_that_share_parameters_are_refused():
    data, labels = labelled()
    shared = network(0, data)
    with pytest.raises(ValueError, match="pieces 0 and 2 share parameters"):
        fit_pieces(lambda k, one: network(k, one) if k == 1 else shared, data, labels, settings=QUICK)


# ---------------------------------------------------------------- errors


def changed(index, value):
    labels = labelled()[1]
    labels[index] = value
    return labels


def spoiled():
    data, labels = labelled()
    data[labels == 1] = math.nan
    return data


def lightened(k):
    weights = torch.ones(1500)
    weights[labelled()[1] == k] = 0
    return weights


UNLABELLED = "7 of 1500 samples have no label .* drop them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(1499).long()}, r"must be 1500 integers.* got torch.int64 \(1499,\)"),
        ({"labels": torch.zeros(1500, 1).long()}, r"got torch.int64 \(1500, 1\)"),
        ({"labels": torch.zeros(1500)}, r"got torch.float32 \(1500,\)"),
        ({"labels": torch.zeros(1500).bool()}, r"got torch.bool \(1500,\)"),
        ({"labels": changed(range(7), -1)}, UNLABELLED),
        ({"labels": changed(range(7), 3)}, "piece 3 has 7 samples, expected at least 100"),
        ({"labels": changed(range(200), 4)}, "piece 3 has 0 samples, expected at least 100"),
        ({"labels": changed(range(200), 4), "minimum": 0}, "piece 3 has 0 samples, expected at least 1"),
        ({"minimum": 2000}, "piece 0 has .* samples, expected at least 2000"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"data": spoiled()}, "piece 1: data must be finite"),
        ({"weights": torch.ones(3)}, r"weights have shape \(3,\), expected \(1500,\)"),
        ({"weights": -torch.ones(1500)}, "not negative, number 0 is -1.0"),
        ({"weights": lightened(2)}, "piece 2: weights must not all be zero"),
    ],
)
def test_what_cannot_be_fitted_is_refused(changes, message):
    data, labels = labelled()
    options = {"data": data, "labels": labels, "settings": QUICK, **changes}
    with pytest.raises(ValueError, match=message):
        fit_pieces(affine, options.pop("data"), options.pop("labels"), **options)


def test_dropping_samples_without_a_label_is_the_callers_choice():
    data, labels = labelled()
    labels[:7] = -1
    with pytest.raises(ValueError, match=UNLABELLED):
        fit_pieces(affine, data, labels, settings=QUICK)
    kept = labels >= 0
    sampler, _ = fit_pieces(affine, data[kept], labels[kept], settings=QUICK)
    assert_close(sampler.weights, torch.bincount(labels[7:]).double() / 1493, rtol=1e-12, atol=0)


def test_smaller_pieces_are_taken_on_request():
    data, labels = labelled()
    labels[:7], labels[7:20] = 0, 3
    sampler, _ = fit_pieces(affine, data, labels, settings=QUICK, minimum=13)
    assert len(sampler.pieces) == 4
