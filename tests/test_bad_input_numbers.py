"""Numbers and choices at their limits and beyond them, typed in and handed over by another node."""

import pytest
import torch
from bad_input_host import NOT_CONVERTED, NOT_IN_LIST, TOO_LARGE, TOO_SMALL, Given, Host, Many
from comfy_api.latest import io

import nodes
from step1x_core.errors import Step1XError

NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = "The input '{}' brings .*, but it takes {}.*Correct it, or the node that it comes from"
WIDGETS = {
    "Step1XEditEncode": {"prompt": "red", "negative_prompt": "", "size_level": 64},
    "Step1XEditReferences": {"size_level": 64},
    "Step1XEditSampler": {"seed": 1, "steps": 1, "cfg": 2.0, "sampler_name": "euler", "denoise": 1.0},
    "Step1XEditScheduler": {"steps": 4, "denoise": 1.0},
    "Step1XEditGuidance": {"truncate": -1.0, "power": 0.4},
    "Step1XEditGuidanceInterval": {"start": 0.0, "end": 0.7},
    "Step1XEditTeaCache": {"threshold": 0.2},
    "Step1XEditRegion": {"similarity": 0.88, "warmup": 0.2, "refreshes": 1, "reuse": 0.02},
    "Step1XEditThink": {"prompt": "red", "seed": 1, "temperature": 0.7},
    "Step1XEditReflect": {"prompt": "red", "seed": 1, "version": "v1.2"},
    "Step1XEditCrop": {"context": 0.5, "min_size": 16},
    "Step1XEditStitch": {"feather": 2},
    "Step1XEditBatch": {"prompts": "red", "combine": "pairs", "negative_prompt": "", "size_level": 64, "seed": 1, "steps": 1, "cfg": 2.0, "sampler_name": "euler"},
    "Step1XEditReflectionLoop": {"prompt": "red", "negative_prompt": "", "size_level": 64, "seed": 1, "steps": 1, "cfg": 2.0, "rounds": 1, "think": False, "reflect": False,
                             "sampler_name": "euler"},
    "Step1XEditLoadLora": {"lora_name": "x", "strength": 1.0},
    "Step1XEditLoadModel": {"model": "x", "version": "auto", "weight_dtype": "default"},
    "Step1XEditLoadMLLM": {"mllm": "x", "device": "cpu", "version": "auto"},
    "Step1XEditContentGate": {"action": "block", "classifier": "none", "unsafe_labels": "", "threshold": 0.5, "message": "", "prompt": "red", "words": "blood", "question": ""},
    "Step1XEditDataset": {"dataset": "x", "size_level": 64, "validation": 0},
    "Step1XEditTrainLora": {"name": "x", "steps": 1, "learning_rate": 0.1, "rank": 1, "alpha": 1.0, "batch_size": 1, "accumulation": 1, "seed": 1, "resume": True, "save_every": 0,
                        "validate_every": 0, "schedule": "constant", "warmup": 0, "ema": 0.0, "gradient_checkpointing": True},
    "Step1XEditPairPropose": {"kinds": "", "count": 1, "seed": 1},
    "Step1XEditPairCompute": {"kinds": "", "count": 1, "seed": 1, "max_side": 64},
    "Step1XEditPairRecord": {"kind": "color_alter", "english": "x", "chinese": "", "direction": "forward", "maker": "x"},
    "Step1XEditPairJudge": {"seed": 1},
    "Step1XEditPairFilter": {"min_semantics": 0.0, "min_quality": 0.0, "min_change": 0.0, "max_change": 1.0, "unjudged": True},
    "Step1XEditPairSheet": {"limit": 4},
    "Step1XEditPairSave": {"name": "x"},
    "Step1XEditGEditBench": {"dataset": "", "method": "x", "language": "en", "task_types": "", "limit": 0},
    "Step1XEditGEditItems": {"count": 1},
    "Step1XEditGEditJudge": {"judge": "x", "seed": 1, "again": False},
}
# (least, most) of every number; a test holds them against the schemas.
SEED, SIZE, STEPS, CFG = (0, 2**64 - 1), (64, 2048), (0, 200), (0.0, 100.0)
RANGES = {
    ("Step1XEditEncode", "size_level"): SIZE,
    ("Step1XEditReferences", "size_level"): SIZE,
    ("Step1XEditSampler", "seed"): SEED,
    ("Step1XEditSampler", "steps"): STEPS,
    ("Step1XEditSampler", "cfg"): CFG,
    ("Step1XEditSampler", "denoise"): (0.0, 1.0),
    ("Step1XEditScheduler", "steps"): (1, 200),
    ("Step1XEditScheduler", "denoise"): (0.0, 1.0),
    ("Step1XEditGuidance", "truncate"): (-1.0, 1.0),
    ("Step1XEditGuidance", "power"): (0.0, 1.0),
    ("Step1XEditTeaCache", "threshold"): (0.0, 2.0),
    ("Step1XEditRegion", "similarity"): (-1.0, 1.0),
    ("Step1XEditRegion", "warmup"): (0.0, 1.0),
    ("Step1XEditRegion", "refreshes"): (0, 20),
    ("Step1XEditRegion", "reuse"): (0.0, 1.0),
    ("Step1XEditThink", "seed"): SEED,
    ("Step1XEditThink", "temperature"): (0.0, 2.0),
    ("Step1XEditReflect", "seed"): SEED,
    ("Step1XEditCrop", "context"): (0.0, 10.0),
    ("Step1XEditCrop", "min_size"): (16, 8192),
    ("Step1XEditStitch", "feather"): (0, 512),
    ("Step1XEditBatch", "size_level"): SIZE,
    ("Step1XEditBatch", "seed"): SEED,
    ("Step1XEditBatch", "steps"): STEPS,
    ("Step1XEditBatch", "cfg"): CFG,
    ("Step1XEditReflectionLoop", "size_level"): SIZE,
    ("Step1XEditReflectionLoop", "seed"): SEED,
    ("Step1XEditReflectionLoop", "steps"): STEPS,
    ("Step1XEditReflectionLoop", "cfg"): CFG,
    ("Step1XEditReflectionLoop", "rounds"): (1, 10),
    ("Step1XEditLoadLora", "strength"): (-10.0, 10.0),
    ("Step1XEditGuidanceInterval", "start"): (0.0, 1.0),
    ("Step1XEditGuidanceInterval", "end"): (0.0, 1.0),
    ("Step1XEditContentGate", "threshold"): (0.0, 1.0),
    ("Step1XEditDataset", "size_level"): SIZE,
    ("Step1XEditDataset", "validation"): (0, 64),
    ("Step1XEditTrainLora", "steps"): (1, 1000000),
    ("Step1XEditTrainLora", "learning_rate"): (0.0, 1.0),
    ("Step1XEditTrainLora", "rank"): (1, 512),
    ("Step1XEditTrainLora", "alpha"): (0.001, 512.0),
    ("Step1XEditTrainLora", "batch_size"): (1, 256),
    ("Step1XEditTrainLora", "accumulation"): (1, 1024),
    ("Step1XEditTrainLora", "seed"): SEED,
    ("Step1XEditTrainLora", "save_every"): (0, 100000),
    ("Step1XEditTrainLora", "validate_every"): (0, 100000),
    ("Step1XEditTrainLora", "warmup"): (0, 100000),
    ("Step1XEditTrainLora", "ema"): (0.0, 0.99999),
    ("Step1XEditPairPropose", "count"): (1, 64),
    ("Step1XEditPairPropose", "seed"): SEED,
    ("Step1XEditPairCompute", "count"): (1, 256),
    ("Step1XEditPairCompute", "seed"): SEED,
    ("Step1XEditPairCompute", "max_side"): (0, 8192),
    ("Step1XEditPairJudge", "seed"): SEED,
    ("Step1XEditPairFilter", "min_semantics"): (0.0, 10.0),
    ("Step1XEditPairFilter", "min_quality"): (0.0, 10.0),
    ("Step1XEditPairFilter", "min_change"): (0.0, 1.0),
    ("Step1XEditPairFilter", "max_change"): (0.0, 1.0),
    ("Step1XEditPairSheet", "limit"): (1, 200),
    ("Step1XEditGEditBench", "limit"): (0, 100000),
    ("Step1XEditGEditItems", "count"): (1, 1000),
    ("Step1XEditGEditJudge", "seed"): SEED,
}
CHOICES = [
    ("Step1XEditSampler", "sampler_name"),
    ("Step1XEditReflect", "version"),
    ("Step1XEditBatch", "combine"),
    ("Step1XEditBatch", "sampler_name"),
    ("Step1XEditReflectionLoop", "sampler_name"),
    ("Step1XEditLoadModel", "version"),
    ("Step1XEditLoadModel", "weight_dtype"),
    ("Step1XEditLoadMLLM", "device"),
    ("Step1XEditLoadMLLM", "version"),
    ("Step1XEditContentGate", "action"),
    ("Step1XEditTrainLora", "schedule"),
    ("Step1XEditPairRecord", "kind"),
    ("Step1XEditPairRecord", "direction"),
    ("Step1XEditGEditBench", "language"),
]


@pytest.fixture(scope="module")
def host(model, clip, vae):
    with pytest.MonkeyPatch.context() as patch:
        yield Host(patch, model, clip, vae)


@pytest.fixture(scope="module")
def links(host):
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:30, 20:30] = 1
    positive, negative, latent = host.encoded
    stitch = host.run("Step1XEditCrop", image=Given(host.picture), mask=Given(mask), context=0.5, min_size=16).made()[2]
    return {"model": host.model, "clip": host.clip, "vae": host.vae, "image": host.picture, "images": host.picture, "images.image0": host.picture, "source": host.picture,
            "edited": host.picture, "target": host.picture, "pairs": (), "dataset": None, "bench": None,
            "positive": positive, "negative": negative, "latent": latent, "mask": mask, "stitch": stitch}


def names_of(node):
    found = {
        "Step1XEditEncode": "clip vae image",
        "Step1XEditReferences": "positive negative vae images.image0",
        "Step1XEditSampler": "model positive negative latent",
        "Step1XEditScheduler": "latent",
        "Step1XEditGuidance": "model",
        "Step1XEditTeaCache": "model",
        "Step1XEditThink": "clip image",
        "Step1XEditReflect": "clip source edited",
        "Step1XEditCrop": "image mask",
        "Step1XEditStitch": "image stitch",
        "Step1XEditBatch": "model clip vae images",
        "Step1XEditReflectionLoop": "model clip vae image",
        "Step1XEditLoadLora": "model",
        "Step1XEditRegion": "model",
        "Step1XEditGuidanceInterval": "model",
        "Step1XEditContentGate": "images",
        "Step1XEditDataset": "clip vae",
        "Step1XEditTrainLora": "model dataset",
        "Step1XEditPairPropose": "clip image",
        "Step1XEditPairCompute": "images",
        "Step1XEditPairRecord": "source target",
        "Step1XEditPairJudge": "clip pairs",
        "Step1XEditPairFilter": "pairs",
        "Step1XEditPairSheet": "pairs",
        "Step1XEditPairSave": "pairs",
        "Step1XEditGEditItems": "bench",
        "Step1XEditGEditJudge": "clip bench",
    }
    return found.get(node, "").split()


def run(host, links, node, **changes):
    return host.run(node, **{name: Given(links[name]) for name in names_of(node)}, **WIDGETS[node] | changes)


def test_no_number_of_any_node_is_left_out(host):
    schemas = {name: node.GET_SCHEMA() for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("Step1X")}
    inputs = [(name, entry) for name, schema in schemas.items() if not schema.is_dev_only for entry in schema.inputs]
    assert {(name, entry.id): (entry.min, entry.max) for name, entry in inputs if isinstance(entry, (io.Int.Input, io.Float.Input))} == RANGES


def beyond(low, high):
    """Values outside a range, by name, with the host's word for them where they are typed in; None where only we look."""
    whole = isinstance(low, int)
    step = 1 if whole else 0.01
    return {"below": (low - step, TOO_SMALL), "above": (high + step, TOO_LARGE), "far_above": (10**30, TOO_LARGE), "nan": (NAN, NOT_CONVERTED if whole else None),
            "infinite": (-INF, NOT_CONVERTED if whole else TOO_SMALL), "text": ("abc", NOT_CONVERTED), "null": (None, NOT_CONVERTED)}


BEYOND = [pytest.param(*place, value, kind, id=f"{place[0].removeprefix('Step1X')}-{place[1]}-{name}")
          for place, limits in RANGES.items() for name, (value, kind) in beyond(*limits).items()]


@pytest.mark.parametrize("node, name, value, kind", BEYOND)
def test_numbers_beyond_their_range(host, links, node, name, value, kind):
    whole = isinstance(RANGES[node, name][0], int)
    sentence = OUT_OF_RANGE.format(name, "a whole number from" if whole else "a number from")
    if node != "Step1XEditLoadLora":
        # Without a LoRA file the host stops at its name.
        typed = run(host, links, node, **{name: value})
        if kind is None:
            typed.says(sentence)
        else:
            assert kind in typed.refused, typed
        host.refuses(run(host, links, node, **{name: Given(value, "INT" if whole else "FLOAT")}), sentence)
    else:
        outcome = host.run(node, model=Given(links["model"]), lora_name=Given("x"), strength=Given(value, "FLOAT"))
        host.refuses(outcome, sentence)


@pytest.mark.parametrize("node, name", [place for place, (low, _) in RANGES.items() if isinstance(low, int)])
def test_fractions_where_whole_numbers_are_due(host, links, node, name):
    host.refuses(run(host, links, node, **{name: Given(RANGES[node, name][0] + 0.5)}), OUT_OF_RANGE.format(name, "a whole number from"))


# Full-size pictures and 200 steps are left out here: nothing is wrong with them but the time they take.
LIMITS = {
    ("Step1XEditEncode", "size_level"): (64,),
    ("Step1XEditReferences", "size_level"): (64,),
    ("Step1XEditSampler", "seed"): SEED,
    ("Step1XEditSampler", "cfg"): (0.0, 1.0, 100.0),
    ("Step1XEditSampler", "denoise"): (0.0, 0.01, 1.0),
    ("Step1XEditScheduler", "steps"): (1, 200),
    ("Step1XEditScheduler", "denoise"): (0.0, 1.0),
    ("Step1XEditGuidance", "truncate"): (-1.0, 1.0),
    ("Step1XEditGuidance", "power"): (0.0, 1.0),
    ("Step1XEditGuidanceInterval", "start"): (0.0, 0.7),
    ("Step1XEditGuidanceInterval", "end"): (0.0, 1.0),
    ("Step1XEditTeaCache", "threshold"): (0.0, 2.0),
    ("Step1XEditCrop", "context"): (0.0, 10.0),
    ("Step1XEditCrop", "min_size"): (16, 8192),
    ("Step1XEditStitch", "feather"): (0, 512),
    ("Step1XEditRegion", "similarity"): (-1.0, 1.0),
    ("Step1XEditRegion", "warmup"): (0.0, 1.0),
    ("Step1XEditRegion", "refreshes"): (0, 20),
    ("Step1XEditRegion", "reuse"): (0.0, 1.0),
    ("Step1XEditBatch", "seed"): SEED,
    ("Step1XEditReflectionLoop", "seed"): SEED,
    ("Step1XEditReflectionLoop", "cfg"): CFG,
    ("Step1XEditReflectionLoop", "rounds"): (1, 10),
}


@pytest.mark.parametrize("node, name, value", [(*place, value) for place, values in LIMITS.items() for value in values])
def test_limits_are_part_of_the_range(host, links, node, name, value):
    for given in (value, Given(value, "FLOAT" if isinstance(value, float) else "INT")):
        outputs = run(host, links, node, **{name: given}).made()
        latents = [output["samples"] for output in outputs if isinstance(output, dict)]
        assert all(torch.isfinite(output).all() for output in [*outputs, *latents] if torch.is_tensor(output))


@pytest.mark.parametrize(
    "node, values",
    [
        ("Step1XEditGuidance", {"power": 1.0, "truncate": 0.0}),
        ("Step1XEditGuidance", {"power": 0.0}),
        ("Step1XEditTeaCache", {"threshold": 2.0}),
        ("Step1XEditRegion", {"warmup": 0.0, "refreshes": 20, "reuse": 1.0}),
        ("Step1XEditRegion", {"similarity": 1.0, "warmup": 1.0}),
        ("Step1XEditGuidanceInterval", {"start": 1.0, "end": 1.0}),
        ("Step1XEditGuidanceInterval", {"start": 0.0, "end": 0.0}),
    ],
)
def test_models_patched_at_the_limits_draw_pictures(host, links, node, values):
    (patched,) = run(host, links, node, **values).made()
    assert torch.isfinite(host.sample(model=Given(patched), cfg=100.0, steps=3).made()[0]["samples"]).all()
    host.still_edits()


def test_an_interval_that_ends_before_it_starts(host, links):
    host.refuses(run(host, links, "Step1XEditGuidanceInterval", start=1.0), "Guidance starts at 1 of the steps and ends at 0.7; .* Lower start or raise end")


@pytest.mark.parametrize("node, name", CHOICES)
@pytest.mark.parametrize("value", ["nope", "", None, 5, ["euler"]], ids=["unknown", "nothing", "null", "number", "list"])
def test_choices_that_there_are_not(host, links, node, name, value):
    sentence = OUT_OF_RANGE.format(name, "one of the entries of its list")
    if not isinstance(value, list) and not node.endswith("Loader"):
        assert run(host, links, node, **{name: value}).refused.startswith(NOT_IN_LIST)
    files = {key: Given("x") for key in ("model", "mllm") if key in WIDGETS[node]}
    host.refuses(run(host, links, node, **files, **{name: Given(value)}), sentence)


@pytest.mark.parametrize("value, expected", [(Many([1, 2, 3]), "There are 3 seeds for 1 edits. Connect one seed"), (Many([1, -1]), OUT_OF_RANGE.format("seed", "a whole number")),
                                             (Many([]), "There are 0 seeds for 1 edits. Connect one seed")], ids=["three", "one_of_two", "none"])
def test_lists_of_seeds(host, links, value, expected):
    host.refuses(run(host, links, "Step1XEditBatch", seed=Given(value, "INT")), expected)


WRITING = {"do_sample": True, "max_length": 2, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.05, "seed": 1}


@pytest.mark.parametrize("name, value", [("repetition_penalty", 0.0), ("repetition_penalty", NAN), ("temperature", NAN), ("temperature", -1.0), ("top_p", NAN), ("top_p", 2.0),
                                         ("min_p", -1.0), ("seed", 2**64)])
def test_settings_of_written_text_beyond_their_range(host, name, value):
    """Of the stock 'Generate Text', which hands on what is connected to it."""
    tokens = host.clip.tokenizer.tokenize_chat(["hello"], [])
    with pytest.raises(Step1XError, match=f"{name.replace('_', '.')} is {value}; it must .*[.]$"):
        host.clip.generate(tokens, **WRITING | {name: value})
    host.still_edits()


@pytest.mark.parametrize("name, value", [("max_length", 0), ("max_length", -3), ("top_k", 0), ("top_k", 10**9), ("top_p", 0.0), ("top_p", 1.0), ("min_p", 1.0),
                                         ("temperature", 0.0), ("seed", 0), ("seed", 2**64 - 1), ("do_sample", False), ("repetition_penalty", 1000.0)])
def test_settings_of_written_text_at_their_limits(host, name, value):
    settings = WRITING | {name: value}
    reply = host.clip.generate(host.clip.tokenizer.tokenize_chat(["hello"], []), **settings)
    assert len(reply) <= max(settings["max_length"], 0) and isinstance(host.clip.decode(reply), str)
