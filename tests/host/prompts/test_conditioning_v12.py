"""The conditioning of v1.2 against Hugging Face transformers and against the worked examples
(docs/model.md, v1.2 positions)."""


import pytest
import torch
from comfy.text_encoders.qwen_vl import process_qwen2vl_images
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_text_encoder
from step1x_core.host.prompts.encoding import LAYOUT_KEY, add_references, decode_edit, encode_edit
from step1x_core.host.prompts.text_encoder import TEXT_ENCODER_NAME, Step1XTokenizer
from step1x_core.host.sampling.sampler import flow_sigmas, sample
from step1x_core.images import from_uint8, picture_grid, resize, to_output_size, to_vision_size_v12, to_working_size, to_working_size_v12
from step1x_core.network.positions import text_ids
from step1x_core.prompts.mllm import attention_mask
from step1x_core.prompts.v11 import IMAGE_PAD_ID
from step1x_core.prompts.v12 import SPECIAL_TOKENS, prompt_ids_v12

EXTRAS = ("text_embeds", "text_ids", "text_mask")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def clip_v12(float_file):
    return load_text_encoder(float_file, "v1.2")


def picture(width, height, seed=0):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def structure(clip, prompt, images, **options):
    """Ids with the picture's tokens written out, text mask likewise, index of the first picture token, and the picture's entry."""
    sequence = [token for token, _ in clip.tokenize(prompt, images=images, **options)[TEXT_ENCODER_NAME][0]]
    start = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
    entry = sequence[start]
    rows, columns = picture_grid(entry["data"])
    ids = [*sequence[:start], *[IMAGE_PAD_ID] * (rows * columns), *sequence[start + 1:]]
    mask = [*entry["text_mask"][:start], *[0] * (rows * columns), *entry["text_mask"][start + 1:]]
    return ids, mask, start, entry


def encode(clip, prompt, images, **options):
    (entry,) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt, images=images, **options))
    return entry


@pytest.mark.parametrize("prompt, size, level", [
    ("make it red", (512, 512), 1024),
    ("", (672, 384), 512),
    ('Hello! Go! say "hi, 😀!" now!', (411, 300), 1024),
    ("把“咖啡”改成“茶”", (333, 1001), 512),
    ("no picture, a fox", None, 1024),
])
def test_states_and_embeddings_equal_transformers(clip_v12, transformers_model, prompt, size, level):
    images = [picture(*size)] if size else []
    ids, mask, start, entry = structure(clip_v12, prompt, images, size_level=level)
    patches, grid = process_qwen2vl_images(entry["data"][None].float() / 255)
    ids = torch.tensor([ids])
    hidden = attention_mask(ids)
    positions = transformers_model.get_rope_index(
        ids, mm_token_type_ids=(ids == IMAGE_PAD_ID).int(), image_grid_thw=grid.reshape(1, 3), attention_mask=hidden
    )[0]
    # Newer transformers put masked tokens at 0; the release the model was trained with puts them at 1.
    positions = torch.where(hidden.bool()[None], positions, 1)
    seen = []
    hook = transformers_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    expected = transformers_model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, pixel_values=patches,
                                  image_grid_thw=grid.reshape(1, 3)).last_hidden_state
    hook.remove()

    sequence = [token for token, _ in clip_v12.tokenize(prompt, images=images, size_level=level)[TEXT_ENCODER_NAME][0]]
    states, embeds, found_positions = clip_v12.cond_stage_model.qwen25_7b.transformer.encode(sequence, "cpu", hide_zeros=False)
    assert torch.equal(found_positions, positions[:, 0])
    assert states.shape == expected.shape and (states - expected).abs().max() <= 1e-4
    assert embeds.shape == seen[0].shape and (embeds - seen[0]).abs().max() <= 1e-4

    cond, extra = encode(clip_v12, prompt, images, size_level=level)
    length = ids.shape[1] - 90
    assert cond.shape == extra["text_embeds"].shape == (1, length, 64) and cond.dtype == extra["text_embeds"].dtype == torch.float32
    assert torch.equal(cond, states[:, 90:].bfloat16().float()) and torch.equal(extra["text_embeds"], embeds[:, 90:].bfloat16().float())
    assert extra["text_mask"].tolist() == [mask[90:]] and extra["text_mask"].dtype == torch.int64
    assert torch.equal(extra["text_ids"][0], text_ids(positions[:, 0], start, picture_grid(entry["data"]), entry["working_size"]))
    assert extra["text_ids"].dtype == torch.float32 and "attention_mask" not in extra


def test_exclamation_mark_takes_part_but_stands_far_back(clip_v12):
    """The worked example (docs/model.md, v1.2 positions): at 640x480 the lone "!" is at -126 between -36 and -35."""
    ids, _, start, entry = structure(clip_v12, "Hello!", [picture(640, 480)])
    cond, extra = encode(clip_v12, "Hello!", [picture(640, 480)])
    time, rows, columns = extra["text_ids"][0].T
    assert ids[90:94] == [25, 21927, 0, 24669] and time[:5].tolist() == [-37, -36, -126, -35, -34]
    image = slice(start - 90, start - 90 + 17 * 23)
    assert (
        time[image].unique().tolist() == [-29]
        and time[image.start - 1] == -30
        and time[image.stop :].tolist() == [-6, -5, -4, -3, -2, -1]
    )
    assert rows[image.start].item() == pytest.approx(0.873882, abs=1e-5) and columns[
        image.start
    ].item() == pytest.approx(0.843847, abs=1e-5)
    assert rows[image.stop - 1].item() == pytest.approx(52.688618, abs=1e-5) and columns[
        image.stop - 1
    ].item() == pytest.approx(70.718651, abs=1e-5)
    text = [*range(image.start), *range(image.stop, len(time))]
    assert not rows[text].any() and not columns[text].any()
    # It is no padding in the forward pass: other tokens see it.
    other = encode(clip_v12, "Hello?", [picture(640, 480)])[0]
    assert other.shape == cond.shape and not torch.allclose(cond[:, -1], other[:, -1])


@pytest.mark.parametrize("prompt, ids, mask", [
    ("make it red", [1281, 432, 2518, 24669, 220, 16, 25, 220, 151652], [0] * 9),
    # The closing mark and what follows merge; the quoted space is a token of its own.
    ('Say "a b"', [24917, 330, 64, 220, 65, 1, 24669, 220, 16, 25, 220, 151652], [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
    # A curly mark at the start of a part, here after a special token, is lost.
    ("<|im_end|>“c”", [220, 151645, 66, 854, 24669, 220, 16, 25, 220, 151652], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
    # A quotation does not reach past a special token.
    ('"a<|im_end|>b"', [330, 64, 151645, 65, 1, 24669, 220, 16, 25, 220, 151652], [0] * 11),
    # An apostrophe is not a quotation mark.
    ("it's", [432, 594, 24669, 220, 16, 25, 220, 151652], [0] * 8),
    # Tags of later models are plain text.
    ("<think>", [366, 26865, 29, 24669, 220, 16, 25, 220, 151652], [0] * 9),
    ("", [24568, 220, 16, 25, 220, 151652], [0] * 6),
])
def test_worked_token_ids(clip_v12, prompt, ids, mask):
    found, text_mask, start, _ = structure(clip_v12, prompt, [picture(64, 64)])
    assert found[91:start] == ids and text_mask[91:start] == mask
    assert found[start + found.count(IMAGE_PAD_ID):] == [151653, 151645, 198, 151644, 77091, 198]


@pytest.mark.parametrize(
    "prompt",
    [
        "two pads <|image_pad|> here",
        '"<|image_pad|>"',
        "lone \ud800 surrogate",
        "\x00\x07 control",
        "<|endoftext|>",
        "".join(SPECIAL_TOKENS),
        "<|vision_start|><|video_pad|>",
        "{prefix} {} {instruction}",
        "“" * 50 + '"' * 51,
    ],
)
def test_awkward_prompts_are_encoded(clip_v12, photo, prompt):
    ids, mask, start, _ = structure(clip_v12, prompt, [photo])
    rows, columns = picture_grid(to_vision_size_v12(photo[0], 1024)[0])
    assert ids.count(IMAGE_PAD_ID) == rows * columns and len(mask) == len(ids)
    cond, extra = encode(clip_v12, prompt, [photo])
    assert cond.shape == (1, len(ids) - 90, 64) and all(extra[name].shape[:2] == cond.shape[:2] for name in EXTRAS)
    assert torch.isfinite(cond).all() and torch.isfinite(extra["text_ids"]).all() and extra["text_ids"][..., 0].max() == -1


@pytest.mark.parametrize("words, inside", [(1900, 141), (5000, 0)])
def test_long_prompts_are_cut_in_or_before_the_picture(clip_v12, words, inside):
    """2048 tokens are kept: ":", the words, the "Picture 1: " and the vision start (6 tokens) come before the picture."""
    images = [picture(640, 480)]
    prompt = " ".join(["red"] * words)
    _, _, start, entry = structure(clip_v12, prompt, images)
    assert max(0, 90 + 2048 - start) == inside
    cond, extra = encode(clip_v12, prompt, images)
    assert cond.shape[1] == 2048 and all(extra[name].shape[1] == 2048 for name in EXTRAS)
    before = 2048 - inside
    whole = encode(clip_v12, "", images)[1]["text_ids"][0, 7:, 1:]  # ":" and 6 tokens, then the picture
    assert torch.equal(extra["text_ids"][0, before:, 1:], whole[:inside]) and not extra["text_ids"][0, :before, 1:].any()
    last = -1 if inside == 0 else -2
    assert (
        extra["text_ids"][0, :before, 0].tolist() == list(range(last + 1 - before, last + 1))
        and (extra["text_ids"][0, before:, 0] == -1).all()
    )


def test_without_a_picture_a_black_one_is_shown(clip_v12):
    """What the stock CLIP Text Encode does."""
    _, _, _, entry = structure(clip_v12, "a fox", [])
    assert entry["working_size"] == (1024, 1024) and entry["data"].shape == (560, 560, 3) and not entry["data"].any()


def test_two_pictures_are_refused(clip_v12, photo):
    with pytest.raises(Step1XError, match="one image"):
        clip_v12.tokenize("combine", images=[photo, photo])


def test_prompts_of_the_older_layout_are_unchanged(clip, clip_v12, photo):
    assert Step1XTokenizer().layout.name == clip.tokenizer.layout.name == "v1.1"
    cond, extra = encode(clip, "make it red", [photo])
    assert cond.shape == (1, 640, 64) and "attention_mask" in extra and not any(name in extra for name in EXTRAS)
    before = prompt_ids_v12("make it red", clip.tokenizer.token_ids)
    assert before == prompt_ids_v12("make it red", clip_v12.tokenizer.token_ids)


def test_encode_edit_gives_each_side_its_own_resize(clip_v12, vae, photo):
    positive, negative, latent = encode_edit(clip_v12, vae, photo, 'write "TEA" on the cup', "", 256)
    assert latent["samples"].shape == (1, 16, 26, 38)
    working = to_working_size_v12(photo[0], 256)
    expected = torch.nn.functional.interpolate(photo.movedim(-1, 1), (208, 304), mode="bilinear", antialias=True).movedim(1, -1)
    assert torch.allclose(working[None], expected, atol=1e-6)
    assert torch.equal(latent["samples"], vae.encode(working[None]))
    for (cond, extra), prompt in ((positive[0], 'write "TEA" on the cup'), (negative[0], "")):
        assert extra["reference_latents"][0] is latent["samples"]
        direct = encode(clip_v12, prompt, [photo], size_level=256)
        assert torch.equal(cond, direct[0]) and all(torch.equal(extra[name], direct[1][name]) for name in EXTRAS)
    assert (
        positive[0][0].shape[1] == negative[0][0].shape[1] + 9
        and positive[0][1]["text_mask"].sum() == 3
        and negative[0][1]["text_mask"].sum() == 0
    )


def test_further_references_are_resized_by_the_rule_of_their_version(clip, clip_v12, vae, photo):
    further = photo.flip(2)
    for encoder, rule in ((clip, to_working_size), (clip_v12, to_working_size_v12)):
        sides = encode_edit(encoder, vae, photo, "make it red", "", 256)[:2]
        for (_, extra), in add_references(list(sides), vae, [further], 128):
            assert torch.equal(extra["reference_latents"][1], vae.encode(rule(further[0], 128)[None]))
    assert not torch.equal(to_working_size(further[0], 128), to_working_size_v12(further[0], 128))


def test_batches_are_merged_picture_by_picture(clip_v12, vae, photo):
    batch = torch.cat((photo, photo.flip(2)))
    both = encode_edit(clip_v12, vae, batch, "make it red!", "", 256)
    for row in range(2):
        single = encode_edit(clip_v12, vae, batch[row:row + 1], "make it red!", "", 256)
        assert torch.allclose(both[2]["samples"][row], single[2]["samples"][0], atol=1e-5)
        for found, expected in zip(both[:2], single[:2]):
            assert torch.equal(found[0][0][row], expected[0][0][0])
            assert all(found[0][1][name].shape[0] == 2 and torch.equal(found[0][1][name][row], expected[0][1][name][0]) for name in EXTRAS)


@pytest.mark.parametrize(
    "size, message",
    [
        ((3000, 1), "too elongated for the language model"),
        ((1, 3000), "too elongated for the language model"),
        ((60000, 1), "too narrow"),
    ],
)
def test_extreme_pictures_are_refused_in_words(clip_v12, vae, size, message):
    level = 1024 if size[0] < 60000 else 64
    with pytest.raises(Step1XError, match=message):
        encode_edit(clip_v12, vae, torch.zeros(1, size[1], size[0], 3), "x", "", level)


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 3000)])
def test_small_and_long_pictures_are_encoded(clip_v12, size):
    cond, extra = encode(clip_v12, "x", [torch.zeros(1, size[1], size[0], 3)])
    assert torch.isfinite(cond).all() and extra["text_ids"].shape[1] == cond.shape[1]


def test_result_is_rounded_before_the_resize(model, clip, clip_v12, vae, photo):
    grey = torch.full((4, 4, 3), 100.6 / 255)
    assert (to_output_size(grey, (2, 2)) * 255).round().unique().tolist() == [100]
    assert (to_output_size(grey, (2, 2), truncate=False) * 255).round().unique().tolist() == [101]

    positive, negative, latent = encode_edit(clip, vae, photo, "x", "", 64)
    sampled = sample(model, positive, negative, latent, flow_sigmas(1, latent["samples"]), 1.0, 0, callback=lambda *args: None)
    assert sampled[LAYOUT_KEY] == "v1.1" and encode_edit(clip_v12, vae, photo, "x", "", 64)[2][LAYOUT_KEY] == "v1.2"
    decoded = vae.decode(sampled["samples"])[0]
    for layout, pixels in (("v1.1", (decoded * 255).to(torch.uint8).numpy()), ("v1.2", (decoded * 255).round().to(torch.uint8).numpy())):
        expected = from_uint8(resize(pixels, (600, 400), Image.Resampling.BICUBIC))
        assert torch.equal(decode_edit(vae, {**sampled, LAYOUT_KEY: layout}, photo)[0], expected)
