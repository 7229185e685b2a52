"""When a sweep ends before its last trial: Ctrl-C, a time limit, and how the driver is told."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from autorank.errors import TrialError


class StopSignal:
    """Says whether a sweep should end, and why.

    Parameters
    ----------
    max_time : float or None
        Seconds from now after which no further trial is started.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self._deadline = None if max_time is None else time.monotonic() + max_time
        self._reason = ""
        self._interrupted = False

    @property
    def reason(self) -> str:
        """Why to stop; empty while the sweep should go on."""
        if not self._reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "time limit reached"
        return self._reason

    @property
    def interrupted(self) -> bool:
        """Whether a person stopped the sweep."""
        return self._interrupted

    def interrupt(self) -> None:
        """Ask for a stop on behalf of a person."""
        self._interrupted = True
        self._reason = self._reason or "interrupted"


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TrialError` inside the block once it takes longer; in the main thread, where signals are taken."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise TrialError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def interrupts(stop: StopSignal, say: Callable[[str], None]) -> Iterator[None]:
    """Turn Ctrl-C (and SIGTERM) into a request to stop; a second one raises KeyboardInterrupt.

    Outside the main thread nothing can be caught, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.interrupted:
            say("stopped now; everything that finished is saved: `autorank resume` goes on")
            raise KeyboardInterrupt
        stop.interrupt()
        say("stopping once the running trials are finished (press Ctrl-C again to stop now; finished trials are safe)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
