"""Where a run's numbers come from: software, machine and command."""

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import latticeflow

_CHECKOUT = Path(latticeflow.__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """Describe this process, ready for JSON; what cannot be found out is None.

    Keys: package_version, git_commit, git_dirty, python, torch, numpy, h5py, host, platform, cpu_count, cpus_usable,
    threads (of torch), command, started (UTC).
    """
    commit, dirty = _git_state(_CHECKOUT)
    return {
        "package_version": latticeflow.__version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "h5py")},
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": _usable_cpus(),
        "threads": _torch_threads(),
        "command": list(sys.orig_argv),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _usable_cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _torch_threads() -> int | None:
    torch = sys.modules.get("torch")  # describing a process must not load torch into it
    return torch.get_num_threads() if torch else None


def _git_state(checkout: Path) -> tuple[str | None, bool | None]:
    """Commit, and whether tracked files differ from it; only of the package's own repository, not of one around it."""
    top = _git(checkout, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != checkout:
        return None, None
    changes = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return _git(checkout, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
