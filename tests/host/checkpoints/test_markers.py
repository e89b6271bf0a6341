"""Formats of other tools are named; ComfyUI's own marks are kept, wherever they stand."""

import json
import logging

import comfy.quant_ops
import comfy.sd
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from test_loading import predict
from test_quantised import FP8, check_equal, host_names, matrices, mllm_state, model_state, unmarked

from step1x_core.checkpoints import markers, quantised
from step1x_core.checkpoints.conversion import Weights
from step1x_core.checkpoints.detection import CONFIG_KEY
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints import loading
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.network.model import register


def foreign_parts(form, layer):
    """What a tool puts in place of `layer.weight` [64, 64]."""
    byte, word = torch.ones(2048, 1, dtype=torch.uint8), torch.ones(64, 8, dtype=torch.int32)
    floats = torch.ones(64)
    return {
        f"{layer}.{key}": tensor
        for key, tensor in {
            "bitsandbytes": {
                "weight": byte,
                "weight.absmax": floats,
                "weight.quant_map": floats[:16],
                "weight.quant_state.bitsandbytes__nf4": byte[:80, 0],
            },
            "bitsandbytes ": {"weight": torch.ones(64, 64, dtype=torch.int8), "SCB": floats},
            "AWQ or GPTQ": {"qweight": word, "qzeros": word, "scales": floats},
            "GPTQ": {"qweight": word, "qzeros": word, "scales": floats, "g_idx": torch.zeros(64, dtype=torch.int32)},
            "nunchaku (SVDQuant)": {
                "qweight": word,
                "wscales": floats,
                "smooth_factor": floats,
                "proj_down": floats,
                "proj_up": floats,
            },
            "nunchaku (SVDQuant) ": {"qweight": word, "wscales": floats, "wzeros": floats},
            "torchao": {"_weight_qdata": torch.ones(64, 64, dtype=torch.int8), "_weight_scale": floats},
            "torchao ": {"weight:qdata": torch.ones(64, 64, dtype=torch.int8), "weight:scale": floats},
            "optimum-quanto": {"weight._data": torch.ones(64, 64, dtype=torch.int8), "weight._scale": floats},
            "HQQ": {"W_q": byte, "scale": floats, "zero": floats},
            "compressed-tensors in packed form": {
                "weight_packed": word,
                "weight_scale": floats,
                "weight_shape": torch.tensor([64, 64]),
            },
        }[form].items()
    }


FORMS = [
    "bitsandbytes",
    "bitsandbytes ",
    "AWQ or GPTQ",
    "GPTQ",
    "nunchaku (SVDQuant)",
    "nunchaku (SVDQuant) ",
    "torchao",
    "torchao ",
    "optimum-quanto",
    "HQQ",
    "compressed-tensors in packed form",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["model", "mllm"])
def test_formats_of_other_tools_are_named_with_what_to_take_instead(model_weights, mllm_weights, tmp_path, form, part):
    weights, state = (model_weights, model_state) if part == "model" else (mllm_weights, mllm_state)
    stored = dict(weights)
    for key in (key for key, weight in weights.items() if weight.ndim == 2):
        del stored[key]
        stored |= foreign_parts(form, key.removesuffix(".weight"))
    with pytest.raises(Step1XError) as error:
        state(tmp_path, stored)
    assert (
        f"is quantised with {form.strip()} (" in str(error.value)
        and "Use the bf16 file" in str(error.value)
        and "scripts/convert.py" in str(error.value)
    )


@pytest.mark.parametrize("method, tool", [("torchao", "torchao"), ("bitsandbytes", "bitsandbytes"), ("awq", "AWQ")])
def test_a_config_names_the_format_where_the_tensors_do_not(mllm_weights, tmp_path, method, tool):
    config = {"quantization_config": {"quant_method": method}}
    with pytest.raises(Step1XError, match=f"quantised with {tool} according to its config.json"):
        mllm_state(
            tmp_path, mllm_weights | {"model.layers.0.mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.int8)}, config
        )
    check_equal(mllm_state(tmp_path, mllm_weights, config), host_names(mllm_weights))


@pytest.mark.parametrize(
    "method, parts, tool",
    [("sdnq", ("scale", "svd_up", "svd_down"), "SDNQ"), ("auto-round", ("qweight", "qzeros", "scales"), "AutoRound")],
)
def test_a_config_tells_tools_apart_that_name_tensors_alike(mllm_weights, tmp_path, method, parts, tool):
    layer = "model.layers.0.mlp.up_proj."
    packed_weight = {layer + "weight": torch.ones(96, 64, dtype=torch.uint8)} | {layer + key: torch.ones(8) for key in parts}
    with pytest.raises(Step1XError, match=f"quantised with {tool} "):
        mllm_state(tmp_path, mllm_weights | packed_weight, {"quantization_config": {"quant_method": method}})


def test_the_entry_of_a_config_is_no_reason_to_refuse_weights_that_are_whole(mllm_weights, tmp_path):
    config = {"quantization_config": {"quant_method": "awq"}}
    found = mllm_state(tmp_path, mllm_weights | {"notes": torch.ones(3, dtype=torch.uint8)}, config)
    assert torch.equal(found["model.norm.weight"], mllm_weights["model.norm.weight"])


def marked(weights, how, prefix=""):
    """The matrices as ComfyUI's scaled fp8, with its marker; the metadata beside."""
    stored, _ = unmarked(weights, matrices(weights), scale="scale_weight" if how == "scaled_fp8" else "weight_scale")
    layers = {key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in matrices(weights)}
    if how == "scaled_fp8":
        stored["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    if how == "comfy_quant":
        stored |= {
            f"{layer}.comfy_quant": torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
            for layer, form in layers.items()
        }
    metadata = {
        "_quantization_metadata": json.dumps(
            {"format_version": "1.0", "layers": {prefix + k: v for k, v in layers.items()}}
        )
    }
    return {prefix + k: v for k, v in stored.items()}, metadata if how == "metadata" else None


def packed(model):
    return {
        name
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "weight", None), comfy.quant_ops.QuantizedTensor)
    }


@pytest.mark.parametrize("how", ["scaled_fp8", "comfy_quant", "metadata"])
def test_files_with_comfyuis_marker_stay_quantised(model_weights, tmp_path, how):
    stored, metadata = marked(model_weights, how)
    found = model_state(tmp_path, stored, metadata)
    found.pop(CONFIG_KEY)
    assert set(found) == set(stored) and all(
        torch.equal(found[k].float(), stored[k].float()) and found[k].dtype == stored[k].dtype for k in stored
    )
    model = load_model(tmp_path / "other-v1p1.safetensors").model.diffusion_model
    assert packed(model) == {key.removesuffix(".weight") for key in matrices(model_weights)}


def test_names_in_the_metadata_are_shortened_with_those_of_the_tensors(model_weights, tmp_path):
    """It was an AttributeError on None."""
    expected, metadata = marked(model_weights, "metadata")
    save_file(expected, tmp_path / "plain-v1p1.safetensors", metadata=metadata)
    stored, metadata = marked(model_weights, "metadata", "model.diffusion_model.")
    save_file(stored, tmp_path / "prefix-v1p1.safetensors", metadata=metadata)
    found, right = load_model(tmp_path / "prefix-v1p1.safetensors"), load_model(tmp_path / "plain-v1p1.safetensors")
    assert (
        packed(found.model.diffusion_model)
        == packed(right.model.diffusion_model)
        == {key.removesuffix(".weight") for key in matrices(model_weights)}
    )
    assert torch.equal(predict(found), predict(right))


def test_names_in_the_metadata_of_a_language_model_are_shortened(mllm_weights, tmp_path):
    stored, metadata = marked(mllm_weights, "metadata")
    text = json.dumps(json.loads(metadata["_quantization_metadata"])).replace(
        "model.layers.", "model.language_model.layers."
    )
    stored = {k.replace("model.layers.", "model.language_model.layers."): v for k, v in stored.items()}
    found = mllm_state(
        tmp_path, stored, metadata={"_quantization_metadata": text, CONFIG_KEY: json.dumps(tiny_models.TINY_MLLM)}
    )
    names = {key.removesuffix(".weight") for key in matrices(mllm_weights)}
    assert {key.removesuffix(".comfy_quant") for key in found if key.endswith(".comfy_quant")} == names
    assert all(found[f"{name}.weight"].dtype == FP8 and f"{name}.weight_scale" in found for name in names)


def test_marked_layers_of_two_shards_are_joined():
    first, second = (
        {"_quantization_metadata": json.dumps({"layers": {name: {"format": "float8_e4m3fn"}}}), name: "1"}
        for name in "ab"
    )
    merged = markers.merge_metadata("x", first, second)
    assert (
        set(json.loads(merged["_quantization_metadata"])["layers"]) == {"a", "b"} and merged["a"] == merged["b"] == "1"
    )


def test_a_host_that_does_not_know_the_model_is_a_sentence(model_weights, tmp_path, monkeypatch):
    save_file(model_weights, tmp_path / "model-v1p1.safetensors")
    monkeypatch.setattr(loading.comfy.sd, "load_diffusion_model_state_dict", lambda *args, **kwargs: None)
    with pytest.raises(Step1XError, match="ComfyUI does not recognise model-v1p1.safetensors"):
        load_model(tmp_path / "model-v1p1.safetensors")


def test_further_tensors_are_logged_once(model_weights, mllm_weights, tmp_path, caplog):
    extra = {f"notes.{i}": torch.zeros(1) for i in range(5)}
    for state, weights in ((model_state, model_weights), (mllm_state, mllm_weights)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            state(tmp_path, weights)
            assert not caplog.records
            state(tmp_path, weights | extra)
        assert [r.getMessage().split(" contains ")[1] for r in caplog.records] == [
            "5 tensors that the model does not have; they are ignored: notes.0, notes.1, notes.2, ..."
        ]


def test_the_stock_loader_refuses_scales_that_it_would_ignore(model_weights, tmp_path):
    register()
    stored, _ = unmarked(model_weights, matrices(model_weights))
    save_file(stored, tmp_path / "scaled-v1p1.safetensors")
    with pytest.raises(
        Step1XError, match="weight_scale, a scale that ComfyUI's own loaders ignore.*'Load Step1X-Edit Model'"
    ):
        comfy.sd.load_diffusion_model(str(tmp_path / "scaled-v1p1.safetensors"))
    for how in ("scaled_fp8", "comfy_quant", "metadata"):
        stored, metadata = marked(model_weights, how)
        save_file(stored, tmp_path / "marked-v1p1.safetensors", metadata=metadata)
        model = comfy.sd.load_diffusion_model(str(tmp_path / "marked-v1p1.safetensors"))
        assert torch.equal(predict(model), predict(load_model(tmp_path / "marked-v1p1.safetensors")))


def test_a_marker_under_another_prefix_than_the_tensors_is_found(mllm_weights, tmp_path):
    stored, _ = marked(mllm_weights, "scaled_fp8")
    expected = mllm_state(tmp_path, stored)
    stored["text_encoders.qwen25_7b.transformer.scaled_fp8"] = stored.pop("scaled_fp8")
    found = mllm_state(tmp_path, stored)
    assert set(found) == set(expected) and sum(key.endswith(".comfy_quant") for key in found) == len(
        matrices(mllm_weights)
    )


@pytest.mark.parametrize("scale", quantised.WEIGHT_SCALES)
def test_the_convert_script_refuses_scales_of_any_name(model_weights, tmp_path, scale):
    stored, _ = unmarked(model_weights, matrices(model_weights), scale=scale)
    save_file(stored, tmp_path / "scaled.safetensors")
    with pytest.raises(Step1XError, match="is already quantised with scales"):
        Weights([tmp_path / "scaled.safetensors"])
