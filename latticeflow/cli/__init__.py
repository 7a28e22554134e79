"""The command line: `latticeflow COMMAND`. Exit codes: 0 done, 2 usage, 65 bad data, 74 I/O, 75 locked, 78 bad
configuration, 130 interrupted."""

import os
import re
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import NoReturn

from latticeflow.cli.arguments import parser

USAGE, BAD_DATA, IO_ERROR, BAD_CONFIG, INTERRUPTED, FAILED = 2, 65, 74, 78, 130, 1
OUT_OF_MEMORY = "can't allocate memory|out of memory|not enough memory"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected failure is one message on standard error."""
    options = parser().parse_args(arguments)
    # Threads that spin while they wait make a step ten times slower when cores are shared; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _interrupt)
    code = FAILED
    try:
        code = _guarded(options)
    except KeyboardInterrupt:
        if _rank() == 0:
            print(f"interrupted; {_how_to_resume(options)}", file=sys.stderr)
        code = INTERRUPTED
    finally:
        if "WORLD_SIZE" in os.environ:
            _leave(code)
    return code


def _guarded(options: Namespace) -> int:
    # Imported here so that `--help` and usage errors do not wait for torch.
    from latticeflow.cli.chains import SamplingError
    from latticeflow.cli.commands import execute
    from latticeflow.cli.folder import UsageError
    from latticeflow.config import ConfigError
    from latticeflow.flows import SingularWeightsError
    from latticeflow.storage import StorageError
    from latticeflow.training import LostProcessError, TrainingError

    try:
        execute(options)
    except ConfigError as error:
        return _fail(error, BAD_CONFIG)
    except UsageError as error:
        return _fail(error, USAGE)
    except StorageError as error:
        return _fail(error, error.exit_code)
    except (LostProcessError, SamplingError, SingularWeightsError, TrainingError) as error:
        return _fail(error, FAILED)
    except OSError as error:
        return _fail(error, IO_ERROR)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        return _fail(f"not enough memory: {str(error).strip().splitlines()[0]}", FAILED)
    return 0


def _fail(error: Exception | str, code: int) -> int:
    if _rank() == 0:
        print(f"latticeflow: {error}", file=sys.stderr)
    elif code != USAGE:  # of the environment, which the first process says as well
        print(f"latticeflow (process {_rank()}, counted from 0): {error}", file=sys.stderr)
    return code


def _leave(code: int) -> None:
    """End with the other processes; what had to be said has been said."""
    from latticeflow.cli.processes import leave

    leave(code)


def _rank() -> int:
    """Return the place of this process among those that `torchrun` started."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() and "WORLD_SIZE" in os.environ else 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _how_to_resume(options: Namespace) -> str:
    words = ["latticeflow", options.command]
    if options.command in ("run", "train"):
        words += [str(options.config), *(("--out", str(options.out)) if options.out else ())]
        words += [word for change in options.overrides for word in ("--set", change)] + ["--resume"]
    elif options.command == "sample":
        words += [str(options.folder)]
    else:
        return "what was stored before is kept"
    words += ["--extend", str(options.extend)] if getattr(options, "extend", 0) else []
    return f"go on with: {shlex.join(words)}"
