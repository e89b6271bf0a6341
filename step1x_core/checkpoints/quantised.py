"""Quantised weights that ComfyUI does not support: scales without its marker, and other tools' formats.

Marked layers (markers.py) are left unchanged. For unmarked layers ComfyUI ignores the scale, and the model produces
noise; these scales are applied here. Other formats are identified and refused.
"""

import re
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..errors import Step1XError
from .block_scales import block_sizes, multiplied, scale_grid
from .detection import CONFIG_KEY
from .markers import FILE_MARKER, MARKER, layer_of, marked_layers

# Names of a weight's scale, after the layer's name. DeepSeek's "inv" refers to how it was computed; it is a factor,
# too.
WEIGHT_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "weight.scale")
# Scales that only matter to a kernel that rounds its inputs, or to a cache of keys and values.
INPUT_SCALES = (
    "input_scale",
    "scale_input",
    "input_scale_inv",
    "scale_input_inv",
    "activation_scale",
    "act_scale",
    "input_zero_point",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
)
# Words in the name of a tensor beside an 8-bit weight that show that the weight cannot be read without it.
SUSPECT = re.compile(r"scale|zero|absmax|amax|scb|quant|g_idx|smooth", re.IGNORECASE)

# Other tools' formats by the end of a tensor's name, more specific ones first.
FOREIGN = {
    "bitsandbytes": re.compile(
        r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|quant_state\.\w+|weight_format)$"
    ),
    "nunchaku (SVDQuant)": re.compile(
        r"\.(wscales|wcscales|wtscale|wzeros|smooth(_factor)?(_orig)?|proj_down|svd_up|svd_down|svdquant_\w+)$"
    ),
    "GPTQ": re.compile(r"\.g_idx$"),
    "AWQ or GPTQ": re.compile(r"\.(qweight|qzeros)$"),
    "optimum-quanto": re.compile(r"\.weight\._(data|scale|shift)(\._\w+)?$"),
    "torchao": re.compile(
        r"(:|\._weight_|\.weight[._])(_data|qdata|int_data|float8_data|packed_weight|tensor_impl|layout_tensor)\b"
    ),
    "HQQ": re.compile(r"\.W_q$"),
    "compressed-tensors in packed form": re.compile(r"\.(weight_packed|weight_global_scale|bitmask|compressed)$"),
}
# How a config.json names such a format.
FOREIGN_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
    "hqq": "HQQ",
    "nunchaku": "nunchaku (SVDQuant)",
    "svdquant": "SVDQuant",
    "sdnq": "SDNQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "mxfp4": "MXFP4",
}

INSTEAD = (
    "Use the bf16 file, a file in ComfyUI's scaled fp8 format, or convert the bf16 file with scripts/convert.py."
)


def is_narrow(tensor: Tensor) -> bool:
    """Return whether the dtype is 8-bit and needs a scale: float8 or int8."""
    return tensor.dtype == torch.int8 or (tensor.is_floating_point() and tensor.element_size() == 1)


def is_weight_scale(key: str) -> bool:
    return any(key.endswith("." + end) for end in WEIGHT_SCALES)


def quantisation_config(config: dict) -> dict:
    """Return the quantisation entry of a folder's config.json, or {}."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder.get(key), dict):
                return holder[key]
    return {}


def check_foreign(name: str, state_dict: dict[str, Tensor], config: dict) -> None:
    """Raise Step1XError for another tool's format, identified by its tensor names or by the folder's config.json."""
    # It distinguishes tools whose tensors have the same names.
    method = str(quantisation_config(config).get("quant_method") or "").lower()
    # A folder may keep the entry after its weights were converted back to bf16.
    if method in FOREIGN_METHODS and any(
        is_narrow(tensor) or (not tensor.is_floating_point() and tensor.ndim > 1) for tensor in state_dict.values()
    ):
        raise Step1XError(
            f"{name} is quantised with {FOREIGN_METHODS[method]} according to its config.json, a format that this node "
            f"pack does not support. {INSTEAD}"
        )
    for tool, pattern in FOREIGN.items():
        # A layer with ComfyUI's marker may have tensors of any name.
        key = next(
            (key for key in state_dict if pattern.search(key) and f"{layer_of(key)}.{MARKER}" not in state_dict), None
        )
        if key is not None:
            raise Step1XError(
                f"{name} is quantised with {tool} (it contains {key}), a format that this node pack does not support. "
                f"{INSTEAD}"
            )


def is_neutral(key: str, tensor: Tensor) -> bool:
    """Return whether a scale is all 1, or a zero point all 0, as some tools write for unquantised layers."""
    return bool((tensor.float() == (0 if "zero" in key else 1)).all())


def refuse_scale(name: str, key: str, tensor: Tensor, weight: str, found: Tensor) -> Step1XError:
    """Return the error for a tensor that looks like an unsupported scale of a weight."""
    return Step1XError(
        f"{name} contains {key} ({dtype_name(tensor)} {list(tensor.shape)}) beside {weight} ({dtype_name(found)} "
        f"{list(found.shape)}), which looks like its scale in an unsupported format; without it the weight would be "
        f"noise. {INSTEAD}"
    )


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def multiply_out(
    name: str,
    state_dict: dict[str, Tensor],
    marked: Collection[str],
    config: dict,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Apply the scales of unmarked layers to their weights, in place, and remove them; returns the number of layers.

    marked: layers that are left unchanged. config: the folder's config.json. check: called before each weight, to raise
    if the user cancels. Scaled weights become bfloat16. If there are any, all other unmarked 8-bit weights become
    bfloat16, too; otherwise the host would take their dtype for that of the model.

    Raises Step1XError for a scale in an unknown layout or with NaN or Inf values, and for another tensor beside a
    weight that looks like its scale.
    """
    check_elsewhere(name, state_dict, marked)
    told = block_sizes(quantisation_config(config))
    beside = {}
    for key in state_dict:
        layer = layer_of(key)
        if layer not in marked and f"{layer}.weight" in state_dict and key not in (f"{layer}.weight", f"{layer}.bias"):
            beside.setdefault(layer, []).append(key)
    done = 0
    for layer, keys in beside.items():
        check()
        done += multiply_layer(name, state_dict, layer, keys, told)
    for key, tensor in state_dict.items() if done else ():
        if key.endswith(".weight") and layer_of(key) not in marked and is_narrow(tensor):
            check()
            state_dict[key] = tensor.to(torch.bfloat16)
    return done


def is_suspect(kind: str, tensor: Tensor, weight: Tensor) -> bool:
    """Return whether a tensor beside an 8-bit weight looks like its scale, by the last part of its name or by its
    size."""
    sizes = {1, weight.shape[0], weight.numel() // max(weight.shape[0], 1)} if weight.ndim else {1}
    return SUSPECT.search(kind) is not None or (tensor.is_floating_point() and tensor.numel() in sizes)


def check_elsewhere(name: str, state_dict: dict[str, Tensor], marked: Collection[str]) -> None:
    """Raise Step1XError for a tensor outside the layers that looks like a scale and names an unmarked 8-bit weight.

    Examples are `a.b_scale` and `scales.a.b` for the layer `a.b`.
    """
    narrow = [
        key.removesuffix(".weight")
        for key, tensor in state_dict.items()
        if key.endswith(".weight") and layer_of(key) not in marked and is_narrow(tensor)
    ]
    for key, tensor in state_dict.items():
        if key.endswith((".weight", ".bias")) or f"{layer_of(key)}.weight" in state_dict or not SUSPECT.search(key):
            continue
        layer = next(
            (layer for layer in narrow if re.search(rf"(?<![^.]){re.escape(layer)}(?![a-zA-Z0-9])", key)), None
        )
        if layer is not None and not is_neutral(key, tensor):
            raise refuse_scale(name, key, tensor, f"{layer}.weight", state_dict[f"{layer}.weight"])


def multiply_layer(
    name: str, state_dict: dict[str, Tensor], layer: str, keys: list[str], told: tuple[int, int] | None
) -> int:
    """Do the work of `multiply_out` for one layer and the tensors `keys` beside its weight; returns 1 if it was scaled,
    else 0."""
    weight_key = f"{layer}.weight"
    weight = state_dict[weight_key]
    scales = [key for key in keys if key[len(layer) + 1 :] in WEIGHT_SCALES]
    for key in keys:
        kind = key[len(layer) + 1 :]
        if kind in INPUT_SCALES and (is_narrow(weight) or scales):
            del state_dict[key]
        elif kind not in WEIGHT_SCALES and is_narrow(weight) and is_suspect(kind, state_dict[key], weight):
            if not is_neutral(key, state_dict[key]):
                raise refuse_scale(name, key, state_dict[key], weight_key, weight)
            del state_dict[key]
    if not scales:
        return 0
    scale = state_dict[scales[0]]
    if not is_narrow(weight) and weight.is_floating_point():
        # `check_leftovers` refuses all others.
        for key in scales:
            if is_neutral(key, state_dict[key]):
                del state_dict[key]
        return 0
    # A scale in bytes is an exponent, or still packed.
    known = is_narrow(weight) and len(scales) == 1 and scale.is_floating_point()
    layout = scale_grid(weight, scale, told) if known else None
    if layout is None:
        raise refuse_scale(name, scales[-1], state_dict[scales[-1]], weight_key, weight)
    if not layout[0].isfinite().all():
        raise Step1XError(
            f"{name} contains NaN or Inf values in {scales[0]}. The file may be damaged; download it again."
        )
    state_dict[weight_key] = multiplied(weight, *layout)
    del state_dict[scales[0]]
    return 1


def check_stock(state_dict: dict[str, Tensor], node: str) -> None:
    """Raise Step1XError, naming the node to use instead, for scales that ComfyUI's own loader would ignore.

    It has chosen the model's dtype before the weights get here, so it is too late to apply them.
    """
    marked = marked_layers("", state_dict, {})
    for key in filter(is_weight_scale, state_dict):
        weight = state_dict.get(f"{layer_of(key)}.weight")
        if layer_of(key) not in marked and weight is not None and is_narrow(weight):
            raise Step1XError(
                f"This file contains {key}, a scale that ComfyUI's own loaders ignore because the file lacks ComfyUI's "
                f"marker. Load it with '{node}', which applies the scale."
            )


def check_lora(name: str, lora: dict[str, Tensor]) -> None:
    """Raise Step1XError for a LoRA whose matrices are integers, or float8 with scales; without the scales they are
    noise."""
    narrow = [key for key, tensor in lora.items() if is_narrow(tensor)]
    scale = next((key for key in lora if is_weight_scale(key) or key.endswith(MARKER)), None) if narrow else None
    integers = [key for key, tensor in lora.items() if tensor.dtype in (torch.int8, torch.uint8) and tensor.ndim > 1]
    whole = next(iter(integers), scale)
    if whole is not None:
        raise Step1XError(
            f"{name} is a quantised LoRA (it contains {whole} as {dtype_name(lora[whole])}), which this node pack does "
            "not support. Use a bf16, fp16 or fp32 file."
        )


def check_leftovers(name: str, state_dict: dict[str, Tensor], marked: Collection[str]) -> None:
    """Raise Step1XError for an unmarked integer weight without a scale, and for a scale of a weight that is not
    8-bit."""
    for key, tensor in state_dict.items():
        weight = f"{layer_of(key)}.weight"
        if layer_of(key) in marked or weight not in state_dict:
            continue
        if is_weight_scale(key):
            raise refuse_scale(name, key, tensor, weight, state_dict[weight])
        if key == weight and tensor.dtype in (torch.int8, torch.uint8):
            raise Step1XError(
                f"{name} stores {key} as {dtype_name(tensor)} without a scale; without one the weight would be noise. "
                f"{INSTEAD}"
            )


def unknown_tensors(state_dict: dict[str, Tensor], expected: Collection[str], marked: Collection[str]) -> list[str]:
    """Return the sorted names that neither the model has nor its marked layers need."""
    known = {CONFIG_KEY, FILE_MARKER, *expected, *(key.replace("_norm.weight", "_norm.scale") for key in expected)}
    return sorted(key for key in state_dict if key not in known and layer_of(key) not in marked)
