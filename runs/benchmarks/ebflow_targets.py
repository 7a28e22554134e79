"""The targets of ebflow.py: densities of the plane and of 1024 variables that are known exactly, and digits."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from ebflow_training import Row
from sklearn.datasets import load_digits
from torch import Generator, Tensor

from latticeflow.actions.densities import Density
from latticeflow.samplers import Sampler
from latticeflow.streams import stream
from latticeflow.training.score import score

WIDTH, SIDE, POINTS, CHUNK, STORED = 0.375, 10.5, 200, 1000, 64


class Kernels(Density):
    """A mixture of normals of the plane around `nodes (n, 2)`, as wide as `widths (2,)`, normalised."""

    dimension, log_z = 2, 0.0

    def __init__(self, theory: str, nodes: Tensor, widths: tuple[float, float], weights: Tensor | None = None) -> None:
        self.theory, self.nodes, self.widths = theory, nodes.double(), torch.tensor(widths, dtype=torch.float64)
        self.weights = torch.ones(len(nodes)).double() if weights is None else weights.double()
        self.log_weights = (self.weights / self.weights.sum()).log() - (2 * math.pi * self.widths.prod()).log()

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent draws, `(n, 2)`, float64."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.nodes[chosen] + self.widths * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def log_density(self, x: Tensor) -> Tensor:
        return -self(x)

    def force(self, field: Tensor) -> Tensor:
        """Return the score: the mean displacement to the nodes, in units of the squared widths."""
        x = field.double()
        shares = torch.softmax(self._terms(x), dim=1)
        return ((shares @ self.nodes - x) / self.widths**2).to(field.dtype)

    def _action(self, x: Tensor) -> Tensor:
        return -torch.logsumexp(self._terms(x), dim=1)

    def _terms(self, x: Tensor) -> Tensor:
        distances = torch.cdist(x / self.widths, self.nodes / self.widths, compute_mode="donot_use_mm_for_euclid_dist")
        return self.log_weights - 0.5 * distances**2


def sine() -> Kernels:
    """`x = 4 u, y = 4 (sin(3 u) + n / 4)`, u uniform on (-2, 2), with the width added to both."""
    u = _midpoints(-2, 2, 1000)
    return Kernels("sine", torch.stack([4 * u, 4 * torch.sin(3 * u)], 1), (WIDTH, math.hypot(1, WIDTH)))


def swirl() -> Kernels:
    """`(t cos t - u / 2 + 1, -t sin t - u / 2 + 2) / 1.2`, `t = 3 pi sqrt(u)`, u uniform on (0, 1)."""
    u = _midpoints(0, 1, 2000)
    t = 3 * math.pi * u.sqrt()
    points = torch.stack([t.cos() * t - 0.5 * u + 1, -t.sin() * t - 0.5 * u + 2], 1)
    return Kernels("swirl", points * 2.5 / 3, (WIDTH, WIDTH))


def checkerboard() -> Kernels:
    """Eight squares with sides of 3."""
    line = _midpoints(-2, 2, 80)
    cells = torch.cartesian_prod(line, line)
    black = (cells.floor().sum(1) % 2) == 0
    return Kernels("checkerboard", 3 * cells[black], (WIDTH, WIDTH))


def two_modes(separation: float) -> Kernels:
    """Two unit normals on the first axis, the left one of weight 0.3."""
    places = torch.tensor([[-0.5 * separation, 0.0], [0.5 * separation, 0.0]])
    return Kernels(f"two modes at {separation:g}", places, (1.0, 1.0), torch.tensor([0.3, 0.7]))


PLANE: dict[str, Callable[[], Kernels]] = {"checkerboard": checkerboard, "sine": sine, "swirl": swirl}


def _midpoints(low: float, high: float, n: int) -> Tensor:
    return low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n


@lru_cache
def grid() -> Tensor:
    """Return the centres of the cells of `[-10.5, 10.5]^2`, `(200^2, 2)`."""
    line = _midpoints(-SIDE, SIDE, POINTS)
    return torch.cartesian_prod(line, line)


class Exact:
    """A density of the plane on the grid, and how far samplers are from it."""

    def __init__(self, target: Kernels) -> None:
        self.target, self.area = target, (2 * SIDE / POINTS) ** 2
        parts = grid().split(CHUNK)
        self.log_p = torch.cat([target.log_density(part) for part in parts])
        self.force = torch.cat([target.force(part) for part in parts])

    def mean(self, values: Tensor) -> float:
        """Return the expectation of a function on the grid."""
        return self.area * float((self.log_p.exp() * values).sum())

    @torch.no_grad()
    def log_density(self, sampler: Sampler) -> Tensor:
        return torch.cat([sampler.log_prob(part.float()).double() for part in grid().split(CHUNK)])

    def divergences(self, sampler: Sampler) -> Row:
        """Return KL(p||q), `1/2 E_p |s_p - s_q|^2`, the masses of q on the grid and, of it, left of 0."""
        own = [score(sampler, part.float()).detach().double() for part in grid().split(CHUNK)]
        log_q = self.log_density(sampler)
        q, left = self.area * log_q.exp(), grid()[:, 0] < 0
        return {
            "kl": self.mean(self.log_p - log_q),
            "fisher": self.mean(0.5 * ((torch.cat(own) - self.force) ** 2).sum(1)),
            "mass": float(q.sum()),
            "left": float(q[left].sum() / q.sum()),
        }


def stored_grid(log_density: Callable[[Tensor], Tensor]) -> list[str]:
    """Return a density on 64^2 points with three digits, a row of the second axis to a line."""
    line = _midpoints(-SIDE, SIDE, STORED)
    with torch.no_grad():
        parts = torch.cartesian_prod(line, line).split(CHUNK)
        density = torch.cat([log_density(part) for part in parts]).exp()
    rows = density.reshape(STORED, STORED).T.tolist()
    return [" ".join(f"{value:.3g}" if value > 1e-6 else "0" for value in row) for row in rows]


@lru_cache
def digits() -> Tensor:
    """Return the digits, `(1797, 8, 8)`, levels 0 to 16, with normal noise of width 1/2.

    Uniform noise would leave edges, where the density jumps: score losses from samples assume that it does not.
    """
    images, generator = torch.from_numpy(load_digits().images), stream(0, "noise of the digits")
    return images + 0.5 * torch.randn(images.shape, generator=generator, dtype=torch.float64)


class Correlated:
    """A Gaussian of D variables with a random basis of eigenvectors, variances from 1/4 to 4; float64."""

    def __init__(self, dimension: int) -> None:
        normal = torch.randn(dimension, dimension, generator=stream(0, "basis"), dtype=torch.float64)
        self.basis = torch.linalg.qr(normal)[0]
        self.widths = torch.logspace(-1, 1, dimension, base=2, dtype=torch.float64)

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        normal = torch.randn(n, len(self.widths), generator=generator, dtype=torch.float64)
        return (normal * self.widths) @ self.basis.T

    def log_prob(self, x: Tensor) -> Tensor:
        squares = ((x @ self.basis / self.widths) ** 2).sum(1)
        return -0.5 * squares - self.widths.log().sum() - 0.5 * len(self.widths) * math.log(2 * math.pi)
