"""What a few-step LoRA's metadata says, and what is refused in it."""

import json

import pytest

from step1x_core.errors import Step1XError
from step1x_core.sampling.few_steps import CFG_KEY, SCHEDULE_KEY, STEPS_KEY, TEACHER_KEY, FewSteps, few_steps_of
from step1x_core.versions import describe_settings

TEACHER = {"version": "v1.1", "steps": 28, "cfg": 6.0}


def read(**entries):
    return few_steps_of(entries, "fast.safetensors")


def test_other_loras_have_no_settings():
    assert few_steps_of(None, "x") is None and few_steps_of({"ss_steps": "100"}, "x") is None


@pytest.mark.parametrize("settings", [
    FewSteps(8), FewSteps(1, 1.0, None, TEACHER), FewSteps(4, 2.5, (1.0, 0.9473684210526315, 0.8, 0.1 + 0.2, 0.0)),
])
def test_what_is_written_is_read(settings):
    read = few_steps_of(settings.metadata(), "x")
    assert read == settings and read.teacher == settings.teacher


def test_only_the_steps_have_to_be_there():
    assert read(**{STEPS_KEY: "4"}) == FewSteps(4, 1.0, None)


@pytest.mark.parametrize("entries, key, expected", [
    ({CFG_KEY: "1"}, STEPS_KEY, "from 1 to 200"),
    ({STEPS_KEY: "0"}, STEPS_KEY, "from 1 to 200"),
    ({STEPS_KEY: "4.5"}, STEPS_KEY, "'4.5'; expected"),
    ({STEPS_KEY: "201"}, STEPS_KEY, "from 1 to 200"),
    ({STEPS_KEY: "4", CFG_KEY: "nan"}, CFG_KEY, "CFG above 0"),
    ({STEPS_KEY: "4", CFG_KEY: "0"}, CFG_KEY, "CFG above 0"),
    ({STEPS_KEY: "2", SCHEDULE_KEY: "1,0"}, SCHEDULE_KEY, "3 sigmas that fall"),
    ({STEPS_KEY: "2", SCHEDULE_KEY: "1,0.5,0.1"}, SCHEDULE_KEY, "3 sigmas"),
    ({STEPS_KEY: "2", SCHEDULE_KEY: "1,1,0"}, SCHEDULE_KEY, "3 sigmas"),
    ({STEPS_KEY: "2", SCHEDULE_KEY: "0.9,0.5,0"}, SCHEDULE_KEY, "3 sigmas"),
    ({STEPS_KEY: "2", SCHEDULE_KEY: "1,nan,0"}, SCHEDULE_KEY, "3 sigmas"),
    ({STEPS_KEY: "2", SCHEDULE_KEY: ""}, SCHEDULE_KEY, "3 sigmas"),
    ({STEPS_KEY: "2", TEACHER_KEY: "[1]"}, TEACHER_KEY, "a JSON object"),
    ({STEPS_KEY: "2", TEACHER_KEY: "[" * 100000}, TEACHER_KEY, "a JSON object"),
])
def test_entries_that_cannot_be_followed_are_refused(entries, key, expected):
    with pytest.raises(Step1XError) as caught:
        read(**entries)
    text = str(caught.value)
    assert text.startswith(f"fast.safetensors: the metadata entry {key} is ") and expected in text and len(text) < 400


def test_descriptions():
    assert FewSteps(1).describe() == "1 step, CFG 1"
    assert FewSteps(8, 1.0, None, TEACHER).describe() == "8 steps, CFG 1 (distilled from v1.1, 28 steps, CFG 6.0)"
    assert FewSteps(2, 1.5, (1.0, 0.5, 0.0)).describe() == "2 steps, CFG 1.5, its own schedule"
    assert describe_settings("v1.1", 0, 0.0, FewSteps(4)) == "4 steps, CFG 1 (defaults of the few-step LoRA)"
    assert describe_settings("v1.1", 8, 0.0, FewSteps(4)) == "8 steps, CFG 1 (default of the few-step LoRA)"
    assert describe_settings("v1.1", 0, None, FewSteps(1)) == "1 step (default of the few-step LoRA)"
    assert json.loads(FewSteps(1, teacher=TEACHER).metadata()[TEACHER_KEY]) == TEACHER
