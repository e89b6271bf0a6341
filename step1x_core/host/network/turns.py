"""Threads of MultiGPU CFG Split that take turns at starting kernels.

Two threads that start kernels at the same time lose a tenth of it and more in handing Python's lock over at every call (docs/performance_notes.md).
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Entry of transformer_options that the host makes where it runs one thread for each device.
THREAD_DEVICE = "multigpu_thread_device"


class Turns:
    """A lock that goes, of two threads, to the one that waits. It is a courtesy: after `patience` seconds a thread goes on without it, since the holder may itself be
    waiting for weights or for its device."""

    def __init__(self, patience: float = 0.01):
        self.patience = patience
        self.line, self.turn = threading.Lock(), threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        # One thread waits for the turn, the others for its place; with one lock alone the thread that lets go would take it again at once.
        with self.line:
            mine = self.turn.acquire(timeout=self.patience)
        try:
            yield
        finally:
            if mine:
                self.turn.release()


# One for all models, since Python has one lock for all threads.
TURNS = Turns()


def in_turn(forward: Callable) -> Callable:
    """A block's forward that waits for its turn where there is one thread for each device."""
    @functools.wraps(forward)
    def turned(self, *args, transformer_options={}, **kwargs):
        if THREAD_DEVICE not in transformer_options:
            return forward(self, *args, transformer_options=transformer_options, **kwargs)
        with TURNS.taken():
            return forward(self, *args, transformer_options=transformer_options, **kwargs)

    return turned
