"""GEdit-Bench's judge in the host: the text encoder's answers, and what a cancel leaves."""

import pytest
import torch
from chat_server import SCORES
from test_gedit import picture

from step1x_core.files import png, save_picture
from step1x_core.gedit.dataset import result_path, select
from step1x_core.gedit.miniature import miniature
from step1x_core.gedit.scores import (
    read_records,
    records_path,
)
from step1x_core.reasoning.judge import judge_edit


def test_the_text_encoder_judges_with_its_likeliest_answer_first(clip, monkeypatch):
    from step1x_core.host.reasoning import thinking
    from step1x_core.host.reasoning.judging import LocalJudge

    asked = []

    def scripted(clip, system, content, max_tokens, seed, temperature):
        asked.append((system, content, seed, temperature))
        return "hm" if len(asked) < 3 else SCORES

    monkeypatch.setattr(thinking, "generate_text", scripted)
    verdict = judge_edit(LocalJudge(clip, "gedit a/en/b", 5), picture(30, 20, "red"), picture(10, 10, "blue"), "x")
    assert verdict.semantics == verdict.quality == (6, 9)
    assert [temperature for *_, temperature in asked] == [0.0, 0.7, 0.7, 0.0] and len({seed for _, _, seed, _ in asked}) == 4
    source = asked[0][1][0]
    assert torch.is_tensor(source) and source.shape == (418, 627, 3) and source[0, 0].tolist() == [1, 0, 0]


def test_what_was_judged_before_a_cancel_is_on_record(tmp_path, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    from step1x_core.host.gedit import benchmark as host
    from step1x_core.host.reasoning import judging

    items = select(miniature(), ["en"], ["subject-add", "text_change", "style_change"])
    bench = host.Bench(tuple(items), "m", tmp_path)
    for item in items:
        save_picture(result_path(tmp_path, "m", item), png(picture(40, 30, "red")))
    asked = []

    def replies(clip, questions, max_tokens):
        asked.append(len(questions))
        if len(asked) == 4:
            raise InterruptProcessingException
        # The first of those that are asked about at a time is understood, the others are not.
        return [SCORES] + ["hm"] * (len(questions) - 1)

    monkeypatch.setattr(host, "check_can_generate", lambda clip: None)
    monkeypatch.setattr(judging, "generate_texts", replies)
    monkeypatch.setattr(judging, "tasks_at_a_time", lambda clip: 2)
    with pytest.raises(InterruptProcessingException):
        host.judge_bench(bench, None, "j", 1, False)
    records = records_path(tmp_path, "m", "j")
    assert asked == [2] * 4 and list(read_records(records)) == [items[0].name]
    monkeypatch.setattr(judging, "generate_texts", lambda clip, questions, max_tokens: [SCORES] * len(questions))
    assert host.judge_bench(bench, None, "j", 1, False).startswith(f"{len(items)} of {len(items)} items judged")
    assert len(records.read_text(encoding="utf-8").splitlines()) == len(items)
