"""Keys that must fit together: each check fails on its own, and is silent when a key that it needs is broken."""

import pytest

from latticeflow.actions import Drawable
from latticeflow.config import ConfigError
from latticeflow.config.building import build_action, build_bare_action, build_sampler
from latticeflow.config.families import DENSITIES, DRAWABLE
from latticeflow.config.loading import parse_config


@pytest.mark.parametrize("shape", ["[8]", "[8, 8, 8]"])
def test_gauge_theories_have_two_extents(gauge, problems, shape):
    found = problems(gauge, f"lattice.shape={shape}")
    assert list(found) == ["lattice.shape"]
    assert "two extents" in found["lattice.shape"].expected
    assert found["lattice.shape"].found == shape


@pytest.mark.parametrize(("shape", "larger"), [("[6, 8]", "[8, 8]"), ("[8, 9]", "[8, 12]"), ("[1, 1]", "[4, 4]")])
def test_a_gauge_flow_needs_multiples_of_four(gauge, problems, shape, larger):
    found = problems(gauge, f"lattice.shape={shape}")
    assert list(found) == ["lattice.shape"]
    assert "multiples of 4" in found["lattice.shape"].expected
    assert found["lattice.shape"].found == shape
    assert larger in found["lattice.shape"].suggestion


def test_other_extents_are_fine_without_a_flow(gauge):
    overrides = ['sampler.flow={kind = "identity"}', "training.steps=0", "lattice.shape=[6, 7]"]
    assert parse_config(gauge, overrides).lattice.shape == (6, 7)


def test_a_gauge_flow_needs_a_gauge_theory(scalar, problems):
    found = problems(scalar, "sampler.flow.kind=gauge")
    assert list(found) == ["sampler.flow.kind"]
    assert 'action.kind = "scalar"' in found["sampler.flow.kind"].expected


@pytest.mark.parametrize("prior", ["haar", "quenched"])
def test_link_priors_need_a_gauge_theory(scalar, problems, prior):
    found = problems(scalar, f'sampler.prior={{kind = "{prior}"}}')
    assert list(found) == ["sampler.prior.kind"]
    assert '"normal"' in found["sampler.prior.kind"].expected


def test_the_normal_prior_needs_the_scalar_field(gauge, problems):
    found = problems(gauge, 'sampler.prior={kind = "normal"}')
    assert list(found) == ["sampler.prior.kind"]
    assert '"haar" or "quenched"' in found["sampler.prior.kind"].expected


@pytest.mark.parametrize("m2", ["0", "-1.0"])
def test_a_free_field_needs_a_positive_mass(scalar, problems, m2):
    found = problems(scalar, "action.lam=0", f"action.m2={m2}")
    assert list(found) == ["action.m2"]
    assert "action.lam" in found["action.m2"].expected


def test_an_interacting_field_may_have_any_mass(scalar):
    assert parse_config(scalar, ["action.m2=-4"]).action.m2 == -4.0


@pytest.mark.parametrize("dilations", ["[1, 1]", "[1, 1, 1, 1]"])
def test_each_convolution_has_a_dilation(gauge, problems, dilations):
    found = problems(gauge, f"sampler.flow.dilations={dilations}")
    assert list(found) == ["sampler.flow.dilations"]
    assert "3 entries" in found["sampler.flow.dilations"].expected


def test_dilations_are_counted_against_the_default_of_hidden(problems):
    text = '[lattice]\nshape=[8, 8]\n[action]\nkind="u1"\nbeta=1\n[sampler.flow]\nkind="gauge"\ndilations=[1]\n'
    assert list(problems(text)) == ["sampler.flow.dilations"]


def test_the_identity_cannot_be_trained(gauge, problems):
    found = problems(gauge, 'sampler.flow={kind = "identity"}')
    assert list(found) == ["training.steps"]
    assert "nothing to train" in found["training.steps"].expected


def test_the_identity_cannot_be_trained_for_the_default_number_of_steps(scalar, problems):
    assert list(problems(scalar + "[training]\n")) == ["training.steps"]


def test_no_steps_with_the_identity_are_fine(scalar):
    assert parse_config(scalar, ["training.steps=0"]).training.steps == 0


def test_forward_kl_needs_samples(gauge, problems):
    text = gauge.replace("signal_clip = 8\n", "")
    assert list(problems(text, "training.estimator=forward_kl")) == ["training.samples"]
    config = parse_config(text, ["training.estimator=forward_kl", "training.samples=runs/a/ensemble.h5"])
    assert config.training.samples == "runs/a/ensemble.h5"


def test_samples_need_forward_kl(gauge, problems):
    found = problems(gauge, "training.samples=ensemble.h5")
    assert list(found) == ["training.samples"]
    assert '"reinforce"' in found["training.samples"].expected


DRAWN = '[lattice]\nshape = [2]\n[action]\nkind = "two_moons"\n[sampler.flow]\nkind = "coupling"\n[training]\n'


def test_forward_kl_learns_from_samples_or_from_draws(problems):
    estimator = "training.estimator=forward_kl"
    assert parse_config(DRAWN, [estimator, "training.draws=100"]).training.draws == 100
    found = problems(DRAWN, estimator)
    assert list(found) == ["training.samples"]
    assert "or training.draws" in found["training.samples"].expected
    found = problems(DRAWN, estimator, "training.draws=100", "training.samples=e.h5")
    assert list(found) == ["training.draws"]
    assert found["training.draws"].expected == "nothing where training.samples is given"
    found = problems(DRAWN, "training.draws=100", "training.samples=e.h5")
    assert list(found) == ["training.samples", "training.draws"]
    assert all('"path"' in problem.expected for problem in found.values())


@pytest.mark.parametrize(("theory", "shape"), DENSITIES.items())
def test_draws_are_of_densities_that_have_them(problems, theory, shape):
    """Which ones is known to the checks by name, without building any."""
    overrides = ["training.estimator=forward_kl", f"action.kind={theory}", f"lattice.shape=[{max(shape, 2)}]"]
    drawable = isinstance(build_bare_action(parse_config(DRAWN, [*overrides, "training.samples=e.h5"])), Drawable)
    assert drawable == (theory in DRAWABLE)
    if drawable:
        assert parse_config(DRAWN, [*overrides, "training.draws=5"]).training.draws == 5
        return
    found = problems(DRAWN, *overrides, "training.draws=5")
    assert list(found) == ["training.draws"]
    assert f'"{theory}"' in found["training.draws"].expected
    assert "two_moons" in found["training.draws"].expected


def test_a_lattice_field_has_no_exact_draws(scalar, problems):
    overrides = ["sampler.flow.kind=coupling", "training.estimator=forward_kl", "training.draws=5"]
    assert list(problems(scalar, *overrides)) == ["training.draws"]


@pytest.mark.parametrize("estimator", ["path", "reparametrisation"])
def test_signal_clip_needs_reinforce(gauge, problems, estimator):
    found = problems(gauge, f"training.estimator={estimator}")
    assert list(found) == ["training.signal_clip"]
    assert "training.gradient_clip" in found["training.signal_clip"].suggestion


def test_holonomies_while_training_need_a_gauge_theory(scalar, problems):
    found = problems(scalar, "training.steps=0", "training.holonomies=[12, 1]")
    assert list(found) == ["training.holonomies"]


def test_the_action_of_a_scalar_field_has_no_holonomies(scalar, problems):
    assert list(problems(scalar, "action.holonomies=[12, 6]")) == ["action.holonomies"]


def test_a_baseline_needs_a_gauge_theory(scalar, problems):
    assert list(problems(scalar + "[baseline]\n")) == ["baseline"]


@pytest.mark.parametrize("kernels", ['["hmc", "hmc"]', '["winding", "hmc", "winding"]'])
def test_each_kernel_is_named_once(gauge, problems, kernels):
    found = problems(gauge, f"chain.kernels={kernels}")
    assert list(found) == ["chain.kernels"]
    assert "each kernel once" in found["chain.kernels"].expected
    assert found["chain.kernels"].found == kernels


def test_a_scalar_field_does_not_wind(scalar, problems):
    found = problems(scalar, 'chain.kernels=["hmc", "winding"]')
    assert list(found) == ["chain.kernels"]
    assert 'no "winding" for action.kind = "scalar"' in found["chain.kernels"].expected


def test_winding_steps_alone_are_refused(gauge, problems):
    found = problems(gauge, 'chain.kernels=["winding"]')
    assert list(found) == ["chain.kernels"]
    assert "another kernel" in found["chain.kernels"].expected


def test_no_kernels_are_refused(gauge, problems):
    assert list(problems(gauge, "chain.kernels=[]")) == ["chain.kernels"]


@pytest.mark.parametrize(
    "kernels", ['["hmc"]', '["hmc", "winding"]', '["independence", "winding"]', '["flow_hmc", "hmc", "independence"]']
)
def test_kernels_that_fit_a_gauge_theory(gauge, kernels):
    assert len(parse_config(gauge, [f"chain.kernels={kernels}"]).chain.kernels) == kernels.count(",") + 1


def test_hmc_and_the_flow_fit_a_scalar_field(scalar):
    overrides = ['chain.kernels=["hmc", "flow_hmc", "independence"]']
    assert parse_config(scalar, overrides).chain.kernels == ("hmc", "flow_hmc", "independence")


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 0),
        (["chain.start=cold"], 100),
        (['chain.kernels=["hmc"]'], 100),
        (['chain.kernels=["independence", "winding"]'], 100),
        (["chain.thermalisation=7"], 7),
        (['chain.kernels=["hmc"]', "chain.thermalisation=0"], 0),
        (["chain.start=cold", "chain.thermalisation=0"], 0),
    ],
)
def test_thermalisation_is_left_out_only_where_the_start_is_in_equilibrium(gauge, overrides, steps):
    assert parse_config(gauge, overrides).chain.thermalisation_steps == steps


@pytest.mark.parametrize(
    ("kernels", "uses"),
    [
        ('["independence"]', True),
        ('["flow_hmc"]', True),
        ('["hmc", "flow_hmc"]', True),
        ('["hmc"]', False),
        ('["hmc", "winding"]', False),
    ],
)
def test_only_some_kernels_use_the_sampler(gauge, kernels, uses):
    assert parse_config(gauge, [f"chain.kernels={kernels}"]).chain.uses_sampler is uses


def test_checks_that_need_a_broken_key_are_skipped(gauge, problems):
    assert list(problems(gauge, "lattice.shape=[6, 0]")) == ["lattice.shape"]
    assert list(problems(gauge, "action.kind=2", "lattice.shape=[8]")) == ["action.kind"]
    assert list(problems(gauge, "sampler.flow.hidden=[]", "sampler.flow.dilations=[1]")) == ["sampler.flow.hidden"]
    assert list(problems(gauge, "training.estimator=1", "training.samples=a.h5")) == ["training.estimator"]
    assert list(problems(gauge, "action.kind=2", 'chain.kernels=["hmc", "winding"]')) == ["action.kind"]
    assert list(problems("lattice = 3\n[action]\nkind = 'u1'\nbeta = 1\n")) == ["lattice"]


def test_checks_that_do_not_need_it_are_not_skipped(gauge, problems):
    found = problems(gauge, "action.kappa=0.7", "lattice.shape=[6, 8]", "training.estimator=path", "chain.block=0")
    assert set(found) == {"action.kappa", "chain.block", "lattice.shape", "training.signal_clip"}


@pytest.mark.parametrize(
    ("override", "named"),
    [("polyakov=true", "sampler.flow.polyakov = true"), ("holonomy_pairs=2", "sampler.flow.holonomy_pairs = 2")],
)
def test_averages_over_holonomies_need_a_blind_flow(gauge, problems, override, named):
    found = problems(gauge, f"sampler.flow.{override}")
    assert list(found) == ["action.holonomies", "training.holonomies"]
    for problem, grid in zip(found.values(), ("[12, 6]", "[12, 1]"), strict=True):
        assert problem.expected.startswith(f"[1, 1] with {named} (")
        assert problem.found == grid


def test_a_flow_that_sees_the_holonomies_is_built_and_trained_on_the_action_itself(gauge):
    flow = ["sampler.flow.polyakov=true", "sampler.flow.holonomy_pairs=1", "sampler.flow.layers=16"]
    one = ["action.holonomies=[1,1]", "training.holonomies=[1,1]", "training.parts=[8,8]", "run.threads=1"]
    config = parse_config(gauge, [*flow, *one])
    sampler, action = build_sampler(config), build_bare_action(config)
    assert build_action(config, training=True) == action
    assert [len(part.layers) for part in sampler.parts] == [8, 8]
    assert [layer.mu for layer in sampler.flow.layers[7].layers[1:]] == [0, 1]
    assert sampler.flow.layers[3].polyakov
    with pytest.raises(ConfigError, match="integers that add up to sampler"):
        parse_config(gauge, [*flow, *one, "training.parts=[10,10]"])


@pytest.mark.parametrize("value", ["-1", "1.5", "true"])
def test_holonomy_pairs_are_counted(gauge, problems, value):
    one = ["action.holonomies=[1,1]", "training.holonomies=[1,1]"]
    assert list(problems(gauge, *one, f"sampler.flow.holonomy_pairs={value}")) == ["sampler.flow.holonomy_pairs"]
