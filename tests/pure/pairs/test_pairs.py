"""Training pairs: makers, near duplicates, proposals, judging, and pairs of other nodes. What becomes of them on disk is in test_pair_dataset.py."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from made_pairs import pairs_of, photograph
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.pairs.hashing import STRUCTURE, Index, fingerprint
from step1x_core.pairs.makers.lettering import CONTRAST, INKS, readable
from step1x_core.pairs.makers.pixels import LUMA
from step1x_core.pairs.orders import MAKERS, carry_out, orders, shrink
from step1x_core.pairs.propose import PROPOSED, propose
from step1x_core.pairs.record import KINDS, changed_pixels, make_pair, words
from step1x_core.pairs.review import Thresholds, card, contact_sheet, sift, spread, statistics
from step1x_core.reasoning.judge import Verdict


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return photograph()


def han(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


@pytest.mark.parametrize("kind, maker", [(kind, maker) for kind, makers in MAKERS.items() for maker in makers])
def test_every_maker_makes_a_pair_with_instructions_and_makes_it_again(picture, kind, maker):
    order = replace(orders("photo", [kind], 0, 1, 3)[0], maker=maker)
    pair, again = (carry_out(picture, "photo", order, 3) for _ in range(2))
    assert pair.source.dtype == pair.target.dtype == np.uint8 and pair.source.shape == pair.target.shape == picture.shape
    assert changed_pixels(pair.source, pair.target).mean() > 0.002 and pair.kind == kind and pair.kind in KINDS
    assert np.array_equal(pair.target, again.target) and np.array_equal(pair.source, again.source) and pair.english == again.english
    assert pair.english and not han(pair.english) and han(pair.chinese) and "{" not in pair.english + pair.chinese
    assert json.loads(json.dumps(pair.details)) == pair.details
    others = [carry_out(picture, "photo", order, seed) for seed in range(4, 12)]
    assert any(not np.array_equal(pair.source, other.source) or not np.array_equal(pair.target, other.target) for other in others)
    if maker in ("fog", "snow", "rain", "night", "recolour", "text_add", "oil"):
        assert np.array_equal(pair.source, picture)
    if maker in ("defog", "unsnow", "unrain", "day", "denoise", "deblur", "dejpeg", "restore", "brighten", "colourise", "text_remove"):
        assert np.array_equal(pair.target, picture)


def test_every_maker_has_wordings_in_both_languages_with_the_same_fields():
    assert set(words()["makers"]) == {maker for makers in MAKERS.values() for maker in makers} and set(
        words()["proposals"]
    ) == set(PROPOSED)
    for wordings in (*words()["makers"].values(), *words()["proposals"].values()):
        assert len(set(wordings["en"])) > 1 and len(set(wordings["zh"])) > 1
        assert all(not han(text) for text in wordings["en"]) and all(han(text) for text in wordings["zh"])


def test_recolour_changes_the_named_colour_and_nothing_else():
    pixels = np.full((100, 100, 3), 128, np.uint8)
    pixels[20:60, 20:60] = (200, 30, 30)
    pair = carry_out(pixels, "square", replace(orders("square", ["color_alter"], 0, 1, 5)[0]), 5)
    changed = changed_pixels(pair.source, pair.target)
    assert changed[20:60, 20:60].all() and changed.sum() == 1600 and "red" in pair.english and "红色" in pair.chinese
    grey = np.full((100, 100, 3), 128, np.uint8)
    assert carry_out(grey, "grey", orders("grey", ["color_alter"], 0, 1, 5)[0], 5) is None


def test_letters_stand_out_from_their_ground():
    for ground in [*INKS.values(), (128, 128, 128)]:
        assert readable(ground)
        assert all(abs(np.dot(INKS[name], LUMA) - np.dot(ground, LUMA)) >= CONTRAST for name in readable(ground))


def test_orders_take_kinds_in_turn_and_every_maker_before_any_again():
    chosen = orders("name", list(MAKERS), 0, 4 * 17, 1)
    assert all({order.kind for order in chosen[first:first + 4]} == set(MAKERS) for first in range(0, len(chosen), 4))
    assert {order.maker for order in chosen if order.kind == "tone_transfer"} == set(MAKERS["tone_transfer"])
    assert chosen[8:16] == orders("name", list(MAKERS), 8, 8, 1) and chosen != orders("other", list(MAKERS), 0, 4 * 17, 1)


def test_small_and_large_pictures(picture):
    assert shrink(picture, 150).shape == (100, 150, 3) and shrink(picture, 0) is picture and shrink(picture, 4000) is picture
    with pytest.raises(Step1XError, match="300x50 pixels; pairs need 64"):
        shrink(picture[:50], 1024)


def test_a_pair_fits_its_target_to_the_source_and_refuses_what_cannot_be_one(picture):
    smaller = np.asarray(Image.fromarray(picture).resize((288, 192)))
    pair = make_pair(picture, smaller, "subject-add", " add a\ncup ", "", "inpainting")
    assert pair.target.shape == picture.shape and pair.english == pair.instruction == "add a cup"
    with pytest.raises(Step1XError, match="300x100 pixels and its source 300x200"):
        make_pair(picture, picture[:100], "subject-add", "add", "", "")
    with pytest.raises(Step1XError, match="has no instruction"):
        make_pair(picture, picture, "subject-add", " ", "\n", "")
    with pytest.raises(Step1XError, match="'painting' is not a kind"):
        make_pair(picture, picture, "painting", "paint", "", "")


# near duplicates

def recompressed(pixels: np.ndarray, size) -> np.ndarray:
    content = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=85)
    return np.asarray(Image.open(content))


def test_the_same_pair_is_found_at_another_size_and_in_another_format(picture):
    # Grain, hatching, small letters, edges and ragged regions look different at another size.
    smooth = ("fog", "defog", "night", "day", "sunset", "winter", "brighten", "colourise", "oil", "sepia", "monochrome")
    pairs = [pair for pair in pairs_of(picture, 72) if pair.maker in smooth]
    assert {pair.maker for pair in pairs} == set(smooth)
    for pair in pairs:
        index = Index()
        index.add("g", fingerprint(pair.source, pair.target), "first")
        smaller = [recompressed(pixels, (264, 176)) for pixels in (pair.source, pair.target)]
        assert index.find("g", fingerprint(*smaller)) == "first", pair.english
        assert index.find("other", fingerprint(*smaller)) is None


def test_different_edits_of_one_picture_are_no_duplicates(picture):
    prints = []
    for colour in ((200, 30, 30), (30, 30, 200), (30, 160, 30)):
        target = picture.copy()
        target[60:120, 100:180] = colour
        prints.append(fingerprint(picture, target))
    for word in ("OPEN", "CLOSED", "EXIT"):
        prints.append(fingerprint(*(pair_with_word(picture, text) for text in ("HELLO", word))))
    moved = picture.copy()
    moved[60:120, 20:100] = (200, 30, 30)
    prints += [fingerprint(picture, moved), fingerprint(moved, picture)]
    index = Index()
    for number, print_ in enumerate(prints):
        assert index.find("g", print_) is None, number
        index.add("g", print_, str(number))


def test_one_part_that_looks_different_is_enough_for_another_pair(picture):
    """Source, what was changed before and after: each has to look the same in structure, and all in colour."""
    print_ = fingerprint(picture, 255 - picture)
    index = Index()
    index.add("g", print_, "first")
    assert index.find("g", print_) == "first" and index.find("h", print_) is None
    for part in range(3):
        other = print_.copy()
        other[part * STRUCTURE:(part + 1) * STRUCTURE] ^= 255
        assert index.find("g", other) is None
    other = print_.copy()
    other[-1] ^= 255
    assert index.find("g", other) is None


def pair_with_word(picture, word):
    from PIL import ImageDraw, ImageFont

    out = Image.fromarray(picture)
    ImageDraw.Draw(out).rectangle((20, 150, 120, 180), fill="white")
    ImageDraw.Draw(out).text((70, 165), word, "black", ImageFont.load_default(20), anchor="mm")
    return np.asarray(out)


def test_an_index_grows(picture):
    index, rng = Index(), np.random.default_rng(0)
    prints = rng.integers(0, 256, (300, len(fingerprint(picture, picture))), np.uint8)
    for number, print_ in enumerate(prints):
        index.add("g", print_, str(number))
    assert [index.find("g", print_) for print_ in prints] == [str(number) for number in range(300)]


# proposals

SOFA = {
    "en": "a red sofa",
    "zh": "红色沙发",
    "place": "on the left",
    "place_zh": "左边",
    "replacement": "a wooden bench",
    "replacement_zh": "木制长椅",
    "colour": "dark green",
    "colour_zh": "深绿色",
    "material": "leather",
    "material_zh": "皮革",
}
REPLY = json.dumps({"objects": [SOFA], "additions": [{"en": "a cat", "zh": "猫", "place": "on the carpet", "place_zh": "地毯上"}],
                    "backgrounds": [{"en": "a beach", "zh": "沙滩"}], "texts": [{"old": "OPEN", "new": "SHUT"}]})


class Script:
    """A language model with given replies; the last one is given for ever."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), 0

    def __call__(self, system, content, max_tokens):
        self.asked += 1
        return self.replies[min(self.asked, len(self.replies)) - 1]


def test_proposals_of_a_good_reply_in_both_languages_and_both_directions():
    proposals, report = propose(Script("Here it is:\n```json\n" + REPLY + "\n```"), None, list(PROPOSED), 9, 1)
    found = {proposal.kind: proposal for proposal in proposals}
    assert set(found) == set(PROPOSED) and all(not han(proposal.english) and han(proposal.chinese) for proposal in proposals)
    remove, replace_, add = (found[f"subject-{name}"] for name in ("remove", "replace", "add"))
    assert "the red sofa" in remove.english and "红色沙发" in remove.chinese and (remove.thing, remove.content) == ("a red sofa", "")
    assert remove.back_kind == "subject-add" and "a red sofa on the left" in remove.back_english and "左边" in remove.back_chinese
    assert replace_.content == "a wooden bench" and "the wooden bench" in replace_.back_english and "a red sofa" in replace_.back_english
    assert add.back_kind == "subject-remove" and "the cat" in add.back_english and add.content == "a cat" and add.thing == ""
    assert '"OPEN"' in found["text_change"].english and found["text_change"].back_english.index("SHUT") < found[
        "text_change"
    ].back_english.index("OPEN")
    assert (
        "a beach" in found["background_change"].english
        and not found["color_alter"].back_kind
        and "dark green" in found["color_alter"].english
    )
    assert all(proposal.english in report and proposal.chinese in report for proposal in proposals)


def test_the_same_seed_gives_the_same_proposals_and_kinds_take_turns():
    def chosen(seed, count=5):
        return propose(Script(REPLY), None, list(PROPOSED), count, seed)[0]

    assert (
        chosen(3) == chosen(3)
        and len({proposal.kind for proposal in chosen(3)}) == 5
        and len({tuple(chosen(seed)) for seed in range(6)}) > 1
    )


# judging, filtering, looking

def scored(pair, semantics=(9.0, 8.0), quality=(7.0, 9.0), problem=""):
    return replace(pair, verdict=Verdict(semantics, quality, problem))


def test_thresholds(picture):
    pair = make_pair(picture, 255 - picture, "tone_transfer", "invert", "", "x")
    same = make_pair(picture, picture, "tone_transfer", "nothing", "", "x")
    cases = {
        "kept": scored(pair),
        "semantics 6 is below 7": scored(pair, semantics=(6, 10)),
        "quality 5 is below 6": scored(pair, quality=(10, 5)),
        "not judged": pair,
        "no usable judgement: mumbling": scored(pair, quality=None, problem="mumbling"),
        "0.00% of the pixels changed": scored(same),
    }
    kept, dropped, report = sift(tuple(cases.values()), Thresholds())
    assert (
        kept == (cases["kept"],)
        and len(dropped) == 5
        and report.startswith("1 of 6 pairs kept.")
        and all(reason in report for reason in list(cases)[1:])
    )
    assert len(sift(tuple(cases.values()), Thresholds(unjudged=True))[0]) == 3
    assert len(sift((scored(pair),), Thresholds(max_change=0.5))[1]) == 1


def test_statistics_and_a_contact_sheet_that_misses_no_kind(picture, tmp_path):
    pairs = pairs_of(picture, 16)
    pairs[0] = scored(pairs[0])
    cards = [card(pair) for pair in pairs]
    table = statistics(cards)
    assert f"| all | {len(pairs)} | {len(pairs)} | {len(pairs)} | 1 | 8.00 | 7.00 |" in table and all(
        f"| {kind} |" in table for kind in MAKERS
    )
    assert [entry.task_type for entry in spread(cards, 4)] == sorted(MAKERS, key=KINDS.index) and len(spread(cards, 100)) == len(cards)
    sheet = np.asarray(contact_sheet(cards, 4))
    # The first pair of the sheet is where it should be: its mean colours are those of the source and of the target.
    shown = spread(cards, 4)[0]
    for side, part in enumerate(shown.load()):
        left = 12 + 204 * side
        height = round(200 * part.height / part.width)
        tile = sheet[36 + (200 - height) // 2 + 2:36 + (200 + height) // 2 - 2, left + 2:left + 198]
        assert np.abs(tile.mean((0, 1)) - np.asarray(part).mean((0, 1))).max() < 4
    assert contact_sheet([], 4).width == contact_sheet(cards, 4).width and "| all | 0 |" in statistics([])


# taking in what other nodes made


