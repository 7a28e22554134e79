"""Observables of scalar configurations `(batch, *lattice)`."""

from torch import Tensor

from latticeflow.lattice import shift, site_mean


def magnetisation(phi: Tensor) -> Tensor:
    """Return `M`, the mean of phi over the lattice, `(batch,)`."""
    return site_mean(phi, phi.dim() - 1)


def abs_magnetisation(phi: Tensor) -> Tensor:
    """Return `|M|`, `(batch,)`."""
    return magnetisation(phi).abs()


def magnetisation_squared(phi: Tensor) -> Tensor:
    """Return `V M^2`, `(batch,)`."""
    return magnetisation(phi) ** 2 * phi[0].numel()


def phi_squared(phi: Tensor) -> Tensor:
    """Return the mean of `phi^2`, `(batch,)`."""
    return site_mean(phi**2, phi.dim() - 1)


def phi_fourth(phi: Tensor) -> Tensor:
    """Return the mean of `phi^4`, `(batch,)`."""
    return site_mean(phi**4, phi.dim() - 1)


def phi_neighbour(phi: Tensor) -> Tensor:
    """Return the mean of `phi(x) phi(x+mu)` over sites and directions, `(batch,)`."""
    dimensions = phi.dim() - 1
    products = [site_mean(phi * shift(phi, mu, dimensions=dimensions), dimensions) for mu in range(dimensions)]
    return sum(products) / dimensions
