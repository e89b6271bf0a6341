"""Edits of photographs as a ground for a miniature: pairs by index, and what counts as the edit that was asked for."""

import numpy as np
import pytest
from PIL import Image

from miniature.grounds import ground, judge
from miniature.photographs import HELD_OUT, KINDS, TRAINED, find_folder, other_targets

SIDE = (64, 64)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Blobs of coloured noise in place of the photographs, held-out ones brighter than the others."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in TRAINED + HELD_OUT:
        low = 100 if name in HELD_OUT else 0
        noise = Image.fromarray(rng.integers(low, low + 155, (32, 32, 3), dtype=np.uint8))
        noise.resize((96, 96), Image.Resampling.BICUBIC).save(folder / name, quality=100)
    return ground("photographs", folder)


def test_a_pair_is_the_same_on_every_call_and_every_index_has_its_own(photographs):
    one, again, other = (photographs.pair_at(3, index, size=SIDE) for index in (5, 5, 6))
    assert np.array_equal(one.source, again.source) and np.array_equal(one.target, again.target)
    assert one.instruction == again.instruction and not np.array_equal(one.source, other.source)


def test_held_out_edits_are_of_other_photographs(photographs):
    means = {split: photographs.pair_at(0, 0, split, SIDE, kind="sepia").source.mean() for split in ("train", "heldout")}
    assert means["train"] < 110 and means["heldout"] > 145


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recolour"])
def test_the_target_is_right_and_neither_the_source_nor_another_edit_is(photographs, kind):
    pair = photographs.pair_at(1, 2, "heldout", SIDE, kind=kind, language="en")
    assert pair.kind == kind and judge(pair, pair.target).success
    assert not judge(pair, pair.source).success
    assert len(pair.others) == len(KINDS) - 1 and not any(judge(pair, other).success for other in pair.others)


def test_a_kind_that_changes_no_photograph_is_told(tmp_path):
    for name in TRAINED + HELD_OUT:
        Image.new("RGB", (64, 64), "grey").save(tmp_path / name)
    with pytest.raises(ValueError, match="recolour"):
        ground("photographs", tmp_path).pair_at(0, 0, size=SIDE, kind="recolour")


def test_the_other_edits_are_made_once():
    picture = np.full((64, 64, 3), 90, np.uint8)
    assert other_targets(picture.tobytes(), picture.shape, "night") is other_targets(picture.tobytes(), picture.shape, "night")


def test_without_the_photographs_it_says_where_they_come_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
        find_folder(tmp_path)
