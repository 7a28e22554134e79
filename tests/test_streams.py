"""Random streams: what a stream holds depends on its name alone."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from latticeflow.streams import stream

NAMES = list(itertools.product([0, 1, 2**63], ["prior", "accept", "momenta", ""], [0, 1, 1000]))


def numbers(*name, count=8):
    return torch.rand(count, dtype=torch.float64, generator=stream(*name))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_name_gives_the_same_numbers(name):
    assert torch.equal(numbers(*name), numbers(*name))


def test_different_names_give_different_numbers():
    first = {tuple(numbers(*name).tolist()) for name in NAMES}
    assert len(first) == len(NAMES)


def test_history_does_not_matter():
    expected = [numbers(7, "block", block) for block in range(4)]
    torch.manual_seed(3)
    torch.rand(17)
    busy = stream(7, "block", 0)
    for block in (2, 0, 3, 1):
        torch.rand(5, generator=busy)
        assert torch.equal(numbers(7, "block", block), expected[block])


def test_a_stream_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.rand(9, generator=stream(1, "prior"))
    assert torch.equal(torch.rand(4), expected)


def test_streams_of_one_name_are_separate_objects():
    first, second = stream(1, "prior"), stream(1, "prior")
    torch.rand(5, generator=first)
    assert torch.equal(torch.rand(3, dtype=torch.float64, generator=second), numbers(1, "prior", count=3))


def test_block_zero_is_the_default():
    assert torch.equal(numbers(5, "prior"), numbers(5, "prior", 0))


def test_the_seeds_of_stored_runs_do_not_change():
    """Files refer to streams by name only, so these values must hold in every version of the package."""
    assert [stream(*name).initial_seed() for name in ((0, "prior", 0), (1, "accept", 3))] == [
        5550118785650693591,
        1093355568880776981,
    ]


def test_first_numbers_of_many_streams_are_uniform_and_uncorrelated():
    """Kolmogorov-Smirnov and the correlation of neighbouring blocks, each at a false-alarm rate of 1e-6."""
    first = np.array([float(numbers(11, "prior", block, count=1)) for block in range(2000)])
    assert kstest(first, "uniform").pvalue > 1e-6
    correlation = np.mean((first[1:] - 0.5) * (first[:-1] - 0.5)) * 12
    assert abs(correlation) < 4.9 / np.sqrt(1999)


@pytest.mark.parametrize(("seed", "block"), [(-1, 0), (0, -1), (-3, -2)])
def test_negative_numbers_are_named(seed, block):
    with pytest.raises(ValueError, match=f"seed and block must not be negative, got {seed} and {block}"):
        stream(seed, "prior", block)


def test_the_device_is_the_one_asked_for():
    assert stream(1, "prior").device == torch.device("cpu")
    assert stream(1, "prior", device="cpu").device == torch.device("cpu")
