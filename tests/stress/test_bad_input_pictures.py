"""Pictures, masks and latents that are none, or of unusual kinds, into every node that takes them."""

import folder_paths
import numpy as np
import pytest
import torch
from bad_input_host import Given, running_host
from comfy.nested_tensor import NestedTensor
from node_inputs import links, socket
from PIL import Image

# Nodes and their checks are the same in every host. A sample of the cases shows what a further host makes of them.
pytestmark = pytest.mark.sampled(11)

NAN, INF = float("nan"), float("inf")
PICTURE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
LATENT = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
MASK = torch.zeros(1, 64, 64)
MASK[:, 20:30, 20:30] = 1


@pytest.fixture(scope="module")
def host(model, clip, vae):
    with running_host(model, clip, vae) as host:
        yield host


NO_PICTURE = "expected a floating-point image tensor .* Connect an output of the type IMAGE"
NOTHING = "is an empty image batch of shape .* Connect an image"
NARROW = "is too narrow to edit .* Crop the image or raise the size level"
BAD_PICTURES = {
    "20000_by_1": (torch.rand(1, 1, 20000, 3), NARROW),
    "1_by_20000": (torch.rand(1, 20000, 1, 3), NARROW),
    "no_channels": (PICTURE[..., :0], NOTHING),
    "empty_batch": (PICTURE[:0], NOTHING),
    "no_rows": (PICTURE[:, :0], NOTHING),
    "bytes": ((PICTURE * 255).byte(), NO_PICTURE),
    "integers": ((PICTURE * 255).long(), NO_PICTURE),
    "16_bit_integers": ((PICTURE * 32767).short(), NO_PICTURE),
    "bool": (PICTURE > 0.5, NO_PICTURE),
    "complex": (PICTURE.to(torch.complex64), NO_PICTURE),
    "without_batch_axis": (PICTURE[0], NO_PICTURE),
    "video": (PICTURE[None], NO_PICTURE),
    "mask": (PICTURE[..., 0], NO_PICTURE),
    "number": (torch.tensor(1.0), NO_PICTURE),
    "nothing": (None, NO_PICTURE),
    "text": ("picture.png", NO_PICTURE),
    "list": ([PICTURE], NO_PICTURE),
    "array": (PICTURE.numpy(), NO_PICTURE),
    "latent": ({"samples": LATENT}, NO_PICTURE),
}


@pytest.mark.parametrize("layout", ["v1.1", "v1.2"])
@pytest.mark.parametrize("picture, expected", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_encode_refuses(host, clip_v12, picture, expected, layout):
    clip = {"clip": Given(clip_v12)} if layout == "v1.2" else {}
    host.refuses(host.encode(image=Given(picture), **clip), expected, from_the_start=layout == "v1.1")


# Each is the same as the plain float32 picture that stands behind it.
FINE_PICTURES = {
    "one_pixel": (PICTURE[:, :1, :1], PICTURE[:, :1, :1]),
    "alpha": (torch.cat((PICTURE, PICTURE[..., :1]), dim=-1), PICTURE),
    "grey": (PICTURE[..., :1], PICTURE[..., :1].repeat(1, 1, 1, 3)),
    "grey_and_alpha": (PICTURE[..., :2], PICTURE[..., :1].repeat(1, 1, 1, 3)),
    "nan": (torch.where(PICTURE > 0.5, NAN, PICTURE), torch.where(PICTURE > 0.5, 0, PICTURE)),
    "infinite": (torch.where(PICTURE > 0.5, INF, PICTURE), torch.where(PICTURE > 0.5, 1, PICTURE)),
    "negative": (torch.where(PICTURE > 0.5, -3, PICTURE), torch.where(PICTURE > 0.5, 0, PICTURE)),
    "brighter_than_white": (torch.where(PICTURE > 0.5, 300, PICTURE), torch.where(PICTURE > 0.5, 1, PICTURE)),
    "float64": (PICTURE.double(), PICTURE),
    "float16": (PICTURE.half(), PICTURE.half().float()),
    "bfloat16": (PICTURE.bfloat16(), PICTURE.bfloat16().float()),
    "16_bit_origin": ((PICTURE * 65535).round() / 65535, (PICTURE * 255).round() / 255),
    "not_contiguous": (PICTURE.permute(0, 2, 1, 3), PICTURE.permute(0, 2, 1, 3).contiguous()),
}


@pytest.mark.parametrize("picture, same", FINE_PICTURES.values(), ids=FINE_PICTURES)
def test_encode_takes_every_kind_of_picture(host, picture, same):
    found, expected = host.encode(image=Given(picture)).made(), host.encode(image=Given(same)).made()
    for a, b in zip(found[:2], expected[:2]):
        assert torch.equal(a[0][0], b[0][0]) and torch.isfinite(a[0][0]).all()
    assert torch.equal(found[2]["samples"], expected[2]["samples"]) and torch.isfinite(found[2]["samples"]).all()


def file_of(mode: str, size=(40, 30)):
    """A picture of that mode with a gradient in it."""
    gradient = np.linspace(0, 65535 if mode.startswith("I") else 255, size[0] * size[1]).reshape(size[::-1])
    if mode in ("I;16", "I", "F"):
        return Image.fromarray(gradient.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    return Image.fromarray(gradient.astype(np.uint8)).convert("RGB" if mode in ("CMYK", "P") else "L").convert(mode)


ROTATED = Image.Exif()
ROTATED[274] = 6
# What a person saves: name of the file, the picture, how it is saved.
FILES = {
    "one_pixel": ("a.png", file_of("RGB", (1, 1)), {}),
    "alpha": ("a.png", file_of("RGBA"), {}),
    "grey": ("a.png", file_of("L"), {}),
    "grey_and_alpha": ("a.png", file_of("LA"), {}),
    "black_and_white": ("a.png", file_of("1"), {}),
    "palette_with_transparency": ("a.gif", file_of("P"), {"transparency": 0}),
    "16_bit": ("a.png", file_of("I;16"), {}),
    "32_bit": ("a.tiff", file_of("I"), {}),
    "float": ("a.tiff", file_of("F"), {}),
    "cmyk": ("a.jpg", file_of("CMYK"), {}),
    "upside_down": ("a.jpg", file_of("RGB"), {"exif": ROTATED}),
    "animation": ("a.gif", file_of("P"), {"save_all": True, "append_images": [file_of("P").rotate(90)]}),
    "lossless_webp": ("a.webp", file_of("RGBA"), {"lossless": True}),
}


@pytest.mark.parametrize("name, picture, options", FILES.values(), ids=FILES)
def test_files_of_every_kind_are_edited(host, tmp_path, monkeypatch, name, picture, options):
    """Through the stock node, at their own size."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    picture.save(tmp_path / name, **options)
    image, _ = host.run("LoadImage", image=name).made()
    encoded = host.encode(image=Given(image)).made()
    (latent,) = host.sample(**{key: Given(value) for key, value in zip(("positive", "negative", "latent"), encoded)}).made()
    edited, *_ = host.decode(latent, source=Given(image)).made()
    assert edited.shape == (*image.shape[:3], 3) and edited.isfinite().all() and 0 <= edited.min() and edited.max() <= 1
    host.still_edits()


def test_a_very_wide_picture_is_edited_where_its_sides_allow_it(host):
    wide = torch.rand(1, 128, 20000, 3)
    positive, negative, latent = host.encode(image=Given(wide), size_level=256).made()
    assert latent["samples"].shape == (1, 16, 2, 400)
    assert host.decode(latent, source=Given(wide)).made()[0].shape == wide.shape


@pytest.mark.parametrize("name", ["empty_batch", "no_rows", "bytes", "without_batch_axis", "video", "nothing", "text", "latent"])
@pytest.mark.parametrize("entry", links("IMAGE"), ids=str)
def test_every_node_with_a_picture_refuses(host, entry, name):
    picture, expected = BAD_PICTURES[name]
    if name == "nothing" and entry.is_optional:
        picture, expected = PICTURE[:0], NOTHING
    host.refuses(host.call(entry.node, **{entry.name: Given(picture)}), expected)


def test_two_pictures_to_think_about(host):
    host.refuses(
        host.call("Step1XEditThinkPrompt", image=Given(PICTURE.repeat(2, 1, 1, 1))),
        "has 2 images; .* Choose one with 'ImageFromBatch'",
    )


NO_MASK = "Input 'mask' is .*; expected a mask tensor .* Connect an output of the type MASK"
EMPTY = "The mask is empty: .* Paint over the part"
BAD_MASKS = {
    "black": (MASK * 0, EMPTY),
    "negative": (-MASK, EMPTY),
    "nan": (MASK * NAN, EMPTY),
    "no_masks": (MASK[:0], EMPTY),
    "no_rows": (MASK[:, :0], NO_MASK),
    "picture": (PICTURE, NO_MASK),
    "row": (MASK[0, 0], NO_MASK),
    "number": (torch.tensor(1.0), NO_MASK),
    "five_axes": (MASK[None, None], NO_MASK),
    "nothing": (None, NO_MASK),
    "text": ("x", NO_MASK),
    "another_shape": (torch.ones(1, 8, 64), "they have different shapes. Connect a mask made for this picture"),
    "20000_wide": (torch.ones(1, 1, 20000), "they have different shapes. Connect a mask made for this picture"),
    "two_for_one": (MASK.repeat(2, 1, 1), "There are 2 masks for 1 pictures. Connect one"),
}


@pytest.mark.parametrize("mask, expected", BAD_MASKS.values(), ids=BAD_MASKS)
def test_crop_refuses_masks(host, mask, expected):
    host.refuses(host.call("Step1XEditCropToMask", image=Given(PICTURE), mask=Given(mask)), expected)


FINE_MASKS = {
    "without_batch_axis": MASK[0],
    "with_channel_axis": MASK[:, None],
    "bool": MASK > 0,
    "integers": MASK.long(),
    "float16": MASK.half(),
    "above_one": MASK * 255,
    "infinite": torch.where(MASK > 0, INF, 0),
}


@pytest.mark.parametrize("mask", FINE_MASKS.values(), ids=FINE_MASKS)
def test_crop_takes_every_kind_of_mask(host, mask):
    crops = [host.call("Step1XEditCropToMask", image=Given(PICTURE), mask=Given(given)).made() for given in (mask, MASK)]
    assert torch.equal(crops[0][0], crops[1][0]) and torch.equal(crops[0][1], crops[1][1])


@pytest.mark.parametrize(
    "result",
    [PICTURE[:, :1, :1], PICTURE[..., :1], PICTURE * NAN, torch.rand(1, 1, 20000, 3), PICTURE.repeat(5, 1, 1, 1)],
    ids=["one_pixel", "grey", "nan", "20000_wide", "five"],
)
def test_stitch_keeps_the_rest_whatever_comes_back(host, result):
    stitch = host.call("Step1XEditCropToMask", image=Given(PICTURE), mask=Given(MASK)).made()[2]
    (whole,) = host.call("Step1XEditStitchCrop", image=Given(result), stitch=Given(stitch)).made()
    outside = MASK[0] == 0
    assert torch.isfinite(whole).all() and all(torch.equal(picture[outside], PICTURE[0][outside]) for picture in whole)


def test_stitch_refuses_another_number_of_pictures(host):
    stitch = host.call("Step1XEditCropToMask", image=Given(PICTURE.repeat(2, 1, 1, 1)), mask=Given(MASK)).made()[2]
    outcome = host.call("Step1XEditStitchCrop", image=Given(PICTURE), stitch=Given(stitch))
    host.refuses(outcome, "1 edited pictures came back for 2 that were cropped. Connect the result")


FOREIGN = "The latent has shape .* belongs to another model. Connect the latent from"
NO_LATENT = "Expected a latent, but found .* Connect an output of the type LATENT"
NO_NUMBERS = "The latent contains NaN or Inf values, .* Check the node that made it"
BAD_LATENTS = {
    "sd": ({"samples": torch.rand(1, 4, 8, 8)}, FOREIGN),
    "flux2": ({"samples": torch.rand(1, 128, 4, 4)}, FOREIGN),
    "wan": ({"samples": torch.rand(1, 16, 1, 8, 8)}, FOREIGN),
    "audio": ({"samples": torch.rand(1, 64, 100)}, FOREIGN),
    "sound_and_video": ({"samples": NestedTensor([torch.rand(1, 16, 1, 8, 8), torch.rand(1, 8, 4)])}, FOREIGN),
    "empty_batch": ({"samples": LATENT[:0]}, "The latent is empty: .* Connect a latent"),
    "no_rows": ({"samples": LATENT[:, :, :0]}, "The latent is empty: .* Connect a latent"),
    "nan": ({"samples": LATENT * NAN}, NO_NUMBERS),
    "infinite": ({"samples": LATENT / 0}, NO_NUMBERS),
    "integers": ({"samples": LATENT.long()}, NO_LATENT),
    "complex": ({"samples": LATENT.to(torch.complex64)}, NO_LATENT),
    "row": ({"samples": LATENT[0, 0, 0]}, NO_LATENT),
    "number": ({"samples": torch.tensor(1.0)}, NO_LATENT),
    "text": ({"samples": "x"}, NO_LATENT),
    "no_samples": ({}, NO_LATENT),
    "nothing": (None, NO_LATENT),
    "tensor": (LATENT, NO_LATENT),
    "list": ([LATENT], NO_LATENT),
}


@pytest.mark.parametrize("node", ["sample", "decode"])
@pytest.mark.parametrize("latent, expected", BAD_LATENTS.values(), ids=BAD_LATENTS)
def test_latents_are_refused(host, latent, expected, node):
    host.refuses(host.sample(latent=Given(latent)) if node == "sample" else host.decode(latent), expected)


@pytest.mark.parametrize("name", ["empty_batch", "no_rows", "integers", "row", "number", "text", "no_samples", "nothing", "tensor"])
def test_scheduler_refuses_latents(host, name):
    latent, expected = BAD_LATENTS[name]
    host.refuses(host.call("Step1XEditScheduler", **{socket("Step1XEditScheduler", "LATENT"): Given(latent)}), expected)


BEFORE = {
    "sd": ({"samples": torch.rand(1, 4, 8, 8)}, "The latent has shape"),
    "two": ({"samples": LATENT.repeat(2, 1, 1, 1)}, "The latent has shape"),
    "nan": ({"samples": LATENT * NAN}, NO_NUMBERS),
    "no_samples": ({}, NO_LATENT),
}


@pytest.mark.parametrize("latent, expected", BEFORE.values(), ids=BEFORE)
def test_encode_refuses_latents_of_the_turn_before(host, latent, expected):
    host.refuses(host.encode(**{socket("Step1XEditEncode", "LATENT"): Given(latent)}), expected, from_the_start=True)


FINE_LATENTS = {
    "empty_sd": torch.zeros(1, 4, 8, 8),
    "empty_flux2": torch.zeros(1, 128, 8, 8),
    "one_cell": LATENT[..., :1, :1],
    "odd_sides": LATENT[..., :5, :7],
    "three": LATENT.repeat(3, 1, 1, 1),
    "float16": LATENT.half(),
    "float64": LATENT.double(),
    "very_large": LATENT * 1e30,
}


@pytest.mark.parametrize("samples", FINE_LATENTS.values(), ids=FINE_LATENTS)
def test_sampler_takes_every_latent_of_the_model_and_empty_ones(host, samples):
    (out,) = host.sample(latent=Given({"samples": samples})).made()
    assert out["samples"].shape == (samples.shape[0], 16, *samples.shape[2:]) and torch.isfinite(out["samples"]).all()


@pytest.mark.parametrize(
    "mask",
    [torch.full((1, 1, 8, 8), NAN), torch.zeros(0, 1, 8, 8), torch.full((1, 1, 8, 8), INF)],
    ids=["nan", "empty", "infinite"],
)
def test_noise_masks_are_refused(host, mask):
    host.refuses(
        host.sample(latent=Given({**host.encoded[2], "noise_mask": mask})),
        "The noise mask of the latent, .* Check the mask of 'Set Latent Noise Mask'",
    )
