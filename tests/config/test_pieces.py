"""Pieces by topological charge and by the sign of the magnetisation: what is built, and what does not fit together."""

import math

import pytest
import torch

from latticeflow.config.building import build_kernel, build_sampler
from latticeflow.config.loading import parse_config
from latticeflow.flows import SectorCoupling
from latticeflow.mcmc import SamplerDraws
from latticeflow.priors import FreeField, QuenchedSectors
from latticeflow.samplers import PiecewiseSampler, SectorSampler

U1 = '[lattice]\nshape = [4, 4]\n[action]\nkind = "u1"\nbeta = 2\n[sampler]\nkind = "piecewise"\npieces = "charge"\n'
PHI4 = (
    '[lattice]\nshape = [4, 4]\n[action]\nkind = "scalar"\nm2 = -4\nlam = 2\n'
    '[sampler]\nkind = "piecewise"\npieces = "sign"\n'
)
GAUGE_FLOW, COUPLING = "sampler.flow.kind=gauge", "sampler.flow.kind=coupling"


def only(found, path):
    """Return the problem of a key, which must be the only one."""
    assert list(found) == [path]
    return found[path]


# ---------------------------------------------------------------- what is built


@pytest.mark.parametrize("beta", [None, 1.5])
def test_sectors_have_quenched_pieces_and_a_flow_that_keeps_the_charge(beta):
    overrides = [] if beta is None else [f'sampler.prior={{kind = "quenched", beta = {beta}}}']
    sampler = build_sampler(parse_config(U1, [*overrides, GAUGE_FLOW, "sampler.flow.layers=3"]))
    assert isinstance(sampler, SectorSampler)
    assert isinstance(sampler.prior, QuenchedSectors)
    assert sampler.prior.beta == (2.0 if beta is None else beta)
    assert [type(layer) for layer in sampler.flow.layers] == [SectorCoupling] * 3


def test_sectors_need_no_flow():
    sampler = build_sampler(parse_config(U1))
    assert isinstance(sampler, SectorSampler)
    assert not list(sampler.parameters())


@pytest.mark.parametrize(("vacuum", "expected"), [([], 1.0), (["sampler.vacuum=0.7"], 0.7)])
def test_signs_are_a_flow_in_a_well_and_its_mirror_image(vacuum, expected):
    prior = 'sampler.prior={kind = "free_field", m2 = 1.0}'
    sampler = build_sampler(parse_config(PHI4, [prior, COUPLING, "sampler.flow.layers=4", *vacuum]))
    assert isinstance(sampler, PiecewiseSampler)
    assert isinstance(sampler.pieces[0].prior, FreeField)
    assert sampler.weights.tolist() == [0.5, 0.5]
    flow, well = sampler.pieces[0].flow.layers
    assert (len(flow.layers), well.shift.item()) == (4, pytest.approx(expected))
    assert sampler.pieces[1].flow.layers[0] is sampler.pieces[0].flow
    x, log_q = sampler.sample(200, torch.Generator().manual_seed(1))
    assert math.isclose((x.mean((1, 2)) > 0).double().mean(), 0.5, abs_tol=0.15)
    assert torch.allclose(sampler.log_prob(-x), log_q, atol=1e-5)


def test_hmc_starts_from_draws_of_the_pieces():
    config = parse_config(PHI4, ['chain.kernels=["hmc"]', "chain.replica=4"])
    kernel = build_kernel(config, build_sampler(config))
    assert isinstance(kernel.draws, SamplerDraws)
    state = kernel.start(4, torch.Generator().manual_seed(1))
    assert state.field.shape == (4, 4, 4)


# ---------------------------------------------------------------- what does not fit together


@pytest.mark.parametrize(("text", "pieces", "fitting"), [(U1, "sign", "charge"), (PHI4, "charge", "sign")])
def test_pieces_have_their_theories(problems, text, pieces, fitting):
    problem = problems(text, f"sampler.pieces={pieces}")["sampler.pieces"]
    assert f'"{fitting}"' in problem.expected
    assert problem.found == f'"{pieces}"'


@pytest.mark.parametrize("pieces", ['"sectors"', "1", '""'])
def test_other_pieces_are_named(problems, pieces):
    assert only(problems(U1, f"sampler.pieces={pieces}"), "sampler.pieces").expected.startswith('"charge"')


@pytest.mark.parametrize(
    ("factor", "path"),
    [("sector = 0.5", "sampler.prior.sector"), ("smooth_sector = [[1.0, 0.5]]", "sampler.prior.smooth_sector")],
)
def test_sectors_have_no_second_factor(problems, factor, path):
    problem = only(problems(U1, f'sampler.prior={{kind = "quenched", {factor}}}'), path)
    assert 'sampler.pieces = "charge"' in problem.expected


def test_sectors_start_from_quenched_draws(problems):
    problem = only(problems(U1, 'sampler.prior={kind = "haar"}'), "sampler.prior.kind")
    assert (problem.expected, problem.found) == ('"quenched" for sampler.pieces = "charge"', '"haar"')


@pytest.mark.parametrize(("change", "path"), [("action.m2=1", "action.m2"), ("action.m2=0", "action.m2")])
def test_signs_need_two_wells(problems, change, path):
    assert "two wells" in only(problems(PHI4, change), path).expected


@pytest.mark.parametrize("vacuum", ["0", "-1.0", "nan"])
def test_the_vacuum_is_positive(problems, vacuum):
    assert only(problems(PHI4, f"sampler.vacuum={vacuum}"), "sampler.vacuum").expected == "number > 0"


def test_only_signs_have_a_vacuum(problems):
    problem = only(problems(U1, "sampler.vacuum=0.5"), "sampler.vacuum")
    assert (problem.expected, problem.found) == (
        'no such key for sampler.pieces = "charge" (only "sign" has it)',
        "0.5",
    )


def test_hmc_in_a_latent_space_needs_a_single_one(problems):
    kernels = 'chain.kernels=["flow_hmc"]'
    assert 'no "flow_hmc"' in only(problems(PHI4, COUPLING, kernels), "chain.kernels").expected
    parse_config(U1, [GAUGE_FLOW, kernels])
