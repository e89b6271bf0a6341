"""v1.2's layout of prompts and pictures, without ComfyUI."""

import random

import pytest
import torch
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.images import from_uint8, to_thinker_size, to_uint8, to_vision_size_v12, to_working_size_v12
from step1x_core.network.positions import vision_coordinates
from step1x_core.prompts.v12 import chat_text, prompt_prefix, split_chat, split_quotations


@pytest.mark.parametrize("text, pieces", [
    ('a“b"c"d”e', [("a“", False), *((c, True) for c in 'b"c"d'), ("”e", False)]),
    ('q"1"“2”', [('q"', False), ("1", True), ('"“', False), ("2", True), ("”", False)]),
    ('a "b" c "d', [('a "', False), ("b", True), ('" c "d', False)]),
    ("“d", [("d", False)]),
    ("“", []),
])
def test_quotations(text, pieces):
    assert split_quotations(text) == pieces


def test_splitting_loses_nothing_but_a_leading_curly_mark():
    source = random.Random(0)
    for _ in range(2000):
        text = "".join(source.choices('ab "“”', k=source.randrange(12)))
        protected = source.randrange(4)
        pieces = split_quotations(text, protected)
        kept = text.removeprefix("“") if protected == 0 else text
        assert "".join(piece for piece, _ in pieces) == kept
        assert all(len(piece) == 1 for piece, quoted in pieces if quoted) and all(piece for piece, _ in pieces)
        assert not any(quoted for piece, quoted in split_quotations(text, len(text)))


def test_prefix_is_protected_and_the_instruction_is_not():
    assert len(prompt_prefix()) == 449 and prompt_prefix().split("\n")[2].endswith(". ")
    pieces = split_chat(chat_text('"a"'), 449)
    assert [piece for piece, quoted in pieces if quoted] == ["a"]
    at = chat_text("").index(prompt_prefix())
    marked = chat_text("")[:at] + '"b"' + chat_text("")[at:]
    assert not any(quoted for _, quoted in split_chat(marked, 449)) and any(quoted for _, quoted in split_chat(marked, 0))


def test_vision_coordinates_span_the_latent_grid():
    coordinates = vision_coordinates(23, 1168)
    assert (coordinates.diff() > 0).all() and coordinates.diff().std() < 1e-9
    assert coordinates[0].item() == pytest.approx((13.5 * 1167 / 643 - 11) / 16) and -0.5 < coordinates[0] < coordinates[-1] < 1168 / 16


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_become_rgb(channels):
    image = torch.rand(30, 40, channels, generator=torch.Generator().manual_seed(0))
    plain = image[..., :3] if channels == 4 else image.expand(-1, -1, 3)
    assert torch.equal(to_working_size_v12(image, 64), to_working_size_v12(plain, 64))
    assert torch.equal(to_vision_size_v12(image, 64)[0], to_vision_size_v12(plain, 64)[0])
    assert torch.equal(to_thinker_size(image), to_thinker_size(plain))


def test_thinker_pictures_are_thumbnails_first(photo):
    """600x400 is small enough, so only the two resizes to multiples of 28 remain; 1500x1000 is brought to 1024x683 before them."""
    pixels = to_uint8(photo[0])
    expected = Image.fromarray(pixels).resize((588, 392), Image.Resampling.BICUBIC).resize((644, 420), Image.Resampling.BICUBIC)
    found = to_thinker_size(photo[0])
    assert found.shape == (420, 644, 3) and (found.int() - torch.tensor(to_uint8(from_uint8(expected))).int()).abs().max() <= 2
    assert to_thinker_size(torch.zeros(1000, 1500, 3)).shape == (672, 1036, 3)
    with pytest.raises(Step1XError, match="too elongated"):
        to_thinker_size(torch.zeros(4, 3000, 3))
