"""How much of the machine's rate of matrix products a training step's convolutions reach."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from plain_flow import plain_flow
from rows import Row
from timing import Clock, medians
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_models import paper_config, trainer_of, trial_step

from latticeflow.config.schema import Config
from latticeflow.streams import stream

SIDE = 1024


def product_rate(dtype: torch.dtype, device: str, repeats: int = 20) -> float:
    """Return the operations per second of products of two 1024 x 1024 matrices."""
    generator = stream(0, "product", device=device)
    a, b = torch.rand(2, SIDE, SIDE, generator=generator, device=device, dtype=dtype)
    return 2 * SIDE**3 / medians({"product": lambda: a @ b}, Clock(device), repeats=repeats)["product"]


def conditioner_rate(size: int, implementation: str, overrides: Sequence[str], repeats: int) -> Row:
    """Return the operations per second of all conditioners together, forward and with gradient, and of a whole step.

    The networks are run on the inputs that a step gives them. A step, with the estimator "reinforce", passes through
    them twice forward and once backward.
    """
    config = paper_config(size, "reinforce", overrides)
    calls = network_calls(config, implementation)
    determinant = "cyclic" if implementation == "package" else "vectorised"
    works: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(calls),
        "gradient": lambda: gradient(calls),
        "step": trial_step(size, implementation, "reinforce", determinant, overrides),
    }
    seconds = medians(works, Clock(config.run.device), repeats=repeats)
    operations = {name: count(works[name]) for name in ("forward", "gradient")}
    operations["step"] = operations["forward"] + operations["gradient"]
    return {"seconds": seconds, "operations": operations}


def count(work: Callable[[], object]) -> int:
    """Return the operations of all products of matrices and convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def network_calls(config: Config, implementation: str) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Return the conditioners and what each is given in one draw."""
    sampler = trainer_of(config).sampler
    flow = sampler.flow
    if implementation == "plain":
        names = ("layers", "bins", "hidden", "kernel", "dilations")
        flow = plain_flow(config.lattice.shape, **{name: getattr(config.sampler.flow, name) for name in names})
        flow.to(next(sampler.parameters()))
    calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = []

    def note(network: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append((network, tuple(each.detach().clone() for each in inputs)))

    networks = [module for name, module in flow.named_modules() if name.endswith("network")]
    hooks = [network.register_forward_pre_hook(note) for network in networks]
    z = sampler.latent(config.training.batch, stream(0, "rate", device=config.run.device))
    with torch.no_grad():
        flow(z)
    for hook in hooks:
        hook.remove()
    if len(calls) != config.sampler.flow.layers:
        raise RuntimeError(f"{len(calls)} networks were called in a draw, {config.sampler.flow.layers} expected")
    return calls


@torch.no_grad()
def forward(calls: Sequence[tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    for network, inputs in calls:
        network(*inputs)


def gradient(calls: Sequence[tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    """Run the networks forward and backward, to weights and inputs."""
    for network, inputs in calls:
        leaves = [each.requires_grad_() for each in inputs]
        network(*leaves).sum().backward()
        network.zero_grad()
        for leaf in leaves:
            leaf.grad = None
