"""GGUF files: their tensors unpacked, llama.cpp's names of Qwen2.5-VL, and the mmproj file that has its vision tower.

Only this file uses the package `gguf`. ComfyUI-GGUF keeps weights packed in memory; here the host's own layers get
them, so a GGUF file takes as much memory as a bf16 one.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Step1XError

GGUF_SUFFIX = ".gguf"
LANGUAGE_ARCHITECTURE = "qwen2vl"
MMPROJ = re.compile("mmproj|mm-proj", re.IGNORECASE)

# llama.cpp's names and those of Hugging Face: the language model, and the vision tower of the mmproj file.
_LANGUAGE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_VISION = {
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QKV = ("attn_q", "attn_k", "attn_v")
# The patch embedding looks at two frames, which llama.cpp stores as two tensors.
_FRAMES = ("v.patch_embd.weight", "v.patch_embd.weight.1")


def is_gguf(path: Path) -> bool:
    """Return whether this is the name of a GGUF file, ignoring case."""
    return path.suffix.lower() == GGUF_SUFFIX


def is_mmproj(name: str) -> bool:
    """Return whether this is the name of a file that has only a vision tower."""
    return is_gguf(Path(name)) and MMPROJ.search(Path(name).name) is not None


def package(name: str):
    """Import the package `gguf`. Raises Step1XError if it is not installed. name: the file that needs it."""
    try:
        import gguf
        import gguf.quants  # noqa: F401 (not imported by older releases themselves)
    except ImportError as error:
        raise Step1XError(
            f"{name} is a GGUF file, which needs the Python package 'gguf', and it cannot be imported ({error}). Run "
            "'python -m pip install gguf' with the Python that starts ComfyUI, or install the node pack ComfyUI-GGUF, "
            "which brings it; or choose a safetensors file."
        ) from error
    return gguf


def open_gguf(path: Path):
    """Return the reader of a GGUF file. Raises Step1XError for a damaged file, and without the package."""
    gguf = package(path.name)
    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError as error:
        raise Step1XError(
            f"{path} does not exist. Press R to refresh the node list, then choose the model again."
        ) from error
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise Step1XError(
            f"{path.name} is damaged, incomplete or not a GGUF file ({error}). Download it again and compare its size."
        ) from error


def unpacked(gguf, name: str, entry) -> Tensor:
    """Return one tensor of a file: float32 and float16 as they are, everything else in bfloat16. name: the file's."""
    kind, shape = entry.tensor_type, tuple(int(size) for size in reversed(entry.shape))
    types = gguf.GGMLQuantizationType
    if kind in (types.F32, types.F16):
        return torch.from_numpy(entry.data.copy()).reshape(shape)
    if kind == types.BF16:
        return torch.from_numpy(entry.data.copy()).view(torch.bfloat16).reshape(shape)
    try:
        values = gguf.quants.dequantize(entry.data, kind)
    except NotImplementedError as error:
        raise Step1XError(
            f"{name} has weights of the type {kind.name}, which the installed package 'gguf' cannot unpack. Update it, "
            "or choose another file, such as Q8_0 or Q4_K_M."
        ) from error
    return torch.from_numpy(values).reshape(shape).bfloat16()


def read_gguf(path: Path, check: Callable = lambda: None) -> tuple[dict[str, Tensor], str, dict]:
    """Read a GGUF file: its tensors by name, its architecture, and its other fields as numbers, texts and lists.

    check: called before each tensor; what it raises ends the reading. Raises Step1XError as `open_gguf` and `unpacked`
    do.
    """
    gguf = package(path.name)
    reader, tensors = open_gguf(path), {}
    for entry in reader.tensors:
        check()
        try:
            tensors[entry.name] = unpacked(gguf, path.name, entry)
        except (ValueError, RuntimeError) as error:
            raise Step1XError(
                f"{path.name} is damaged: {entry.name} cannot be unpacked ({error}). Download it again."
            ) from error
    # Of vocabularies nothing is needed: the host has the tokenizer.
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    return tensors, str(fields.get("general.architecture", "")), fields


def language_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename llama.cpp's tensors of a language model to Hugging Face's. Others keep their names."""
    out = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(weight|bias)", name)
        layer, module, kind = match.groups() if match else (None, name, "")
        if match and module in _LANGUAGE:
            name = f"{'' if layer is None else f'model.layers.{layer}.'}{_LANGUAGE[module]}.{kind}"
        out[name] = tensor
    return out


def vision_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join llama.cpp's tensors of a vision tower to Hugging Face's: q, k and v are one matrix there, and the
    frames of the patch embedding one kernel. Others keep their names."""
    out, rest = {}, dict(tensors)
    if all(name in rest for name in _FRAMES):
        out["visual.patch_embed.proj.weight"] = torch.stack([rest.pop(name) for name in _FRAMES], dim=2)
    for name in list(rest):
        match = re.fullmatch(r"v\.blk\.(\d+)\.attn_q\.(weight|bias)", name)
        parts = [name.replace("attn_q", part) for part in _QKV]
        if match and all(part in rest for part in parts):
            joined = torch.cat([rest.pop(part) for part in parts])
            out[f"visual.blocks.{match[1]}.attn.qkv.{match[2]}"] = joined
    for name, tensor in rest.items():
        match = re.fullmatch(r"(?:v\.blk\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if match and match[2] in _VISION:
            block = "" if match[1] is None else f"visual.blocks.{match[1]}."
            name = f"{block}{_VISION[match[2]]}.{match[3]}"
        out[name] = tensor
    return out


def language_config(fields: dict, vision: dict, depth: int) -> dict:
    """Return what shapes do not show as Hugging Face's config.json has it. fields, vision: those of the two files;
    depth: blocks of the vision tower."""
    prefix = f"{LANGUAGE_ARCHITECTURE}."
    sections = fields.get(f"{prefix}rope.dimension_sections")
    every = vision.get("clip.vision.n_wa_pattern")
    text = {
        "num_attention_heads": fields.get(f"{prefix}attention.head_count"),
        "rope_theta": fields.get(f"{prefix}rope.freq_base"),
        "rms_norm_eps": fields.get(f"{prefix}attention.layer_norm_rms_epsilon"),
        # llama.cpp has a fourth section, which is empty.
        "rope_scaling": {"mrope_section": list(sections[:3])} if sections else None,
    }
    tower = {
        "num_heads": vision.get("clip.vision.attention.head_count"),
        "fullatt_block_indexes": list(range(every - 1, depth, every)) if every else None,
    }
    return {name: value for name, value in text.items() if value is not None} | {
        "vision_config": {name: value for name, value in tower.items() if value is not None}
    }


def find_mmproj(path: Path) -> Path:
    """Return the mmproj file in the folder of a language model: the only one, or the one whose name has most in common
    with the model's.

    Raises Step1XError if there is none, or if several fit equally well.
    """
    found = sorted(file for file in path.parent.iterdir() if is_mmproj(file.name))
    if not found:
        raise Step1XError(
            f"{path.name} has no vision tower, which Step1X-Edit needs to read the image. Put the mmproj file of "
            f"Qwen2.5-VL-7B-Instruct (GGUF, with 'mmproj' in its name) into the same folder: {path.parent}"
        )

    def likeness(file: Path) -> int:
        plain = MMPROJ.sub("", file.stem).strip("-_.").lower()
        return len(os.path.commonprefix([plain, path.stem.lower()]))

    best = max(map(likeness, found))
    fits = [file for file in found if likeness(file) == best]
    # The same tower in several precisions.
    for precision in ("bf16", "f16", "f32"):
        exact = [file for file in fits if re.search(rf"(?<![a-z0-9]){precision}\b", file.stem.lower())]
        if len(exact) == 1:
            return exact[0]
    if len(fits) > 1:
        raise Step1XError(
            f"{path.parent} has several mmproj files that may belong to {path.name}: "
            f"{', '.join(file.name for file in fits)}. Leave one, or give it a name that begins like the model's."
        )
    return fits[0]


def read_language_model(path: Path, check: Callable = lambda: None) -> tuple[dict[str, Tensor], dict]:
    """Read Qwen2.5-VL from its GGUF file and the mmproj file beside it: tensors by Hugging Face's names, and what the
    files say as in config.json.

    check: as for `read_gguf`. Raises Step1XError as `read_gguf` and `find_mmproj` do, and for another model.
    """
    tower = find_mmproj(path)
    tensors, architecture, fields = read_gguf(path, check)
    if architecture != LANGUAGE_ARCHITECTURE:
        raise Step1XError(
            f"{path.name} is not a Qwen2.5-VL model: its architecture is '{architecture}', expected "
            f"'{LANGUAGE_ARCHITECTURE}'. Choose a GGUF file of Qwen2.5-VL-7B-Instruct."
        )
    vision, _, settings = read_gguf(tower, check)
    state_dict = language_names(tensors) | vision_names(vision)
    depth = len({name.split(".")[2] for name in state_dict if name.startswith("visual.blocks.")})
    merged = state_dict.get("visual.merger.mlp.2.weight")
    width = state_dict["model.norm.weight"].shape[0] if "model.norm.weight" in state_dict else None
    if merged is not None and width is not None and len(merged) != width:
        raise Step1XError(
            f"{tower.name} does not belong to {path.name}: its tower gives {len(merged)} numbers, expected {width}. "
            "Download the mmproj file of the same model."
        )
    return state_dict, language_config(fields, settings, depth)
