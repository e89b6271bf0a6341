"""A LoRA changes what the shipped miniature model does, through the stock loader and ours."""

from functools import cache
from types import SimpleNamespace

import demo_host
import demo_model
import folder_paths
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from miniature import demo_lora
from nodes import LoraLoaderModelOnly
from step1x_core.host.checkpoints.lora import apply_lora, load_lora_file

TRIANGLE = (slice(24, 40), slice(18, 34))


@pytest.fixture(scope="module", autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo():
    return demo_host.load_demo()


@pytest.fixture(scope="module")
def picture():
    return demo_host.to_image(Image.open(demo_model.SAMPLE_IMAGE).convert("RGB"))


@pytest.fixture(scope="module")
def file(demo, picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("loras") / "purple-means-red.safetensors"
    save_file(demo_lora.swap_words(demo.model, demo.clip, demo.vae, picture), path)
    return path


@pytest.fixture(scope="module")
def recolour(demo, picture):
    @cache
    def edit(model, colour):
        """The picture [H, W, 3] with its green triangle made that colour."""
        return demo_host.edit(SimpleNamespace(**vars(demo) | {"model": model}), picture, f"make the green triangle {colour}")[0][0]

    return edit


def stock(model, path, strength):
    folder_paths.add_model_folder_path("loras", str(path.parent))
    return LoraLoaderModelOnly().load_lora_model_only(model, path.name, strength)[0]


def ours(model, path, strength):
    return apply_lora(model, load_lora_file(path), strength)


def triangle(picture) -> torch.Tensor:
    return picture[TRIANGLE].mean(dim=(0, 1))


@pytest.mark.once
@pytest.mark.parametrize("load", [stock, ours])
def test_the_lora_gives_the_word_its_new_meaning(demo, file, recolour, load):
    red, green, blue = triangle(recolour(demo.model, "purple"))
    assert blue > red + 0.05 > green + 0.1
    changed = recolour(load(demo.model, file, 1.0), "purple")
    red, green, blue = triangle(changed)
    assert red > 0.6 and red > 2 * blue and red > 2 * green
    # The very edit that the other word asks for, everywhere in the picture; and the model that was given keeps its own meaning of it.
    assert (changed - recolour(demo.model, "red")).abs().mean() < 0.01


@pytest.mark.once
def test_other_words_keep_their_meaning(demo, file, recolour):
    without, with_lora = (recolour(model, "yellow") for model in (demo.model, ours(demo.model, file, 1.0)))
    assert (without - with_lora).abs().mean() < 0.01
    red, green, blue = triangle(with_lora)
    assert min(red, green) > 2 * blue
