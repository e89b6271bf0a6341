"""Applies LoRAs through the host's own patches."""

import logging
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter, WeightAdapterBase
from torch import Tensor

from ...checkpoints.files import check_file, check_types, is_safetensors
from ...checkpoints.keys import EMBEDDERS
from ...checkpoints.lora import diffsynth_names, official_alphas
from ...checkpoints.lora_names import check_complete, find_layer, flat, layers_of, summary
from ...checkpoints.quantised import check_lora
from ...errors import Step1XError
from ..sampling.few_steps import attach, read_few_steps
from ..sampling.sampler import renew_norm_limiter
from .loading import naming

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."
# Prefixes that trainers add to a layer's name.
PREFIXES = ("transformer.", PREFIX, "base_model.model.", "")
# Layers that FLUX does not have; their names are the same in every layout.
OWN_LAYERS = (f"{PREFIX}connector.", f"{PREFIX}text_token_mapping")
# Where the host's adapters store the magnitudes of a DoRA; the shape of the change is known for these adapters.
SCALE_PLACES = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8}
SHAPED = (*SCALE_PLACES, OFTAdapter)


def lora_keys(model) -> dict:
    """Map LoRA module names to the model's weights.

    The host's own map, which the stock loader uses, contains kohya's names, the original ones after "diffusion_model.",
    and FLUX's in diffusers. This adds Step1X-Edit's own diffusers names, DiffSynth's, and every name after each prefix.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    config = model.model.model_config.unet_config
    renamed = EMBEDDERS | diffsynth_names(config["depth"], config["depth_single_blocks"])
    names = {name: f"{PREFIX}{module}.weight" for name, module in renamed.items()}
    for name, target in keys.items():
        if name.startswith(OWN_LAYERS) and target.endswith(".weight"):
            names[name.removeprefix(PREFIX)] = target
        elif name.startswith("transformer."):
            names[name.removeprefix("transformer.")] = target
    return keys | {prefix + name: target for name, target in names.items() for prefix in PREFIXES}


def load_lora_file(path) -> dict[str, Tensor]:
    """Load the tensors of a LoRA file and log its path.

    Raises Step1XError for a damaged file, for other formats than safetensors, and for tensors that are not weights; the
    host's exception if the user cancels.
    """
    path = Path(path)
    if not is_safetensors(path):
        raise Step1XError(
            f"{path.name} is not a safetensors file. Only safetensors files are supported; download the LoRA in that "
            "format."
        )
    check_file(path)
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    comfy.model_management.throw_exception_if_processing_interrupted()
    check_types(path.name, lora, lora)
    check_lora(path.name, lora)
    log.info("Loaded a Step1X-Edit LoRA from %s", path)
    return lora


def apply_lora_file(model, path, strength: float):
    """Return a clone of the model with a LoRA file applied (`load_lora_file`, `apply_lora`).

    The settings of a few-step LoRA become the model's defaults, unless its strength is 0. Raises Step1XError if the
    model already follows another one.
    """
    lora = load_lora_file(path)
    settings = read_few_steps(path) if strength else None
    model = apply_lora(model, lora, strength)
    if settings is None:
        return model
    attach(model, settings)
    return renew_norm_limiter(model)


def model_layers(model) -> dict:
    """Map flat layer names (`flat`), without prefix, to the targets of the host's patches: a weight's name, or a tuple
    of name, part and function."""
    weights, layers = model.model.state_dict(), {}
    for name, target in lora_keys(model).items():
        key, *rest = target if isinstance(target, tuple) else (target,)
        if key not in weights:
            # Hosts differ in the name of a norm's weight; guidance_in and other layers exist only in FLUX.
            key = f"{key.rpartition('.')[0]}.scale"
        if key in weights:
            layers.setdefault(flat(name.removeprefix(PREFIX)), (key, *rest) if rest else key)
    return layers


class DoRAAdapter(WeightAdapterBase):
    """DoRA with a magnitude for each output row: m * (W + D) / |W + D|, as PEFT and LyCORIS define it. The host divides
    by |W|."""

    name = "dora"

    def __init__(self, loaded_keys, weights):
        """weights: the host's adapter for D, and m as [rows, 1]."""
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        inner, magnitude = self.weights
        changed = inner.calculate_weight(
            weight.clone(), key, 1.0, strength_model, offset, function, intermediate_dtype, original_weight
        )
        lengths = changed.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps
        # `function` reorders rows if the file's order differs.
        changed *= (
            function(comfy.model_management.cast_to_device(magnitude, weight.device, intermediate_dtype)).to(
                weight.dtype
            )
            / lengths
        )
        weight += strength * (changed - weight)
        return weight


def bias_patches(layer: str, target, tensors: dict[str, Tensor], biases) -> dict:
    """Return the patch of a layer's bias, {} without one, and remove it from `tensors`. The host has none for part of a
    layer.

    biases: names of the model's tensors. Raises Step1XError if the model's layer has no bias.
    """
    change = tensors.pop("diff_b", None)
    lora = tensors.pop("lora_bias", None)
    if lora is not None:
        alpha = tensors.get("alpha")
        change = (
            lora if alpha is None or alpha.item() == 0 else lora * (alpha.item() / tensors["lora_down.weight"].shape[0])
        )
    if change is None:
        return {}
    name, *rest = target if isinstance(target, tuple) else (target,)
    name = f"{name.rpartition('.')[0]}.bias"
    if name not in biases:
        raise Step1XError(
            f"This LoRA does not fit the Step1X-Edit model: it changes the bias of {layer}, but that layer has no "
            "bias. Choose another file."
        )
    return {(name, *rest) if rest else name: ("diff", (change,))}


def host_patches(model, lora: dict[str, Tensor]) -> tuple[dict, list[str]]:
    """Return the host's patches for a file's tensors, and the names of the tensors that match no layer of the model.

    Raises Step1XError as `layers_of` and `check_complete` do.
    """
    layers, weights = model_layers(model), model.model.state_dict()
    found, unknown = layers_of(lora, layers)
    patches, renamed, targets, magnitudes = {}, {}, {}, {}
    for layer, tensors in found.items():
        check_complete(layer, tensors)
        target = find_layer(layer, layers)
        patches |= bias_patches(layer, target, tensors, weights)
        scale = tensors.get("dora_scale")
        if scale is not None and (scale.ndim == 1 or scale.shape[1:].numel() == 1):
            magnitudes[target] = tensors.pop("dora_scale").reshape(-1, 1)
        targets[layer] = target
        renamed |= {f"{layer}.{kind}": tensor for kind, tensor in tensors.items()}
    for target, patch in comfy.lora.load_lora(official_alphas(renamed), targets).items():
        magnitude = magnitudes.get(target)
        patches[target] = patch if magnitude is None else DoRAAdapter(patch.loaded_keys, (patch, magnitude))
    return patches, unknown


def target_shape(layers: dict, key: str | tuple) -> tuple[int, ...] | None:
    """Return the shape of a patch's target: a linear layer's weight or bias, or the part (axis, start, length) in
    second place of a tuple. None for other layers.

    layers: all layers of the model by name.
    """
    name, part = key[:2] if isinstance(key, tuple) else (key, None)
    module, _, kind = name.rpartition(".")
    # The host's names include layers that exist only in FLUX.
    layer = layers.get(module)
    if not hasattr(layer, "in_features"):
        return None
    shape = [layer.out_features, layer.in_features][: 1 if kind == "bias" else 2]
    if part is not None:
        shape[part[0]] = part[2]
    return tuple(shape)


def matrix_shape(tensors, whole: int, first: int, second: int) -> tuple[int, ...] | None:
    """Return the shape of a LoKr matrix: of tensor number `whole`, or of the product of two others. None if they cannot
    be multiplied."""
    if tensors[whole] is not None:
        return tuple(tensors[whole].shape)
    a, b = tensors[first], tensors[second]
    return (a.shape[0], b.shape[1]) if a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] > 0 else None


def change_shape(adapter) -> tuple[int, ...] | None:
    """Return the shape [rows, columns] of an adapter's change to a linear layer, or None if its tensors do not match
    each other. For OFT, columns is -1: any."""
    tensors = adapter.weights
    if isinstance(adapter, LoRAAdapter):
        up, down, _, middle, _, reshaped = tensors
        fits = (
            middle is None and reshaped is None and min(up.ndim, down.ndim) > 1 and up[0].numel() == down.shape[0] > 0
        )
        return (up.shape[0], down[0].numel()) if fits else None
    if isinstance(adapter, LoHaAdapter):
        sides = [matrix_shape((None, *pair), 0, 1, 2) for pair in (tensors[0:2], tensors[3:5])]
        return sides[0] if sides[0] == sides[1] and tensors[5] is None else None
    if isinstance(adapter, LoKrAdapter):
        one, two = matrix_shape(tensors, 0, 3, 4), matrix_shape(tensors, 1, 5, 6)
        fits = one and two and len(one) == len(two) == 2 and tensors[7] is None
        return (one[0] * two[0], one[1] * two[1]) if fits else None
    blocks = tensors[0]
    return (blocks.shape[0] * blocks.shape[1], -1) if blocks.ndim == 3 else None


def magnitude_fits(scale: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Return whether the magnitudes of a DoRA are one for each row, [rows, 1], or one for each column, [1, columns]."""
    return scale is None or tuple(scale.shape) in ((shape[0], 1), (1, shape[1]))


def check_patches(model, patches: dict) -> None:
    """Raise Step1XError for patches whose shape differs from their layer's; the host would skip them, or fail while
    sampling."""
    layers = dict(model.model.named_modules())
    for key, patch in patches.items():
        name, shape = key if isinstance(key, str) else key[0], target_shape(layers, key)
        if isinstance(patch, tuple):
            found = tuple(patch[1][0].shape)
            fits = shape in (None, found)
        else:
            scale = patch.weights[1] if isinstance(patch, DoRAAdapter) else dora_scale(patch)
            adapter = patch.weights[0] if isinstance(patch, DoRAAdapter) else patch
            found = change_shape(adapter) if isinstance(adapter, SHAPED) else shape
            fits = found is not None and (
                shape is None or found == (shape[0], shape[1] if found[1] > 0 else -1) and magnitude_fits(scale, shape)
            )
        if not fits:
            tensors = [list(t.shape) for t in flat_tensors(patch)]
            raise Step1XError(
                f"This LoRA does not fit the Step1X-Edit model: its tensors for {name} have the shapes {tensors}, but "
                f"the layer is {list(shape or [])}. It may belong to a model of another size, or be damaged. Choose "
                "another file."
            )


def dora_scale(adapter) -> Tensor | None:
    """Return the magnitudes, for columns, of the host's own adapter."""
    place = SCALE_PLACES.get(type(adapter))
    return None if place is None else adapter.weights[place]


def flat_tensors(patch) -> list[Tensor]:
    """Return all tensors of a patch."""
    if isinstance(patch, WeightAdapterBase):
        patch = patch.weights
    if isinstance(patch, (tuple, list)):
        return [tensor for part in patch for tensor in flat_tensors(part)]
    return [patch] if isinstance(patch, Tensor) else []


def apply_lora(model, lora: dict[str, Tensor], strength: float):
    """Return a clone of the model with the LoRA's patches, which the host applies when weights are loaded or used.
    Tensors for other layers are logged.

    Raises Step1XError if the LoRA matches no layer of the model, and if it does not fit or would be applied in part.
    """
    with naming("This LoRA"):
        patches, unknown = host_patches(model, comfy.lora_convert.convert_lora(lora))
    if not patches:
        raise Step1XError(
            f"This LoRA matches no layer of the Step1X-Edit model; its tensor names are {summary(list(lora))}. It may "
            "belong to another model, or use an unknown layout. Choose another file."
        )
    check_patches(model, patches)
    if unknown:
        log.warning(
            "%d of the %d tensors of this LoRA match no layer of the model and have no effect: %s.",
            len(unknown),
            len(lora),
            summary(unknown),
        )
    model = model.clone()
    model.add_patches(patches, strength)
    return model
