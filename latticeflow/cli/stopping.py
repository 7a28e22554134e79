"""Stopping in order: the first signal lets a piece of work finish, a second one stops at once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def here(self) -> None:
        """Raise KeyboardInterrupt if somebody asked: what is to be kept is stored."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def finishing(piece: str) -> Iterator[Stop]:
    """Let a first SIGINT or SIGTERM wait for `Stop.here`, which the work calls between its pieces.

    A second one raises KeyboardInterrupt wherever the work is.
    """
    stop = Stop()

    def note(*_: object) -> None:
        stop.here()
        stop.asked = True
        # Not print, which must not be entered again while it is interrupted.
        os.write(sys.__stderr__.fileno(), f"stopping after this {piece}; again to stop at once\n".encode())

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
