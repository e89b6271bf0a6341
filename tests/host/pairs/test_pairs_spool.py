"""Computed pairs wait on the disk, one picture is worked on at a time."""

import tempfile
import tracemalloc

import numpy as np
import pytest
import torch

from step1x_core.errors import Step1XError
from step1x_core.host.pairs import making as pair_making
from step1x_core.host.pairs.making import algorithmic_pairs
from step1x_core.pairs.orders import ORDER_KINDS, carry_out, orders, shrink
from step1x_core.pairs.record import Pair, digest
from step1x_core.pairs.spool import spooled


def pictures(count, side=96):
    return torch.rand((count, side, side, 3), generator=torch.Generator().manual_seed(3))


def test_pairs_from_the_disk_are_those_that_were_made():
    images = [pictures(2), pictures(1, 128)]
    pairs, report = algorithmic_pairs(images, "", 6, 4, 0)
    made = []
    for picture in pair_making.pictures(images, "images"):
        picture = shrink(picture, 0)
        name = digest(picture.tobytes())
        made += [carry_out(picture, name, order, 4) for order in orders(name, list(ORDER_KINDS), 0, 6, 4)]
    suited = [pair for pair in made if pair]
    assert suited and report.startswith(f"{len(suited)} pairs made; {len(made) - len(suited)} edits did not suit")
    for pair, direct in zip(pairs, suited, strict=True):
        assert np.array_equal(pair.source, direct.source) and np.array_equal(pair.target, direct.target)
        assert (pair.kind, pair.maker, pair.instruction, pair.details) == (direct.kind, direct.maker, direct.instruction, direct.details)


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


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(Step1XError, match="cannot be kept in .*No space left.*Free space on the disk"):
        algorithmic_pairs([pictures(1)], "", 1, 1, 0)


def test_a_picture_that_is_too_small_is_told_before_others_are_worked_on(monkeypatch):
    monkeypatch.setattr(pair_making, "carry_out", lambda *args: pytest.fail("worked"))
    with pytest.raises(Step1XError, match="has 16x16 pixels"):
        algorithmic_pairs([pictures(1), pictures(1, 16)], "", 1, 1, 0)
