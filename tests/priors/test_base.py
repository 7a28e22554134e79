"""The contract of every prior: shapes, precision, one density per field, draws that belong to the generator."""

import pytest
import torch

from latticeflow.priors import FreeField, HaarUniform, Normal, QuenchedU1, Resampled, StudentT

SMOOTH = ((0.7, 3.0), (0.3, 0.4))


def resampled(base):
    """Return a resampled prior as it is evaluated, with its normalisation fixed."""
    prior = Resampled(base, truncation=20, hidden=(8,)).double()
    prior.normalise(1000)
    return prior


PRIORS = {
    "free 1d": (FreeField((5,), 0.3), (5,)),
    "free 3d": (FreeField([2, 3, 4], 1.2), (2, 3, 4)),
    "normal 1d": (Normal((5,), scale=0.7), (5,)),
    "normal 3d": (Normal((2, 3, 4)), (2, 3, 4)),
    "student-t": (StudentT([3, 4]), (3, 4)),
    "student-t shared": (StudentT((5,), degrees_of_freedom=2.0, per_site=False), (5,)),
    "resampled": (resampled(Normal((5,))), (5,)),
    "resampled 3d": (resampled(StudentT((2, 3, 4))), (2, 3, 4)),
    "haar": (HaarUniform((3, 5)), (2, 3, 5)),
    "quenched": (QuenchedU1(2.0, (3, 5)), (2, 3, 5)),
    "quenched with sectors": (QuenchedU1(1.0, [4, 4], sector=0.6), (2, 4, 4)),
    "quenched with smooth sectors": (QuenchedU1(1.0, [4, 4], smooth_sector=SMOOTH), (2, 4, 4)),
    "quenched without freedom": (QuenchedU1(2.0, (1, 2)), (2, 1, 2)),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", PRIORS)
def test_contract_of_every_prior(name):
    prior, shape = PRIORS[name]
    first, again, other = prior.sample(7, seeded(1)), prior.sample(7, seeded(1)), prior.sample(7, seeded(2))
    assert first.shape == (7, *shape)
    assert first.dtype == torch.float64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    log_prob = prior.log_prob(first)
    assert log_prob.shape == (7,)
    assert log_prob.dtype == torch.float64
    for i in range(7):
        torch.testing.assert_close(prior.log_prob(first[i : i + 1])[0], log_prob[i])
    assert len(torch.unique(first.reshape(7, -1), dim=0)) == 7


@pytest.mark.parametrize("name", PRIORS)
def test_without_a_generator_the_global_one_serves(name):
    prior, shape = PRIORS[name]
    torch.manual_seed(3)
    first = prior.sample(2)
    torch.manual_seed(3)
    assert torch.equal(prior.sample(2), first)
    assert first.shape == (2, *shape)


@pytest.mark.parametrize("name", PRIORS)
def test_empty_batches(name):
    prior, shape = PRIORS[name]
    assert prior.sample(0, seeded(1)).shape == (0, *shape)
    assert prior.log_prob(prior.sample(0, seeded(1))).shape == (0,)


@pytest.mark.parametrize("name", PRIORS)
def test_a_generator_leaves_the_global_state_alone(name):
    before = torch.random.get_rng_state()
    PRIORS[name][0].sample(3, seeded(1))
    assert torch.equal(torch.random.get_rng_state(), before)
