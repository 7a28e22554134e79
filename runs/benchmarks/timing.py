"""How long, and how much memory: seconds of methods that take turns, and peaks of memory above where they began.

As a program it is a process of its own for one measurement of memory, see `fresh_peak`.
"""

import ctypes
import gc
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from latticeflow.storage import provenance

Work = Callable[[], object]


class Clock:
    """Seconds of this process's CPU time or, on a GPU, of the wall once the device has nothing left to do."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Work) -> float:
        started = self.now()
        work()
        return self.now() - started


def in_turns(
    works: Mapping[str, Work], clock: Clock, *, repeats: int = 5, limit: float = math.inf
) -> dict[str, list[float]]:
    """Return the seconds of each work, all of them in turn, `repeats` times after a first time that does not count.

    A work gets no further turn that would take it beyond `limit` seconds altogether; where there is none at all, its
    first time has to do.
    """
    first = {name: clock.seconds(work) for name, work in works.items()}
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            if 2 * first[name] + sum(found[name]) < limit:
                found[name].append(clock.seconds(work))
    return {name: times or [first[name]] for name, times in found.items()}


def medians(works: Mapping[str, Work], clock: Clock, *, repeats: int = 5, limit: float = math.inf) -> dict[str, float]:
    """Return the median seconds of each work, all of them in turn."""
    return {name: median(times) for name, times in in_turns(works, clock, repeats=repeats, limit=limit).items()}


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of log value against log size."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def peak_megabytes(work: Work, device: str = "cpu") -> float:
    """Return how far memory rises while the work is done above what was in use before, in MB.

    On the CPU it is that of the process, so what an earlier peak has left to the allocator is given back first.
    """
    gc.collect()
    if torch.device(device).type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _memory("VmRSS")
    work()
    return max(0.0, _memory("VmHWM") - before)


def _memory(name: str) -> float:
    """Return an entry of the process's status in MB; ru_maxrss would count the parent of a new process too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1.024e-3 for line in lines if line.startswith(name))


def fresh_peak(module: str, function: str, *, device: str = "cpu", threads: int = 1, **arguments: Any) -> float:
    """Return the peak of the work that `module.function(**arguments)` returns, in a process of its own.

    The process does it once before, so that what is loaded and built, and stays, does not count. Raises RuntimeError
    with the last line of its errors.
    """
    task = {"module": module, "function": function, "device": device, "threads": threads, "arguments": arguments}
    done = subprocess.run([sys.executable, __file__, json.dumps(task)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module}.{function}({arguments}): {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.splitlines()[-1])


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return versions, threads and processor for the results."""
    own = {name: value for name, value in provenance().items() if name not in ("host", "command")}
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        own["cpu"] = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    if torch.device(device).type != "cpu":
        own["gpu"] = torch.cuda.get_device_name(device)
    return own


def _main(task: str) -> None:
    options = json.loads(task)
    torch.set_num_threads(options["threads"])
    work = getattr(importlib.import_module(options["module"]), options["function"])(**options["arguments"])
    work()
    print(peak_megabytes(work, options["device"]))


if __name__ == "__main__":
    _main(sys.argv[1])
