"""What does not fit together in configurations of real fields: each names the key, what was expected and found."""

import pytest

from latticeflow.config import Config, ConfigError
from latticeflow.config.loading import parse_config

PHI4 = '[lattice]\nshape = [4, 4]\n[action]\nkind = "scalar"\nm2 = -4\nlam = 8\n'
ANY_DIMENSION = ("student_t", "funnel", "mixture", "linear_regression", "horseshoe")
PLANAR = ("two_moons", "circle_of_gaussians", "two_rings")
DENSITY = '[lattice]\nshape = [10]\n[action]\nkind = "student_t"\n'
U1 = '[lattice]\nshape = [8, 8]\n[action]\nkind = "u1"\nbeta = 2\n'
STABILISED = '[sampler]\nkind = "stabilised"\n'
COUPLING = '[sampler.flow]\nkind = "coupling"\n'
AUTOREGRESSIVE = '[sampler.flow]\nkind = "autoregressive"\n'
SECTIONS = {"sampler": STABILISED, "sampler.flow": COUPLING}
QUENCHED = 'sampler.prior={kind = "quenched"}'
REAL_FLOWS = '"coupling", "autoregressive", "linear", "glow"'


def only(found, path):
    """Return the problem of a key, which must be the only one."""
    assert list(found) == [path]
    return found[path]


# ---------------------------------------------------------------- theory and sampler


@pytest.mark.parametrize("overrides", [[], ["action.kind=schwinger", "action.kappa=0.2"]])
def test_a_stabilised_sampler_needs_a_real_field(problems, overrides):
    problem = only(problems(U1 + STABILISED, QUENCHED, *overrides), "sampler.kind")
    assert problem.expected.startswith('"flow" or "piecewise" for action.kind')
    assert problem.found == '"stabilised"'


def test_with_links_the_kind_alone_is_complained_about(problems):
    """The prior that is filled in is theirs; one that is written down has to fit as well."""
    assert only(problems(U1 + STABILISED), "sampler.kind").found == '"stabilised"'
    found = problems(U1 + STABILISED, "sampler.prior.kind=student_t")
    assert set(found) == {"sampler.kind", "sampler.prior.kind"}


@pytest.mark.parametrize(
    ("text", "flow", "expected"),
    [
        (U1, "coupling", '"gauge" or "identity" for action.kind = "u1"'),
        (U1, "autoregressive", '"gauge" or "identity" for action.kind = "u1"'),
        (PHI4, "gauge", f'{REAL_FLOWS} or "identity" for action.kind = "scalar"'),
        (DENSITY, "gauge", f'{REAL_FLOWS} or "identity" for action.kind = "student_t"'),
    ],
)
def test_flows_have_their_theories(problems, text, flow, expected):
    problem = only(problems(text, f"sampler.flow.kind={flow}"), "sampler.flow.kind")
    assert (problem.expected, problem.found) == (expected, f'"{flow}"')


@pytest.mark.parametrize("prior", ['"haar"', '"quenched"', '"free_field", m2 = 1'])
@pytest.mark.parametrize("sampler", ["", COUPLING, STABILISED])
@pytest.mark.parametrize("density", [*ANY_DIMENSION, *PLANAR])
def test_priors_of_densities(problems, density, sampler, prior):
    shape = "[10]" if density in ANY_DIMENSION else "[2]"
    overrides = [f"sampler.prior={{kind = {prior}}}", f"action.kind={density}", f"lattice.shape={shape}"]
    problem = only(problems(DENSITY + sampler, *overrides), "sampler.prior.kind")
    assert problem.expected == f'"normal" or "student_t" for action.kind = "{density}"'
    assert problem.found == prior.partition(",")[0]


@pytest.mark.parametrize("prior", ["haar", "quenched"])
def test_priors_of_the_scalar_field(problems, prior):
    problem = only(problems(PHI4 + STABILISED, f'sampler.prior={{kind = "{prior}"}}'), "sampler.prior.kind")
    assert all(name in problem.expected for name in ('"normal"', '"free_field"', '"student_t"', '"scalar"'))
    assert problem.found == f'"{prior}"'


@pytest.mark.parametrize("prior", ['"normal"', '"student_t"', '"free_field", m2 = 1'])
def test_priors_of_gauge_theories(problems, prior):
    problem = only(problems(U1, f"sampler.prior={{kind = {prior}}}"), "sampler.prior.kind")
    assert problem.expected == '"haar" or "quenched" for action.kind = "u1"'


@pytest.mark.parametrize("kind", ["gauge", "coupling", "identity"])
def test_a_stabilised_sampler_has_no_flow_section(problems, kind):
    problem = only(problems(f'{PHI4}{STABILISED}[sampler.flow]\nkind = "{kind}"\n[training]\n'), "sampler.flow")
    assert problem.expected == 'no such section for sampler.kind = "stabilised"'
    assert problem.found == "a section"


@pytest.mark.parametrize(("path", "value"), [("training.holonomies", "[2, 2]"), ("baseline.samples", "8")])
def test_densities_have_nothing_of_gauge_theories(problems, path, value):
    found = problems(DENSITY + STABILISED + "[training]\n", f"{path}={value}")
    problem = only(found, path if path.startswith("training") else "baseline")
    assert 'action.kind = "student_t"' in problem.expected


def test_densities_do_not_wind(problems):
    assert list(problems(DENSITY, 'chain.kernels=["hmc", "winding"]')) == ["chain.kernels"]


@pytest.mark.parametrize(("text", "flow"), [(PHI4, "coupling"), (DENSITY, "coupling"), (U1, "gauge")])
def test_the_identity_is_not_trained_and_the_flow_that_fits_is_named(problems, text, flow):
    problem = only(problems(text + "[training]\n"), "training.steps")
    assert f'sampler.flow.kind = "{flow}"' in problem.suggestion


# ---------------------------------------------------------------- dimensions and masks


@pytest.mark.parametrize("shape", ["[2, 5]", "[4, 4, 4]"])
@pytest.mark.parametrize("sampler", ["", STABILISED])
def test_a_density_has_one_extent(problems, shape, sampler):
    problem = only(problems(DENSITY + sampler, f"lattice.shape={shape}"), "lattice.shape")
    assert problem.expected == 'one extent, the dimension, for action.kind = "student_t"'
    assert problem.found == shape


@pytest.mark.parametrize(
    ("shape", "overrides"),
    [("[7]", ["action.kind=horseshoe"]), ("[1]", ["action.kind=funnel"]), ("[4, 5]", ["sampler.mask=random"])],
)
def test_one_problem_with_the_extents_of_a_density_is_enough(problems, shape, overrides):
    """Couplings could not act there either."""
    assert list(problems(DENSITY + STABILISED, f"lattice.shape={shape}", *overrides)) == ["lattice.shape"]


@pytest.mark.parametrize(("kind", "least"), [("funnel", 2), ("mixture", 2), ("linear_regression", 2), ("horseshoe", 4)])
def test_a_density_has_a_smallest_dimension(problems, kind, least):
    problem = only(problems(DENSITY, f"action.kind={kind}", f"lattice.shape=[{least - 1}]"), "lattice.shape")
    assert problem.expected == f'a dimension of at least {least} for action.kind = "{kind}"'
    assert problem.found == f"[{least - 1}]"
    assert parse_config(DENSITY, [f"action.kind={kind}", f"lattice.shape=[{least}]"]).lattice.shape == (least,)


@pytest.mark.parametrize("kind", PLANAR)
@pytest.mark.parametrize("shape", ["[1]", "[3]"])
def test_a_planar_density_has_two_variables(problems, kind, shape):
    problem = only(problems(DENSITY, f"action.kind={kind}", f"lattice.shape={shape}"), "lattice.shape")
    assert problem.expected == f'[2] for action.kind = "{kind}"'
    assert problem.found == shape


def test_a_circle_of_one_gaussian_is_refused(problems):
    overrides = ["action.kind=circle_of_gaussians", "lattice.shape=[2]", "action.modes=1"]
    assert only(problems(DENSITY, *overrides), "action.modes").expected == "integer >= 2"


@pytest.mark.parametrize(
    ("data", "shape", "words"),
    [("synthetic", "[7]", "an even dimension"), ("breast_cancer", "[64]", "[62]"), ("breast_cancer", "[61]", "[62]")],
)
def test_a_horseshoe_has_the_dimension_of_its_data(problems, data, shape, words):
    overrides = ["action.kind=horseshoe", f"action.data={data}", f"lattice.shape={shape}"]
    problem = only(problems(DENSITY, *overrides), "lattice.shape")
    assert problem.expected.startswith(words)
    assert problem.found == shape


@pytest.mark.parametrize(("text", "shape"), [(PHI4, "[4, 5]"), (PHI4, "[3]"), (DENSITY, "[9]"), (PHI4, "[2, 4, 5]")])
@pytest.mark.parametrize("mask", ["checkerboard", "stripes"])
@pytest.mark.parametrize("section", SECTIONS)
def test_convolutions_need_even_extents(problems, section, mask, text, shape):
    overrides = [f"lattice.shape={shape}", f"{section}.mask={mask}", f"{section}.conditioner=convolution"]
    problem = only(problems(text + SECTIONS[section], *overrides), "lattice.shape")
    assert problem.expected == f"even extents for convolutions on a {mask} mask"
    assert problem.found == shape
    assert f'{section}.conditioner = "dense"' in problem.suggestion
    parse_config(text + SECTIONS[section], [*overrides, f"{section}.conditioner=dense"])


@pytest.mark.parametrize("shape", ["[1, 4]", "[4, 1, 6]"])
@pytest.mark.parametrize("section", SECTIONS)
def test_an_extent_of_one_is_no_direction(section, shape):
    parse_config(PHI4 + SECTIONS[section], [f"lattice.shape={shape}"])


@pytest.mark.parametrize("shape", ["[4, 4]", "[4, 5]"])
@pytest.mark.parametrize("section", SECTIONS)
def test_convolutions_take_no_random_mask(problems, section, shape):
    found = problems(PHI4 + SECTIONS[section], f"{section}.mask=random", f"lattice.shape={shape}")
    problem = only(found, f"{section}.mask")
    assert problem.expected == '"checkerboard" or "stripes" for convolutions'
    assert problem.found == '"random"'
    assert f'{section}.conditioner = "dense"' in problem.suggestion


@pytest.mark.parametrize("conditioner", ["dense", "convolution"])
@pytest.mark.parametrize(("text", "shape"), [(PHI4, "[1]"), (PHI4, "[1, 1]"), (DENSITY, "[1]")])
@pytest.mark.parametrize("section", SECTIONS)
def test_one_site_leaves_nothing_to_condition_on(problems, section, text, shape, conditioner):
    found = problems(text + SECTIONS[section], f"lattice.shape={shape}", f"{section}.conditioner={conditioner}")
    problem = only(found, "lattice.shape")
    assert problem.expected.startswith("an extent of 2 or more for couplings")
    assert problem.found == shape


@pytest.mark.parametrize("section", SECTIONS)
def test_a_convolution_of_one_site_sees_nothing(problems, section):
    problem = only(problems(PHI4 + SECTIONS[section], f"{section}.kernel=1"), f"{section}.kernel")
    assert (problem.expected, problem.found) == ("odd integer >= 3 for convolutions", "1")
    parse_config(PHI4 + SECTIONS[section], [f"{section}.kernel=1", f"{section}.conditioner=dense"])


# ---------------------------------------------------------------- single values


WRONG = {
    "action.degrees_of_freedom": (["0", "-1.0", "nan", "true"], "number > 0"),
    "sampler.prior.degrees_of_freedom": (["0", "-2", "inf"], "number > 0"),
    "sampler.prior.sites": (['"every"', "1"], '"own" or "shared"'),
    "sampler.tau": (["0", "-100.0", "inf"], "number > 0"),
    "sampler.sites": (['"all"', "true"], '"own" or "shared"'),
}
OF_COUPLINGS = {
    "layers": (["0", "2.0"], "integer >= 1"),
    "mask": (['"chess"', "1"], '"checkerboard", "stripes" or "random"'),
    "transform": (['"cubic"'], '"affine" or "spline"'),
    "bins": (["1", "65"], "integer from 2 to 64"),
    "bound": (["0", "-3.0"], "number > 0"),
    "clamp": (['"hard"', "false"], '"asymmetric", "symmetric", "tanh" or "none"'),
    "clamp_positive": (["0", "-0.1", "nan"], "number > 0"),
    "clamp_negative": (["0", "-2", "inf"], "number > 0"),
    "conditioner": (['"local"'], '"convolution" or "dense"'),
    "hidden": (["[]", "[0]", "100"], "list of 1 or more integers >= 1"),
    "kernel": (["2", "0", "3.0"], "odd integer >= 1"),
    "inner_kernel": (["4", "-1"], "odd integer >= 1"),
    "symmetry": (['"Z(2)"', "2"], '"none" or "z2"'),
}
OF_MAF = {
    "blocks": (["0", "6.0", "true"], "integer >= 1"),
    "hidden": (["[]", "[0]", "50"], "list of 1 or more integers >= 1"),
    "activation": (['"sine"', "1"], '"tanh", "relu", "elu", "gelu", "silu" or "softplus"'),
}
CASES = [(DENSITY + STABILISED, path, value, words) for path, (values, words) in WRONG.items() for value in values]
CASES += [
    (PHI4 + sampler, f"{section}.{key}", value, words)
    for section, sampler in SECTIONS.items()
    for key, (values, words) in OF_COUPLINGS.items()
    for value in values
]
CASES += [
    (PHI4 + AUTOREGRESSIVE, f"sampler.flow.{key}", value, words)
    for key, (values, words) in OF_MAF.items()
    for value in values
]


@pytest.mark.parametrize(("text", "path", "value", "expected"), CASES)
def test_wrong_values_are_named(problems, text, path, value, expected):
    prior = ["sampler.prior.kind=student_t"] if path.startswith("sampler.prior") else []
    problem = only(problems(text, *prior, f"{path}={value}"), path)
    assert (problem.expected, problem.found) == (expected, value)


@pytest.mark.parametrize("m2", ["0", "-4.0"])
def test_the_free_field_prior_has_a_positive_mass(problems, m2):
    found = problems(PHI4 + STABILISED, f'sampler.prior={{kind = "free_field", m2 = {m2}}}')
    assert only(found, "sampler.prior.m2").expected == "number > 0"


def test_the_free_field_prior_has_no_mass_of_its_own(problems):
    assert only(problems(PHI4, "sampler.prior.kind=free_field"), "sampler.prior.m2").found == "nothing"


@pytest.mark.parametrize(
    ("path", "word", "meant"),
    [
        ("sampler.kind", "stabilized", "stabilised"),
        ("sampler.kind", "Stabilised", "stabilised"),
        ("sampler.prior.kind", "studentt", "student_t"),
        ("sampler.prior.kind", "student-t", "student_t"),
        ("sampler.prior.kind", "freefield", "free_field"),
        ("sampler.flow.kind", "couplings", "coupling"),
        ("sampler.flow.kind", "auto-regressive", "autoregressive"),
        ("action.kind", "studentt", "student_t"),
        ("action.kind", "horse_shoe", "horseshoe"),
        ("action.kind", "linear-regression", "linear_regression"),
    ],
)
def test_misspelt_kinds_come_with_the_nearest_one(problems, path, word, meant):
    others = ["sampler.prior.m2=1.0"] if meant == "free_field" else []
    found = problems(PHI4 if path.startswith("sampler") else "[lattice]\nshape = [4]\n", f"{path}={word}", *others)
    problem = only(found, path)
    assert problem.suggestion == f'did you mean "{meant}"?'
    assert f'"{meant}"' in problem.expected
    assert problem.found == f'"{word}"'


def test_keys_below_a_misspelt_kind_are_checked_as_of_the_nearest_one(problems):
    found = problems(PHI4, "sampler.kind=stabilized", "sampler.layers=8", "sampler.tau=0", "sampler.taau=1")
    assert set(found) == {"sampler.kind", "sampler.tau", "sampler.taau"}


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("sampler.layers", '[sampler] of kind "stabilised"'),
        ("sampler.tau", '[sampler] of kind "stabilised"'),
        ("lattice.clamp", '[sampler.flow] of kind "coupling"'),
        ("sampler.prior.degrees_of_freedom", '[sampler.prior] of kind "student_t"'),
        ("lattice.data_seed", '[action] of kind "linear_regression" or "horseshoe"'),
    ],
)
def test_keys_of_another_kind_are_sent_to_it(problems, path, owner):
    assert owner in only(problems(PHI4, "sampler.prior.kind=normal", f"{path}=1"), path).suggestion


def test_a_configuration_made_in_python_is_checked_too():
    action, sampler = {"kind": "horseshoe"}, {"kind": "stabilised", "conditioner": "dense"}
    made = Config(lattice={"shape": [8]}, action=action, sampler=sampler)
    assert made.sampler.prior.kind == "student_t"
    with pytest.raises(ConfigError, match=r"lattice\.shape: expected an even dimension"):
        Config(lattice={"shape": [9]}, action=action, sampler=sampler)
