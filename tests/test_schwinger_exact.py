"""The two-flavour Schwinger model on 2x2: five-dimensional quadrature, and importance sampling against it.

The gauge-invariant content is three plaquettes and two holonomies, and the rectangle rule converges exponentially. In
a holonomy the integrand is a trigonometric polynomial: a determinant with two flavours holds at most four windings, so
that five points are exact. In a plaquette the Boltzmann factor needs some more.
"""

import functools
import math

import pytest
import torch

from latticeflow.actions import HolonomyMarginal, SchwingerAction, U1Action
from latticeflow.exact import u1_log_z, u1_plaquette
from latticeflow.observables import observables
from latticeflow.priors import QuenchedU1, links_from_plaquettes
from latticeflow.stats import log_z, reweighted_mean

# beta, kappa: log Z, plaquette, condensate (PHYSICS, section 4)
TABLE = {
    (1.0, 0.20): (1.593333, 0.560236, 1.745210),
    (2.0, 0.25): (5.138009, 0.807403, 1.466977),
}
PLAQUETTE_POINTS, HOLONOMY_POINTS = 13, 5
CHUNK = 4096


def periodic_grid(points):
    return 2 * math.pi * torch.arange(points, dtype=torch.float64) / points


def quadrature_links(plaquette_points, holonomy_points):
    """Links `(batch, 2, 2, 2)` on the grid of all five angles, in chunks; the fourth plaquette closes the torus."""
    plaquettes, holonomies = periodic_grid(plaquette_points), periodic_grid(holonomy_points)
    points = torch.cartesian_prod(plaquettes, plaquettes, plaquettes, holonomies, holonomies)
    for chunk in points.split(CHUNK):
        free = chunk[:, :3]
        closed = torch.cat([free, -free.sum(1, keepdim=True)], dim=1).reshape(-1, 2, 2)
        yield links_from_plaquettes(closed, chunk[:, 3:])


@functools.cache
def quadrature(action, plaquette_points=PLAQUETTE_POINTS, holonomy_points=HOLONOMY_POINTS):
    """`log Z` and the means of plaquette and, with fermions, condensate."""
    wanted = observables(action)
    names = [name for name in ("plaquette", "condensate") if name in wanted]
    log_weight, values = [], []
    for links in quadrature_links(plaquette_points, holonomy_points):
        log_weight.append(-action(links))
        values.append(torch.stack([wanted[name](links) for name in names]))
    logs = torch.cat(log_weight)
    means = torch.cat(values, dim=1) @ torch.softmax(logs, dim=0)
    return (float(torch.logsumexp(logs, dim=0)) - math.log(len(logs)), *means.tolist())


@pytest.mark.parametrize(("beta", "kappa"), TABLE)
def test_quadrature_gives_the_trusted_values(beta, kappa):
    for value, trusted in zip(quadrature(SchwingerAction(beta, kappa)), TABLE[beta, kappa], strict=True):
        assert value == pytest.approx(trusted, rel=0, abs=2e-6)


def test_quadrature_has_converged():
    """Fewer plaquette points change nothing that counts, one holonomy point fewer than five does."""
    action = SchwingerAction(1.0, 0.20)
    assert quadrature(action, 11, 5) == pytest.approx(quadrature(action), rel=0, abs=2e-7)
    assert quadrature(action, 11, 6) == pytest.approx(quadrature(action, 11, 5), rel=0, abs=1e-11)
    assert abs(quadrature(action, 11, 4)[0] - quadrature(action)[0]) > 1e-5


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_quadrature_of_the_pure_gauge_theory(beta):
    """The same sum without fermions against the character expansion."""
    expected = u1_log_z(beta, (2, 2)), u1_plaquette(beta, (2, 2))
    assert quadrature(U1Action(beta), 16, 1) == pytest.approx(expected, abs=1e-9)
    assert quadrature(SchwingerAction(beta, 0.0), 16, 1)[:2] == pytest.approx(expected, abs=1e-9)


def test_quadrature_of_the_marginal():
    """The marginal has the partition function of its action; its mean plaquette as well."""
    action = SchwingerAction(1.0, 0.20)
    marginal = HolonomyMarginal(action, (2, 3))
    assert quadrature(marginal, 9, 5)[:2] == pytest.approx(quadrature(action, 9, 5)[:2], abs=1e-11)


@pytest.mark.parametrize("sector", [0.0, 0.4])
@pytest.mark.parametrize(("beta", "kappa"), TABLE)
def test_importance_sampling_gives_the_same(beta, kappa, sector):
    """`log Z`, plaquette and condensate within 4 deviations of the quadrature: 8e-4 for all twelve together."""
    action, prior = SchwingerAction(beta, kappa), QuenchedU1(1.3 * beta, (2, 2), sector=sector)
    links = prior.sample(20_000, torch.Generator().manual_seed(1))
    log_weight = (-action(links) - prior.log_prob(links)).numpy()
    wanted = observables(action)
    found = [log_z(log_weight)]
    found += [reweighted_mean(wanted[name](links).numpy(), log_weight) for name in ("plaquette", "condensate")]
    for (value, error), exact in zip(found, quadrature(action), strict=True):
        assert abs(value - exact) < 4 * error
        assert error < 0.01
