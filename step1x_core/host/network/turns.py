"""Makes the threads of MultiGPU CFG Split take turns at launching kernels.

Two threads that launch kernels at the same time lose a tenth of the time or more to passing Python's lock at every call
(docs/performance_notes.md).
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Entry of transformer_options that the host sets when it runs one thread for each device.
THREAD_DEVICE = "multigpu_thread_device"


class Turns:
    """A lock that alternates between two threads. It is optional: after `patience` seconds a thread continues without
    it, since the holder may itself be waiting for weights or for its device."""

    def __init__(self, patience: float = 0.01):
        self.patience = patience
        self.line, self.turn = threading.Lock(), threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        # One thread waits for the turn, the others for their place in the queue; with a single lock, the releasing
        # thread would reacquire it at once.
        with self.line:
            mine = self.turn.acquire(timeout=self.patience)
        try:
            yield
        finally:
            if mine:
                self.turn.release()


# One for all models, because Python has one lock for all threads.
TURNS = Turns()


def in_turn(forward: Callable) -> Callable:
    """Wrap a block's forward so that it waits for its turn if there is one thread for each device."""
    @functools.wraps(forward)
    def turned(self, *args, transformer_options={}, **kwargs):
        if THREAD_DEVICE not in transformer_options:
            return forward(self, *args, transformer_options=transformer_options, **kwargs)
        with TURNS.taken():
            return forward(self, *args, transformer_options=transformer_options, **kwargs)

    return turned
