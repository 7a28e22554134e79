"""Several kernels in turn."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Generator

from latticeflow.mcmc.kernel import ChainState, Kernel, StepInfo


class Composite(Kernel):
    """One step is a step of each kernel in turn; each leaves the target invariant, hence so does their product.

    A column that several of the kernels have is stored as `<column>_<kernel>`. The chains start as those of the kernel
    that draws independent proposals, if one does, else as those of the first.
    Raises ValueError for less than two kernels, equal names, and kernels of different actions.
    """

    name = "composite"

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        names = [kernel.name for kernel in kernels]
        if len(kernels) < 2 or len(set(names)) < len(names):
            raise ValueError(f"a composite needs at least two kernels of different names, got {names}")
        if any(kernel.action != kernels[0].action for kernel in kernels):
            raise ValueError(f"the kernels have different actions: {[kernel.action for kernel in kernels]}")
        self.kernels = tuple(kernels)
        self.action = kernels[0].action
        self._shared = {name for name, n in Counter(column for k in kernels for column in k.history).items() if n > 1}
        self.history = {
            self.column(kernel, name): dtype for kernel in kernels for name, dtype in kernel.history.items()
        }
        self.proposals = tuple(name for kernel in kernels for name in kernel.proposals)

    def column(self, kernel: Kernel, name: str) -> str:
        """Return the name under which a kernel's column is stored."""
        return f"{name}_{kernel.name}" if name in self._shared else name

    def start(self, replica: int, generator: Generator) -> ChainState:
        first = next((kernel for kernel in self.kernels if kernel.proposals), self.kernels[0])
        return first.start(replica, generator)

    def step(self, state: ChainState, generator: Generator) -> tuple[ChainState, StepInfo]:
        """Take a step of every kernel."""
        history, proposals, bad = {}, {}, 0
        for kernel in self.kernels:
            state, info = kernel.step(state, generator)
            history |= {self.column(kernel, name): values for name, values in info.history.items()}
            proposals |= info.proposals
            bad += info.bad
        return state, StepInfo(history, proposals, bad)

    def tune(self, info: StepInfo) -> None:
        for kernel in self.kernels:
            kernel.tune(StepInfo({name: info.history[self.column(kernel, name)] for name in kernel.history}))

    @property
    def parameters(self) -> dict[str, float]:
        return {f"{k.name}.{name}": value for k in self.kernels for name, value in k.parameters.items()}

    @parameters.setter
    def parameters(self, values: Mapping[str, float]) -> None:
        for kernel in self.kernels:
            prefix = f"{kernel.name}."
            kernel.parameters = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
