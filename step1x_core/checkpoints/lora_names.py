"""How LoRA files name layers and tensors, reduced to one spelling (docs/model.md, LoRA)."""

import re

from torch import Tensor

from ..errors import Step1XError

# Prefixes that trainers add to a layer's name, with dots or underscores; they may be stacked in any order.
PREFIXES = (
    "base_model_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "transformer_",
    "lora_unet_",
    "lora_transformer_",
    "lora_dit_",
    "lora_",
    "lycoris_",
    "oft_unet_",
    "unet_",
    "pipe_",
    "dit_",
    "net_",
    "inner_model_",
    "module_",
    "model_",
)
# Parts that wrappers insert in the middle of a name.
INFIXES = (
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "_fsdp_wrapped_module.",
    "processor.",
    "_orig_mod_",
    "processor_",
)
# The spellings of a tensor's kind at the end of its name. In PEFT names an adapter name may be included.
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
_KINDS = [
    (re.compile(pattern + "$"), kind)
    for pattern, kind in (
        (rf"[._]lora[._](?:linear_layer\.)?up{_ADAPTER}\.weight", "lora_up.weight"),
        (rf"[._]lora[._](?:linear_layer\.)?down{_ADAPTER}\.weight", "lora_down.weight"),
        (rf"\.lora_B{_ADAPTER}(?:\.weight)?", "lora_up.weight"),
        (rf"\.lora_A{_ADAPTER}(?:\.weight)?", "lora_down.weight"),
        (rf"\.lora_(?:B|up){_ADAPTER}\.bias", "lora_bias"),
        (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "dora_scale"),
        (r"\.w_norm", "diff"),
        (r"\.b_norm", "diff_b"),
    )
]
_OTHER_KINDS = re.compile(
    r"\.(alpha|dora_scale|diff|diff_b|set_weight|lora_mid\.weight|reshape_weight|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|"
    r"[ab][12]\.weight|oft_blocks|rescale)$"
)
# Complete sets of a layer's tensors, without those that are optional in each set.
_FORMS = [
    frozenset(form)
    for form in (
        {"lora_up.weight", "lora_down.weight"},
        {"lora_up.weight", "lora_down.weight", "lora_mid.weight"},
        {"lora_up.weight", "lora_down.weight", "reshape_weight"},
        {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
        {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
        *(
            one | two
            for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
            for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
        ),
        {"a1.weight", "a2.weight", "b1.weight", "b2.weight"},
        {"oft_blocks"},
        {"oft_blocks", "rescale"},
    )
]
_DIFFERENCES = [frozenset(form) for form in ({"diff"}, {"set_weight"}, set())]


def flat(name: str) -> str:
    """Return a layer's name without wrapper parts, with underscores for dots, as kohya and LyCORIS spell all names."""
    for infix in INFIXES:
        name = name.replace(infix, "")
    return name.replace(".", "_")


def find_layer(name: str, layers: dict):
    """Look up a layer's name from a file, under any known prefix, in `layers` (by flat names); None if it is not
    there."""
    name, seen = flat(name), set()
    names = [name]
    while names:
        name = names.pop(0)
        if name in layers:
            return layers[name]
        for prefix in PREFIXES:
            if name.startswith(prefix) and (rest := name[len(prefix) :]) not in seen:
                seen.add(rest)
                names.append(rest)
    return None


def split_name(key: str) -> tuple[str, str] | None:
    """Split a tensor's name into its layer and its kind in the host's spelling; None for an unknown kind."""
    for pattern, kind in _KINDS:
        if match := pattern.search(key):
            return key[: match.start()], kind
    match = _OTHER_KINDS.search(key)
    return match and (key[: match.start()], match.group(1))


def unknown_kind(key: str, layers: dict) -> bool:
    """Return whether a tensor of unknown kind belongs to a layer of the model, so that ignoring it would lose
    something."""
    while "." in key:
        key = key.rpartition(".")[0]
        if find_layer(key, layers) is not None:
            return True
    return False


def layers_of(lora: dict[str, Tensor], layers: dict) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Group a file's tensors by layer and kind, for the layers in `layers`; also returns the names of all other
    tensors.

    layers: by flat names. Raises Step1XError for tensors of the model's layers that could only be ignored: those of an
    unknown kind, and duplicates.
    """
    out, unknown, targets = {}, [], {}
    for key, tensor in lora.items():
        split = split_name(key)
        target = find_layer(split[0], layers) if split else None
        if target is None:
            if split is None and unknown_kind(key, layers):
                raise Step1XError(
                    f"This LoRA contains the tensor {key}, whose kind is unknown. Without it the LoRA would be applied "
                    "wrongly. Export the LoRA in the layout of kohya, PEFT or LyCORIS, or choose another file."
                )
            unknown.append(key)
            continue
        layer, kind = split
        tensors = out.setdefault(layer, {})
        if kind in tensors or targets.setdefault(target, layer) != layer:
            raise Step1XError(
                f"This LoRA contains more than one change of the same layer ({key} and another under a similar name), "
                "as files with several adapters do. Export a single adapter, or choose another file."
            )
        tensors[kind] = tensor
    return out, unknown


def check_complete(layer: str, tensors: dict[str, Tensor]) -> None:
    """Raise Step1XError unless a layer's tensors form one complete change; the host would apply part of them, or
    none."""
    kinds = frozenset(tensors)
    adapter = kinds - {"alpha", "dora_scale", "lora_bias", "diff_b"}
    complete = (
        adapter in _FORMS
        or adapter in _DIFFERENCES
        and kinds & {"diff", "set_weight", "diff_b"}
        and not kinds & {"dora_scale", "lora_bias"}
    )
    if not complete or {"diff_b", "lora_bias"} <= kinds or "lora_bias" in kinds and "lora_down.weight" not in kinds:
        raise Step1XError(
            f"This LoRA is incomplete or in an unknown layout: for {layer} it contains only "
            f"{', '.join(sorted(kinds))}. Choose another file."
        )


def summary(names: list[str], shown: int = 4) -> str:
    """List the first names, and say how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
