"""Models, text encoders, VAEs and conditionings of the wrong kind or version, connected to every input."""

import comfy.sd
import pytest
import tiny_models
import torch
from bad_input_host import BAD_LINK, MISMATCH, MISSING, NO_SUCH_NODE, Given, running_host, use_folders
from node_inputs import links, socket
from PIL import Image

from step1x_core.host.checkpoints.loading import load_model, load_text_encoder

# Nodes and their checks are the same in every host. A sample of the cases shows what a further host makes of them.
pytestmark = pytest.mark.sampled(11)

INPUTS = links()
# Optional sockets to which nothing is the same as no wire.
MAY_BE_NOTHING = {"Step1XEditDecode.source", "Step1XEditEncode.latent", "Step1XEditTrainLora.vae"}


def parametrize_by(kind):
    """Every socket of that type."""
    return pytest.mark.parametrize("entry", links(kind), ids=str)


NO_MODEL = "Expected a Step1X-Edit model, but found .* Connect the model from 'Load Step1X-Edit Model'"
NO_ENCODER = "This text encoder formats prompts for another model. Use the one from 'Load Step1X-Edit MLLM'"
NO_VAE = "(Expected a VAE, but found|Input 'vae' is) .*Connect the stock 'Load VAE' with"
REFUSALS = {
    "MODEL": NO_MODEL,
    "CLIP": NO_ENCODER,
    "VAE": NO_VAE,
    "IMAGE": "expected a floating-point image tensor .* Connect an output of the type IMAGE",
    "MASK": "expected a mask tensor .* Connect an output of the type MASK",
    "LATENT": "Expected a latent, but found .* Connect an output of the type LATENT",
    "CONDITIONING": "is not a conditioning, or is empty. Connect a conditioning from 'Step1X-Edit Encode'",
    "STEP1X_STITCH": "Input 'stitch' is a value of type .* Connect the output 'stitch' of 'Step1X-Edit Crop to Mask'",
    "STEP1X_EDIT_DATASET": "Input 'dataset' is .* Connect the output of 'Step1X-Edit Dataset'",
    "STEP1X_PAIRS": "Input 'pairs' is .* Connect the output of 'Step1X-Edit Compute Pairs' or 'Step1X-Edit Record Pairs'",
    "STEP1X_PROPOSAL": "Input 'proposals' is .* Connect the output of 'Step1X-Edit Propose Edits'",
    "STEP1X_BENCH": "Input 'bench' is .* Connect the output of 'Step1X-Edit GEdit-Bench Items'",
    "STEP1X_BENCH_ITEM": "Input 'items' is .* Connect the output of 'Step1X-Edit GEdit-Bench Items'",
}


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
    with running_host(model, clip, vae, lambda patch: use_folders(patch, root)) as host:
        yield host


def test_no_type_of_socket_is_without_a_sentence():
    assert {entry.kind for entry in INPUTS} == set(REFUSALS)


@pytest.mark.parametrize("entry", INPUTS, ids=str)
def test_outputs_of_another_type_are_refused_by_the_host(host, entry):
    other = "LATENT" if entry.kind != "LATENT" else "IMAGE"
    host.refuses(host.call(entry.node, **{entry.name: Given(host.fitting(other), other)}), MISMATCH)


@pytest.mark.parametrize(
    "entry, wrong",
    [
        pytest.param(entry, wrong, id=f"{entry}-{wrong}")
        for entry in INPUTS
        for wrong in ("nothing", "other", "text")
        if wrong != "nothing" or f"{entry.node}.{entry.name}" not in MAY_BE_NOTHING
    ],
)
def test_what_comes_through_a_node_without_types(host, entry, wrong):
    """Switches and reroutes of other packs fit everywhere, and a checkpoint without a text encoder or VAE gives None."""
    value = {"nothing": None, "other": host.fitting("STEP1X_STITCH" if entry.kind != "STEP1X_STITCH" else "VAE"), "text": "x"}[wrong]
    if (entry.node, entry.name, wrong) == ("Step1XEditEncode", "model", "nothing"):
        return host.call(entry.node, **{entry.name: Given(value)}).made()  # as if it were not connected
    not_connected = (entry.node, entry.name, wrong) == ("Step1XEditContentGate", "clip", "nothing")
    host.refuses(
        host.call(entry.node, **{entry.name: Given(value)}),
        "no text encoder is connected. Connect 'clip'" if not_connected else REFUSALS[entry.kind],
    )


@pytest.mark.parametrize("link, expected", [(["nowhere", 0], NO_SUCH_NODE), (["a"], BAD_LINK), (["a", 0, 0], BAD_LINK), ([], BAD_LINK)])
@pytest.mark.parametrize("node, kind", [("Step1XEditEncode", "CLIP"), ("Step1XEditSampler", "LATENT"), ("Step1XEditBatchImages", "IMAGE")])
def test_links_that_lead_nowhere(host, node, kind, link, expected):
    host.refuses(host.call(node, **{socket(node, kind): link}), expected)


@pytest.mark.parametrize("entry", [entry for entry in INPUTS if not entry.is_optional], ids=str)
def test_missing_inputs(host, entry):
    host.refuses(host.call(entry.node, entry.name), MISSING)


@pytest.fixture(scope="module")
def v12(models, host):
    """Model, text encoder and an encoded edit of the other layout."""
    encoder = load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")
    return load_model(models / "diffusion_models" / tiny_models.V12_FILE), encoder, host.encode(clip=Given(encoder)).made()


OTHER_LAYOUT = "The model was loaded as .*, but the prompt was encoded for .* Set the version of 'Load Step1X-Edit MLLM'"


@pytest.mark.parametrize(
    "of_model, of_positive, of_negative",
    [
        ("v1.1", "v1.2", "v1.1"),
        ("v1.1", "v1.1", "v1.2"),
        ("v1.1", "v1.2", "v1.2"),
        ("v1.2", "v1.1", "v1.2"),
        ("v1.2", "v1.2", "v1.1"),
        ("v1.2", "v1.1", "v1.1"),
    ],
)
def test_versions_of_model_and_conditioning(host, v12, of_model, of_positive, of_negative):
    models, encoded = {"v1.1": host.model, "v1.2": v12[0]}, {"v1.1": host.encoded, "v1.2": v12[2]}
    outcome = host.sample(model=Given(models[of_model]), positive=Given(encoded[of_positive][0]), negative=Given(encoded[of_negative][1]))
    host.refuses(outcome, OTHER_LAYOUT)


@pytest.mark.parametrize("node", ["Step1XEditBatchImages", "Step1XEditReflectionLoop"])
@pytest.mark.parametrize("kind", ["MODEL", "CLIP"])
def test_versions_inside_one_node(host, v12, node, kind):
    outcome = host.call(node, **{socket(node, kind): Given(v12[0] if kind == "MODEL" else v12[1], kind)})
    if node == "Step1XEditBatchImages":
        # It tells of each edit in a line of its own.
        assert (
            outcome.error[0].endswith("Step1XError")
            and "None of the edits could be made" in outcome.error[1]
            and "Set the version of" in outcome.error[1]
        )
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
@parametrize_by("VAE")
def test_vaes_of_other_models(host, foreign_vaes, entry, kind):
    host.refuses(
        host.call(entry.node, **{entry.name: Given(foreign_vaes[kind], "VAE")}),
        "This VAE's latents have 4 channels; Step1X-Edit needs 16. Load the FLUX VAE",
    )


@pytest.fixture(scope="module")
def foreign_model():
    """FLUX itself: our model without its connector."""
    size = tiny_models.TransformerSize(
        hidden=128, head_dim=128, depth=1, depth_single=1, text=64, connector=128, connector_depth=1, vector=32
    )
    shapes = {name: shape for name, shape in tiny_models.transformer_shapes("v1.1", size).items() if not name.startswith("connector.")}
    return comfy.sd.load_diffusion_model_state_dict(tiny_models.random_weights(shapes, 0))


@parametrize_by("MODEL")
def test_models_of_other_families(host, foreign_model, entry):
    host.refuses(host.call(entry.node, **{entry.name: Given(foreign_model, "MODEL")}), NO_MODEL)


class SDTextEncoder:
    """What a stock text encoder has in common with ours."""

    tokenizer = object()


@parametrize_by("CLIP")
def test_text_encoders_of_other_models(host, entry):
    host.refuses(host.call(entry.node, **{entry.name: Given(SDTextEncoder(), "CLIP")}), NO_ENCODER)


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
    "joined": (
        lambda cond: [[torch.cat((cond[0][0], cond[0][0]), dim=1), cond[0][1]]],
        "cannot be concatenated. Write everything into one prompt",
    ),
    "nan": (lambda cond: [[cond[0][0] * float("nan"), cond[0][1]]], "Sampling returned NaN or Inf values"),
    "no_valid_text": (
        with_extra(attention_mask=torch.zeros(1, 640, dtype=torch.long)),
        "Sampling returned NaN or Inf values",
    ),
    "reference_of_sd": (
        with_extra(reference_latents=[LATENT[:, :4]]),
        "The reference latent has shape .* belongs to another model",
    ),
    "reference_of_wan": (
        with_extra(reference_latents=[LATENT[:, :, None]]),
        "The reference latent has shape .* belongs to another model",
    ),
    "reference_nan": (with_extra(reference_latents=[LATENT * float("nan")]), "Sampling returned NaN or Inf values"),
    "kontext_method": (with_extra(reference_latents_method="index"), "Remove that node"),
}


@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize("change, expected", CONDITIONINGS.values(), ids=CONDITIONINGS)
def test_conditionings_of_other_models(host, change, expected, side):
    host.refuses(host.sample(**{side: Given(change(host.encoded[side == "negative"]))}), expected)


@pytest.mark.parametrize(
    "change",
    [
        with_extra(reference_latents=None),
        with_extra(reference_latents=[LATENT] * 3),
        with_extra(reference_latents=[LATENT.repeat(2, 1, 1, 1)]),
        with_extra(reference_latents=[LATENT[..., :3, :5]]),
        lambda cond: [[cond[0][0], {}]],
        lambda cond: cond + cond,
    ],
    ids=[
        "no_reference",
        "three_references",
        "two_in_a_reference",
        "small_reference",
        "text_alone",
        "two_conditionings",
    ],
)
def test_conditionings_that_are_unusual_but_fine(host, change):
    positive, negative = (Given(change(cond)) for cond in host.encoded[:2])
    assert torch.isfinite(host.sample(positive=positive, negative=negative).made()[0]["samples"]).all()
