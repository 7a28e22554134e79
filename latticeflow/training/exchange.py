"""What the processes of a training tell each other, by torch.distributed: activations to the next, states to the first.

The default process group has to be there (`torch.distributed.init_process_group`).
"""

import io
import platform
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

AHEAD = 2
"""How many batches a process may be ahead of the next one."""


class LostProcessError(RuntimeError):
    """Another process cannot be reached, for the reason in the message."""


@contextmanager
def reaching_others() -> Iterator[None]:
    """Say of a message that does not get through what it means."""
    try:
        yield
    except RuntimeError as error:  # gloo and nccl have no error of their own for all that happens
        raise LostProcessError(f"another process of this training ended or does not answer: {short(error)}") from error


class Exchange:
    """The messages of one process; tensors come out on `device`, whatever carries them.

    Every method raises LostProcessError where the others do not answer within the group's timeout.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.carrier = device if _own_devices(device) else torch.device("cpu")  # by nccl, else by gloo
        self.layout_in: list[Any] = []
        self.layout_out: list[Any] = []
        self.under_way: deque[list[Any]] = deque()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.processes - 1

    @reaching_others()
    def pass_on(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors, of the same shapes every time, to the next process, and do not wait for it to take them."""
        carried = [tensor.to(self.carrier).contiguous() for tensor in tensors]
        if not self.layout_out:
            self.layout_out = [(tensor.shape, tensor.dtype) for tensor in carried]
            dist.send_object_list([self.layout_out], self.rank + 1, device=self.carrier)
        while len(self.under_way) >= AHEAD:
            self._wait_for_oldest()
        self.under_way.append([(dist.isend(tensor, self.rank + 1), tensor) for tensor in carried])

    @reaching_others()
    def receive(self) -> list[Tensor]:
        """Return what the process before this one passed on."""
        if not self.layout_in:
            told = [None]
            dist.recv_object_list(told, self.rank - 1, device=self.carrier)
            self.layout_in = told[0]
        tensors = [torch.empty(shape, dtype=dtype, device=self.carrier) for shape, dtype in self.layout_in]
        for tensor in tensors:
            dist.recv(tensor, self.rank - 1)
        return [tensor.to(self.device) for tensor in tensors]

    @reaching_others()
    def collect(self, state: Any) -> list[Any]:
        """Return the states of all processes on the first one, nothing on the others; tensors on the CPU."""
        while self.under_way:
            self._wait_for_oldest()
        packed = [None] * self.processes if self.is_first else None
        dist.gather_object(_packed(state), packed)
        return [_unpacked(each, "cpu") for each in packed or ()]

    @reaching_others()
    def spread(self, state: Any) -> Any:
        """Return the state that the first process gives."""
        packed = [_packed(state) if self.is_first else None]
        dist.broadcast_object_list(packed)
        return _unpacked(packed[0], self.device)

    def _wait_for_oldest(self) -> None:
        for work, _ in self.under_way.popleft():
            work.wait()


def _own_devices(device: torch.device) -> bool:
    """Return whether each process has a GPU of its own, between which nccl carries tensors."""
    if device.type != "cuda":
        return False
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (platform.node(), str(device)))
    return len(set(found)) == len(found)


def short(error: Exception) -> str:
    """Return the first sentence of what torch.distributed says, without the place in its source."""
    return re.sub(r"\[/[^\]]*\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]


def _packed(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes, device: torch.device | str) -> Any:
    return torch.load(io.BytesIO(packed), map_location=device, weights_only=True)
