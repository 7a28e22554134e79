"""Flows in parts: prefixes are samplers, local gradients are those of the truncated objectives and of nothing else."""

import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions import ScalarAction
from latticeflow.flows import coupling_flow, gauge_flow
from latticeflow.priors import HaarUniform, Normal, StudentT
from latticeflow.samplers import FlowSampler, GivenDraws, Part, PartwiseSampler, StabilisedSampler
from latticeflow.training import make_estimator

SHAPE, ACTION = (4, 4), ScalarAction(-4.0, 8.0)
REVERSE = ("reinforce", "reparametrisation", "path")


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def partwise(sizes=(2, 2, 4), *, prior=None):
    """Return a sampler far from the identity."""
    torch.manual_seed(1)
    sampler = PartwiseSampler(prior or Normal(SHAPE), coupling_flow(SHAPE, layers=8, hidden=(4,)), sizes).double()
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return sampler


def gradients(sampler):
    """Return the gradients by part, None where there is none."""
    return [[parameter.grad for parameter in sampler.own_parameters(k)] for k in range(len(sampler.parts))]


def nothing(grads):
    return all(gradient is None or not gradient.any() for gradient in grads)


def test_the_parts_are_the_flow():
    sampler, z = partwise(), torch.randn(5, *SHAPE, dtype=torch.float64)
    x, log_det = sampler.flow(z)
    total = 0
    for part in sampler.parts:
        z, one = part(z)
        total = total + one
    assert torch.equal(z, x)
    assert_close(total, log_det)


def test_weights_are_those_of_the_flow_without_parts():
    sampler = partwise()
    plain = FlowSampler(sampler.prior, sampler.flow)
    assert sampler.state_dict().keys() == plain.state_dict().keys()
    assert len(list(sampler.parameters())) == len(list(plain.parameters()))


def test_moving_the_sampler_moves_the_parts():
    sampler = partwise().float()
    assert {parameter.dtype for part in sampler.parts for parameter in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_every_prefix_is_a_sampler(k):
    prefix = partwise().prefix(k)
    x, log_q = prefix.sample(6, generator())
    assert len(prefix.flow.layers) == (0, 2, 4, 8)[k]
    assert_close(prefix.log_prob(x), log_q, rtol=1e-10, atol=1e-10)


def test_what_closes_a_stabilised_flow_belongs_to_its_last_part():
    whole = StabilisedSampler(SHAPE, layers=4, hidden=(4,))
    sampler = PartwiseSampler(whole.prior, whole.flow, [2, 2])
    assert [len(part.layers) for part in sampler.parts] == [2, 4]


def test_the_prior_learns_with_the_first_part():
    sampler = partwise(prior=StudentT(SHAPE, per_site=False))
    own = [{id(parameter) for parameter in sampler.own_parameters(k)} for k in range(3)]
    assert {id(parameter) for parameter in sampler.prior.parameters()} <= own[0]
    assert sum(map(len, own)) == len(set().union(*own)) == len(list(sampler.parameters()))


@pytest.mark.parametrize("estimator", REVERSE)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_part_learns_alone(estimator, k):
    sampler = partwise()
    surrogate, _ = make_estimator(estimator)(sampler.part(k, 16, generator()), ACTION, 16, generator())
    surrogate.backward()
    for j, grads in enumerate(gradients(sampler)):
        assert nothing(grads) == (j != k)


@pytest.mark.parametrize("estimator", REVERSE)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_local_gradients_are_those_of_the_prefix_with_the_rest_held(estimator, k):
    """The same draws, through the prefix as a whole, whose other parameters are constants."""
    sampler = partwise()
    part = sampler.part(k, 16, generator())
    surrogate, log_weight = make_estimator(estimator)(part, ACTION, 16, generator())
    surrogate.backward()
    local = [gradient.clone() for gradient in gradients(sampler)[k]]
    sampler.zero_grad()
    for parameter in sampler.parameters():
        parameter.requires_grad_(requires_grad=False)
    for parameter in sampler.own_parameters(k):
        parameter.requires_grad_()
    surrogate, expected = make_estimator(estimator)(sampler.prefix(k + 1), ACTION, 16, generator())
    surrogate.backward()
    assert_close(log_weight, expected, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(local, gradients(sampler)[k], strict=True):
        assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_the_reparametrised_gradient_is_that_of_the_truncated_objective():
    """`<S(g_k(z)) - log|det g_k'(z)|>`, written out."""
    sampler = partwise()
    surrogate, _ = make_estimator("reparametrisation")(sampler.part(1, 16, generator()), ACTION, 16, None)
    surrogate.backward()
    found = [gradient.clone() for gradient in gradients(sampler)[1]]
    sampler.zero_grad()
    z, _ = sampler.parts[0](sampler.prior.sample(16, generator()))
    x, log_det = sampler.parts[1](z.detach())
    (ACTION(x) - log_det).mean().backward()
    for one, wanted in zip(found, gradients(sampler)[1], strict=True):
        assert_close(one, wanted)


@pytest.mark.parametrize("estimator", REVERSE)
def test_a_chain_of_parts_gives_each_its_own_gradient(estimator):
    sampler, chosen, source = partwise(), make_estimator(estimator), generator()
    weights = []
    for part in sampler.chain():
        surrogate, log_weight = chosen(part, ACTION, 16, source)
        surrogate.backward()
        weights.append(log_weight)
    together = [[gradient.clone() for gradient in grads] for grads in gradients(sampler)]
    for k, (grads, log_weight) in enumerate(zip(together, weights, strict=True)):
        sampler.zero_grad()
        surrogate, alone = chosen(sampler.part(k, 16, generator()), ACTION, 16, generator())
        surrogate.backward()
        assert_close(log_weight, alone, rtol=1e-10, atol=1e-10)
        for one, wanted in zip(grads, gradients(sampler)[k], strict=True):
            assert_close(one, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_part_reads_data_through_what_is_behind_it(k):
    """`<-log p(f_k(y)) - log|det f_k'(y)|>`, written out; the parts before do not come into it."""
    sampler = partwise(prior=StudentT(SHAPE, per_site=False))
    data = torch.randn(16, *SHAPE, dtype=torch.float64)
    learner = sampler.on_data(k)
    (-learner.log_prob(data).mean()).backward()
    found = gradients(sampler)
    assert [nothing(grads) for grads in found] == [j != k for j in range(3)]
    found = [gradient.clone() for gradient in found[k]]
    sampler.zero_grad()
    y, constant = data, 0
    for part in reversed(sampler.parts[k + 1 :]):
        y, log_det = part.inverse(y)
        constant = constant + log_det.detach()
    z, log_det = sampler.parts[k].inverse(y.detach())
    objective = sampler.prior.log_prob(z) + log_det
    assert_close(learner.log_prob(data), objective + constant, rtol=1e-10, atol=1e-10)
    (-objective.mean()).backward()
    own = gradients(sampler)[k]
    for one, wanted in zip(found, own, strict=True):
        assert_close(one, wanted)


def test_the_first_part_on_data_is_the_whole_density():
    sampler, data = partwise(), torch.randn(8, *SHAPE, dtype=torch.float64)
    assert_close(sampler.on_data(0).log_prob(data), sampler.log_prob(data), rtol=1e-10, atol=1e-10)


def kept(step):
    """Return the bytes that are kept for the backward pass."""
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


@pytest.mark.parametrize(("sizes", "most"), [((4, 4), 0.6), ((2, 2, 2, 2), 0.35)])
def test_a_part_keeps_less_for_its_backward_pass(sizes, most):
    sampler, chosen = partwise(sizes), make_estimator("reparametrisation")
    whole = kept(lambda: chosen(sampler, ACTION, 64, generator()))
    for k in range(len(sizes)):
        part = sampler.part(k, 64, generator())
        assert kept(lambda part=part: chosen(part, ACTION, 64, generator())) < most * whole
        data = torch.randn(64, *SHAPE, dtype=torch.float64)
        assert kept(lambda k=k, data=data: sampler.on_data(k).log_prob(data)) < most * kept(
            lambda data=data: sampler.log_prob(data)
        )


def test_given_draws_are_given_once():
    draws = torch.zeros(3, *SHAPE), torch.zeros(3)
    given = GivenDraws(draws, lambda: torch.ones(3, *SHAPE))
    assert given.sample(3) is draws[0]
    with pytest.raises(ValueError, match="3 draws were given, 4 are asked for"):
        given.sample(4)
    with pytest.raises(ValueError, match="3 draws were given, 4 are asked for"):
        Part(given, coupling_flow(SHAPE, layers=2, hidden=(4,))).sample(4)


@pytest.mark.parametrize(
    ("flow", "sizes", "message"),
    [
        (lambda: coupling_flow(SHAPE, layers=8), (4, 2), "parts must be positive and add up to 8 layers, got .4, 2."),
        (lambda: coupling_flow(SHAPE, layers=8), (8, 0), "must be positive"),
        (lambda: coupling_flow(SHAPE, layers=8), (-2, 10), "must be positive"),
        (lambda: coupling_flow(SHAPE, layers=8), (), "must be positive"),
        (lambda: coupling_flow(SHAPE, layers=8), (3, 5), "cut a cycle of 2 masks.*may come after 2, 4, 6$"),
        (lambda: gauge_flow(SHAPE, layers=16), (4, 12), "cut a cycle of 8 masks.*may come after 8$"),
        (lambda: gauge_flow(SHAPE, layers=8), (4, 4), "cut a cycle of 8 masks.*there is no place for a cut$"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(flow, sizes, message):
    with pytest.raises(ValueError, match=message):
        PartwiseSampler(Normal(SHAPE), flow(), sizes)


def test_a_gauge_flow_in_parts():
    torch.manual_seed(1)
    sampler = PartwiseSampler(HaarUniform(SHAPE), gauge_flow(SHAPE, layers=16, hidden=(4,)), [8, 8]).double()
    x, log_q = sampler.sample(4, generator())
    assert_close(sampler.log_prob(x), log_q, rtol=1e-9, atol=1e-9)
