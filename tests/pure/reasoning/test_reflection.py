"""Thinking, judging and the rounds: the official tables, and every choice that differs from the official code."""

import json
from dataclasses import replace

import golden_checks_reflection
import golden_files
import pytest
from conftest import PACK

from step1x_core.reasoning.conversation import LAYOUTS, MAX_TRIES, RULES
from step1x_core.reasoning.reflection import Loop, Reflection, Step, reflect, think, unjudged
from step1x_core.reasoning.replies import BadReply
from step1x_core.reasoning.report import report
from step1x_core.reasoning.templates import LANGUAGES, load_templates

GOLDENS = PACK / "tests" / "parity" / "goldens" / "v12"
FINAL, PREVIEW = RULES["v1.2"], RULES["v1.2-preview"]

GOOD = {
    "rewrite": "Make the cup red.",
    "description": "A red cup.",
    "consistency": '{"meets_instruction": "yes", "raw_score": 9, "omissions": 1, "reason": "no spoon"}',
    "reflection": "<#Think>Well done.<#Success>",
    "edit_score": '{"score": [7, 8], "reasoning": ""}',
    "quality_score": '{"score": [6, 9], "reasoning": ""}',
}

SYSTEMS = {load_templates(language)[f"{name}.system"]: name for language in LANGUAGES for name in LAYOUTS}


class Model:
    """Answers each call from a list of replies, over and over its last one; an exception in the list is raised."""

    def __init__(self, **replies):
        self.replies = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in {**GOOD, **replies}.items()}
        self.asked = []

    def __call__(self, system, content, max_tokens):
        name = SYSTEMS[system]
        self.asked.append((name, content, max_tokens))
        replies = self.replies[name]
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def count(self, name) -> int:
        return sum(asked == name for asked, _, _ in self.asked)

    def text(self, name) -> str:
        return next(part for asked, content, _ in self.asked if asked == name for part in content if isinstance(part, str))


class Cancelled(Exception):
    """Stands for the host's cancel."""


def judged(model, rules=FINAL, prompt="make it red") -> Reflection:
    return reflect(model, 1, 2, prompt, rules)


@pytest.mark.parametrize("name", ["loop_control_final.json", "loop_control_preview.json"])
def test_official_rounds(name):
    errors = golden_files.Errors()
    golden_checks_reflection.CHECKS[name](json.loads((GOLDENS / name).read_text(encoding="utf-8")), errors)
    assert errors.max == 0


@pytest.mark.parametrize(
    "case, path, value",
    [
        (1, ("rounds", 1, "base_image"), "source"),
        (1, ("rounds", 1, "encoded_prompts", 0), "make cup green"),
        (2, ("result", "final_images"), ["output_2"]),
        (9, ("rounds", 0, "reflect", "instruction"), "rewritten"),
        (10, ("think_called_with", 1), "rewritten"),
    ],
)
def test_the_check_of_the_rounds_finds_a_wrong_entry(case, path, value):
    table = json.loads((GOLDENS / "loop_control_final.json").read_text(encoding="utf-8"))
    place = table["cases"][case]
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] != value
    place[path[-1]] = value
    errors = golden_files.Errors()
    golden_checks_reflection.CHECKS["loop_control_final.json"](table, errors)
    assert errors.max > 0


def test_a_round_asks_in_order_with_its_budgets_and_passes_findings_on():
    model = Model()
    result = judged(model)
    assert [name for name, _, _ in model.asked] == ["description", "consistency", "reflection", "edit_score", "quality_score"]
    assert [tokens for _, _, tokens in model.asked] == [768, 1024, 768, 768, 768]
    assert [[part if isinstance(part, int) else "text" for part in content] for _, content, _ in model.asked] == [
        [1, "text"], ["text", 2], [1, 2, "text"], [1, 2, "text"], [2, "text"]]
    assert "A red cup." in model.text("consistency")
    assert "score of 7 out of 10" in model.text("reflection") and "no spoon" in model.text("reflection")
    assert all("make it red" in model.text(name) for name in ("description", "consistency", "reflection", "edit_score"))
    assert "make it red" not in model.text("quality_score")
    assert (result.verdict, result.edit_scores, result.quality_scores, result.value) == ("success", (7, 8), (6, 9), 42)
    assert result.consistency.score == 7 and result.explanation == "Well done." and [call.tries for call in result.calls] == [1] * 5


def test_the_preview_asks_for_no_scores_and_has_its_own_budget():
    model = Model()
    result = judged(model, PREVIEW)
    assert [(name, tokens) for name, _, tokens in model.asked] == [("description", 768), ("consistency", 512), ("reflection", 768)]
    assert result.edit_scores == result.quality_scores == () and result.value == 0


def test_the_rewrite_is_asked_once_within_its_budget():
    model = Model(rewrite=" Make the cup red.\n")
    assert think(model, 1, "red cup pls").instruction == "Make the cup red."
    (name, content, tokens), = model.asked
    assert (name, content[0], tokens) == ("rewrite", 1, 512) and "red cup pls" in content[1]


# The choices that differ from the official code, in the order of the module's list.

@pytest.mark.parametrize("rules", [FINAL, PREVIEW])
@pytest.mark.parametrize("call", ["description", "consistency", "reflection"])
def test_tries_are_limited_in_both_versions(rules, call):
    model = Model(**{call: "错误: no"})
    result = judged(model, rules)
    assert model.count(call) == MAX_TRIES == 20
    assert result.verdict == "failed" and call in result.explanation and "20 tries" in result.explanation
    assert Loop("p", rules).after(result).next_step() == Step("source", "p")


@pytest.mark.parametrize("call", ["edit_score", "quality_score"])
def test_scores_without_a_good_reply_are_zero_and_leave_the_verdict(call):
    model = Model(**{call: "eight"})
    result = judged(model, replace(FINAL, tries=3))
    assert model.count(call) == 3 and result.verdict == "success" and result.value == 0
    assert {"edit_score": result.edit_scores, "quality_score": result.quality_scores}[call] == (0, 0)


def test_a_bad_reply_is_tried_again_and_a_client_may_say_so_itself():
    model = Model(consistency=["nope", BadReply("cut off"), GOOD["consistency"]], reflection=["<#Think>", GOOD["reflection"]],
                  edit_score=["[1, 2]", GOOD["edit_score"]])
    result = judged(model)
    assert result.verdict == "success" and {call.name: call.tries for call in result.calls} == {
        "description": 1, "consistency": 3, "reflection": 2, "edit_score": 2, "quality_score": 1}
    assert [call.problem for call in result.calls] == [""] * 5
    assert result.calls[1].replies == ["nope", GOOD["consistency"]]


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("out of memory"), Cancelled(), RecursionError(), ValueError("host")])
@pytest.mark.parametrize("call", ["description", "consistency", "reflection", "edit_score", "quality_score"])
def test_no_other_exception_is_tried_again(problem, call):
    model = Model(**{call: problem})
    with pytest.raises(type(problem)) as caught:
        judged(model)
    assert caught.value is problem and model.count(call) == 1


def test_an_exception_in_thinking_passes_through():
    with pytest.raises(Cancelled):
        think(Model(rewrite=Cancelled()), 1, "red")


def test_a_refinement_is_trimmed():
    result = judged(Model(reflection="<#Think>too pale<#Reflection>\n make the sky blue \n"))
    assert (result.verdict, result.refined) == ("refine", "make the sky blue")
    assert Loop("p").after(result).next_step() == Step("latest", "make the sky blue")


def test_an_empty_refinement_is_a_failed_edit():
    result = judged(Model(reflection="<#Think>hm<#Reflection> \n"))
    assert (result.verdict, result.refined) == ("failed", "")
    assert Loop("p").after(result).next_step() == Step("source", "p")


@pytest.mark.parametrize("scores", ["[]", '["8", "9"]', "[8]", "[8, 9, 7]", "[8, NaN]", "[8, null]", "[true, 8]"])
def test_a_faulty_score_list_is_tried_again_and_never_loses_a_picture(scores):
    faulty = f'{{"score": {scores}, "reasoning": ""}}'
    model = Model(edit_score=[faulty, GOOD["edit_score"]], quality_score=faulty)
    result = judged(model)
    assert model.count("edit_score") == 2 and result.edit_scores == (7, 8)
    assert model.count("quality_score") == MAX_TRIES and result.quality_scores == (0, 0)
    assert Loop("p").after(result).best() == 0


def test_scores_beyond_the_scale_are_clamped():
    result = judged(Model(edit_score='{"score": [-1, 99], "reasoning": ""}'))
    assert result.edit_scores == (0, 10)


@pytest.mark.parametrize("rules", [FINAL, PREVIEW])
def test_a_picture_that_could_not_be_judged_stays_a_candidate(rules):
    loop = Loop("p", rules)
    assert loop.best() is None
    loop = loop.after(unjudged("out of memory"))
    assert loop.best() == 0 and "out of memory" in report(loop)
    loop = loop.after(replace(judged(Model(), rules), verdict="failed"))
    assert loop.best() == 1
    # A scored picture is better than one without scores; the preview has nothing to go by but the order.
    assert loop.after(unjudged("cancelled")).best() == (1 if rules.scored else 2)


@pytest.mark.parametrize("rewrite", ["", " \n"])
def test_an_empty_rewrite_falls_back_to_the_instruction(rewrite):
    assert think(Model(rewrite=rewrite), 1, "red cup pls").instruction == "red cup pls"


@pytest.mark.parametrize("rules", [FINAL, PREVIEW])
def test_the_texts_are_in_the_language_of_the_instruction(rules):
    for prompt, language in (("make it red", "english"), ("把天空变红", "chinese")):
        model = Model()
        think(model, 1, prompt, rules)
        judged(model, rules, prompt)
        templates = load_templates(language)
        for name, content, _ in model.asked:
            start = templates[f"{name}.user"].partition("{")[0]
            assert any(isinstance(part, str) and part.startswith(start) for part in content)


def test_own_texts_are_used(tmp_path):
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "rewrite.user.txt").write_text("Say it well: {instruction}", encoding="utf-8")
    (tmp_path / "english" / "edit_score.user.txt").write_text("Rate {instruction}!", encoding="utf-8")
    model = Model()
    think(model, 1, "a {prompt}", overrides=tmp_path)
    reflect(model, 1, 2, "a {prompt}", overrides=tmp_path)
    assert model.text("rewrite") == "Say it well: a {prompt}" and model.text("edit_score") == "Rate a {prompt}!"
    assert model.text("description") == load_templates("english")["description.user"].replace("{instruction}", "a {prompt}")


# Rounds.

def scored(reply: str, value: float) -> Reflection:
    return Reflection("success" if "<#Success>" in reply else "failed", reply=reply, edit_scores=(value, 10), quality_scores=(10, 1))


@pytest.mark.parametrize("rounds, best", [
    ([("<#Success>", 5), ("<#Failed>", 5)], 0),
    ([("<#Failed>", 5), ("<#Success>", 5)], 1),
    ([("<#Success>", 5), ("<#Success>", 5)], 1),
    ([("<#Others>", 5), ("<#Failed>", 5)], 1),
    ([("<#Success>", 5), ("<#Others>", 5)], 0),
    ([("<#Failed>", 6), ("<#Success>", 5)], 0),
])
def test_the_highest_value_wins_then_the_success_tag_then_the_later_round(rounds, best):
    loop = Loop("p", max_rounds=5)
    for reply, value in rounds:
        loop = loop.after(scored(f"<#Think>a{reply}", value))
    assert loop.best() == best


def test_the_state_of_a_loop_is_never_changed():
    first = Loop("p", max_rounds=2)
    second = first.after(unjudged("x"))
    assert first.rounds == () and len(second.rounds) == 1
    assert second.next_step() == Step("source", "p") and second.after(unjudged("y")).next_step() is None


def test_no_round_allowed_is_no_round():
    assert Loop("p", max_rounds=0).next_step() is None


def test_the_report_tells_all_rounds():
    model = Model(reflection=["<#Think>too pale<#Reflection>Make it darker.", GOOD["reflection"]], description=["错误: x", "A red cup."],
                  edit_score=['{"score": [2, 8], "reasoning": "pale"}', GOOD["edit_score"]])
    thought = think(model, 1, "red cup pls")
    loop = Loop(thought.instruction)
    while loop.next_step():
        loop = loop.after(judged(model, prompt=loop.prompt))
    text = report(loop, thought)
    for line in (
        "Instruction: red cup pls",
        "Rewritten: Make the cup red.",
        "Round 1 edits the source: Make the cup red.",
        "  Verdict: refine",
        "  Explanation: too pale",
        "  Next instruction: Make it darker.",
        "  Consistency: 7 of 10",
        "  description (2 tries)",
        "  reflection (1 try)",
        "Round 2 edits round 1: Make it darker.",
        "  Verdict: success",
        "Best: round 2",
        '    {"score": [2, 8], "reasoning": "pale"}',
    ):
        assert line in text.splitlines()
    assert "success 2, restraint 8, naturalness 6, freedom from artifacts 9; value 12 of 100" in text


def test_the_report_names_a_call_without_a_good_reply():
    loop = Loop("p").after(judged(Model(reflection="no tags"), replace(FINAL, tries=4)))
    assert "  reflection (4 tries, no usable answer: no <#Think>)" in report(loop).splitlines()


def test_replies_and_instructions_with_lone_surrogates_can_be_written():
    model = Model(consistency='{"raw_score": 8, "reason": "\\ud800"}', reflection="<#Think>\udc00<#Reflection>\ud83d red")
    thought = think(model, 1, "red \ud800")
    result = judged(model, prompt=thought.instruction)
    assert result.refined == "\ufffd red" and result.consistency.reason == "\ufffd"
    report(Loop("red \ud800").after(result), thought).encode("utf-8")
