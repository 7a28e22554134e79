"""Stopping in order: the first signal lets a piece of work finish, a second one stops at once."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PASSED_ON = 1.0
"""Seconds in which torchrun passes on to its processes what the terminal has sent to all of them."""


class Stop:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def here(self, *, also: bool = False) -> None:
        """Raise KeyboardInterrupt if somebody asked, `also` elsewhere: what is to be kept is stored."""
        if self.asked or also:
            raise KeyboardInterrupt


@contextmanager
def finishing(piece: str) -> Iterator[Stop]:
    """Let a first SIGINT or SIGTERM wait for `Stop.here`, which the work calls between its pieces.

    A second one raises KeyboardInterrupt wherever the work is; of several processes, one a second later.
    """
    stop, again = Stop(), time.monotonic()

    def note(*_: object) -> None:
        nonlocal again
        if stop.asked and time.monotonic() < again:
            return
        stop.here()
        stop.asked = True
        again = time.monotonic() + (PASSED_ON if "WORLD_SIZE" in os.environ else 0.0)
        # Not print, which must not be entered again while it is interrupted.
        os.write(sys.__stderr__.fileno(), f"stopping after this {piece}; again to stop at once\n".encode())

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
