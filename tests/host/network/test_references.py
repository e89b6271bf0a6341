"""Several references: sizes and positions by the rules of each version."""

import pytest
import tiny_models
import torch

from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.prompts.encoding import add_references, at_working_size, encode_edit
from step1x_core.host.sampling.sampler import sample
from step1x_core.versions import LAYOUT_V11, LAYOUT_V12

FILES = {"v1.0": tiny_models.V10_FILE, "v1.1": tiny_models.V11_FILE, "v1.2": tiny_models.V12_FILE}
# (time, row, column) of the first token of reference number 1 and 2.
FIRST_TOKENS = {
    "v1.0": [(0, 0, 0), (0, 0, 0)],
    "v1.1": [(1, 1, 1), (2, 1, 1)],
    "v1.2": [(1, 0, 0), (2, 0, 0)],
    "RealRestorer": [(1, 1, 1), (2, 1, 1)],
}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def load(models, version):
    return load_model(models / "diffusion_models" / FILES.get(version, tiny_models.V11_FILE), version)


@pytest.mark.once
@pytest.mark.parametrize("version", FIRST_TOKENS)
def test_positions_of_each_reference(models, version):
    network = load(models, version).model.diffusion_model
    for index, first in enumerate(FIRST_TOKENS[version]):
        # Of a shape of its own: 3 rows and 5 columns of tokens.
        ids = network.process_reference(torch.zeros(1, 16, 6, 10), index)[1][0].reshape(3, 5, 3)
        assert tuple(ids[0, 0].int().tolist()) == first
        assert torch.equal(ids[:, 0, 1] - first[1], torch.arange(3.0)) and torch.equal(ids[0, :, 2] - first[2], torch.arange(5.0))
        assert (ids[..., 0] == first[0]).all()


@pytest.mark.once
def test_sizes_follow_the_version_of_the_prompt(clip, clip_v12, vae, photo):
    other = photo[:, :, : photo.shape[2] // 3]
    found = {}
    for name, text_encoder, layout in (("v1.1", clip, LAYOUT_V11), ("v1.2", clip_v12, LAYOUT_V12)):
        positive, negative, _ = encode_edit(text_encoder, vae, photo, "make it red", "", 128)
        (extended, _) = add_references([positive, negative], vae, [other, photo], 96)
        own, *further = extended[0][1]["reference_latents"]
        assert torch.equal(own, positive[0][1]["reference_latents"][0])
        for latent, picture in zip(further, (other, photo)):
            assert torch.equal(latent, vae.encode(at_working_size(picture, layout, 96)))
            # About 96 x 96 pixels, of the picture's own shape.
            height, width = (8 * side for side in latent.shape[-2:])
            assert abs(height * width - 96 * 96) < 0.3 * 96 * 96
            assert abs(width / height - picture.shape[2] / picture.shape[1]) < 0.35
        found[name] = further
    # v1.1 resizes 8-bit values with Lanczos, v1.2 floats bilinearly.
    assert any(not torch.equal(a, b) for a, b in zip(found["v1.1"], found["v1.2"]))


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_v10_is_warned_of_and_both_sample(models, clip, vae, photo, caplog, version):
    positive, negative, latent = encode_edit(clip, vae, photo, "make it red", "", 64)
    extended = add_references([positive, negative], vae, [photo[:, :200, :200]], 64)
    sigmas, model = torch.tensor([1.0, 0.0]), load(models, version)
    with caplog.at_level("WARNING"):
        one, two = (
            sample(model, *sides, latent, sigmas, 4.0, seed=1)["samples"] for sides in ((positive, negative), extended)
        )
    assert ("gives all reference images the same positions" in caplog.text) == (version == "v1.0")
    assert two.isfinite().all() and not torch.allclose(one, two)
