"""Pair nodes: proposing, making, recording, judging, sifting and saving, with the text encoder and ComfyUI's classes."""

import json
import random

import numpy as np
import pytest
import torch
from made_pairs import pairs_of, photograph
from PIL import Image
from test_pairs import REPLY, Script, scored

from step1x_core.errors import Step1XError
from step1x_core.host.pairs import making as pair_making
from step1x_core.host.pairs import review as pair_review
from step1x_core.host.reasoning import judging
from step1x_core.images import from_uint8
from step1x_core.pairs.propose import PROPOSED, SEEN, TRIES, propose, read_ideas
from step1x_core.pairs.record import digest, make_pair
from step1x_core.pairs.review import Thresholds
from step1x_core.reasoning import judge
from step1x_core.reasoning.judge import to_judge_size
from step1x_core.reasoning.replies import BadReply


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return photograph()


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no JSON",
        "{}",
        "[]",
        '{"objects": 5}',
        '{"objects": [5, {"en": "a sofa"}]}',
        "{" * 100000,
        '{"objects": [' + "[" * 50000,
        json.dumps({"objects": [{"en": "红色沙发", "zh": "a red sofa"}]}),
        json.dumps({"objects": [{"en": "x" * 500, "zh": "沙发"}]}),
        json.dumps({"texts": [{"old": "A", "new": "A"}, {"old": "a\nb", "new": "c"}, {"old": 1, "new": 2}]}),
        '{"a": \ud800}',
    ],
)
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

    monkeypatch.setattr(judging, "generate_texts", replies)
    monkeypatch.setattr(judging, "tasks_at_a_time", lambda clip: 8)
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
        return [
            '{"score": [8, 9], "reasoning": ""}'
            if any(torch.equal(part, known) for part in question.content if torch.is_tensor(part))
            else "mumble"
            for question in questions
        ]

    known = from_uint8(to_judge_size(Image.fromarray(first.target)))
    monkeypatch.setattr(judging, "generate_texts", replies)
    monkeypatch.setattr(judging, "tasks_at_a_time", lambda clip: 8)
    judged, report = pair_review.judge_pairs(None, (scored(first, semantics=(1.0, 2.0)), first, second), 5)
    assert judged[0].verdict.semantics == (1.0, 2.0) and judged[1].verdict.semantics == judged[1].verdict.quality == (8.0, 9.0)
    assert (
        judged[2].verdict.problem
        and [len(questions) for questions in asked] == [2] * 2 + [1] * 8
        and report.startswith("2 of 3 pairs judged.")
    )
    assert asked[0][0].seed != asked[0][1].seed and any(first.english in part for part in asked[0][0].content if isinstance(part, str))


@pytest.mark.once
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
        ask = judging.LocalJudge(clip, f"pair {digest(pair.source.tobytes(), pair.target.tobytes())}", 5)
        # Fewer tokens than a judge may need: these answers have no end.
        alone.append(
            judge.judge_edit(
                lambda system, content, _, ask=ask: ask(system, content, 4),
                Image.fromarray(pair.source),
                Image.fromarray(pair.target),
                pair.instruction,
            )
        )
        tries.append(len(ask.exchanges))
    assert len(set(tries)) > 1 and len({verdict.replies for verdict in alone}) == len(pairs)

    rounds, ask_all = [], judging.generate_texts
    monkeypatch.setattr(
        judging,
        "generate_texts",
        lambda clip, questions, tokens: rounds.append(len(questions)) or ask_all(clip, questions, 4),
    )
    monkeypatch.setattr(judging, "tasks_at_a_time", lambda clip: 2)
    judged, _ = pair_review.judge_pairs(clip, pairs, 5)
    assert [pair.verdict for pair in judged] == alone and [pair.english for pair in judged] == [pair.english for pair in pairs]
    assert max(rounds) == 2 and sum(rounds) == sum(tries) and len(rounds) < sum(tries)


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
    assert (
        np.array_equal(back.target, picture)
        and np.array_equal(back.source, there.target)
        and back.details == {"object": "a red sofa", "content": "", "direction": "backward"}
    )
    assert all(pair.maker == "inpainting" and pair.chinese for pair in pairs)
    by_hand, _ = pair_making.record_pairs(
        [image(picture)], [torch.cat(targets)], [], ["ps_human"], ["smile", "frown"], [""], [""], "forward"
    )
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
