"""Models, text encoders, VAEs and conditionings of the wrong kind or version, connected to every input."""

import comfy.sd
import folder_paths
import pytest
import tiny_models
import torch
from bad_input_host import BAD_LINK, MISMATCH, MISSING, NO_SUCH_NODE, Given, Host
from comfy_api.latest import io
from PIL import Image

import nodes
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.training.cache import Cache, EditDataset

TYPES = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "image": "IMAGE", "images": "IMAGE", "images.image0": "IMAGE", "source": "IMAGE", "edited": "IMAGE", "mask": "MASK",
         "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT", "samples": "LATENT", "stitch": "STEP1X_STITCH",
         "target": "IMAGE", "dataset": "STEP1X_EDIT_DATASET", "pairs": "STEP1X_PAIRS", "proposals": "STEP1X_PROPOSAL", "bench": "STEP1X_BENCH", "items": "STEP1X_BENCH_ITEM"}
EDIT = {"negative_prompt": "", "size_level": 64, "seed": 1, "steps": 1, "cfg": 2.0, "sampler_name": "euler"}
NODES = {
    "Step1XEditEncode": (("clip", "vae", "image"), {"prompt": "red", "negative_prompt": "", "size_level": 64}),
    "Step1XEditReferences": (("positive", "negative", "vae", "images.image0"), {"size_level": 64}),
    "Step1XEditSampler": (("model", "positive", "negative", "latent"), {"seed": 1, "steps": 1, "cfg": 2.0, "sampler_name": "euler", "denoise": 1.0}),
    "Step1XEditDecode": (("samples", "vae"), {}),
    "Step1XEditScheduler": (("latent",), {"steps": 4, "denoise": 1.0}),
    "Step1XEditGuidance": (("model",), {"truncate": -1.0, "power": 0.4}),
    "Step1XEditGuidanceInterval": (("model",), {"start": 0.0, "end": 0.7}),
    "Step1XEditTeaCache": (("model",), {"threshold": 0.2}),
    "Step1XEditFp8Attention": (("model",), {}),
    "Step1XEditRegion": (("model",), {"similarity": 0.88, "warmup": 0.2, "refreshes": 1, "reuse": 0.02}),
    "Step1XEditThink": (("clip", "image"), {"prompt": "red", "seed": 1, "temperature": 0.7}),
    "Step1XEditReflect": (("clip", "source", "edited"), {"prompt": "red", "seed": 1, "version": "v1.2"}),
    "Step1XEditCrop": (("image", "mask"), {"context": 0.5, "min_size": 16}),
    "Step1XEditStitch": (("image", "stitch"), {"feather": 2}),
    "Step1XEditBatch": (("model", "clip", "vae", "images"), {"prompts": "red", "combine": "pairs", **EDIT}),
    "Step1XEditReflectionLoop": (("model", "clip", "vae", "image"), {"prompt": "red", "rounds": 1, "think": False, "reflect": False, **EDIT}),
    "Step1XEditLoadLora": (("model",), {"lora_name": Given("x"), "strength": 1.0}),
    "Step1XEditContentGate": (("images", "clip"), {"action": "block", "classifier": "none", "unsafe_labels": "", "threshold": 0.5, "message": "", "prompt": "red", "words": "",
                                        "question": "Is it bad?"}),
    "Step1XEditDataset": (("clip", "vae"), {"dataset": "pairs", "size_level": 64, "validation": 0}),
    "Step1XEditTrainLora": (("model", "dataset"), {"name": "x", "steps": 1, "learning_rate": 0.1, "rank": 1, "alpha": 1.0, "batch_size": 1, "accumulation": 1, "seed": 1,
                                               "resume": True, "save_every": 0, "validate_every": 0, "schedule": "constant", "warmup": 0, "ema": 0.0,
                                               "gradient_checkpointing": True}),
    "Step1XEditPairPropose": (("clip", "image"), {"kinds": "", "count": 1, "seed": 1}),
    "Step1XEditPairCompute": (("images", "pairs"), {"kinds": "", "count": 1, "seed": 1, "max_side": 64}),
    "Step1XEditPairRecord": (("source", "target", "proposals", "pairs"), {"kind": "color_alter", "english": "x", "chinese": "", "direction": "forward", "maker": "x"}),
    "Step1XEditPairJudge": (("clip", "pairs"), {"seed": 1}),
    "Step1XEditPairFilter": (("pairs",), {"min_semantics": 0.0, "min_quality": 0.0, "min_change": 0.0, "max_change": 1.0, "unjudged": True}),
    "Step1XEditPairSheet": (("pairs",), {"limit": 4}),
    "Step1XEditPairSave": (("pairs",), {"name": "x"}),
    "Step1XEditGEditItems": (("bench",), {"count": 1}),
    "Step1XEditGEditSave": (("images", "items"), {}),
    "Step1XEditGEditJudge": (("clip", "bench"), {"judge": "x", "seed": 1, "again": False}),
    "Step1XEditGEditReport": (("bench",), {"judge": "x"}),
}
OPTIONAL = {("Step1XEditContentGate", "clip"), ("Step1XEditPairCompute", "pairs"), ("Step1XEditPairRecord", "proposals"), ("Step1XEditPairRecord", "pairs")}
# Optional ones; what else can be wrong with them is tried elsewhere.
LEFT_OUT = {("Step1XEditDecode", "source"), ("Step1XEditEncode", "latent"), ("Step1XEditTrainLora", "vae")}
INPUTS = [(node, name) for node, (names, _) in NODES.items() for name in names]

NO_MODEL = "Expected a Step1X-Edit model, but found .* Connect the model from 'Load Step1X-Edit Model'"
NO_ENCODER = "This text encoder formats prompts for another model. Use the one from 'Load Step1X-Edit MLLM'"
NO_VAE = "Expected a VAE, but found .* Load the FLUX VAE"
REFUSALS = {"MODEL": NO_MODEL, "CLIP": NO_ENCODER, "VAE": NO_VAE, "IMAGE": "expected a floating-point image tensor .* Connect an output of the type IMAGE",
            "MASK": "expected a mask tensor .* Connect an output of the type MASK", "LATENT": "Expected a latent, but found .* Connect an output of the type LATENT",
            "CONDITIONING": "is not a conditioning, or is empty. Connect a conditioning from 'Step1X-Edit Encode'",
            "STEP1X_STITCH": "The input 'stitch' brings .* Connect the output 'stitch' of 'Step1X-Edit Crop'",
            "STEP1X_EDIT_DATASET": "Input 'dataset' is .* Connect the output of 'Step1X-Edit Dataset'",
            "STEP1X_PAIRS": "Input 'pairs' is .* Connect the output of 'Step1X-Edit Computed Pairs' or 'Step1X-Edit Record Pairs'",
            "STEP1X_PROPOSAL": "Input 'proposals' is .* Connect the output of 'Step1X-Edit Propose Edits'",
            "STEP1X_BENCH": "Input 'bench' is .* Connect the output of 'Step1X-Edit GEdit-Bench'",
            "STEP1X_BENCH_ITEM": "Input 'items' is .* Connect the output of 'Step1X-Edit GEdit-Bench Items'"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The host's input and output folders are in it; the former holds a pair of pictures."""
    root = tmp_path_factory.mktemp("host")
    for part in ("source", "target"):
        (root / "input" / "pairs" / part).mkdir(parents=True)
        Image.new("RGB", (64, 64), "green").save(root / "input" / "pairs" / part / "1.png")
    (root / "input" / "pairs" / "target" / "1.txt").write_text("nothing")
    return root


@pytest.fixture(scope="module")
def host(model, clip, vae, root):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("input", "output"):
            patch.setattr(folder_paths, f"{name}_directory", str(root / name))
        yield Host(patch, model, clip, vae)


@pytest.fixture(scope="module")
def things(host, root):
    """A fitting thing for every type."""
    positive, _, latent = host.encoded
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:30, 20:30] = 1
    stitch = host.run("Step1XEditCrop", image=Given(host.picture), mask=Given(mask), context=0.5, min_size=16).made()[2]
    bench, = host.run("Step1XEditGEditBench", dataset="", method="x", language="en", task_types="", limit=1).made()
    return {"MODEL": host.model, "CLIP": host.clip, "VAE": host.vae, "IMAGE": host.picture, "MASK": mask, "CONDITIONING": positive, "LATENT": latent, "STEP1X_STITCH": stitch,
            "STEP1X_EDIT_DATASET": EditDataset(Cache(root / "cache"), []), "STEP1X_PAIRS": (), "STEP1X_PROPOSAL": None, "STEP1X_BENCH": bench,
            "STEP1X_BENCH_ITEM": (bench, bench.items[0])}


def given(things, node, *left_out):
    """Fitting things for the inputs of a node, but none for an optional one."""
    return {name: Given(things[TYPES[name]], TYPES[name]) for name in NODES[node][0] if name not in left_out and (node, name) not in OPTIONAL}


def run(host, things, node, **changes):
    return host.run(node, **given(things, node) | NODES[node][1] | changes)


def test_no_input_of_any_node_is_left_out(host):
    schemas = {name: node.GET_SCHEMA() for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("Step1X")}
    found = {(name, entry.id) for name, schema in schemas.items() if not schema.is_dev_only for entry in schema.inputs if not isinstance(entry, io.WidgetInput)}
    assert found - {(node, name.split(".")[0]) for node, name in INPUTS} == LEFT_OUT


@pytest.mark.parametrize("node, name", INPUTS)
def test_outputs_of_another_type_are_refused_by_the_host(host, things, node, name):
    other = "LATENT" if TYPES[name] != "LATENT" else "IMAGE"
    host.refuses(run(host, things, node, **{name: Given(things[other], other)}), MISMATCH)


@pytest.mark.parametrize("wrong", ["nothing", "other", "text"])
@pytest.mark.parametrize("node, name", INPUTS)
def test_what_comes_through_a_node_without_types(host, things, node, name, wrong):
    """Switches and reroutes of other packs fit everywhere, and a checkpoint without a text encoder or VAE gives None."""
    value = {"nothing": None, "other": things["STEP1X_STITCH" if TYPES[name] != "STEP1X_STITCH" else "VAE"], "text": "x"}[wrong]
    not_connected = (node, name, wrong) == ("Step1XEditContentGate", "clip", "nothing")
    host.refuses(run(host, things, node, **{name: Given(value)}), "no text encoder is connected. Connect 'clip'" if not_connected else REFUSALS[TYPES[name]])


@pytest.mark.parametrize("link, expected", [(["nowhere", 0], NO_SUCH_NODE), (["a"], BAD_LINK), (["a", 0, 0], BAD_LINK), ([], BAD_LINK)])
@pytest.mark.parametrize("node, name", [("Step1XEditEncode", "clip"), ("Step1XEditSampler", "latent"), ("Step1XEditBatch", "images")])
def test_links_that_lead_nowhere(host, things, node, name, link, expected):
    host.refuses(run(host, things, node, **{name: link}), expected)


@pytest.mark.parametrize("node, name", [(node, names[0]) for node, (names, _) in NODES.items()])
def test_missing_inputs(host, things, node, name):
    host.refuses(host.run(node, **given(things, node, name), **NODES[node][1]), MISSING)


@pytest.fixture(scope="module")
def v12(models, host):
    """Model, text encoder and an encoded edit of the other layout."""
    encoder = load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")
    return load_model(models / "diffusion_models" / tiny_models.V12_FILE), encoder, host.encode(clip=Given(encoder)).made()


OTHER_LAYOUT = "The model was loaded as .*, but the prompt was encoded for .* Set the version of 'Load Step1X-Edit MLLM'"


@pytest.mark.parametrize("of_model, of_positive, of_negative", [("v1.1", "v1.2", "v1.1"), ("v1.1", "v1.1", "v1.2"), ("v1.1", "v1.2", "v1.2"),
                                                                ("v1.2", "v1.1", "v1.2"), ("v1.2", "v1.2", "v1.1"), ("v1.2", "v1.1", "v1.1")])
def test_versions_of_model_and_conditioning(host, v12, of_model, of_positive, of_negative):
    models, encoded = {"v1.1": host.model, "v1.2": v12[0]}, {"v1.1": host.encoded, "v1.2": v12[2]}
    outcome = host.sample(model=Given(models[of_model]), positive=Given(encoded[of_positive][0]), negative=Given(encoded[of_negative][1]))
    host.refuses(outcome, OTHER_LAYOUT)


@pytest.mark.parametrize("node", ["Step1XEditBatch", "Step1XEditReflectionLoop"])
@pytest.mark.parametrize("part", ["model", "clip"])
def test_versions_inside_one_node(host, things, v12, node, part):
    outcome = run(host, things, node, **{part: Given(v12[0] if part == "model" else v12[1], TYPES[part])})
    if node == "Step1XEditBatch":
        # It tells of each edit in a line of its own.
        assert outcome.error[0].endswith("Step1XError") and "None of the edits could be made" in outcome.error[1] and "Set the version of" in outcome.error[1]
        host.still_edits()
    else:
        host.refuses(outcome, OTHER_LAYOUT)


def test_fitting_versions_are_made(host, v12):
    (out,) = host.sample(model=Given(v12[0]), **dict(zip(("positive", "negative", "latent"), map(Given, v12[2])))).made()
    assert torch.isfinite(out["samples"]).all()


@pytest.fixture(scope="module")
def foreign_vaes():
    """A VAE of Stable Diffusion's latents (4 channels) and, as a checkpoint without one gives it, none at all."""
    four = {name: tuple(4 if n == 16 else n for n in shape) for name, shape in tiny_models.vae_shapes().items()}
    return {"sd": comfy.sd.VAE(sd=tiny_models.random_weights(four, 3)), "none": comfy.sd.VAE(sd={"unrelated": torch.zeros(1)})}


@pytest.mark.parametrize("kind", ["sd", "none"])
@pytest.mark.parametrize(
    "node",
    [
        "Step1XEditEncode",
        "Step1XEditReferences",
        "Step1XEditDecode",
        "Step1XEditBatch",
        "Step1XEditReflectionLoop",
        "Step1XEditDataset",
        "Step1XEditTrainLora",
    ],
)
def test_vaes_of_other_models(host, things, foreign_vaes, node, kind):
    host.refuses(run(host, things, node, vae=Given(foreign_vaes[kind], "VAE")), "This VAE's latents have 4 channels; Step1X-Edit needs 16. Load the FLUX VAE")


@pytest.fixture(scope="module")
def foreign_model():
    """FLUX itself: our model without its connector."""
    size = tiny_models.TransformerSize(hidden=128, head_dim=128, depth=1, depth_single=1, text=64, connector=128, connector_depth=1, vector=32)
    shapes = {name: shape for name, shape in tiny_models.transformer_shapes("v1.1", size).items() if not name.startswith("connector.")}
    return comfy.sd.load_diffusion_model_state_dict(tiny_models.random_weights(shapes, 0))


@pytest.mark.parametrize(
    "node",
    [
        "Step1XEditSampler",
        "Step1XEditGuidance",
        "Step1XEditGuidanceInterval",
        "Step1XEditTeaCache",
        "Step1XEditRegion",
        "Step1XEditBatch",
        "Step1XEditReflectionLoop",
        "Step1XEditLoadLora",
        "Step1XEditTrainLora",
    ],
)
def test_models_of_other_families(host, things, foreign_model, node):
    host.refuses(run(host, things, node, model=Given(foreign_model, "MODEL")), NO_MODEL)


class SDTextEncoder:
    """What a stock text encoder has in common with ours."""

    tokenizer = object()


@pytest.mark.parametrize(
    "node",
    [
        "Step1XEditEncode",
        "Step1XEditThink",
        "Step1XEditReflect",
        "Step1XEditBatch",
        "Step1XEditContentGate",
        "Step1XEditDataset",
        "Step1XEditPairPropose",
        "Step1XEditPairJudge",
        "Step1XEditGEditJudge",
    ],
)
def test_text_encoders_of_other_models(host, things, node):
    host.refuses(run(host, things, node, clip=Given(SDTextEncoder(), "CLIP")), NO_ENCODER)


def with_extra(**changes):
    return lambda cond: [[cond[0][0], {**cond[0][1], **changes}]]


LATENT = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
NO_FIT = "This conditioning does not fit the Step1X-Edit model: .* Encode the prompt with"
NO_CONDITIONING = "is not a conditioning, or is empty. Connect a conditioning from 'Step1X-Edit Encode'"
CONDITIONINGS = {
    "sd": (lambda cond: [[torch.rand(1, 77, 768), {"pooled_output": None}]], NO_FIT),
    "flux": (lambda cond: [[torch.rand(1, 256, 4096), {"pooled_output": torch.rand(1, 768)}]], NO_FIT),
    "empty": (lambda cond: [], NO_CONDITIONING),
    "without_text": (lambda cond: [[None, {}]], NO_CONDITIONING),
    "matrix": (lambda cond: [[torch.rand(77, 64), {}]], NO_CONDITIONING),
    "joined": (lambda cond: [[torch.cat((cond[0][0], cond[0][0]), dim=1), cond[0][1]]], "cannot be concatenated. Write everything into one prompt"),
    "nan": (lambda cond: [[cond[0][0] * float("nan"), cond[0][1]]], "Sampling returned NaN or Inf values"),
    "no_valid_text": (with_extra(attention_mask=torch.zeros(1, 640, dtype=torch.long)), "Sampling returned NaN or Inf values"),
    "reference_of_sd": (with_extra(reference_latents=[LATENT[:, :4]]), "The reference latent has shape .* belongs to another model"),
    "reference_of_wan": (with_extra(reference_latents=[LATENT[:, :, None]]), "The reference latent has shape .* belongs to another model"),
    "reference_nan": (with_extra(reference_latents=[LATENT * float("nan")]), "Sampling returned NaN or Inf values"),
    "kontext_method": (with_extra(reference_latents_method="index"), "Remove that node"),
}


@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize("change, expected", CONDITIONINGS.values(), ids=CONDITIONINGS)
def test_conditionings_of_other_models(host, change, expected, side):
    host.refuses(host.sample(**{side: Given(change(host.encoded[side == "negative"]))}), expected)


@pytest.mark.parametrize("change", [with_extra(reference_latents=None), with_extra(reference_latents=[LATENT] * 3), with_extra(reference_latents=[LATENT.repeat(2, 1, 1, 1)]),
                                    with_extra(reference_latents=[LATENT[..., :3, :5]]), lambda cond: [[cond[0][0], {}]], lambda cond: cond + cond],
                         ids=["no_reference", "three_references", "two_in_a_reference", "small_reference", "text_alone", "two_conditionings"])
def test_conditionings_that_are_unusual_but_fine(host, change):
    positive, negative = (Given(change(cond)) for cond in host.encoded[:2])
    assert torch.isfinite(host.sample(positive=positive, negative=negative).made()[0]["samples"]).all()
