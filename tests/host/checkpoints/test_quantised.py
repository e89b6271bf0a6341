"""Scales without ComfyUI's marker are multiplied out; what is not understood is refused."""

import json
import weakref

import pytest
import tiny_models
import torch
from diffusers_layout import to_diffusers
from safetensors.torch import save_file
from test_loading import predict

from step1x_core.checkpoints import quantised
from step1x_core.checkpoints.detection import CONFIG_KEY
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints import loading
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder

FP8 = torch.float8_e4m3fn
PEAK = {FP8: 448, torch.float8_e5m2: 57344, torch.int8: 127}
# The shape of the scale, as (rows, columns) of blocks; None for one value.
LAYOUTS = {
    "one": None,
    "vector_of_one": None,
    "rows": (1, None),
    "row_vector": (1, None),
    "blocks": (32, 32),
    "ragged_blocks": (128, 128),
    "groups": (1, 16),
}


def grid_of(weight, layout):
    """Largest magnitude per block, float32 [R, C], and the same spread to the size of the weight; in other words than
    what is tested."""
    rows, columns = LAYOUTS[layout] or weight.shape
    columns = columns or weight.shape[1]
    starts = range(0, weight.shape[0], rows), range(0, weight.shape[1], columns)
    grid = torch.tensor([[weight[i : i + rows, j : j + columns].abs().max() for j in starts[1]] for i in starts[0]])
    index = torch.arange(weight.shape[0]) // rows, torch.arange(weight.shape[1]) // columns
    return grid, grid[index[0]][:, index[1]]


def quantise(weight, layout, dtype=FP8):
    """Codes of [N, K], their scale in the shape of the layout, and the bfloat16 matrix that they stand for."""
    grid, spread = grid_of(weight.float(), layout)
    grid, spread = grid / PEAK[dtype], spread / PEAK[dtype]
    codes = weight.float() / spread
    codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
    shape = {"one": (), "vector_of_one": (1,), "row_vector": (-1,)}.get(layout)
    return codes, grid if shape is None else grid.reshape(shape), (codes.float() * spread).to(torch.bfloat16)


def unmarked(weights, names, layout="one", scale="weight_scale", dtype=FP8):
    """The state dict with these matrices quantised, and the one that should come of it."""
    stored, right = dict(weights), dict(weights)
    for key in names:
        stored[key], factor, right[key] = quantise(weights[key], layout, dtype)
        stored[key.removesuffix("weight") + scale] = factor
    return stored, right


def matrices(weights):
    return [
        key for key, weight in weights.items() if weight.ndim == 2 and ("_blocks." in key or "model.layers." in key)
    ]


def model_state(folder, stored, metadata=None, name="other-v1p1.safetensors"):
    """What the pack's loader gives the host for a transformer in a file of that content."""
    save_file({k: v.clone() for k, v in stored.items()}, folder / name, metadata=metadata)
    return loading.model_state_dict(loading.find_checkpoint(folder / name, "transformer"))[0]


def mllm_state(folder, stored, config=None, metadata=None):
    """The same for the language model, in a file or, with a config.json, in a folder."""
    path = folder / "model.safetensors"
    save_file(
        {k: v.clone() for k, v in stored.items()},
        path,
        metadata=metadata or {CONFIG_KEY: json.dumps(tiny_models.TINY_MLLM)},
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(tiny_models.TINY_MLLM | config))
    return loading.mllm_state_dict(loading.find_checkpoint(path if config is None else folder, "text_encoder"))[0]


def check_equal(found, right):
    """No scale is left, and every tensor has the right values to the bit."""
    assert set(found) - {CONFIG_KEY} == set(right)
    for key, tensor in right.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def host_names(weights):
    return {("model." + k if k.startswith("lm_head.") else k): v for k, v in weights.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8])
def test_every_layout_of_scales_is_multiplied_out_in_the_transformer(model_weights, tmp_path, layout, dtype):
    stored, right = unmarked(model_weights, matrices(model_weights), layout, dtype=dtype)
    check_equal(model_state(tmp_path, stored), right)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_every_layout_of_scales_is_multiplied_out_in_the_language_model(mllm_weights, tmp_path, layout, dtype):
    stored, right = unmarked(mllm_weights, matrices(mllm_weights), layout, dtype=dtype)
    check_equal(mllm_state(tmp_path, stored), host_names(right))


@pytest.mark.parametrize("scale", quantised.WEIGHT_SCALES)
def test_every_name_of_a_scale_is_known(model_weights, mllm_weights, tmp_path, scale):
    stored, right = unmarked(model_weights, matrices(model_weights), "blocks", scale)
    check_equal(model_state(tmp_path, stored), right)
    stored, right = unmarked(mllm_weights, matrices(mllm_weights), "blocks", scale)
    check_equal(mllm_state(tmp_path, stored), host_names(right))


@pytest.mark.parametrize("scale", ["weight_scale", "scale_weight"])
def test_a_file_without_marker_gives_the_picture_of_its_weights(model_weights, models, tmp_path, scale):
    """Without the scale the output was off by 1.23."""
    stored, right = unmarked(model_weights, matrices(model_weights), "one", scale)
    save_file(stored, tmp_path / "scaled-v1p1.safetensors")
    save_file(right, tmp_path / "right-v1p1.safetensors")
    found = predict(load_model(tmp_path / "scaled-v1p1.safetensors"))
    assert torch.equal(found, predict(load_model(tmp_path / "right-v1p1.safetensors")))
    exact = predict(load_model(models / "diffusion_models" / tiny_models.V11_FILE))
    assert 0 < (found - exact).norm() / exact.norm() < 0.1


def compressed_tensors(strategy, block=None):
    weights = {"num_bits": 8, "strategy": strategy, "type": "float", "block_structure": block}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": weights}},
        }
    }


def test_a_folder_of_compressed_tensors_gives_the_conditioning_of_its_weights(
    mllm_weights, float_file, photo, tmp_path
):
    """Without the scales the cosine to bf16 was 0.037."""
    stored, right = unmarked(mllm_weights, matrices(mllm_weights), "rows")
    check_equal(mllm_state(tmp_path, stored, compressed_tensors("channel")), host_names(right))
    clip, float_clip = load_text_encoder(tmp_path), load_text_encoder(float_file)
    tokens = clip.tokenize("make it red", images=[photo])
    cosine = torch.nn.functional.cosine_similarity(
        clip.encode_from_tokens(tokens).flatten(), float_clip.encode_from_tokens(tokens).flatten(), dim=0
    )
    assert cosine > 0.99


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [40, 24]}},
        compressed_tensors("block", [40, 24]),
    ],
)
def test_the_size_of_blocks_is_that_of_the_config(mllm_weights, tmp_path, monkeypatch, config):
    monkeypatch.setitem(LAYOUTS, "odd", (40, 24))
    stored, right = unmarked(mllm_weights, matrices(mllm_weights), "odd", "weight_scale_inv")
    check_equal(mllm_state(tmp_path, stored, config), host_names(right))


def test_scales_of_inputs_and_caches_are_dropped(model_weights, tmp_path):
    stored, right = unmarked(model_weights, matrices(model_weights))
    for i, end in enumerate(("input_scale", "scale_input", "output_scale", "k_scale")):
        stored[matrices(model_weights)[i].removesuffix("weight") + end] = torch.tensor(0.25)
    check_equal(model_state(tmp_path, stored), right)


def test_plain_fp8_beside_scaled_layers_becomes_bf16_without_loss(model_weights, tmp_path):
    """Else the host, which asks for the commonest type, would round the multiplied weights to fp8 without a scale."""
    names = matrices(model_weights)
    plain = {k: model_weights[k].to(FP8) for k in names[1:]}
    stored, right = unmarked(model_weights | plain, names[:1])
    check_equal(model_state(tmp_path, stored), right | {k: v.bfloat16() for k, v in plain.items()})


def test_the_diffusers_layout_is_multiplied_out_before_it_is_stacked(model_weights, tmp_path):
    layout = to_diffusers(model_weights)
    names = [key for key, weight in layout.items() if weight.ndim == 2 and "transformer_blocks." in key]
    stored, right = unmarked(layout, names, "rows")
    check_equal(model_state(tmp_path, stored), loading.diffusers_to_original(right))


QKV = "double_blocks.0.img_attn.qkv."


@pytest.mark.parametrize(
    "extra",
    [
        {"weight_scale": torch.full((7,), 2.0)},
        {"weight_scale": torch.full((1, 64), 2.0)},
        {"weight_scale": torch.full((4, 2, 2), 2.0)},
        {"weight_scale": torch.full((192, 1), 127, dtype=torch.uint8)},
        {"scale": torch.tensor(2.0)},
        {"weight_zero_point": torch.ones(192, 1, dtype=torch.int8)},
        {"weight_scale": torch.tensor(2.0), "scale_weight": torch.tensor(2.0)},
        {"pre_quant_scale": torch.full((64,), 2.0)},
        {"w_amax": torch.tensor(3.0)},
        {"factor": torch.full((192, 1), 2.0)},
        {"w_s": torch.tensor(2.0)},
    ],
    ids=lambda extra: "-".join(f"{key}{list(tensor.shape)}" for key, tensor in extra.items()),
)
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_what_looks_like_a_scale_and_is_not_understood_is_refused(model_weights, tmp_path, extra, dtype):
    stored = (
        model_weights
        | {QKV + "weight": model_weights[QKV + "weight"].to(dtype)}
        | {QKV + key: tensor for key, tensor in extra.items()}
    )
    with pytest.raises(
        Step1XError, match=rf"contains {QKV}\w+ .* beside {QKV}weight .*looks like its scale.*Use the bf16 file"
    ):
        model_state(tmp_path, stored)


@pytest.mark.parametrize("key", [f"{QKV[:-1]}_scale", f"{QKV[:-1]}_weight_scale", f"scales.{QKV[:-1]}", f"{QKV}quant.scale"])
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_a_scale_outside_of_its_layer_is_refused(model_weights, tmp_path, key, dtype):
    stored = model_weights | {QKV + "weight": model_weights[QKV + "weight"].to(dtype)}
    with pytest.raises(Step1XError, match=rf"contains {key} .* beside {QKV}weight .*looks like its scale"):
        model_state(tmp_path, stored | {key: torch.full((192, 1), 2.0)})


def test_scales_of_nothing_narrow_are_only_logged(model_weights, tmp_path):
    """Plain fp8 has no scales; a tensor of such a name that belongs to none of its layers is no reason to refuse it."""
    plain = {key: tensor.to(FP8) if tensor.ndim == 2 else tensor for key, tensor in model_weights.items()}
    found = model_state(tmp_path, plain | {"logit_scale": torch.tensor(4.6)})
    assert set(found) - {CONFIG_KEY} == {*plain, "logit_scale"} and found[QKV + "weight"].dtype == FP8


@pytest.mark.parametrize("key", ["double_blocks.0.img_mlp.2.", "single_blocks.0.linear2."])
def test_scales_of_rows_that_lie_down_are_not_taken_for_groups_of_columns(model_weights, tmp_path, key):
    """[1, rows] beside [rows, n * rows] would fit groups of n columns, and the product be noise."""
    weight = model_weights[key + "weight"]
    scale = torch.full((1, weight.shape[0]), 2.0)
    with pytest.raises(Step1XError, match=rf"contains {key}weight_scale .*looks like its scale"):
        model_state(tmp_path, model_weights | {key + "weight": weight.to(FP8), key + "weight_scale": scale})


def test_one_row_of_blocks_of_a_told_size_is_read():
    weight, scale = torch.ones(4, 32).to(FP8), torch.arange(1.0, 5.0)[None]
    stored = {"a.weight": weight, "a.weight_scale": scale}
    quantised.multiply_out("x", stored, (), {"quantization_config": {"weight_block_size": [8, 8]}})
    assert torch.equal(stored["a.weight"], scale.repeat_interleave(8, 1).expand(4, -1).bfloat16())


def test_a_scale_beside_a_weight_that_is_not_of_8_bits_is_refused_unless_it_is_1(model_weights, tmp_path):
    with pytest.raises(Step1XError, match=r"weight_scale \(float32 \[\]\) beside .*\(bfloat16 \[192, 64\]\)"):
        model_state(tmp_path, model_weights | {QKV + "weight_scale": torch.tensor(0.5)})
    check_equal(model_state(tmp_path, model_weights | {QKV + "weight_scale": torch.ones(192, 1)}), model_weights)


def test_zero_points_of_zero_are_dropped(mllm_weights, tmp_path):
    stored, right = unmarked(mllm_weights, matrices(mllm_weights), "rows", dtype=torch.int8)
    stored |= {
        key.removesuffix("weight") + "weight_zero_point": torch.zeros(mllm_weights[key].shape[0], 1, dtype=torch.int8)
        for key in matrices(mllm_weights)
    }
    check_equal(mllm_state(tmp_path, stored), host_names(right))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integers_without_a_scale_are_refused(model_weights, tmp_path, dtype):
    weight = torch.ones(192, 64 if dtype == torch.int8 else 32, dtype=dtype)
    with pytest.raises(Step1XError, match=f"{QKV}weight as {str(dtype)[6:]} without a scale"):
        model_state(tmp_path, model_weights | {QKV + "weight": weight})


def test_a_scale_that_is_no_number_is_refused(model_weights, tmp_path):
    stored, _ = unmarked(model_weights, [QKV + "weight"])
    with pytest.raises(Step1XError, match="contains NaN or Inf values"):
        model_state(tmp_path, stored | {QKV + "weight_scale": torch.tensor(float("nan"))})


def test_exponents_as_scales_are_multiplied_out(model_weights, tmp_path):
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no float8_e8m0fnu")
    codes = model_weights[QKV + "weight"].to(FP8)
    powers = torch.exp2(torch.arange(12.0).reshape(6, 2) - 5)
    stored = model_weights | {QKV + "weight": codes, QKV + "weight_scale_inv": powers.to(torch.float8_e8m0fnu)}
    right = (codes.float() * powers.repeat_interleave(32, 0).repeat_interleave(32, 1)).bfloat16()
    check_equal(model_state(tmp_path, stored), model_weights | {QKV + "weight": right})


def test_multiplying_out_holds_no_second_copy_of_everything():
    """Each weight is let go of as soon as its product is there."""
    state_dict = {f"{i}.weight": torch.ones(64, 64, dtype=torch.int8) for i in range(4)} | {
        f"{i}.weight_scale": torch.tensor(0.5) for i in range(4)
    }
    held = [weakref.ref(state_dict[f"{i}.weight"]) for i in range(4)]
    alive = []
    quantised.multiply_out("x", state_dict, (), {}, lambda: alive.append(sum(ref() is not None for ref in held)))
    assert alive == [4, 3, 2, 1] and all(ref() is None for ref in held)
