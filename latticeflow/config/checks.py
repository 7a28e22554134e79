"""Checks between keys, each a function of the values by dotted path.

A key that is missing or broken is not among the values; the KeyError that follows skips the checks that need it.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from latticeflow.config.families import DENSITIES, DRAWABLE, GAUGE_THEORIES, PLANAR_DENSITIES, PRIORS
from latticeflow.config.part_checks import PART_CHECKS
from latticeflow.config.piece_checks import PIECE_CHECKS
from latticeflow.config.problems import Problem, alternatives, refused, written
from latticeflow.flows.masks import check_tiles
from latticeflow.training.estimators import ON_SAMPLES, REVERSE
from latticeflow.training.score import WIDTHS

MOST_STEPS = 10**6
LINEAR_FLOWS = ("linear", "glow")
REAL_FLOWS = ("coupling", "autoregressive", *LINEAR_FLOWS)
BREAST_CANCER_DIMENSION = 62

Values = Mapping[str, Any]


def cross_problems(values: Values) -> list[Problem]:
    """Return what does not fit together among the values that are known."""
    problems: list[Problem] = []
    for check in CHECKS:
        with suppress(KeyError):
            problems += check(values)
    return problems


def massless_scalar(values: Values) -> list[Problem]:
    """Without a quartic coupling the mass must make the integral converge."""
    m2, lam = values["action.m2"], values["action.lam"]
    if lam != 0 or m2 > 0:
        return []
    return [Problem("action.m2", "number > 0 where action.lam = 0 (no integral otherwise)", written(m2))]


def gauge_dimensions(values: Values) -> list[Problem]:
    """Gauge theories live in two dimensions."""
    theory, shape = values["action.kind"], values["lattice.shape"]
    if theory not in GAUGE_THEORIES or len(shape) == 2:
        return []
    return [Problem("lattice.shape", f"two extents for the gauge theory {written(theory)}", written(shape))]


def density_dimension(values: Values) -> list[Problem]:
    """A density has one extent, its dimension."""
    theory, shape = values["action.kind"], values["lattice.shape"]
    if theory not in DENSITIES:
        return []
    least, kind = DENSITIES[theory], f"for action.kind = {written(theory)}"
    if len(shape) != 1:
        return [Problem("lattice.shape", f"one extent, the dimension, {kind}", written(shape))]
    if theory in PLANAR_DENSITIES and shape[0] != 2:
        return [Problem("lattice.shape", f"[2] {kind}", written(shape))]
    if shape[0] < least:
        return [Problem("lattice.shape", f"a dimension of at least {least} {kind}", written(shape))]
    if theory != "horseshoe":
        return []
    if values["action.data"] == "breast_cancer" and shape[0] != BREAST_CANCER_DIMENSION:
        expected = f'[{BREAST_CANCER_DIMENSION}] for action.data = "breast_cancer"'
        return [Problem("lattice.shape", expected, written(shape))]
    return [Problem("lattice.shape", f"an even dimension {kind}", written(shape))] if shape[0] % 2 else []


def flow_theory(values: Values) -> list[Problem]:
    """A gauge flow acts on links, flows of real fields on anything else; `ebflow_layers` are of their own."""
    theory, flow = values["action.kind"], values["sampler.flow.kind"]
    gauge = theory in GAUGE_THEORIES
    if values.get("sampler.kind") == "ebflow" or flow == "identity" or (flow == "gauge") == gauge:
        return []
    fitting = alternatives(["gauge", "identity"] if gauge else [*REAL_FLOWS, "identity"])
    return [Problem("sampler.flow.kind", f"{fitting} for action.kind = {written(theory)}", written(flow))]


def sampler_theory(values: Values) -> list[Problem]:
    """Stabilised and energy-based flows are of real fields, not of angles."""
    theory, sampler = values["action.kind"], values["sampler.kind"]
    if sampler not in ("stabilised", "ebflow") or theory not in GAUGE_THEORIES:
        return []
    return [Problem("sampler.kind", f'"flow" or "piecewise" for action.kind = {written(theory)}', written(sampler))]


def ebflow_layers(values: Values) -> list[Problem]:
    """An energy-based flow has linear layers."""
    flow = values["sampler.flow.kind"]
    if values["sampler.kind"] != "ebflow" or values["action.kind"] in GAUGE_THEORIES or flow in LINEAR_FLOWS:
        return []
    return [Problem("sampler.flow.kind", f'{alternatives(LINEAR_FLOWS)} for sampler.kind = "ebflow"', written(flow))]


def compiled_couplings(values: Values) -> list[Problem]:
    """Splines are compiled, and what gauge couplings see."""
    if not values["training.compile"]:
        return []
    stabilised = values["sampler.kind"] == "stabilised"
    flow = "coupling" if stabilised else values["sampler.flow.kind"]
    transform = values.get("sampler.transform" if stabilised else "sampler.flow.transform")
    if flow == "gauge" or (flow == "coupling" and transform == "spline"):
        return []
    return [Problem("training.compile", "false for a flow without gauge couplings or couplings with splines", "true")]


def coupling_mask(values: Values) -> list[Problem]:
    """A mask leaves something to condition on, and looks the same everywhere to a convolution."""
    if density_dimension(values):  # one problem with the extents is enough
        return []
    return [problem for section in _couplings(values) for problem in _mask_problems(values, section)]


def _couplings(values: Values) -> Iterator[str]:
    """Yield the sections that have the keys of couplings."""
    yield from (section for section in ("sampler", "sampler.flow") if f"{section}.mask" in values)


def _mask_problems(values: Values, section: str) -> Iterator[Problem]:
    mask, conditioner, shape = values[f"{section}.mask"], values[f"{section}.conditioner"], values["lattice.shape"]
    if values["action.kind"] in GAUGE_THEORIES:
        return
    if max(shape) < 2:
        yield Problem("lattice.shape", f"an extent of 2 or more for couplings ({section}.mask)", written(shape))
    elif conditioner == "convolution" and mask == "random":
        expected = '"checkerboard" or "stripes" for convolutions'
        hint = f'{section}.conditioner = "dense" takes any mask'
        yield Problem(f"{section}.mask", expected, written(mask), hint)
    elif conditioner == "convolution" and any(extent % 2 and extent > 1 for extent in shape):
        hint = f'{section}.conditioner = "dense" takes any extents'
        yield Problem("lattice.shape", f"even extents for convolutions on a {mask} mask", written(shape), hint)


def coupling_kernel(values: Values) -> list[Problem]:
    """A window of one site holds none of the frozen sites, which a convolution reads first."""
    if values["action.kind"] in GAUGE_THEORIES:
        return []
    return [
        Problem(f"{section}.kernel", "odd integer >= 3 for convolutions", "1")
        for section in _couplings(values)
        if values.get(f"{section}.conditioner") == "convolution" and values.get(f"{section}.kernel") == 1
    ]


def flow_tiles(values: Values) -> list[Problem]:
    """The stripe masks of a gauge flow tile only some lattices."""
    theory, shape = values["action.kind"], values["lattice.shape"]
    if values["sampler.flow.kind"] != "gauge" or theory not in GAUGE_THEORIES or len(shape) != 2:
        return []
    try:
        check_tiles(tuple(shape))
    except ValueError:
        larger = [-(-extent // 4) * 4 for extent in shape]
        expected = 'extents that are multiples of 4 for sampler.flow.kind = "gauge"'
        return [Problem("lattice.shape", expected, written(shape), f"the next larger ones are {written(larger)}")]
    return []


def blind_orbits(values: Values) -> list[Problem]:
    """An average over holonomy shifts is for flows that are blind to the holonomies."""
    if values["sampler.flow.kind"] != "gauge" or values["action.kind"] not in GAUGE_THEORIES:
        return []
    seeing = {"polyakov": values["sampler.flow.polyakov"], "holonomy_pairs": values["sampler.flow.holonomy_pairs"]}
    given = " and ".join(f"sampler.flow.{key} = {written(value)}" for key, value in seeing.items() if value)
    grids = {path: values.get(path) for path in ("action.holonomies", "training.holonomies")}
    expected = f"[1, 1] with {given} (averages over holonomies are for flows that are blind to them)"
    return [
        Problem(path, expected, written(grid))
        for path, grid in grids.items()
        if given and grid is not None and tuple(grid) != (1, 1)
    ]


def prior_theory(values: Values) -> list[Problem]:
    """The prior must draw the theory's field."""
    theory, prior = values["action.kind"], values["sampler.prior.kind"]
    if theory in PRIORS[prior]:
        return []
    fitting = " or ".join(written(name) for name, theories in PRIORS.items() if theory in theories)
    return [Problem("sampler.prior.kind", f"{fitting} for action.kind = {written(theory)}", written(prior))]


def prior_sector_factor(values: Values) -> list[Problem]:
    """The normalisation of a sector factor is known for either kind, not for both together."""
    return _one_factor(values, "sampler.prior")


def baseline_sector_factor(values: Values) -> list[Problem]:
    """As for the prior."""
    return _one_factor(values, "baseline")


def _one_factor(values: Values, section: str) -> list[Problem]:
    sector, smooth = values[f"{section}.sector"], values[f"{section}.smooth_sector"]
    if not (sector and smooth):
        return []
    return [Problem(f"{section}.sector", f"0 where {section}.smooth_sector is given", written(sector))]


def dilation_count(values: Values) -> list[Problem]:
    """Each convolution of the conditioner has one dilation: the hidden ones and the last."""
    dilations, hidden = values["sampler.flow.dilations"], values["sampler.flow.hidden"]
    if dilations is None or len(dilations) == len(hidden) + 1:
        return []
    expected = f"{len(hidden) + 1} entries, one more than sampler.flow.hidden = {written(hidden)}"
    return [Problem("sampler.flow.dilations", expected, written(dilations))]


def distinct_kernels(values: Values) -> list[Problem]:
    """Each kernel has one set of settings and one set of columns."""
    kernels = values["chain.kernels"]
    if len(set(kernels)) == len(kernels):
        return []
    return [Problem("chain.kernels", "each kernel once", written(kernels))]


def moving_kernels(values: Values) -> list[Problem]:
    """Winding steps alone do not reach every configuration, and only links can wind."""
    kernels, theory = values["chain.kernels"], values["action.kind"]
    problems = []
    if "winding" in kernels and theory not in GAUGE_THEORIES:
        expected = f'no "winding" for action.kind = {written(theory)} (gauge theories only)'
        problems.append(Problem("chain.kernels", expected, written(kernels)))
    if set(kernels) == {"winding"}:
        problems.append(
            Problem("chain.kernels", 'another kernel beside "winding", which moves the charge alone', written(kernels))
        )
    return problems


def hmc_steps(values: Values) -> list[Problem]:
    """A trajectory of HMC has a number of steps that can be taken."""
    return _countable_steps(values, "chain.hmc")


def flow_hmc_steps(values: Values) -> list[Problem]:
    """The same for HMC in the latent space."""
    return _countable_steps(values, "chain.flow_hmc")


def _countable_steps(values: Values, section: str) -> list[Problem]:
    step, length = values[f"{section}.step_size"], values[f"{section}.trajectory_length"]
    if step * MOST_STEPS >= length:
        return []
    expected = f"at least {length / MOST_STEPS:g}, {MOST_STEPS} steps for {section}.trajectory_length = {length:g}"
    return [Problem(f"{section}.step_size", expected, written(step))]


def something_to_train(values: Values) -> list[Problem]:
    """The identity has no parameters, but for the affine map that a cluster's samples set."""
    steps = values["training.steps"]
    if steps == 0 or values["sampler.flow.kind"] != "identity" or values.get("sampler.kind") == "ebflow":
        return []
    if values.get("sampler.pieces") == "clusters":
        return []
    flow = "gauge" if values.get("action.kind") in GAUGE_THEORIES else "coupling"
    hint = f"leave [training] out, or choose sampler.flow.kind = {written(flow)}"
    return [Problem("training.steps", '0 with sampler.flow.kind = "identity" (nothing to train)', written(steps), hint)]


def training_samples(values: Values) -> list[Problem]:
    """Some estimators learn from samples, and need them: of an ensemble, or exact draws."""
    estimator, samples, draws = (values[f"training.{key}"] for key in ("estimator", "samples", "draws"))
    given = {key: found for key, found in (("samples", samples), ("draws", draws)) if found is not None}
    if estimator in REVERSE:
        learning = ", ".join(map(written, [*ON_SAMPLES, "explicit"]))
        name = written(estimator)
        expected = f"no such key with training.estimator = {name} (those that learn from samples are {learning})"
        return [Problem(f"training.{key}", expected, written(found)) for key, found in given.items()]
    if not given and estimator in ON_SAMPLES:
        expected = f"path of an ensemble, or training.draws, for training.estimator = {written(estimator)}"
        return [Problem("training.samples", expected, "nothing")]
    if len(given) == 2:
        return [Problem("training.draws", "nothing where training.samples is given", written(draws))]
    return []


def training_draws(values: Values) -> list[Problem]:
    """Only some densities have exact independent draws."""
    theory, draws = values["action.kind"], values["training.draws"]
    if draws is None or theory in DRAWABLE:
        return []
    expected = f"no such key for action.kind = {written(theory)} (exact draws have {', '.join(DRAWABLE)})"
    return [Problem("training.draws", expected, written(draws), "training.samples names an ensemble")]


def training_signal_clip(values: Values) -> list[Problem]:
    """Only reinforce has a signal to clip."""
    estimator, clip = values["training.estimator"], values["training.signal_clip"]
    if clip is None or estimator == "reinforce":
        return []
    expected = f'no such key with training.estimator = {written(estimator)} (only "reinforce" has a signal to clip)'
    return [Problem("training.signal_clip", expected, written(clip), "training.gradient_clip bounds the gradient")]


def training_widths(values: Values) -> list[Problem]:
    """Each width belongs to one score loss."""
    estimator = values["training.estimator"]
    return [
        problem
        for key, owner in WIDTHS.items()
        if estimator != owner
        for problem in refused(values, "training", (key,), f"no such key without training.estimator = {written(owner)}")
    ]


def odd_activation(values: Values) -> list[Problem]:
    """A leaky ReLU is not odd."""
    if values["sampler.flow.kind"] != "linear" or values["sampler.flow.symmetry"] != "z2":
        return []
    activation = values["sampler.flow.activation"]
    if activation == "cubic":
        return []
    return [Problem("sampler.flow.activation", '"cubic" for sampler.flow.symmetry = "z2"', written(activation))]


def linear_kernel(values: Values) -> list[Problem]:
    """Only convolutions have a window."""
    if values["sampler.flow.kind"] != "linear" or values["sampler.flow.linear"] == "convolution":
        return []
    return list(refused(values, "sampler.flow", ("kernel",), 'no such key without sampler.flow.linear = "convolution"'))


def glow_levels(values: Values) -> list[Problem]:
    """Each level of Glow halves the sides."""
    if values["sampler.flow.kind"] != "glow" or values["action.kind"] in GAUGE_THEORIES:
        return []
    shape, block = values["lattice.shape"], 2 ** values["sampler.flow.levels"]
    if len(shape) == 2 and all(extent % block == 0 for extent in shape):
        return []
    expected = f"two extents that are multiples of {block} for sampler.flow.levels = {values['sampler.flow.levels']}"
    return [Problem("lattice.shape", expected, written(shape))]


def training_holonomies(values: Values) -> list[Problem]:
    """Only gauge fields have holonomies."""
    return _gauge_only(values, "training.holonomies")


def baseline_theory(values: Values) -> list[Problem]:
    """The baseline is a reweighted gauge ensemble."""
    return _gauge_only(values, "baseline")


def _gauge_only(values: Values, path: str) -> list[Problem]:
    theory, found = values["action.kind"], values[path]
    if found is None or theory in GAUGE_THEORIES:
        return []
    expected = f"nothing here for action.kind = {written(theory)} (gauge theories only)"
    return [Problem(path, expected, written(found))]


CHECKS = (
    massless_scalar,
    gauge_dimensions,
    density_dimension,
    flow_theory,
    sampler_theory,
    ebflow_layers,
    compiled_couplings,
    coupling_mask,
    coupling_kernel,
    flow_tiles,
    blind_orbits,
    prior_theory,
    prior_sector_factor,
    baseline_sector_factor,
    dilation_count,
    distinct_kernels,
    moving_kernels,
    hmc_steps,
    flow_hmc_steps,
    something_to_train,
    training_samples,
    training_draws,
    training_signal_clip,
    training_widths,
    odd_activation,
    linear_kernel,
    glow_levels,
    training_holonomies,
    baseline_theory,
    *PIECE_CHECKS,
    *PART_CHECKS,
)
