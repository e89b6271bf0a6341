"""ComfyUI's markers of quantised layers.

These are a tensor `comfy_quant` beside a weight, a tensor `scaled_fp8` for a whole file, or `_quantization_metadata` in
the file's metadata.
"""

import json
from collections.abc import Callable

from torch import Tensor

from ..errors import Step1XError
from .prefixes import is_transformer_prefix

MARKER = "comfy_quant"
FILE_MARKER = "scaled_fp8"
METADATA_KEY = "_quantization_metadata"


def layer_of(key: str) -> str:
    """Return the layer of a tensor: `a.b` for `a.b.weight_scale` and for `a.b.weight.scale`."""
    return key.split(".weight.")[0] if ".weight." in key else key.rpartition(".")[0]


def stored_layers(name: str, text: str) -> dict:
    """Return the layers of a `_quantization_metadata` entry. Raises Step1XError if it cannot be read."""
    try:
        layers = json.loads(text)["layers"]
        layers.items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Step1XError(
            f"{name} could not be loaded: {METADATA_KEY} in its metadata is not a list of layers "
            f"({type(error).__name__}: {error}). Download it again, or choose another file."
        ) from error
    return layers


def merge_metadata(name: str, first: dict, second: dict) -> dict:
    """Merge the metadata of two files of one model: the layers that either marks; for all else the second takes
    precedence."""
    merged = first | second
    if METADATA_KEY in first and METADATA_KEY in second:
        merged[METADATA_KEY] = json.dumps(
            {"layers": stored_layers(name, first[METADATA_KEY]) | stored_layers(name, second[METADATA_KEY])}
        )
    return merged


def shorten_metadata(
    name: str, metadata: dict, state_dict: dict[str, Tensor], rename: Callable[[dict], dict] = dict
) -> dict:
    """Rename the marked layers in the metadata as `state_dict` names them after its names were shortened.

    rename: how tensor names were changed, besides dropping a prefix. A layer that is not in `state_dict` keeps its
    name.

    Raises Step1XError for an entry that cannot be read.
    """
    if METADATA_KEY not in metadata:
        return metadata
    layers = {}
    for layer, form in stored_layers(name, metadata[METADATA_KEY]).items():
        found = next(iter(rename({f"{layer}.weight": None}))).removesuffix(".weight")
        while f"{found}.weight" not in state_dict and "." in found:
            found = found.partition(".")[2]
        layers[found if f"{found}.weight" in state_dict else layer] = form
    return metadata | {METADATA_KEY: json.dumps({"layers": layers})}


def marked_layers(name: str, state_dict: dict[str, Tensor], metadata: dict) -> set[str]:
    """Return the layers that ComfyUI treats as quantised. Raises Step1XError for metadata that cannot be read."""
    marked = {key.removesuffix("." + MARKER) for key in state_dict if key.endswith("." + MARKER)}
    if METADATA_KEY in metadata:
        return marked | set(stored_layers(name, metadata[METADATA_KEY]))
    if FILE_MARKER in state_dict:
        marked |= {key.removesuffix(".scale_weight") for key in state_dict if key.endswith(".scale_weight")}
    return marked


def lift_marker(state_dict: dict[str, Tensor]) -> None:
    """Rename ComfyUI's marker of a whole file to its bare name, in place; its prefix may differ from that of the
    tensors."""
    ends = [key for key in state_dict if key.endswith("." + FILE_MARKER)]
    for key in (key for key in ends if is_transformer_prefix(key.removesuffix(FILE_MARKER))):
        state_dict[FILE_MARKER] = state_dict.pop(key)
