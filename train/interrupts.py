"""Ctrl-C as a question that training looks at between steps, so that nothing is cut in half.

The first one is noted, the next one ends the process as usual. A signal belongs to the process, and
so does what is kept here; workers of a process pool note for themselves.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any

_noted = threading.Event()


def is_stopping() -> bool:
    """Whether Ctrl-C asked to stop."""
    return _noted.is_set()


@contextmanager
def noted() -> Iterator[None]:
    """Note Ctrl-C within the block; outside of the main thread, which gets no signals, nothing."""
    _noted.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(*_: Any) -> None:
        _noted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):  # print could be interrupted by itself
            os.write(2, b"\nstopping; Ctrl-C once more ends at once\n")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _noted.clear()


def note_in_worker() -> None:
    """Note Ctrl-C from now on, one that came while SIGINT was blocked included."""

    def note(*_: Any) -> None:
        _noted.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def held_back() -> Iterator[None]:
    """Let Ctrl-C wait within the block, also in processes that start there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def processes(n: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end without a word on Ctrl-C, and no new task once the block is left.

    A task that notes Ctrl-C itself (`noted`) is ended by that.
    """
    ended_by_signal = signal.SIGINT, signal.SIG_DFL
    pool = ProcessPoolExecutor(n, get_context("spawn"), signal.signal, ended_by_signal)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
