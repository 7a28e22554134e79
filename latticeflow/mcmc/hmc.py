"""Hybrid Monte Carlo."""

import math
from collections.abc import Mapping

import torch
from scipy.special import erfcinv
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.flows import Bijection, Sequential
from latticeflow.mcmc.integrators import INTEGRATORS, integrate
from latticeflow.mcmc.kernel import ChainState, Draws, Kernel, StepInfo, choose, metropolis, spread_start

HISTORY = {"accepted": torch.bool, "delta_h": torch.float64}
LARGEST_CHANGE = 2.0


class HMC(Kernel):
    """Hybrid Monte Carlo: `H = p^2 / 2 + S`, trajectories of fixed length, accepted with `min(1, exp(-delta_h))`.

    Duane, Kennedy, Pendleton and Roweth, Phys. Lett. B 195 (1987) 216. Momenta are standard normal and drawn afresh for
    every trajectory of `trajectory_length`, which takes `ceil(trajectory_length / step_size)` equal steps of an
    integrator (by name, see `INTEGRATORS`). With `jitter` in [0, 1) each replica scales its steps by a factor uniform
    in `1 -+ jitter`, against trajectories that close on themselves: a mode that turns by pi does not mix. `tune` brings
    `step_size` to the target acceptance. For a marginal action (holonomies) trajectories follow the bare action, and
    every step ends with a draw of the orbit's element, a Gibbs step. `start` draws the fields that the chains start
    from. Links are angles, wrapped to `(-pi, pi]` after each trajectory.
    Raises ValueError for a number out of range and for an unknown integrator.
    """

    name = "hmc"
    history = HISTORY

    def __init__(
        self,
        action: Action,
        start: Draws,
        *,
        trajectory_length: float = 1.0,
        step_size: float = 0.1,
        integrator: str = "omelyan",
        jitter: float = 0.0,
        target_acceptance: float = 0.8,
    ) -> None:
        if integrator not in INTEGRATORS:
            raise ValueError(f"integrator must be one of {', '.join(INTEGRATORS)}, got {integrator!r}")
        for name, value, below in (
            ("trajectory_length", trajectory_length, math.inf),
            ("step_size", step_size, math.inf),
            ("target_acceptance", target_acceptance, 1.0),
        ):
            if not 0 < value < below:
                raise ValueError(f"{name} must be between 0 and {below:g}, got {value!r}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {jitter!r}")
        self.action = action
        self.draws = start
        self.trajectory_length = trajectory_length
        self.step_size = step_size
        self.integrator = INTEGRATORS[integrator]
        self.jitter = jitter
        self.target_acceptance = target_acceptance
        self.tunings = 0
        self.flow: Bijection = Sequential()
        self.potential = action.bare

    @property
    def steps(self) -> int:
        """Return the number of steps of a trajectory."""
        return max(1, math.ceil(self.trajectory_length / self.step_size * (1 - 1e-12)))

    @property
    def parameters(self) -> dict[str, float]:
        return {"step_size": self.step_size, "tunings": self.tunings}

    @parameters.setter
    def parameters(self, values: Mapping[str, float]) -> None:
        self.step_size, self.tunings = float(values["step_size"]), int(values["tunings"])

    @torch.no_grad()
    def start(self, replica: int, generator: Generator) -> ChainState:
        """Return the states at fields drawn to start from, see `spread_start`."""
        return spread_start(self.action, self.draws, replica, generator)

    @torch.no_grad()
    def step(self, state: ChainState, generator: Generator) -> tuple[ChainState, StepInfo]:
        """Take a trajectory of every replica, accept or reject, draw the orbit's element."""
        z, log_det = self.flow.inverse(state.field)
        momentum = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        moved, kicked = self.trajectory(z, momentum, generator)
        field, moved_log_det = self.flow(moved)
        field = self.action.wrap(field)
        orbit = self.action.orbit(field)
        proposal = ChainState(field, orbit)
        delta_h = proposal.action - moved_log_det - state.action - log_det + _kinetic(kicked) - _kinetic(momentum)
        finite = torch.isfinite(delta_h)
        accepted = metropolis(torch.where(finite, -delta_h, -math.inf), generator)
        merged = ChainState(choose(accepted, field, state.field), choose(accepted, orbit, state.orbit))
        after = ChainState(*self.action.draw(merged.field, merged.orbit, generator))
        delta_h = torch.where(finite, delta_h, math.inf)
        return after, StepInfo({"accepted": accepted, "delta_h": delta_h}, bad=int((~finite).sum()))

    def trajectory(
        self, position: Tensor, momentum: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return position and momentum at the end of one trajectory from the given ones, `(replica, ...)`."""
        step_size: float | Tensor = self.trajectory_length / self.steps
        if self.jitter:
            uniform = torch.rand(len(position), generator=generator, dtype=position.dtype, device=position.device)
            factor = 1 + self.jitter * (2 * uniform - 1)
            step_size = step_size * factor.reshape(-1, *[1] * (position.dim() - 1))
        return integrate(
            self.potential.force,
            position,
            momentum,
            integrator=self.integrator,
            step_size=step_size,
            steps=self.steps,
        )

    def tune(self, info: StepInfo) -> None:
        r"""Move the step size towards the target acceptance.

        For many degrees of freedom `acceptance = erfc(sqrt(h) / 2)` with `h = <delta_h>`, which goes as
        `step_size^(2 order)` (Gupta et al., Phys. Lett. B 242 (1990) 437); so one measured acceptance says how far the
        step is off. Correction k = 0, 1, ... counts `1 / sqrt(1 + k / 10)` of itself.
        """
        acceptance = float(torch.exp(-info.history["delta_h"].clamp(min=0)).mean())
        found, wanted = float(erfcinv(acceptance)), float(erfcinv(self.target_acceptance))
        factor = (wanted / found) ** (1 / self.integrator.order) if found > 0 else math.inf
        factor = min(max(factor, 1 / LARGEST_CHANGE), LARGEST_CHANGE)
        aim = self.trajectory_length / self.steps * factor
        gain = 1 / math.sqrt(1 + self.tunings / 10)
        self.tunings += 1
        self.step_size = min(self.step_size ** (1 - gain) * aim**gain, self.trajectory_length)


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * (momentum**2).flatten(1).sum(1)
