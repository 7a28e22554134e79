"""Every kernel on the 2x2 Schwinger model against five-dimensional quadrature (PHYSICS, section 4).

Thirty-two means compare at 3.5 standard deviations: a false alarm in 1.5e-2 of all choices of the seed, which is fixed.
"""

import pytest

from latticeflow.actions import HolonomyMarginal, SchwingerAction
from latticeflow.flows import Sequential
from latticeflow.mcmc import HMC, Composite, FlowHMC, IndependenceMetropolis, Winding
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import FlowSampler

SHAPE = (2, 2)
SIGMAS = 3.5
# beta, kappa: plaquette, condensate; a step of leapfrog that is rejected often
TABLE = {
    (1.0, 0.20): (0.560236, 1.745210, 0.67),
    (2.0, 0.25): (0.807403, 1.466977, 0.45),
}


def hmc(action, prior, step_size, _):
    return HMC(action, prior, step_size=step_size, trajectory_length=2 * step_size, integrator="leapfrog")


def winding(action, prior, step_size, _):
    return Composite([hmc(action, prior, step_size, _), Winding(action, prior)])


def independence(action, prior, *_):
    return IndependenceMetropolis(FlowSampler(prior, Sequential()), action, candidates=512)


def mixed(action, prior, step_size, _):
    return Composite([independence(action, prior), hmc(action, prior, step_size, _)])


def flow_hmc(action, prior, step_size, flow):
    length = 1.6 * step_size
    return FlowHMC(
        action,
        FlowSampler(prior, flow),
        step_size=0.8 * step_size,
        trajectory_length=length,
        integrator="leapfrog",
        jitter=0.2,
    )


KERNELS = {  # how it is made, the grid of the holonomy marginal
    "independence": (independence, None),
    "independence, marginal": (independence, (3, 2)),
    "hmc": (hmc, None),
    "hmc, marginal": (hmc, (2, 3)),
    "hmc and winding": (winding, None),
    "hmc and winding, marginal": (winding, (2, 2)),
    "independence and hmc, marginal": (mixed, (2, 3)),
    "flow_hmc": (flow_hmc, None),
}


def check(name, beta, kappa, run, flow, *, precision, **size):
    make, grid = KERNELS[name]
    plaquette, condensate, step_size = TABLE[beta, kappa]
    action = SchwingerAction(beta, kappa)
    action = HolonomyMarginal(action, grid) if grid else action
    kernel = make(action, QuenchedU1(1.3 * beta, SHAPE), step_size, flow)
    chains = run(kernel, ["plaquette", "condensate"], **size)
    for observable, exact in (("plaquette", plaquette), ("condensate", condensate)):
        mean, error = chains.mean(observable)
        assert abs(mean - exact) < SIGMAS * error, (observable, mean, error)
        assert error < precision * exact
    for column, values in chains.history.items():
        if column.startswith("accepted"):  # one quantum of flux is much for four plaquettes
            assert (0.001 if column == "accepted_winding" else 0.2) < values.mean() < 0.95, (column, values.mean())


@pytest.mark.parametrize(("beta", "kappa"), TABLE)
@pytest.mark.parametrize("name", KERNELS)
def test_means_are_those_of_the_quadrature(name, beta, kappa, run_chains, sine_flow):
    check(
        name, beta, kappa, run_chains, sine_flow(SHAPE), precision=0.03, replica=256, steps=12, thin=1, burn=8, seed=21
    )


@pytest.mark.long
@pytest.mark.parametrize(("beta", "kappa"), TABLE)
@pytest.mark.parametrize("name", KERNELS)
def test_means_are_those_of_the_quadrature_precisely(name, beta, kappa, run_chains, sine_flow):
    check(
        name,
        beta,
        kappa,
        run_chains,
        sine_flow(SHAPE),
        precision=0.004,
        replica=1024,
        steps=200,
        thin=1,
        burn=20,
        seed=22,
    )
