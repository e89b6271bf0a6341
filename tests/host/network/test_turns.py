"""Threads that take turns at a block, as MultiGPU CFG Split's do."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from step1x_core.host.network import turns
from step1x_core.host.network.turns import THREAD_DEVICE, Turns, in_turn

TIMEOUT = 30


def in_threads(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        for running in [pool.submit(call) for call in calls]:
            running.result(TIMEOUT)


def test_the_one_who_waits_is_next():
    shared, order, both_here = Turns(patience=TIMEOUT), [], threading.Barrier(2)

    def work():
        both_here.wait()
        for _ in range(20):
            with shared.taken():
                order.append(threading.get_ident())
                time.sleep(0.01)

    in_threads(work, work)
    # A plain lock would give long rows of one thread. The last ones of the slower thread stand alone.
    assert sum(first != second for first, second in zip(order, order[1:])) > 30


def test_one_at_a_time_until_patience_ends():
    shared, inside, most = Turns(patience=0.2), [], []

    def work(seconds):
        with shared.taken():
            inside.append(seconds)
            most.append(len(inside))
            time.sleep(seconds)
            inside.remove(seconds)

    in_threads(*[lambda: work(0.01)] * 3)
    assert most == [1, 1, 1]
    in_threads(lambda: work(1.0), lambda: (time.sleep(0.1), work(0.02)))
    assert max(most) == 2
    # Whoever went on without the turn does not give it back for the holder.
    most.clear()
    in_threads(*[lambda: work(0.01)] * 3)
    assert most == [1, 1, 1]


def test_an_error_gives_the_turn_back(monkeypatch):
    shared = Turns(patience=TIMEOUT)
    monkeypatch.setattr(turns, "TURNS", shared)

    @in_turn
    def forward(self, x, transformer_options={}):
        assert shared.turn.locked() == (THREAD_DEVICE in transformer_options)
        return 1 / x

    with pytest.raises(ZeroDivisionError):
        forward(None, 0, transformer_options={THREAD_DEVICE: "cuda:1"})
    assert not shared.turn.locked()
    assert forward(None, 2, transformer_options={THREAD_DEVICE: "cuda:1"}) == forward(None, x=2) == 0.5
