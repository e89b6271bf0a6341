"""Scenes, edit pairs and their judge: training data is only as good as these."""

import itertools
import json
import re
import string
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from miniature.drawing import BACKGROUNDS, COLOURS, SHAPES, WORDS, Background, Scene, Thing, colour_distance, render, things_area
from miniature.edits import EDITS, plain_background, with_thing
from miniature.instructions import (
    CHINESE_COLOURS,
    CHINESE_PLACES,
    CHINESE_SHAPES,
    ENGLISH_PLACES,
    TEMPLATES,
    Reference,
    choose_reference,
    is_unique,
    matching,
)
from miniature.layout import PLACES, in_place, sample_scene
from miniature.scenes import KIND_SHARES, KINDS, LANGUAGES, SPLITS, judge, make_pair, pair_at, write_dataset

SIZES = ((128, 128), (96, 96), (256, 96), (112, 240), (256, 256))


@pytest.fixture(scope="module")
def pairs():
    return [pair_at(1, index) for index in range(500)]


def only(pairs, *kinds):
    return [pair for pair in pairs if pair.kind in kinds]


def spoil(picture, rng):
    """What an autoencoder does to a picture: slightly blurred, slightly noisy."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)), np.float32)
    return np.clip(np.round(blurred + rng.normal(0, 0.02 * 255, picture.shape)), 0, 255).astype(np.uint8)


def scene_of(*things, word=None):
    """Things given as (shape, colour, x, y) on a white picture of 128x128 pixels."""
    return Scene(
        128,
        128,
        plain_background("white"),
        tuple(Thing(shape, colour, COLOURS[colour], x, y, 16) for shape, colour, x, y in things),
        word,
    )


def look(pair):
    return pair.source.tobytes(), pair.target.tobytes(), pair.instruction, pair.kind, pair.language


def test_same_seed_same_pair():
    for split in SPLITS:
        assert [look(pair_at(3, index, split)) for index in (5, 6)] == [look(pair_at(3, index, split)) for index in (5, 6)]


def test_seeds_indices_and_splits_differ():
    sources = [pair_at(seed, index, split).source.tobytes() for split in SPLITS for seed in (0, 1) for index in range(30)]
    assert len(set(sources)) == len(sources)


def test_every_kind_and_language_turns_up(pairs):
    assert {(pair.kind, pair.language) for pair in pairs} >= set(itertools.product(KINDS, LANGUAGES))
    assert sum(KIND_SHARES.values()) == pytest.approx(1)
    assert len(only(pairs, "none")) < 0.1 * len(pairs)
    assert {pair.details["style"] for pair in only(pairs, "style")} == {"invert", "greyscale", "pixelate"}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_language_can_be_chosen(kind):
    for language in LANGUAGES:
        pair = make_pair(np.random.default_rng(4), kind=kind, language=language)
        assert (pair.kind, pair.language) == (kind, language)
        assert pair.instruction.isascii() or language == "zh" or "“" in pair.instruction


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    shape = (*size[::-1], 3)
    for kind in KINDS:
        pair = pair_at(0, 7, size=size, kind=kind)
        assert pair.source.shape == pair.target.shape == shape and pair.region.shape == shape[:2]
        assert pair.source.dtype == pair.target.dtype == np.uint8 and pair.region.dtype == bool
        assert judge(pair, pair.target).success


@pytest.mark.parametrize("size", [(120, 128), (80, 128), (128, 272)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 16"):
        pair_at(0, 0, size=size)


def test_colours_are_far_apart():
    assert min(colour_distance(a, b) for a, b in itertools.combinations(COLOURS.values(), 2)) >= 100


@pytest.mark.parametrize("size", SIZES)
def test_objects_keep_apart(size):
    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(60):
        scene = sample_scene(rng, size)
        counts.add(len(scene.things))
        areas = sum(things_area(scene, (thing,), 2).astype(int) for thing in scene.things)
        assert areas.max() == 1
        assert not areas[[0, -1]].any() and not areas[:, [0, -1]].any()
        if scene.word:
            letters = np.any(render(replace(scene, things=())) != render(replace(scene, things=(), word=None)), axis=-1)
            assert letters.any() and not (letters & (areas > 0)).any()
    assert counts >= {1, 2, 3}


def test_no_rendering_writes_to_shared_arrays():
    scene = scene_of(("circle", "red", 40, 40))
    before = render(replace(scene, things=()))
    render(scene)
    assert np.array_equal(render(replace(scene, things=())), before)


def test_outside_the_region_nothing_changes(pairs):
    for pair in pairs:
        changed = (pair.source != pair.target).any(-1)
        assert not (changed & ~pair.region).any()
        assert changed.any() == (pair.kind != "none")
        if pair.kind in ("recolour", "replace", "remove", "add", "text"):
            assert pair.region.mean() < 0.35


def test_matching():
    scene = scene_of(("circle", "red", 24, 24), ("circle", "red", 104, 64), ("circle", "blue", 24, 104), ("star", "red", 64, 64))
    assert matching(Reference("circle"), scene) == [0, 1, 2]
    assert matching(Reference("circle", "red"), scene) == [0, 1]
    assert matching(Reference("circle", place="left"), scene) == [0, 2]
    assert matching(Reference("circle", place="middle"), scene) == []
    unique = [Reference("star"), Reference("circle", "blue"), Reference("circle", place="right"), Reference("circle", "red", "left"),
              Reference("circle", None, "bottom left")]
    assert all(is_unique(reference, scene) for reference in unique)
    assert not any(is_unique(reference, scene) for reference in (Reference("circle", "red"), Reference("star", "blue")))


def test_twins_in_one_column_have_no_ambiguous_reference():
    # "On the left" would do for both, and the middle of the left edge has no name of its own.
    scene = scene_of(("circle", "red", 24, 24), ("circle", "red", 24, 64))
    rng = np.random.default_rng(0)
    assert choose_reference(rng, scene, 1) is None
    assert {choose_reference(rng, scene, 0).place for _ in range(50)} == {"top", "top left"}


def said_in_english(instruction):
    """The object that an English instruction refers to, read from its words alone."""
    text = instruction.rstrip(".!").lower()
    said = re.search(rf"the ((?:{'|'.join(PLACES)}) )?((?:{'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})\b ?(.*)", text)
    before, colour, shape, rest = (group and group.strip() for group in said.groups())
    after = [(len(wording), name) for name, wordings in ENGLISH_PLACES.items() for wording in wordings if rest.startswith(wording)]
    return Reference(shape, colour, before or (max(after)[1] if after else None))


def said_in_chinese(instruction):
    # "用一个圆形代替..." names the new shape first.
    instruction = instruction.split("代替")[-1]
    at, shape = min((instruction.find(name), shape) for shape, name in CHINESE_SHAPES.items() if name in instruction)
    before = instruction[:at]
    colour = next((english for english in COLOURS if CHINESE_COLOURS[english] in before), None)
    places = [(len(wording), name) for name, wordings in CHINESE_PLACES.items() for wording in wordings if wording in before]
    return Reference(shape, colour, max(places)[1] if places else None)


def test_instructions_mean_one_object(pairs):
    """Reads the sentences back, so this also covers the wording."""
    referring = only(pairs, "recolour", "replace", "remove")
    assert len(referring) > 200
    for pair in referring:
        read = (said_in_english if pair.language == "en" else said_in_chinese)(pair.instruction)
        assert read == pair.details["reference"], pair.instruction
        assert matching(read, pair.scene) == [pair.details["thing"]]
    places = {pair.details["reference"].place for pair in referring}
    assert places == {None, *PLACES}


def test_recolour_replace_and_remove_touch_the_object_meant(pairs):
    for pair in only(pairs, "recolour", "replace", "remove"):
        index, details = pair.details["thing"], pair.details
        old = pair.scene.things[index]
        others = pair.scene.things[:index] + pair.scene.things[index + 1:]
        if pair.kind == "remove":
            assert pair.edited.things == others
        else:
            new = pair.edited.things[index]
            assert pair.edited.things[:index] + pair.edited.things[index + 1:] == others
            assert (new.x, new.y, new.radius) == (old.x, old.y, old.radius)
            assert (
                (new.shape, new.colour)
                == (details.get("shape", old.shape), details.get("colour", old.colour))
                != (old.shape, old.colour)
            )


def test_added_objects_are_where_they_were_asked_for(pairs):
    for pair in only(pairs, "add"):
        new = pair.edited.things[-1]
        assert pair.edited.things[:-1] == pair.scene.things
        assert in_place(new, pair.edited, pair.details["place"])
        spoken = (CHINESE_PLACES if pair.language == "zh" else ENGLISH_PLACES)[pair.details["place"]]
        assert any(wording in pair.instruction.lower() for wording in spoken)
        assert (CHINESE_SHAPES[new.shape] if pair.language == "zh" else new.shape) in pair.instruction
        assert (CHINESE_COLOURS[new.colour] if pair.language == "zh" else new.colour) in pair.instruction


def test_templates():
    for language in LANGUAGES:
        assert TEMPLATES[language].keys() == {*KINDS, "invert", "greyscale", "pixelate"} - {"style", "none"}
        for wish, templates in TEMPLATES[language].items():
            assert len(set(templates)) == len(templates) >= 6
            needed = {"recolour": {"ref", "colour"}, "replace": {"ref", "shape"}, "remove": {"ref"}, "add": {"thing", "place"},
                      "background": {"colour"}, "text": {"new"}}.get(wish, set())
            for template in templates:
                slots = {name.removeprefix("a_") for _, name, _, _ in string.Formatter().parse(template) if name}
                assert slots - {"old"} == needed, template


def test_instructions_vary():
    pairs = [pair_at(2, index, kind="text") for index in range(150)]
    texts = [pair.instruction for pair in pairs]
    assert all(f'"{pair.edited.word.text}"' in pair.instruction or f"“{pair.edited.word.text}”" in pair.instruction for pair in pairs)
    assert 15 < sum("“" in text for text in texts) < 100
    assert 15 < sum(text.endswith((".", "。")) for text in texts) < 100
    english = [text for text in texts if text.isascii()]
    assert 5 < sum(text[0].isupper() for text in english) < len(english) - 5


def test_the_target_succeeds_and_the_source_does_not(pairs):
    for pair in pairs[:200]:
        verdict = judge(pair, pair.target)
        assert verdict.success and verdict.outside_error == verdict.region_error == 0
        assert judge(pair, pair.source).success == (pair.kind == "none")


def test_a_spoilt_target_still_succeeds(pairs):
    rng = np.random.default_rng(0)
    assert np.mean([judge(pair, spoil(pair.target, rng)).success for pair in pairs[:200]]) >= 0.99
    assert not any(judge(pair, spoil(pair.source, rng)).success for pair in pairs[:200] if pair.kind != "none")


def test_editing_the_wrong_object_fails(pairs):
    """As well as editing one more object than asked for."""
    tried = 0
    for pair in only(pairs, "recolour", "remove"):
        for index, thing in enumerate(pair.scene.things):
            if index != pair.details["thing"] and thing.colour != pair.details.get("colour"):
                new = [replace(thing, rgb=COLOURS[pair.details["colour"]])] if pair.kind == "recolour" else []
                wrong = render(with_thing(pair.scene, index, *new))
                assert not judge(pair, wrong).changed
                verdict = judge(pair, np.where(pair.region[..., None], pair.target, wrong))
                assert verdict.changed and not verdict.success
                tried += 1
    assert tried > 100


def test_the_wrong_colour_shape_or_word_fails(pairs):
    rng = np.random.default_rng(0)
    for pair in pairs[:80]:
        wrong = []
        if "thing" in pair.details and pair.kind != "remove":
            thing = pair.edited.things[pair.details["thing"]]
            if "colour" in pair.details:
                wrong += [replace(thing, rgb=rgb) for name, rgb in COLOURS.items() if name != thing.colour]
            if "shape" in pair.details:
                wrong += [replace(thing, shape=shape) for shape in SHAPES if shape != thing.shape]
            wrong = [with_thing(pair.edited, pair.details["thing"], other) for other in wrong]
        if pair.kind == "text":
            wrong = [
                replace(pair.edited, word=word and replace(pair.edited.word, text=word))
                for word in (None, *WORDS)
                if word != pair.edited.word.text
            ]
        if pair.kind == "background":
            wrong = [replace(pair.edited, background=plain_background(name)) for name in BACKGROUNDS if name != pair.details["background"]]
        assert not any(judge(pair, spoil(render(scene), rng)).success for scene in wrong)


def test_a_new_background_must_keep_the_objects():
    for index in range(40):
        pair = pair_at(5, index, size=(96, 96), kind="background")
        for thing in range(len(pair.edited.things)):
            assert not judge(pair, render(with_thing(pair.edited, thing))).success
        if pair.edited.word:
            assert not judge(pair, render(replace(pair.edited, word=None))).success


def test_a_blur_is_no_mosaic():
    mosaics = [pair for pair in (pair_at(6, index, kind="style") for index in range(40)) if pair.details["style"] == "pixelate"]
    assert mosaics
    for pair in mosaics:
        for radius in (1, 2, 3, 4):
            assert not judge(pair, np.asarray(Image.fromarray(pair.source).filter(ImageFilter.GaussianBlur(radius)))).success


def test_changes_elsewhere_fail(pairs):
    """The edit alone is not enough: a shifted background is noticed."""
    for pair in only(pairs[:100], "recolour", "replace", "remove", "add", "text"):
        brighter = np.clip(pair.target + np.where(pair.target > 127, -20.0, 20.0), 0, 255).astype(np.uint8)
        verdict = judge(pair, np.where(pair.region[..., None], pair.target, brighter))
        assert verdict.changed and not verdict.untouched and not verdict.success


def test_doing_nothing_is_right_only_when_nothing_was_asked():
    pair = pair_at(0, 0, kind="none")
    assert pair.instruction == "" and np.array_equal(pair.source, pair.target)
    assert judge(pair, pair.source).success
    assert not judge(pair, 255 - pair.source).success


def test_crowded_scenes_offer_no_place():
    things = [(shape, "red", x, y) for shape, x, y in zip(itertools.cycle(SHAPES), (23, 64, 105) * 3, (23,) * 3 + (64,) * 3 + (105,) * 3)]
    scene = scene_of(*things)
    assert EDITS["add"](np.random.default_rng(0), scene, "en") is None


def test_striped_backgrounds_stay_where_they_are_behind_a_removed_object():
    scene = replace(scene_of(("circle", "red", 64, 64)), background=Background("white", "stripes", (250, 250, 250), (230, 230, 230), 12))
    edit = EDITS["remove"](np.random.default_rng(0), scene, "zh")
    assert np.array_equal(edit.draw(), render(replace(scene, things=())))


def test_dataset_in_the_official_format(tmp_path):
    path = write_dataset(tmp_path / "data", 6, seed=2, split="heldout", size=(112, 96))
    metadata = json.loads(path.read_text(encoding="utf-8"))
    assert len(metadata) == 6
    for index, (target, entry) in enumerate(metadata.items()):
        pair = pair_at(2, index, "heldout", (112, 96))
        assert entry.keys() == {"ref_image_path", "caption"} and entry["caption"] == pair.instruction
        assert np.array_equal(np.asarray(Image.open(target)), pair.target)
        assert np.array_equal(np.asarray(Image.open(entry["ref_image_path"])), pair.source)
