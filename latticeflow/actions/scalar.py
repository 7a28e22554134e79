"""The scalar field with a quartic coupling, in any number of dimensions."""

from dataclasses import dataclass

from torch import Tensor

from latticeflow.actions.base import Action, check_coupling
from latticeflow.lattice import shift, site_sum


@dataclass(frozen=True)
class ScalarAction(Action):
    """`S = sum_x [ m2 phi^2 + lam phi^4 + sum_mu (phi(x+mu) - phi(x))^2 ]` for fields `(batch, *lattice)`.

    Raises ValueError for a negative or non-finite `lam`, a non-finite `m2`, or `m2 <= 0` with `lam = 0` (no integral).
    """

    m2: float
    lam: float

    theory = "scalar"
    field_name = "phi"

    def __post_init__(self) -> None:
        check_coupling("m2", self.m2)
        check_coupling("lam", self.lam, low=0.0)
        if self.lam == 0 and self.m2 <= 0:
            raise ValueError(f"m2 must be positive where lam = 0, got {self.m2!r}")

    def __call__(self, field: Tensor) -> Tensor:
        dimensions = field.dim() - 1
        density = self.m2 * field**2 + self.lam * field**4
        for mu in range(dimensions):
            density = density + (shift(field, mu, dimensions=dimensions) - field) ** 2
        return site_sum(density, dimensions)

    def force(self, field: Tensor) -> Tensor:
        """Return `-dS/dphi = -2 m2 phi - 4 lam phi^3 + 2 sum_mu (phi(x+mu) + phi(x-mu) - 2 phi)`."""
        dimensions = field.dim() - 1
        total = -(2 * self.m2 + 4 * dimensions) * field - 4 * self.lam * field**3
        for mu in range(dimensions):
            for steps in (1, -1):
                total = total + 2 * shift(field, mu, steps, dimensions=dimensions)
        return total

    def field_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape)
