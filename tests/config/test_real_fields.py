"""Stabilised samplers, coupling flows and densities: defaults, what is built, and what does not fit together."""

import pytest
import torch

from latticeflow.actions import (
    CircleOfGaussians,
    Funnel,
    GaussianMixture,
    HorseshoeLogistic,
    LinearRegression,
    MultivariateStudentT,
    ScalarAction,
    TwoMoons,
    TwoRings,
    breast_cancer_horseshoe,
    synthetic_horseshoe,
    synthetic_regression,
)
from latticeflow.config.building import build_action, build_prior, build_sampler, build_trainer
from latticeflow.config.loading import parse_config
from latticeflow.flows import LOFT, AffineMap, Clamp, Coupling, ElementwiseAffine, SplineMap
from latticeflow.flows.autoregressive import ACTIVATIONS
from latticeflow.priors import FreeField, Normal, StudentT
from latticeflow.samplers import FlowSampler, StabilisedSampler

PHI4 = '[lattice]\nshape = [4, 4]\n[action]\nkind = "scalar"\nm2 = -4\nlam = 8\n'
DENSITY = '[lattice]\nshape = [10]\n[action]\nkind = "student_t"\n'
U1 = '[lattice]\nshape = [8, 8]\n[action]\nkind = "u1"\nbeta = 2\n'

AUTOREGRESSIVE = '[sampler.flow]\nkind = "autoregressive"\nblocks = 2\nhidden = [5]\n'
STABILISED = '[sampler]\nkind = "stabilised"\n'
COUPLING = '[sampler.flow]\nkind = "coupling"\n'
FREE_FIELD = '[sampler.prior]\nkind = "free_field"\nm2 = 0.5\n'
STUDENT_T = '[sampler.prior]\nkind = "student_t"\n'
SMALL = ("layers=2", "hidden=[4]")

DENSITIES = {
    "funnel": ("[3]", [], Funnel(3)),
    "funnel, narrow": ("[2]", ["scale=1.5"], Funnel(2, scale=1.5)),
    "student_t": ("[1]", [], MultivariateStudentT(1)),
    "student_t, light": ("[5]", ["degrees_of_freedom=7"], MultivariateStudentT(5, degrees_of_freedom=7.0)),
    "mixture": ("[2]", [], GaussianMixture(2)),
    "mixture, wide": ("[50]", ["radius=5"], GaussianMixture(50, radius=5.0)),
    "two_moons": ("[2]", [], TwoMoons()),
    "circle_of_gaussians": ("[2]", [], CircleOfGaussians()),
    "circle_of_gaussians, of five": ("[2]", ["modes=5", "radius=3"], CircleOfGaussians(5, radius=3.0)),
    "two_rings": ("[2]", [], TwoRings()),
    "linear_regression": ("[2]", [], synthetic_regression(2)),
    "linear_regression, large": (
        "[11]",
        ["observations=40", "data_seed=3"],
        synthetic_regression(11, observations=40, seed=3),
    ),
    "horseshoe": ("[4]", [], synthetic_horseshoe(4)),
    "horseshoe, large": ("[12]", ["observations=20", "data_seed=5"], synthetic_horseshoe(12, observations=20, seed=5)),
    "horseshoe, real": ("[62]", ["data=breast_cancer"], breast_cancer_horseshoe()),
}

SECTIONS = {"sampler": STABILISED, "sampler.flow": COUPLING}
"""The sections that have the keys of couplings, and how to choose them."""


def within(section, *changes):
    return [f"{section}.{change}" for change in changes]


def couplings(sampler):
    return [layer for layer in sampler.flow.layers if isinstance(layer, Coupling)]


# ---------------------------------------------------------------- defaults


def test_defaults_of_a_stabilised_sampler():
    sampler = parse_config(PHI4 + STABILISED).sampler
    assert sampler.model_dump() == {
        "kind": "stabilised",
        "prior": {"kind": "student_t", "degrees_of_freedom": 30.0, "sites": "own"},
        "layers": 32,
        "mask": "checkerboard",
        "transform": "affine",
        "bins": 8,
        "bound": 3.0,
        "clamp": "asymmetric",
        "clamp_positive": 0.1,
        "clamp_negative": 2.0,
        "conditioner": "convolution",
        "hidden": (64,),
        "kernel": 3,
        "inner_kernel": 1,
        "symmetry": "none",
        "tau": 100.0,
        "sites": "own",
    }


def test_a_coupling_flow_has_the_same_defaults_but_for_what_it_lacks():
    config = parse_config(PHI4 + COUPLING)
    own = parse_config(PHI4 + STABILISED).sampler.model_dump(exclude={"kind", "prior", "tau", "sites"})
    assert config.sampler.flow.model_dump(exclude={"kind"}) == own
    assert (config.sampler.kind, config.sampler.prior.kind) == ("flow", "normal")


@pytest.mark.parametrize("text", [PHI4, DENSITY])
@pytest.mark.parametrize("sampler", ["", "[sampler]\n", '[sampler]\nkind = "flow"\n', STUDENT_T])
def test_without_a_kind_it_is_a_flow_and_the_identity(text, sampler):
    config = parse_config(text + sampler)
    prior = "student_t" if sampler == STUDENT_T else "normal"
    assert (config.sampler.kind, config.sampler.flow.kind, config.sampler.prior.kind) == ("flow", "identity", prior)


def test_densities_have_no_baseline_and_no_holonomies():
    config = parse_config(DENSITY)
    assert config.baseline is None
    assert not hasattr(config.action, "holonomies")


def test_a_prior_of_the_stabilised_sampler_may_be_chosen():
    assert parse_config(PHI4 + STABILISED + FREE_FIELD).sampler.prior.m2 == 0.5
    assert parse_config(DENSITY + STABILISED, ["sampler.prior.kind=normal"]).sampler.prior.scale == 1.0


# ---------------------------------------------------------------- round trip through TOML


PROPOSALS = [
    "",
    STABILISED,
    STABILISED + FREE_FIELD,
    COUPLING,
    FREE_FIELD + COUPLING,
    STUDENT_T + COUPLING,
    STABILISED + STUDENT_T,
    AUTOREGRESSIVE,
]


@pytest.mark.parametrize("sampler", PROPOSALS)
@pytest.mark.parametrize("training", ["", '[training]\nsteps = 0\nstart_from = "runs/phi4-4x4"\n'])
def test_round_trip_of_the_samplers(sampler, training):
    config = parse_config(PHI4 + sampler + training)
    assert parse_config(config.to_toml()) == config
    assert parse_config(config.to_toml()).to_toml() == config.to_toml()
    assert ("start_from" in config.to_toml()) == bool(training)


@pytest.mark.parametrize("sampler", ["", STABILISED, COUPLING])
@pytest.mark.parametrize("name", DENSITIES)
def test_round_trip_of_the_densities(name, sampler):
    config = density(name, sampler, *(within("sampler", "conditioner=dense") if sampler == STABILISED else []))
    assert parse_config(config.to_toml()) == config


def density(name, sampler="", *overrides):
    """Return a configuration of one of DENSITIES, of dimension 2 where couplings would leave nothing."""
    shape, changes, _ = DENSITIES[name]
    shape = "[2]" if sampler and shape == "[1]" else shape
    if sampler == COUPLING:
        overrides = ("sampler.flow.conditioner=dense", *overrides)
    kind = name.partition(",")[0]
    return parse_config(
        DENSITY + sampler, [f"action.kind={kind}", f"lattice.shape={shape}", *within("action", *changes), *overrides]
    )


def test_differences_name_keys_of_the_sampler():
    one, other = (parse_config(PHI4 + STABILISED, [f"sampler.tau={tau}", "action.m2=-3"]) for tau in (50, 60))
    assert one.differences(other) == ["sampler.tau"]
    assert parse_config(PHI4).theory_differences(other) == ["action.m2"]


# ---------------------------------------------------------------- building


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_built_with_their_settings(name):
    _, _, expected = DENSITIES[name]
    built = build_action(density(name))
    assert type(built) is type(expected)
    if isinstance(expected, HorseshoeLogistic | LinearRegression):
        x = torch.randn(5, expected.dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert torch.equal(built(x), expected(x))
    else:
        assert built == expected


def test_priors_are_built_with_their_settings():
    free = build_prior(parse_config(PHI4 + FREE_FIELD))
    assert isinstance(free, FreeField)
    assert (free.m2, free.shape) == (0.5, (4, 4))
    normal = build_prior(parse_config(DENSITY + '[sampler.prior]\nkind = "normal"\nscale = 2\n'))
    assert isinstance(normal, Normal)
    assert (normal.scale, normal.shape) == (2.0, (10,))


@pytest.mark.parametrize(("sites", "shape"), [("own", (4, 4)), ("shared", ())])
def test_the_student_t_prior_is_built_with_its_settings(sites, shape):
    overrides = within("sampler.prior", "degrees_of_freedom=5", f"sites={sites}")
    prior = build_prior(parse_config(PHI4 + STUDENT_T, overrides))
    assert isinstance(prior, StudentT)
    assert prior.degrees_of_freedom.shape == shape
    torch.testing.assert_close(prior.degrees_of_freedom, torch.full(shape, 5.0, dtype=torch.float64))


@pytest.mark.parametrize("sites", ["own", "shared"])
@pytest.mark.parametrize("symmetry", ["none", "z2"])
def test_a_stabilised_sampler_is_built_with_its_settings(sites, symmetry):
    overrides = within("sampler", "layers=4", "tau=7", f"sites={sites}", f"symmetry={symmetry}", "hidden=[5, 6]")
    sampler = build_sampler(parse_config(PHI4 + STABILISED, overrides))
    assert isinstance(sampler, StabilisedSampler)
    assert isinstance(sampler.prior, StudentT)
    loft, affine = sampler.flow.layers[4:]
    assert not affine.log_scale.any()
    assert len(couplings(sampler)) == 4
    assert isinstance(loft, LOFT)
    assert loft.tau == 7.0
    assert isinstance(affine, ElementwiseAffine)
    assert affine.log_scale.shape == (() if sites == "shared" else (4, 4))
    assert (affine.shift is None) == (symmetry == "z2")
    for layer in couplings(sampler):
        assert layer.odd == (symmetry == "z2")
        assert [part.linear.out_features for part in layer.network.network.layers] == [5, 6, 2]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("clamp", ["asymmetric", "symmetric", "tanh", "none"])
def test_clamps_are_built_with_their_settings(section, clamp):
    changes = (*SMALL, f"clamp={clamp}", "clamp_positive=0.25", "clamp_negative=1.5")
    sampler = build_sampler(parse_config(PHI4 + SECTIONS[section], within(section, *changes)))
    assert isinstance(sampler, StabilisedSampler) == (section == "sampler")
    assert len(couplings(sampler)) == 2
    for layer in couplings(sampler):
        assert isinstance(layer.site_map, AffineMap)
        assert layer.site_map.clamp == Clamp(clamp, positive=0.25, negative=1.5)


@pytest.mark.parametrize("section", SECTIONS)
def test_splines_are_built_with_their_settings(section):
    changes = (*SMALL, "transform=spline", "bins=5", "bound=2.5", "clamp=tanh")
    sampler = build_sampler(parse_config(PHI4 + SECTIONS[section], within(section, *changes)))
    for layer in couplings(sampler):
        assert isinstance(layer.site_map, SplineMap)
        assert (layer.site_map.bins, layer.site_map.bound) == (5, 2.5)
        assert layer.site_map.affine.clamp.kind == "tanh"


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (["conditioner=dense"], [1, 1]),
        (["kernel=3", "inner_kernel=1"], [4, 1]),
        (["kernel=3", "inner_kernel=3"], [4, 5]),
    ],
)
def test_conditioners_are_built_with_their_settings(section, changes, windows):
    """Of a checkerboard a window of 3 x 3 sees the 4 nearest sites of the other parity, 5 of the same."""
    sampler = build_sampler(parse_config(PHI4 + SECTIONS[section], within(section, *SMALL, *changes)))
    for layer in couplings(sampler):
        assert layer.network.dense == ("conditioner=dense" in changes)
        assert [part.window for part in layer.network.network.layers] == windows


@pytest.mark.parametrize("section", SECTIONS)
def test_masks_are_built_with_their_settings(section):
    found = {}
    for mask in ("checkerboard", "stripes", "random"):
        changes = ("layers=4", "hidden=[4]", "conditioner=dense", f"mask={mask}")
        sampler = build_sampler(parse_config(PHI4 + SECTIONS[section], within(section, *changes)))
        found[mask] = [layer.active.tolist() for layer in couplings(sampler)]
        assert all(len(active) == 8 for active in found[mask])
    assert found["checkerboard"][0] == found["checkerboard"][2] == [0, 2, 5, 7, 8, 10, 13, 15]
    assert found["stripes"][0] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert found["stripes"][2] == list(range(0, 16, 2))
    assert found["random"][0] != found["random"][2]


@pytest.mark.parametrize("sampler", [STABILISED, COUPLING])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_training_sets_the_precision(sampler, dtype):
    built = build_sampler(parse_config(f"{PHI4}{sampler}[training]\ndtype = '{dtype}'\n"))
    assert {parameter.dtype for parameter in built.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in build_sampler(parse_config(PHI4 + sampler)).parameters()} == {torch.float64}


@pytest.mark.parametrize("text", [PHI4 + STABILISED, PHI4 + COUPLING, DENSITY + STABILISED])
def test_weights_derive_from_the_seed_alone(text):
    built = [build_sampler(parse_config(text, [f"run.seed={seed}"])) for seed in (3, 3, 4)]
    state = torch.random.get_rng_state()
    one, same, other = (torch.cat([p.detach().flatten() for p in sampler.parameters()]) for sampler in built)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    build_sampler(parse_config(text))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("text", [PHI4 + STABILISED + FREE_FIELD, PHI4 + COUPLING, DENSITY + STABILISED])
def test_what_is_built_can_be_trained(text):
    """The first step is reproducible too, and moves the weights."""
    section = "sampler.flow" if COUPLING in text else "sampler"
    losses = []
    for _ in range(2):
        config = parse_config(text + "[training]\nsteps = 2\nbatch = 4\n", within(section, *SMALL))
        trainer = build_trainer(config, build_sampler(config))
        trainer.run()
        losses.append([record.loss for record in trainer.records])
    assert losses[0] == losses[1]
    assert isinstance(trainer.sampler, FlowSampler)
    assert type(trainer.action) is (ScalarAction if PHI4 in text else MultivariateStudentT)


def test_defaults_of_an_autoregressive_flow():
    flow = parse_config(DENSITY + '[sampler.flow]\nkind = "autoregressive"\n').sampler.flow
    expected = {"kind": "autoregressive", "blocks": 6, "hidden": (50, 50), "activation": "tanh"}
    assert flow.model_dump() == expected


def test_an_autoregressive_flow_is_built_with_its_settings():
    sampler = build_sampler(parse_config(PHI4 + AUTOREGRESSIVE, ["sampler.flow.activation=softplus"]))
    assert [block.reverse for block in sampler.flow.layers] == [False, True]
    for block in sampler.flow.layers:
        assert [layer.out_features for layer in block.network.layers] == [5, 32]
        assert block.network.activation is torch.nn.functional.softplus


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_can_be_configured(name):
    assert parse_config(PHI4 + AUTOREGRESSIVE, [f"sampler.flow.activation={name}"]).sampler.flow.activation == name


@pytest.mark.parametrize("estimator", ["path", "reinforce", "reparametrisation"])
@pytest.mark.parametrize("text", [PHI4, DENSITY])
def test_an_autoregressive_flow_learns_by_reverse_kl(text, estimator):
    overrides = [f"training.estimator={estimator}", "training.learning_rate=1e-2", "training.window=5"]
    config = parse_config(text + AUTOREGRESSIVE + "[training]\nsteps = 25\nbatch = 64\nwarmup = 0\n", overrides)
    trainer = build_trainer(config, build_sampler(config))
    trainer.run()
    losses = [record.loss for record in trainer.records]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("section", SECTIONS)
def test_couplings_of_a_density_are_dense_with_random_masks_unless_told_otherwise(section):
    """Its variables are no lattice, on which neighbours would mean something."""
    chosen = [parse_config(text + SECTIONS[section]).sampler for text in (DENSITY, PHI4)]
    density, phi4 = (sampler if section == "sampler" else sampler.flow for sampler in chosen)
    assert (density.conditioner, density.mask) == ("dense", "random")
    assert (phi4.conditioner, phi4.mask) == ("convolution", "checkerboard")
    told = parse_config(DENSITY + SECTIONS[section], within(section, "mask=stripes", "conditioner=convolution")).sampler
    told = told if section == "sampler" else told.flow
    assert (told.conditioner, told.mask) == ("convolution", "stripes")
