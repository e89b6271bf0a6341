"""Step1X-Edit in a GGUF loader: raw uint8 weights under the original names, and custom operations that unpack them when they are used.

The classes here do what the operations of ComfyUI-GGUF do to a model; that pack itself is not needed.
"""

import comfy.lora
import comfy.ops
import comfy.sd
import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from step1x_core.checkpoints.detection import CONFIG_KEY, config_tensor
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.checkpoints.lora import apply_lora
from step1x_core.host.network.model import Step1XEditModel, register
from step1x_core.host.sampling.sampler import flow_sigmas, sample, with_norm_limiter
from step1x_core.versions import VERSIONS

# Layers that the converter of ComfyUI-GGUF's llama.cpp patch keeps in half or full precision.
KEPT = ("img_in.", "txt_in.", "time_in.", "vector_in.", "final_layer.")
Q8_BLOCK = 32


class GGUFTensor(torch.Tensor):
    """Raw bytes [rows, bytes per row], or an unquantised tensor, that gives the shape of the weight it stands for."""

    @staticmethod
    def __new__(cls, data, logical_shape):
        tensor = torch.Tensor._make_subclass(cls, data)
        tensor.logical_shape = torch.Size(logical_shape)
        return tensor

    @property
    def shape(self):
        return getattr(self, "logical_shape", self.size())

    def to(self, *args, **kwargs):
        return GGUFTensor(super().to(*args, **kwargs).as_subclass(torch.Tensor), self.shape)

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 32 weights: a float16 scale and 32 int8."""
    blocks = weight.reshape(weight.shape[0], -1, Q8_BLOCK)
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 127).half()
    values = (blocks / scale.float()).round().to(torch.int8)
    return torch.cat((scale.view(torch.uint8), values.view(torch.uint8)), dim=-1).flatten(1)


def unpack(tensor, dtype: torch.dtype) -> torch.Tensor:
    raw = tensor.data.as_subclass(torch.Tensor)
    if raw.dtype != torch.uint8:
        return raw.to(dtype)
    blocks = raw.reshape(raw.shape[0], -1, Q8_BLOCK + 2)
    values = blocks[..., 2:].contiguous().view(torch.int8).float() * blocks[..., :2].contiguous().view(torch.float16).float()
    return values.flatten(1).to(dtype)


class GGUFLayer(torch.nn.Module):
    comfy_cast_weights = True

    def cast_bias_weight(self, x):
        return unpack(self.weight, x.dtype), None if self.bias is None else unpack(self.bias, x.dtype)


class GGUFOperations(comfy.ops.manual_cast):
    class Linear(GGUFLayer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    setattr(self, name, torch.nn.Parameter(state_dict[prefix + name], requires_grad=False))
            if self.weight is None:
                missing_keys.append(prefix + "weight")

        def forward_comfy_cast_weights(self, x):
            return torch.nn.functional.linear(x, *self.cast_bias_weight(x))

        forward = forward_comfy_cast_weights


def as_gguf(weights: dict, prefix: str = "") -> dict:
    """A state dict as a GGUF loader hands it to the host."""
    out = {}
    for key, weight in weights.items():
        small = weight.ndim == 1 or any(name in key for name in KEPT)
        out[prefix + key] = GGUFTensor(weight if small else q8_0(weight), weight.shape)
    return out


def random_weights(version):
    return tiny_models.random_weights(tiny_models.transformer_shapes(version, tiny_models.TINY_TRANSFORMER), seed=1)


def load_gguf(version, prefix=""):
    register()
    return comfy.sd.load_diffusion_model_state_dict(
        as_gguf(random_weights(version), prefix), model_options={"custom_operations": GGUFOperations()}
    )


def conditioning(version, seed):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(3))
    length = 24
    context = torch.randn(1, length, 64, generator=generator)
    extra = {"reference_latents": [latent]}
    if VERSIONS[version].layout.text_positions:
        extra |= {
            "text_ids": torch.arange(length).float()[None, :, None].repeat(1, 1, 3),
            "text_embeds": torch.randn(1, length, 64, generator=generator),
            "text_mask": (torch.arange(length) > 15).long()[None],
        }
    else:
        extra["attention_mask"] = (torch.arange(length) < 20).long()[None]
    return [[context, extra]], {"samples": latent}


def short_edit(model, version):
    positive, latent = conditioning(version, 4)
    negative, _ = conditioning(version, 5)
    return sample(model, positive, negative, latent, flow_sigmas(2, latent["samples"]), 4.0, seed=1, callback=lambda *args: None)["samples"]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("version", ["v1.0", "v1.1", "v1.2"])
def test_a_gguf_state_dict_is_recognised_and_edits_like_its_unpacked_weights(version, prefix, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({key: unpack(weight, torch.float32) for key, weight in as_gguf(random_weights(version)).items()}, path)
    expected = short_edit(load_model(path, version), version)
    model = load_gguf(version, prefix)
    network = model.model.diffusion_model
    assert isinstance(model.model, Step1XEditModel) and network.version == version
    assert network.connector.S.input_embedder.weight.dtype == torch.uint8
    assert (network.text_token_mapping is not None) == (version == "v1.2") and (
        network.connector.scale_factor is not None
    ) == (version == "v1.0")
    # The limiter comes with our loader, and with our sampler node.
    found = short_edit(with_norm_limiter(model), version)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


def test_the_version_that_a_saved_model_names_survives_the_conversion():
    """Nothing else tells a v1.2-preview without text-token mapping from v1.1; the converter turns the entry into float16."""
    register()
    entry = config_tensor({"version": "v1.2-preview"}).half()
    weights = as_gguf(random_weights("v1.1")) | {CONFIG_KEY: GGUFTensor(entry, entry.shape)}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"custom_operations": GGUFOperations()})
    assert model.model.diffusion_model.version == "v1.2-preview"


def test_lora_patches_are_found_for_packed_weights():
    """A GGUF patcher keeps the patches and adds them to the unpacked weight; the names and shapes it is given decide."""
    model = load_gguf("v1.2")
    lora = {
        "transformer.text_token_mapping.lora_A.weight": torch.randn(2, 64),
        "transformer.text_token_mapping.lora_B.weight": torch.randn(128, 2),
        "lora_unet_connector_S_input_embedder.lora_down.weight": torch.randn(2, 64),
        "lora_unet_connector_S_input_embedder.lora_up.weight": torch.randn(128, 2),
        "blocks.0.attn.a_to_qkv.lora_A.default.weight": torch.randn(2, 64),
        "blocks.0.attn.a_to_qkv.lora_B.default.weight": torch.randn(192, 2),
    }
    patches = apply_lora(model, lora, 1.0).patches
    weights = random_weights("v1.2")
    for name in ("text_token_mapping.weight", "connector.S.input_embedder.weight", "double_blocks.0.img_attn.qkv.weight"):
        unpacked = unpack(model.model.diffusion_model.get_parameter(name), torch.float32)
        merged = comfy.lora.calculate_weight(patches[f"diffusion_model.{name}"], unpacked.clone(), name)
        assert torch.allclose(unpacked, weights[name], atol=0.03) and not torch.allclose(merged, unpacked, atol=0.1)
