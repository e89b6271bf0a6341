"""RealRestorer: v1.1's network under names and with defaults of its own."""

import convert as command
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.host.sampling.few_steps import version_defaults
from step1x_core.host.sampling.sampler import sample
from step1x_core.versions import VERSIONS


@pytest.fixture(scope="module")
def weights():
    """The tensors of `write_restorer`, without their prefix."""
    shapes = tiny_models.transformer_shapes("v1.1", tiny_models.TINY_TRANSFORMER)
    return tiny_models.random_weights(shapes, seed=6)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "RealRestorer"
    tiny_models.write_restorer(folder)
    return folder


def version_of(path, version=None):
    return load_model(path, version).model.diffusion_model.version


def renamed(weights, prefix: str) -> dict:
    return {prefix + key: tensor for key, tensor in weights.items()}


def test_the_repository_samples_as_v11_does_at_its_own_cfg(repository, weights, tmp_path, clip, vae, photo):
    save_file(weights, tmp_path / "plain-v1p1.safetensors")
    restorer, plain = load_model(repository), load_model(tmp_path / "plain-v1p1.safetensors")
    assert version_defaults(restorer, 0, 0.0) == (28, 3.0) and version_defaults(plain, 0, 0.0) == (28, 6.0)
    positive, negative, latent = encode_edit(clip, vae, photo, "Remove the rain from this photo.", "", 128)
    sigmas = torch.tensor([1.0, 0.6, 0.0])
    made = [
        sample(model, positive, negative, latent, sigmas, version_defaults(model, 0, cfg)[1], seed=7)["samples"]
        for model, cfg in ((restorer, 0.0), (plain, 3.0), (plain, 6.0))
    ]
    assert torch.equal(made[0], made[1]) and not torch.allclose(made[0], made[2])


def test_a_single_file_is_told_by_its_name_else_by_its_keys(weights, tmp_path):
    cases = [
        ("", "RealRestorer_bf16", "RealRestorer"),
        ("", "real-restorer-from-v1p1", "RealRestorer"),
        ("inner_model.", "diffusion_pytorch_model", "RealRestorer"),
        # A trainer's prefix in front of what the name says is v1.1.
        ("inner_model.", "step1x-edit-v1p1-tuned", "v1.1"),
        ("net.", "step1x-edit-v1p1-tuned", "v1.1"),
    ]
    for number, (prefix, name, version) in enumerate(cases):
        path = tmp_path / str(number) / f"{name}.safetensors"
        path.parent.mkdir()
        save_file(renamed(weights, prefix), path)
        assert version_of(path) == version, (prefix, name)
    assert version_of(path, "RealRestorer") == "RealRestorer"
    with pytest.raises(Step1XError, match="v1.1 or v1.2-preview, or a fine-tune of v1.1"):
        save_file(renamed(weights, "net."), tmp_path / "unnamed.safetensors")
        version_of(tmp_path / "unnamed.safetensors")


def test_a_repository_under_another_name_is_told_by_its_class(repository, tmp_path):
    target = tmp_path / "restore"
    target.symlink_to(repository, target_is_directory=True)
    assert version_of(target) == "RealRestorer"


@pytest.mark.once
def test_a_converted_file_keeps_the_version(repository, weights, tmp_path):
    command.convert(repository, tmp_path / "small.safetensors", "bf16")
    assert version_of(tmp_path / "small.safetensors") == "RealRestorer"
    saved = load_file(tmp_path / "small.safetensors")["img_in.weight"]
    assert torch.equal(saved, weights["img_in.weight"].bfloat16())


def test_its_prompt_layout_is_that_of_v11(repository, models):
    assert VERSIONS["RealRestorer"].layout is VERSIONS["v1.1"].layout
    folder = repository / "text_encoder"
    folder.mkdir(exist_ok=True)
    (folder / tiny_models.MLLM_FILE).symlink_to(models / "text_encoders" / tiny_models.MLLM_FILE)
    assert load_text_encoder(repository).tokenizer.layout.name == "v1.1"
