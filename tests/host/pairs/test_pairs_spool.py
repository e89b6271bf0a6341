"""Computed pairs wait on the disk, one picture is worked on at a time."""

import tempfile

import numpy as np
import pytest
import torch

from step1x_core.errors import Step1XError
from step1x_core.host.pairs import making as pair_making
from step1x_core.host.pairs.making import algorithmic_pairs
from step1x_core.pairs.orders import ORDER_KINDS, carry_out, orders, shrink
from step1x_core.pairs.record import digest


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
