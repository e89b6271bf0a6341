"""Pairs kept on disk, without ComfyUI."""

import tracemalloc

import numpy as np

from step1x_core.pairs.record import Pair
from step1x_core.pairs.spool import spooled


def test_memory_does_not_grow_with_the_pairs(tmp_path):
    size = 512 * 512 * 3

    def made():
        for number in range(40):
            yield Pair(np.full((512, 512, 3), number, np.uint8), np.full((512, 512, 3), 99, np.uint8), "tone_transfer", "x", "", "test")

    tracemalloc.start()
    pairs = spooled(made(), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == 40 and peak < 8 * size
    assert [int(pair.source[5, 5, 1]) for pair in pairs] == list(range(40)) and not list(tmp_path.iterdir())


def test_a_picture_that_pairs_share_is_stored_once(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    pairs = spooled((Pair(picture, picture + number, "tone_transfer", "x", "", "test") for number in range(3)), tmp_path)
    assert len({pair.source.ctypes.data for pair in pairs}) == 1 and [pair.target.max() for pair in pairs] == [0, 1, 2]
    assert spooled(iter(()), tmp_path) == ()
