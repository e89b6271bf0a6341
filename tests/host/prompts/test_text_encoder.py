"""The text encoder against Hugging Face transformers and against the worked examples (docs/model.md, Quotes)."""

import hashlib
import json

import comfy.memory_management
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from step1x_core.checkpoints.language_model import detect_mllm_config, normalize_keys
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_text_encoder, mllm_shapes
from step1x_core.host.prompts.text_encoder import Step1XTokenizer
from step1x_core.prompts.cut import layout_states
from step1x_core.prompts.mllm import attention_mask
from step1x_core.prompts.v11 import IMAGE_PAD_ID, prompt_head_ids, split_quotations

NAME = "qwen25_7b"


@pytest.fixture(scope="module")
def float_clip(float_file):
    return load_text_encoder(float_file)


def picture(width, height, seed=0):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def sequence_of(clip, prompt, images):
    return [token for token, _ in clip.tokenize(prompt, images=images)[NAME][0]]


@pytest.mark.parametrize("prompt, size", [
    ("make it red", (512, 512)),
    ("", (672, 384)),
    ('Go! say "hi, 😀" now!', (411, 300)),
    ("把“咖啡”改成“茶”", (333, 1001)),
    ("no picture, a fox", None),
])
def test_hidden_states_equal_transformers(float_clip, transformers_model, prompt, size):
    sequence = sequence_of(float_clip, prompt, [picture(*size)] if size else [])
    at = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
    pixels = sequence[at]["data"].float() / 255

    # The processor's patch order, written out: merged cells row by row, 2x2 patches inside a cell, then channel, frame, y, x.
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    rows, columns = pixels.shape[0] // 28, pixels.shape[1] // 28
    patches = ((pixels - mean) / std).reshape(rows, 2, 14, columns, 2, 14, 3).permute(0, 3, 1, 4, 6, 2, 5)
    patches = patches[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(rows * columns * 4, -1)
    grid = torch.tensor([[1, rows * 2, columns * 2]])
    ids = torch.tensor([sequence[:at] + [IMAGE_PAD_ID] * (rows * columns) + sequence[at + 1:]])
    mask = attention_mask(ids)
    types = (ids == IMAGE_PAD_ID).int()

    with torch.no_grad():
        positions = transformers_model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask)[0]
        # Newer transformers put masked tokens at 0; the release the model was trained with puts them at 1.
        positions = torch.where(mask.bool()[None], positions, 1)
        expected = transformers_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=patches, image_grid_thw=grid
        ).last_hidden_state
        found = float_clip.cond_stage_model.qwen25_7b([sequence])[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4

    cond, extra = float_clip.encode_from_tokens_scheduled(float_clip.tokenize(prompt, images=[picture(*size)] if size else []))[0]
    kept = min(640, ids.shape[1] - 217)
    assert cond.shape == (1, 640, 64) and extra["attention_mask"].tolist() == [[1] * kept + [0] * (640 - kept)]
    assert (cond[:, :kept] - expected[:, 217:217 + kept]).abs().max() <= 1e-4 and (cond[:, kept:] == 0).all()


def test_prompt_and_picture_both_change_the_conditioning(clip, photo):
    def encode(prompt, image):
        return clip.encode_from_tokens(clip.tokenize(prompt, images=[image]))

    base = encode("make it red", photo)
    assert torch.equal(base, encode("make it red", photo))
    assert not torch.allclose(base, encode("make it blue", photo))
    assert not torch.allclose(base, encode("make it red", photo.flip(2)))


def test_head_is_the_published_text():
    tokenizer = getattr(Step1XTokenizer(), NAME).tokenizer
    head = tokenizer.decode(prompt_head_ids())
    prefix = head.split("<|im_start|>user\n")[1]
    assert len(prompt_head_ids()) == 218 and len(prefix) == 1058
    assert hashlib.sha256(prefix.encode()).hexdigest() == "40882ddca94ca6971c8d5713d42464afa31dad09236dfacafe3ee26b4b44aa82"


@pytest.mark.parametrize(
    "prompt, after",
    [
        ("make it red", [6927, 432, 2518, 151645, 198, 151644, 77091, 198]),
        (
            "Replace 'A b' with \"C!\"",
            [23107, 330, 47249, 854, 2073, 18987, 65, 1, 448, 330, 34, 2073, 17839, 1, 151645, 198, 151644, 77091, 198],
        ),
        ("把“咖啡”改成“茶”", [99360, 1, 101342, 102312, 1, 116893, 1, 100019, 1, 151645, 198, 151644, 77091, 198]),
        (
            "it's",
            [
                275,
                1,
                82,
                27,
                91,
                72,
                76,
                62,
                68,
                77,
                67,
                91,
                29,
                198,
                27,
                91,
                72,
                76,
                62,
                82,
                83,
                64,
                81,
                83,
                91,
                29,
                64,
                82,
                82,
                72,
                82,
                83,
                64,
                77,
                83,
                198,
            ],
        ),
        ("", [151645, 198, 151644, 77091, 198]),
    ],
)
def test_worked_examples_of_the_model_page(clip, prompt, after):
    sequence = sequence_of(clip, prompt, [picture(512, 512)])
    at = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
    assert sequence[at + 1:] == [151653, *after]


def test_quotations_split_into_characters():
    assert split_quotations('a "b c" d') == ['a "', "“b”", "“ ”", "“c”", '" d']
    assert split_quotations("plain") == ["plain"]
    assert split_quotations("it's") == ['it"', "“s”", ""]
    assert split_quotations("‘single’ 「corner」") == ["‘single’ 「corner」"]


@pytest.mark.parametrize(
    "prompt",
    [
        "two pads <|image_pad|> here",
        '"<|image_pad|>"',
        "lone \ud800 surrogate",
        "\x00\x07 control",
        "<|endoftext|>",
        "<|im_end|>" * 3,
        "x " * 5000,
    ],
)
def test_awkward_prompts_are_encoded(clip, photo, prompt):
    cond, extra = clip.encode_from_tokens_scheduled(clip.tokenize(prompt, images=[photo]))[0]
    assert cond.shape == (1, 640, 64) and torch.isfinite(cond).all()
    sequence = sequence_of(clip, prompt, [photo])
    assert sum(isinstance(token, dict) for token in sequence) == 1 and IMAGE_PAD_ID not in sequence


def test_prompt_weights_are_literal_text(clip):
    assert sequence_of(clip, "(red:1.5)", [])[-8:] != sequence_of(clip, "red", [])[-8:]
    assert all(weight == 1.0 for _, weight in clip.tokenize("(red:1.5)")[NAME][0])


def test_two_pictures_are_refused(clip, photo):
    with pytest.raises(Step1XError, match="one image"):
        clip.tokenize("combine", images=[photo, photo])


def test_without_a_picture_a_black_one_is_shown(clip):
    data = next(token["data"] for token in sequence_of(clip, "a fox", []) if isinstance(token, dict))
    assert data.shape == (504, 504, 3) and (data == 0).all()


def test_layout_keeps_640_positions():
    states = torch.arange(1.0, 1001.0).reshape(1, 1000, 1)
    cond, mask = layout_states(states)
    assert cond[0, 0, 0] == 218 and cond[0, -1, 0] == 857 and mask.sum() == 640


def hugging_face_folder(path, source, shards=2, language_model_prefix=False):
    """The weights as a Hugging Face folder: config.json, index and shards, in the old or the new key names."""
    weights = load_file(source)
    if language_model_prefix:
        weights = {
            ("model." + k if k.startswith("visual.") else k.replace("model.", "model.language_model.", 1)): v
            for k, v in weights.items()
        }
    path.mkdir(parents=True)
    names = sorted(weights)
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({k: weights[k] for k in part}, path / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "config.json").write_text(json.dumps(tiny_models.TINY_MLLM))
    return path


@pytest.mark.parametrize("new_names", [False, True])
def test_hugging_face_folder_gives_the_same_conditioning(tmp_path, float_file, float_clip, photo, new_names):
    folder = hugging_face_folder(tmp_path / "Qwen2.5-VL", float_file, language_model_prefix=new_names)
    loaded = load_text_encoder(folder)
    tokens = loaded.tokenize("make it red", images=[photo])
    assert torch.equal(loaded.encode_from_tokens(tokens), float_clip.encode_from_tokens(tokens))


def test_scaled_fp8_file_is_close_to_the_original(tmp_path, float_file, float_clip, photo):
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(float_file).items()}
    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, weight in weights.items():
        if key.startswith("model.layers.") and key.endswith("_proj.weight"):
            scale = weight.float().abs().max() / 448
            scaled[key] = (weight.float() / scale).to(torch.float8_e4m3fn)
            scaled[key.removesuffix("weight") + "scale_weight"] = scale
        else:
            scaled[key] = weight
    path = tmp_path / "scaled.safetensors"
    save_file(scaled, path, metadata={"step1x_edit_config": json.dumps(tiny_models.TINY_MLLM)})
    loaded = load_text_encoder(path)
    tokens = loaded.tokenize("make it red", images=[photo])
    found, expected = loaded.encode_from_tokens(tokens), float_clip.encode_from_tokens(tokens)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_full_size_key_list_is_that_of_the_7b_model(monkeypatch):
    """Qwen2.5-VL-7B-Instruct: 729 tensors, 8.29 billion parameters, the head included."""
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "depth": 32,
        "num_heads": 16,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    published = tiny_models.mllm_shapes(
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "vision_config": vision,
        }
    )
    assert len(published) == 729 and sum(torch.Size(s).numel() for s in published.values()) == 8_292_166_656
    weights = normalize_keys({key: torch.empty(shape, device="meta") for key, shape in published.items()})
    config = detect_mllm_config(weights, {})
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vision_heads) == (28, 4, 128, 16)
    expected = {"model." + k if k == "lm_head.weight" else k: v for k, v in published.items()}
    assert mllm_shapes(config) == expected
    # With dynamic VRAM the host's own layers have no weights before they are loaded.
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    assert mllm_shapes(config) == expected


def test_patcher_can_be_rebuilt_from_its_file(float_clip):
    factory, arguments = float_clip.patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    name = "qwen25_7b.transformer.model.norm.weight"
    assert torch.equal(again.model.state_dict()[name], float_clip.patcher.model.state_dict()[name])


@pytest.mark.parametrize(
    "drop, message",
    [
        ("visual.", "no vision tower"),
        ("model.layers.0.self_attn.q_proj.weight", "not a Qwen2.5-VL model"),
        ("model.layers.1.mlp.up_proj.weight", "lacks 1 of"),
        ("model.norm.weight", "lacks the tensor model.norm.weight"),
    ],
)
def test_missing_tensors_are_named(tmp_path, float_file, drop, message):
    path = tmp_path / "broken.safetensors"
    save_file(
        {k: v for k, v in load_file(float_file).items() if not k.startswith(drop)},
        path,
        metadata={"step1x_edit_config": json.dumps(tiny_models.TINY_MLLM)},
    )
    with pytest.raises(Step1XError, match=message):
        load_text_encoder(path)
