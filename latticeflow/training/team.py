"""The processes that do one thing together: what each has of a batch, and what they bring together in every step."""

import time
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from latticeflow.streams import SharedStream
from latticeflow.training.exchange import Exchange, reaching_others


class Alone:
    """A single process, which has all of a batch and nothing to bring together."""

    rank, processes = 0, 1

    def share(self, n: int) -> int:
        """Return how many of n rows this process has."""
        return n

    def stream(self, generator: Generator, n: int) -> Generator | SharedStream:
        """Return the stream that this process draws its rows of n from."""
        return generator

    def joined_rows(self, own: list[Tensor]) -> list[Tensor]:
        """Return for each of these the rows of all processes, in their order."""
        return own

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their means over all processes."""


class Team(Exchange, Alone):
    """The processes of torch.distributed's default group, with equal numbers of rows that follow each other.

    `wants_stop` is set where somebody asked this process to stop, `stop_wanted` after a step in which any of the others
    was; `elsewhere` are the CPU seconds of others in the steps so far, to be taken by who notes them down. `waiting` is
    whether the others, between two things to do, wait for the first process to say what is next. Methods that all
    have to call raise LostProcessError where another one does not.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.wants_stop = self.stop_wanted = False
        self.waiting, self.elsewhere, self.cpu = True, 0.0, time.process_time()

    def share(self, n: int) -> int:
        """Return how many of n rows each process has. Raises ValueError where they are not equally many."""
        if n % self.processes:
            raise ValueError(f"{n} cannot be shared equally by {self.processes} processes")
        return n // self.processes

    def rows(self, n: int) -> slice:
        """Return which of n rows are those of this process."""
        own = self.share(n)
        return slice(self.rank * own, (self.rank + 1) * own)

    def stream(self, generator: Generator, n: int) -> SharedStream:
        return SharedStream(generator, self.rows(n), n)

    def joined_rows(self, own: list[Tensor]) -> list[Tensor]:
        """Return for each of these, float64, the rows of all processes, and note what else the others tell."""
        spent = self._cpu_since_last()
        told = torch.tensor([float(self.wants_stop), spent], dtype=torch.float64, device=own[0].device)
        everything = self.gathered(torch.cat([told, *own]))
        self.stop_wanted = self.stop_wanted or bool(everything[:, 0].any())
        self.elsewhere += float(everything[:, 1].sum()) - spent
        return [rows.flatten() for rows in everything[:, 2:].split([len(each) for each in own], dim=1)]

    @reaching_others()
    def gathered(self, own: Tensor) -> Tensor:
        """Return `(processes, ...)`, tensors of one shape, one from each process."""
        carried = own.to(self.carrier).contiguous()
        received = [torch.empty_like(carried) for _ in range(self.processes)]
        dist.all_gather(received, carried)
        return torch.stack(received).to(own.device)

    @reaching_others()
    def average(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their means over all processes; those that no process has stay away.

        They travel in one buffer for each type of number, and are the same on all processes bit for bit.
        """
        of_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            of_type.setdefault(parameter.dtype, []).append(parameter)
        for alike in of_type.values():
            self._average(alike)

    def _average(self, parameters: Sequence[Tensor]) -> None:
        zero = torch.zeros_like
        gradients = [zero(each) if each.grad is None else each.grad for each in parameters]
        there = torch.tensor([each.grad is not None for each in parameters])
        buffer = torch.cat([*(each.flatten() for each in gradients), there.to(gradients[0])]).to(self.carrier)
        dist.all_reduce(buffer)
        *means, there = buffer.to(parameters[0].device).split([*map(torch.numel, gradients), len(parameters)])
        for parameter, mean, count in zip(parameters, means, there.tolist(), strict=True):
            if count:
                parameter.grad = (mean / self.processes).view_as(parameter)

    @reaching_others()
    def spread_word(self, word: int) -> int:
        """Return the number that the first process gives."""
        told = torch.tensor(word, device=self.carrier)
        dist.broadcast(told, 0)
        return int(told)

    def taken_elsewhere(self) -> float:
        """Return the CPU seconds of others that have not been taken yet."""
        taken, self.elsewhere = self.elsewhere, 0.0
        return taken

    def _cpu_since_last(self) -> float:
        now = time.process_time()
        spent, self.cpu = now - self.cpu, now
        return spent


ALONE = Alone()
