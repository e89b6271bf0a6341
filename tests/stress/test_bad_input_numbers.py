"""Numbers and choices at their limits and beyond them, typed in and handed over by another node."""

import pytest
import torch
from bad_input_host import NOT_CONVERTED, NOT_IN_LIST, TOO_LARGE, TOO_SMALL, Given, Many, running_host
from comfy_api.latest import io
from node_inputs import called, classes, entries, numbers, widgets

from step1x_core.errors import Step1XError
from step1x_core.speed.presets import ALL_STEPS, REGION, TEACACHE

# Nodes and their checks are the same in every host. A sample of the cases shows what a further host makes of them.
pytestmark = pytest.mark.sampled(11)

NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = "Input '{}' is .*, but it takes {}.*Correct it, or the node that it comes from"
SEEDS = (0, 2**64 - 1)
NUMBERS = numbers()
# Lists of files are checked where they are resolved: test_bad_input_checkpoints and test_gate have names that lead nowhere.
CHOICES = [entry for entry in entries() if isinstance(entry.input, io.Combo.Input) and not entry.is_file and entry.name != "classifier"]


@pytest.fixture(scope="module")
def host(model, clip, vae):
    with running_host(model, clip, vae) as host:
        yield host


def whole(entry) -> bool:
    return isinstance(entry.input, io.Int.Input)


def sentence(entry) -> str:
    return OUT_OF_RANGE.format(entry.name, "a whole number from" if whole(entry) else "a number from")


def beyond(entry) -> list[tuple]:
    """Values outside an input's range, with the host's word for them where they are typed in; None where only we look."""
    step = 1 if whole(entry) else 0.01
    return [
        (entry.input.min - step, TOO_SMALL),
        (entry.input.max + step, TOO_LARGE),
        (NAN, NOT_CONVERTED if whole(entry) else None),
        (10**30, TOO_LARGE),
        (-INF, NOT_CONVERTED if whole(entry) else TOO_SMALL),
        ("abc", NOT_CONVERTED),
        (None, NOT_CONVERTED),
    ]


@pytest.mark.parametrize("entry", NUMBERS, ids=str)
def test_every_number_has_a_range_with_its_default_inside(entry):
    low, high = entry.input.min, entry.input.max
    assert -INF < low < high < INF and (entry.input.default is None or low <= entry.input.default <= high)
    if entry.name.split(".")[-1] == "seed":
        assert (low, high) == SEEDS


@pytest.mark.parametrize("entry", NUMBERS, ids=str)
def test_every_node_checks_its_numbers_itself(host, entry):
    """What another node hands over the host does not look at."""
    things = {link.name: host.fitting(link.kind) for link in entries(entry.node) if not link.is_widget and not link.is_optional}
    for value in [*(value for value, _ in beyond(entry)), *([entry.input.min + 0.5] if whole(entry) else []), True]:
        with pytest.raises(Step1XError, match=sentence(entry)):
            called(entry.node, things | widgets(entry.node, **dict(entry.opened)) | {entry.name: value})


@pytest.mark.parametrize("number, entry", enumerate(NUMBERS), ids=map(str, NUMBERS))
def test_numbers_beyond_their_range(host, number, entry):
    """Every input with one of the values, in turn, through the host."""
    values = beyond(entry)
    value, kind = values[number % len(values)]
    chosen = dict(entry.opened)
    typed = host.call(entry.node, **chosen, **{entry.name: value})
    if kind is None:
        typed.says(sentence(entry))
    else:
        assert kind in typed.refused, typed
    host.refuses(host.call(entry.node, **chosen, **{entry.name: Given(value, entry.kind)}), sentence(entry))


# What a limit of these would cost is time or files, and nothing else: full-size pictures, 200 steps, written texts, trainings, datasets.
SLOW_NODES = ("Step1XEditThinkPrompt", "Step1XEditReflectOnEdit", "Step1XEditContentGate")
SLOW_FOLDERS = ("training", "evaluation")
SLOW_AT_MOST = ("size_level", "Step1XEditSampler.steps", "Step1XEditBatchImages.steps", "Step1XEditReflectionLoop.steps")


def limits(entry) -> list:
    """The values at the ends of the range that are tried."""
    if any(other.is_file for other in entries(entry.node)):
        return []  # Files are bad_input_weights' and bad_input_checkpoints' business.
    if entry.node in SLOW_NODES or any(name in classes()[entry.node].GET_SCHEMA().category.split("/") for name in SLOW_FOLDERS):
        return []
    slow = entry.name in SLOW_AT_MOST or f"{entry.node}.{entry.name}" in SLOW_AT_MOST
    return [entry.input.min] if slow else [entry.input.min, entry.input.max]


LIMITS = [pytest.param(entry, value, id=f"{entry}-{value}") for entry in NUMBERS for value in limits(entry)]


def test_limits_are_tried_of_every_node_that_edits():
    assert len(LIMITS) > 30


@pytest.mark.parametrize("entry, value", LIMITS)
def test_limits_are_part_of_the_range(host, entry, value):
    for given in (value, Given(value, entry.kind)):
        outputs = host.call(entry.node, **dict(entry.opened), **{entry.name: given}).made()
        latents = [output["samples"] for output in outputs if isinstance(output, dict)]
        assert all(torch.isfinite(output).all() for output in [*outputs, *latents] if torch.is_tensor(output))


@pytest.mark.parametrize(
    "node, values",
    [
        ("Step1XEditGuidance", {"power": 1.0, "truncate": 0.0}),
        ("Step1XEditGuidance", {"power": 0.0}),
        ("Step1XEditSpeedPreset", {"mode": TEACACHE, "mode.threshold": 2.0}),
        ("Step1XEditSpeedPreset", {"mode": REGION, "mode.warmup": 0.0, "mode.refreshes": 20, "mode.reuse": 1.0}),
        ("Step1XEditSpeedPreset", {"mode": REGION, "mode.similarity": 1.0, "mode.warmup": 1.0}),
        ("Step1XEditSpeedPreset", {"mode": ALL_STEPS, "mode.start_percent": 1.0, "mode.end_percent": 1.0}),
        ("Step1XEditSpeedPreset", {"mode": ALL_STEPS, "mode.start_percent": 0.0, "mode.end_percent": 0.0}),
    ],
)
def test_models_patched_at_the_limits_draw_pictures(host, node, values):
    (patched,) = host.call(node, **values).made()
    assert torch.isfinite(host.sample(model=Given(patched), cfg=100.0, steps=3).made()[0]["samples"]).all()
    host.still_edits()


def test_an_interval_that_ends_before_it_starts(host):
    host.refuses(host.call("Step1XEditSpeedPreset", **{"mode": ALL_STEPS, "mode.start_percent": 1.0, "mode.end_percent": 0.7}),
                 "Guidance starts at 1 of the steps and ends at 0.7; .* Lower start_percent or raise end_percent")


@pytest.mark.parametrize("entry", CHOICES, ids=str)
@pytest.mark.parametrize("value", ["nope", "", None, 5, ["euler"]], ids=["unknown", "nothing", "null", "number", "list"])
def test_choices_that_there_are_not(host, entry, value):
    chosen = dict(entry.opened)
    if not isinstance(value, list):
        assert host.call(entry.node, **chosen, **{entry.name: value}).refused.startswith(NOT_IN_LIST)
    host.refuses(
        host.call(entry.node, **chosen, **{entry.name: Given(value)}),
        OUT_OF_RANGE.format(entry.name, "one of the entries of its list"),
    )


@pytest.mark.parametrize(
    "value, expected",
    [
        (Many([1, 2, 3]), "There are 3 seeds for 1 edits. Connect one seed"),
        (Many([1, -1]), OUT_OF_RANGE.format("seed", "a whole number")),
        (Many([]), "There are 0 seeds for 1 edits. Connect one seed"),
    ],
    ids=["three", "one_of_two", "none"],
)
def test_lists_of_seeds(host, value, expected):
    host.refuses(host.call("Step1XEditBatchImages", seed=Given(value, "INT")), expected)


WRITING = {
    "do_sample": True,
    "max_length": 2,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.0,
    "repetition_penalty": 1.05,
    "seed": 1,
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", NAN),
        ("temperature", NAN),
        ("temperature", -1.0),
        ("top_p", NAN),
        ("top_p", 2.0),
        ("min_p", -1.0),
        ("seed", 2**64),
    ],
)
def test_settings_of_written_text_beyond_their_range(host, name, value):
    """Of the stock 'Generate Text', which hands on what is connected to it."""
    tokens = host.clip.tokenizer.tokenize_chat(["hello"], [])
    with pytest.raises(Step1XError, match=f"{name.replace('_', '.')} is {value}; it must .*[.]$"):
        host.clip.generate(tokens, **WRITING | {name: value})
    host.still_edits()


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_length", 0),
        ("max_length", -3),
        ("top_k", 0),
        ("top_k", 10**9),
        ("top_p", 0.0),
        ("top_p", 1.0),
        ("min_p", 1.0),
        ("temperature", 0.0),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("do_sample", False),
        ("repetition_penalty", 1000.0),
    ],
)
def test_settings_of_written_text_at_their_limits(host, name, value):
    settings = WRITING | {name: value}
    reply = host.clip.generate(host.clip.tokenizer.tokenize_chat(["hello"], []), **settings)
    assert len(reply) <= max(settings["max_length"], 0) and isinstance(host.clip.decode(reply), str)
