"""LoRAs under the names that other programs read: kohya's, diffusers' and PEFT's (docs/model.md, LoRA)."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import Step1XError
from ..files import unwritable, write_file, write_whole
from .keys import diffusers_modules, swap_halves
from .lora import diffsynth_names, official_alphas
from .lora_names import check_complete, find_layer, flat, layers_of, summary

KOHYA, DIFFUSERS, PEFT = "kohya", "diffusers", "PEFT"
LAYOUTS = (KOHYA, DIFFUSERS, PEFT)
_PREFIXES = {KOHYA: "lora_unet_", DIFFUSERS: "transformer.", PEFT: "base_model.model."}
# More blocks than any transformer has: the names of a file tell how many there are.
_BLOCKS = 64
_DOUBLE = ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
_SINGLE = ("linear1", "linear2", "modulation.lin")
_OUTSIDE = (
    "img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer",
    "final_layer.linear", "final_layer.adaLN_modulation.1", "text_token_mapping", "connector.global_proj_out",
    "connector.S.input_embedder", "connector.S.t_embedder.mlp.0", "connector.S.t_embedder.mlp.2",
    "connector.S.c_embedder.linear_1", "connector.S.c_embedder.linear_2",
)  # fmt: skip
_REFINER = ("self_attn_qkv", "self_attn_proj", "adaLN_modulation.1", "mlp.fc1", "mlp.fc2")
_FINAL_MODULATION = "final_layer.adaLN_modulation.1"
# Files of a PEFT folder, as peft itself names them.
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Change:
    """The change of a matrix: scale * up @ down. up [rows, rank], down [rank, columns], of any float dtype."""

    up: Tensor
    down: Tensor
    scale: float


def modules() -> list[str]:
    """The original names of all linear layers that a LoRA may change, for up to 64 blocks of each kind."""
    return [
        *(f"double_blocks.{i}.{stream}_{part}" for i in range(_BLOCKS) for stream in ("img", "txt") for part in _DOUBLE),
        *(f"single_blocks.{i}.{part}" for i in range(_BLOCKS) for part in _SINGLE),
        *(f"connector.S.individual_token_refiner.blocks.{i}.{part}" for i in range(8) for part in _REFINER),
        *_OUTSIDE,
    ]


def known_layers() -> dict[str, tuple[str, int | None]]:
    """Map flat names of layers, as files spell them, to the original module and the part of it; None is the whole."""
    layers = {}
    for module in modules():
        names = diffusers_modules(module)
        layers |= {flat(name): (module, part if len(names) > 1 else None) for part, name in enumerate(names)}
    layers |= {flat(theirs): (module, None) for theirs, module in diffsynth_names(_BLOCKS, _BLOCKS).items()}
    return layers | {flat(module): (module, None) for module in modules()}


def read_changes(lora: dict[str, Tensor]) -> dict[str, dict[int | None, Change]]:
    """Group a plain LoRA's tensors, in any known layout, as {original module: {part or None: its change}}.

    Raises Step1XError for other forms than plain LoRA, for tensors that belong to no layer, and for a file that changes
    a layer both in whole and in part.
    """
    layers = known_layers()
    found, unknown = layers_of(lora, layers)
    if unknown or not found:
        raise Step1XError(
            f"This LoRA has tensors for layers that Step1X-Edit does not have: {summary(unknown or list(lora))}. It may "
            "belong to another model, or use an unknown layout. Choose another file."
        )
    changes: dict[str, dict[int | None, Change]] = {}
    for layer, tensors in found.items():
        check_complete(layer, tensors)
        if set(tensors) - {"lora_up.weight", "lora_down.weight", "alpha"}:
            raise Step1XError(
                f"This LoRA is not a plain one: {layer} has {', '.join(sorted(tensors))}. Only LoRAs with an up and a "
                "down matrix for each layer can be written under other names."
            )
        module, part = find_layer(layer, layers)
        tensors = official_alphas({f"x.{kind}": tensor for kind, tensor in tensors.items()})
        up, down = tensors["x.lora_up.weight"], tensors["x.lora_down.weight"]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise Step1XError(
                f"This LoRA is damaged: the matrices of {layer} are {list(up.shape)} and {list(down.shape)}, which "
                "cannot be multiplied. Choose another file."
            )
        alpha = tensors.get("x.alpha")
        scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
        if module == _FINAL_MODULATION and "norm_out" in layer:
            up = swap_halves(up)
        changes.setdefault(module, {})[part] = Change(up, down, scale)
    for module, parts in changes.items():
        if None in parts and len(parts) > 1:
            raise Step1XError(f"This LoRA changes {module} both in whole and in part. Choose another file.")
    return changes


def part_rows(module: str, rows: int, columns: int) -> list[int]:
    """The rows of each part of a fused matrix [rows, columns], which is as wide as the hidden size."""
    if module.endswith("qkv"):
        return [rows // 3] * 3
    return [columns, columns, columns, rows - 3 * columns]


def split(module: str, change: Change) -> list[Change | None]:
    """Split the change of a fused matrix into its parts; None for a part that does not change.

    Ranks that a part does not use are left out: a file that was fused from parts gets its own ranks back.
    """
    out = []
    for up in change.up.split(part_rows(module, *change.up.shape[:1], change.down.shape[1])):
        used = up.any(0)
        out.append(Change(up[:, used], change.down[used], change.scale) if used.any() else None)
    return out


def fuse(module: str, parts: dict[int, Change]) -> Change:
    """Join the changes of parts into one of the fused matrix: their ranks side by side, each for its own rows."""
    columns = next(iter(parts.values())).down.shape[1]
    rows = [columns] * 3 if module.endswith("qkv") else [columns, columns, columns, 4 * columns]
    for part, change in parts.items():
        rows[part] = change.up.shape[0]
    down = torch.cat([change.down for _, change in sorted(parts.items())])
    up = down.new_zeros(sum(rows), len(down))
    rank = 0
    for part, change in sorted(parts.items()):
        start = sum(rows[:part])
        up[start : start + rows[part], rank : rank + len(change.down)] = change.up.float() * change.scale
        rank += len(change.down)
    return Change(up, down, 1.0)


def kohya(changes: dict[str, dict[int | None, Change]]) -> dict[str, Tensor]:
    """kohya's names: the original module with underscores, and an alpha."""
    out = {}
    for module, parts in changes.items():
        change = parts[None] if None in parts else fuse(module, parts)
        key = _PREFIXES[KOHYA] + flat(module)
        out |= {f"{key}.lora_up.weight": change.up, f"{key}.lora_down.weight": change.down}
        out[f"{key}.alpha"] = torch.tensor(float(change.scale * len(change.down)))
    return out


def with_lora_ab(changes: dict[str, dict[int | None, Change]], prefix: str) -> dict[str, Tensor]:
    """diffusers' names after a prefix, with lora_A and lora_B. The scale is multiplied into lora_B, so that every reader
    gets it: diffusers' files have no alpha."""
    out = {}
    for module, parts in changes.items():
        names = diffusers_modules(module)
        if len(names) > 1 and None in parts:
            parts = {part: change for part, change in enumerate(split(module, parts[None])) if change is not None}
        for part, change in parts.items():
            up = (change.up.float() * change.scale).to(change.up.dtype)
            key = prefix + names[part or 0]
            out[f"{key}.lora_B.weight"] = swap_halves(up) if module == _FINAL_MODULATION else up
            out[f"{key}.lora_A.weight"] = change.down
    return out


def exported(lora: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Return a plain LoRA's tensors under the names of `layout`, one of LAYOUTS. Raises Step1XError as `read_changes`
    does."""
    changes = read_changes(lora)
    out = kohya(changes) if layout == KOHYA else with_lora_ab(changes, _PREFIXES[layout])
    return {name: tensor.contiguous() for name, tensor in out.items()}


def peft_config(tensors: dict[str, Tensor]) -> dict:
    """The adapter_config.json of tensors in the PEFT layout. Layers of another rank than most are listed."""
    pattern = re.compile(rf"{re.escape(_PREFIXES[PEFT])}(.+)\.lora_A\.weight")
    ranks = {match[1]: len(tensor) for name, tensor in tensors.items() if (match := pattern.fullmatch(name))}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: number for name, number in ranks.items() if number != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        # The scale is in the weights.
        "lora_alpha": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "bias": "none",
        "inference_mode": True,
    }


def export_lora(lora: dict[str, Tensor], path: Path, layout: str, metadata: dict[str, str]) -> None:
    """Write a LoRA in one of LAYOUTS: a safetensors file, or for PEFT a folder with two files.

    metadata: of the source, which is kept.

    Raises Step1XError as `read_changes` does, and if the disk is full or write-protected.
    """
    tensors = exported(lora, layout)
    file = path / PEFT_WEIGHTS if layout == PEFT else path
    try:
        write_whole(file, lambda partial: save_file(tensors, partial, metadata | {"format": "pt"}))
    except (OSError, SafetensorError) as error:
        raise unwritable(file, error) from error
    if layout == PEFT:
        write_file(path / PEFT_CONFIG, json.dumps(peft_config(tensors), indent=2).encode())
