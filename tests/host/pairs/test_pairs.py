"""Training pairs: makers, near duplicates, proposals, judging, and pairs of other nodes. What becomes of them on disk is in test_pair_dataset.py."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_pairs import pairs_of, photograph
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.host.gedit import benchmark as gedit
from step1x_core.host.pairs import making as pair_making
from step1x_core.host.pairs import review as pair_review
from step1x_core.images import from_uint8
from step1x_core.pairs.hashing import Index, fingerprint
from step1x_core.pairs.makers.lettering import CONTRAST, INKS, readable
from step1x_core.pairs.makers.pixels import LUMA
from step1x_core.pairs.orders import MAKERS, carry_out, orders, shrink
from step1x_core.pairs.propose import PROPOSED, SEEN, TRIES, propose, read_ideas
from step1x_core.pairs.record import KINDS, changed_pixels, digest, make_pair, words
from step1x_core.pairs.review import Thresholds, card, contact_sheet, sift, spread, statistics
from step1x_core.reasoning import judge
from step1x_core.reasoning.judge import Verdict, to_judge_size
from step1x_core.reasoning.replies import BadReply


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
    assert set(words()["makers"]) == {maker for makers in MAKERS.values() for maker in makers} and set(words()["proposals"]) == set(PROPOSED)
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

SOFA = {"en": "a red sofa", "zh": "红色沙发", "place": "on the left", "place_zh": "左边", "replacement": "a wooden bench", "replacement_zh": "木制长椅",
        "colour": "dark green", "colour_zh": "深绿色", "material": "leather", "material_zh": "皮革"}
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
    assert '"OPEN"' in found["text_change"].english and found["text_change"].back_english.index("SHUT") < found["text_change"].back_english.index("OPEN")
    assert "a beach" in found["background_change"].english and not found["color_alter"].back_kind and "dark green" in found["color_alter"].english
    assert all(proposal.english in report and proposal.chinese in report for proposal in proposals)


def test_the_same_seed_gives_the_same_proposals_and_kinds_take_turns():
    def chosen(seed, count=5):
        return propose(Script(REPLY), None, list(PROPOSED), count, seed)[0]

    assert chosen(3) == chosen(3) and len({proposal.kind for proposal in chosen(3)}) == 5 and len({tuple(chosen(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize("reply", ["", "no JSON", "{}", "[]", '{"objects": 5}', '{"objects": [5, {"en": "a sofa"}]}', "{" * 100000, '{"objects": [' + "[" * 50000,
                                   json.dumps({"objects": [{"en": "红色沙发", "zh": "a red sofa"}]}), json.dumps({"objects": [{"en": "x" * 500, "zh": "沙发"}]}),
                                   json.dumps({"texts": [{"old": "A", "new": "A"}, {"old": "a\nb", "new": "c"}, {"old": 1, "new": 2}]}), '{"a": \ud800}'])
def test_rubbish_is_asked_for_anew_a_few_times_and_then_a_table_serves(reply):
    with pytest.raises(BadReply):
        read_ideas(reply)
    model = Script(reply)
    proposals, report = propose(model, None, list(PROPOSED), 6, 1)
    assert model.asked == TRIES and {proposal.kind for proposal in proposals} == {"background_change", "style_change", "tone_transfer"}
    assert report.startswith("The language model gave no usable list in 3 tries")
    with pytest.raises(Step1XError, match="no usable list in 3 tries.*subject-remove"):
        propose(Script(reply), None, ["subject-remove"], 1, 1)
    assert propose(Script(reply, REPLY), None, list(SEEN), 6, 1)[1].startswith("The language model found")


def test_nothing_is_asked_where_a_table_has_it_all():
    model = Script(REPLY)
    assert len(propose(model, None, ["style_change"], 3, 1)[0]) == 3 and model.asked == 0


# judging, filtering, looking

def scored(pair, semantics=(9.0, 8.0), quality=(7.0, 9.0), problem=""):
    return replace(pair, verdict=Verdict(semantics, quality, problem))


def test_thresholds(picture):
    pair = make_pair(picture, 255 - picture, "tone_transfer", "invert", "", "x")
    same = make_pair(picture, picture, "tone_transfer", "nothing", "", "x")
    cases = {"kept": scored(pair), "semantics 6 is below 7": scored(pair, semantics=(6, 10)), "quality 5 is below 6": scored(pair, quality=(10, 5)),
             "not judged": pair, "no usable judgement: mumbling": scored(pair, quality=None, problem="mumbling"), "0.00% of the pixels changed": scored(same)}
    kept, dropped, report = sift(tuple(cases.values()), Thresholds())
    assert kept == (cases["kept"],) and len(dropped) == 5 and report.startswith("1 of 6 pairs kept.") and all(reason in report for reason in list(cases)[1:])
    assert len(sift(tuple(cases.values()), Thresholds(unjudged=True))[0]) == 3
    assert len(sift((scored(pair),), Thresholds(max_change=0.5))[1]) == 1


def test_without_a_text_encoder_pairs_are_sifted_by_change_and_by_the_scores_that_are_there(picture):
    pair = make_pair(picture, 255 - picture, "tone_transfer", "invert", "", "x")
    same = make_pair(picture, picture, "tone_transfer", "nothing", "", "x")
    good, bad, mumbled = scored(pair), scored(pair, semantics=(6, 10)), scored(pair, quality=None, problem="mumbling")
    kept, dropped, report = pair_review.sift_as_they_are((pair, good, bad, mumbled, same), Thresholds())
    assert kept == (pair, good) and dropped == (bad, mumbled, same)
    assert report.startswith("2 of 5 pairs kept.") and "2 pairs have no scores and were filtered by change only." in report
    kept, _, report = pair_review.sift_as_they_are((good, bad, mumbled), Thresholds(unjudged=True))
    assert kept == (good, mumbled) and "by change only" not in report


def test_the_judge_sifts_by_the_scores_it_has_just_given(picture, monkeypatch):
    first, second = pairs_of(picture, 2)
    monkeypatch.setattr(pair_review, "check_can_generate", lambda clip: None)
    # The first pair gets 8 and 9, the second 3 and 9.
    low = to_judge_size(Image.fromarray(second.target))

    def replies(clip, questions, max_tokens):
        lower = [any(torch.equal(part, from_uint8(low)) for part in question.content if torch.is_tensor(part)) for question in questions]
        return [f'{{"score": [{3 if low else 8}, 9], "reasoning": ""}}' for low in lower]

    monkeypatch.setattr(gedit, "generate_texts", replies)
    kept, dropped, report = pair_review.judge_and_sift(None, (first, second), 5, Thresholds(semantics=4.0, quality=3.0))
    assert [pair.verdict.semantics for pair in kept] == [(8.0, 9.0)] and [pair.verdict.semantics for pair in dropped] == [(3.0, 9.0)]
    assert report.startswith("1 of 2 pairs kept.") and "semantics 3 is below 4" in report and "2 of 2 pairs judged." in report
    assert len(pair_review.judge_and_sift(None, (first, second), 5, Thresholds(semantics=3.0, quality=3.0))[0]) == 2


def test_the_judge_keeps_scores_and_asks_for_the_rest(picture, monkeypatch):
    monkeypatch.setattr(pair_review, "check_can_generate", lambda clip: None)
    asked = []
    first, second = pairs_of(picture, 2)

    def replies(clip, questions, max_tokens):
        assert max_tokens == 768
        asked.append(questions)
        # The target tells the pairs apart in both questions; the questions of both pairs are asked at a time.
        return ['{"score": [8, 9], "reasoning": ""}' if any(torch.equal(part, known) for part in question.content if torch.is_tensor(part)) else "mumble"
                for question in questions]

    known = from_uint8(to_judge_size(Image.fromarray(first.target)))
    monkeypatch.setattr(gedit, "generate_texts", replies)
    judged, report = pair_review.judge_pairs(None, (scored(first, semantics=(1.0, 2.0)), first, second), 5)
    assert judged[0].verdict.semantics == (1.0, 2.0) and judged[1].verdict.semantics == judged[1].verdict.quality == (8.0, 9.0)
    assert judged[2].verdict.problem and [len(questions) for questions in asked] == [2] * 2 + [1] * 8 and report.startswith("2 of 3 pairs judged.")
    assert asked[0][0].seed != asked[0][1].seed and any(first.english in part for part in asked[0][0].content if isinstance(part, str))


def test_pairs_at_a_time_get_the_verdicts_they_get_alone(picture, clip, monkeypatch):
    """With a model of random weights, of whose answers a part is taken for readable: the pairs need different numbers of tries."""
    def read(reply):
        if len(reply) % 4:
            raise BadReply("mumbling")
        return len(reply) / 100, 1.0

    monkeypatch.setattr(judge, "read_scores", read)
    pairs = tuple(pairs_of(picture, 3))
    alone, tries = [], []
    for pair in pairs:
        ask = gedit.LocalJudge(clip, f"pair {digest(pair.source.tobytes(), pair.target.tobytes())}", 5)
        # Fewer tokens than a judge may need: these answers have no end.
        alone.append(judge.judge_edit(lambda system, content, _, ask=ask: ask(system, content, 4), Image.fromarray(pair.source), Image.fromarray(pair.target), pair.instruction))
        tries.append(len(ask.exchanges))
    assert len(set(tries)) > 1 and len({verdict.replies for verdict in alone}) == len(pairs)

    rounds, ask_all = [], gedit.generate_texts
    monkeypatch.setattr(gedit, "generate_texts", lambda clip, questions, tokens: rounds.append(len(questions)) or ask_all(clip, questions, tokens))
    monkeypatch.setattr(gedit, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(gedit, "TOGETHER", 2)
    judged, _ = pair_review.judge_pairs(clip, pairs, 5)
    assert [pair.verdict for pair in judged] == alone and [pair.english for pair in judged] == [pair.english for pair in pairs]
    assert max(rounds) == 2 and sum(rounds) == sum(tries) and len(rounds) < sum(tries)


def test_statistics_and_a_contact_sheet_that_misses_no_kind(picture, tmp_path):
    pairs = pairs_of(picture, 16)
    pairs[0] = scored(pairs[0])
    cards = [card(pair) for pair in pairs]
    table = statistics(cards)
    assert f"| all | {len(pairs)} | {len(pairs)} | {len(pairs)} | 1 | 8.00 | 7.00 |" in table and all(f"| {kind} |" in table for kind in MAKERS)
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

def image(picture):
    return torch.from_numpy(picture.astype(np.float32) / 255)[None]


def test_pairs_of_other_nodes_read_forward_and_backward(picture):
    rng = random.Random(0)
    proposals, _ = propose(Script(REPLY), None, ["subject-remove", "color_alter"], 2, rng.randrange(100))
    targets = [image(255 - picture), image(picture[::-1].copy())]
    pairs, report = pair_making.record_pairs([image(picture)], targets, proposals, ["tone_transfer"], [""], [""], ["inpainting"], "both")
    assert len(pairs) == 3 and "1 edits have no instruction for the way back" in report
    back, = (pair for pair in pairs if pair.kind == "subject-add")
    there, = (pair for pair in pairs if pair.kind == "subject-remove")
    assert np.array_equal(back.target, picture) and np.array_equal(back.source, there.target) and back.details == {"object": "a red sofa", "content": "", "direction": "backward"}
    assert all(pair.maker == "inpainting" and pair.chinese for pair in pairs)
    by_hand, _ = pair_making.record_pairs([image(picture)], [torch.cat(targets)], [], ["ps_human"], ["smile", "frown"], [""], [""], "forward")
    assert [(pair.kind, pair.english) for pair in by_hand] == [("ps_human", "smile"), ("ps_human", "frown")]


def test_numbers_that_do_not_agree_are_refused(picture):
    two = [image(picture)] * 2
    with pytest.raises(Step1XError, match="The input 'source' has 2 values for 3 edited images"):
        pair_making.record_pairs(two, [image(picture)] * 3, [], ["ps_human"], ["a"], [""], [""], "forward")
    with pytest.raises(Step1XError, match="'direction' is both, but without proposals"):
        pair_making.record_pairs(two, two, [], ["ps_human"], ["a"], [""], [""], "both")


def test_computed_pairs_of_a_batch(picture):
    pairs, report = pair_making.algorithmic_pairs([image(picture), image(picture[:, ::-1].copy())], "text_change, style_change", 3, 1, 150)
    assert len(pairs) == 6 and {pair.kind for pair in pairs} == {"text_change", "style_change"} and pairs[0].source.shape == (100, 150, 3)
    assert report.startswith("6 pairs made;")
    with pytest.raises(Step1XError, match="'subject-add' is not a kind that can be made here"):
        pair_making.algorithmic_pairs([image(picture)], "subject-add", 3, 1, 150)
