"""Converts checkpoints to the host's quantised formats, reading and writing one tensor at a time.

The formats are ComfyUI's own: beside a quantised `weight` are its scales and `comfy_quant`, a uint8 tensor of JSON that
names the format.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import Step1XError
from ..files import write_file
from ..rounding import multiple_up
from .detection import CONFIG_KEY, CONNECTOR_KEY
from .files import check_file, is_safetensors
from .formats import FORMATS, FP8, fits, marker
from .keys import diffusers_to_original, is_diffusers_layout
from .language_model import HEAD_KEY, TEXT_KEY, normalize_keys
from .plain_formats import chunks
from .prefixes import transformer_names, transformer_prefix
from .quantised import is_weight_scale

READABLE = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": FP8,
    "F8_E5M2": torch.float8_e5m2,
}
WRITTEN = {torch.float32: "F32", torch.bfloat16: "BF16", FP8: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8"}

# Tensor names that identify a file quantised with scales; plain fp8 files have none of them.
SCALES = ("comfy_quant", "weight_scale", "scale_weight", "scaled_fp8")

# The matrices applied to every token: nearly all of the computation.
MODEL_LAYERS = re.compile(
    r"(double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])\.weight"
)
# A third of the weights but almost no computation. They are applied to one vector per image, so their rounding error
# affects every token.
MODULATION_LAYERS = re.compile(r"(double_blocks\.\d+\.(img|txt)_mod|single_blocks\.\d+\.modulation)\.lin\.weight")
# The language model's vision tower, and its head, which only writing text needs.
VISION_LAYERS = re.compile(r"visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.\w+_proj)|merger\.mlp\.[02])\.weight")
LANGUAGE_HEAD = "lm_head.weight"
# Formats for layers whose sides do not suit the chosen one.
INSTEAD = {"w4a4": "int8_convrot", "mxfp8": "fp8"}
MLLM_LAYERS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


class Weights:
    """The tensors of safetensors files under the host's names, read one at a time.

    kind: "model" or "mllm". prefix: what precedes a transformer's names in the file. shapes: native names to empty
    tensors of that shape and dtype. metadata: of all files. stored: the CONFIG_KEY tensor, if any.

    Raises Step1XError for damaged files, other models and files that are quantised with scales.
    """

    def __init__(self, paths: list[Path]):
        self.metadata, self.files, empty = {}, {}, {}
        for path in paths:
            check_file(path)
            with safe_open(path, framework="pt") as file:
                self.metadata |= file.metadata() or {}
                for key in file.keys():
                    entry = file.get_slice(key)
                    self.files[key] = path
                    empty[key] = (entry.get_dtype(), entry.get_shape())
        name = paths[0].name
        self.prefix = transformer_prefix(name, empty)
        # This pack's tensor names to the names in the file.
        self.stored_names = {short: key for key, short in transformer_names(name, empty).items()} or {
            key: key for key in empty
        }
        self.stored_names |= {key: key for key in (CONFIG_KEY,) if key in empty}
        empty = {short: empty[key] for short, key in self.stored_names.items()}

        scales = [key for key in empty if key.split(".")[-1] in SCALES or is_weight_scale(key)]
        if scales or "_quantization_metadata" in self.metadata:
            raise Step1XError(f"{name} is already quantised with scales. Convert the bf16 file, or a plain fp8 file.")
        self.stored = {CONFIG_KEY: self._load(CONFIG_KEY)} if empty.pop(CONFIG_KEY, None) else {}
        for key, (dtype, _) in empty.items():
            if dtype not in READABLE:
                raise Step1XError(
                    f"{name} cannot be converted: {key} has dtype {dtype}. Convert a bf16 or plain fp8 file."
                )

        if CONNECTOR_KEY in empty:
            self.kind, self._native = "model", diffusers_to_original if is_diffusers_layout(empty) else dict
        elif TEXT_KEY in normalize_keys(empty):
            self.kind, self._native = "mllm", host_mllm_names
        else:
            raise Step1XError(
                f"{name} is neither a Step1X-Edit model ({CONNECTOR_KEY} is missing) nor a Qwen2.5-VL model "
                f"({TEXT_KEY} is missing). Choose another file or folder."
            )
        self.shapes = self._native(
            {key: torch.empty(shape, dtype=READABLE[dtype], device="meta") for key, (dtype, shape) in empty.items()}
        )
        # Indices in place of the tensors show what each native tensor is made of.
        keys = list(empty)
        numbers = self._native({key: torch.tensor([i, i]) for i, key in enumerate(keys)})
        self.sources = {target: [keys[i] for i in sorted(set(found.tolist()))] for target, found in numbers.items()}

    def _load(self, key: str) -> Tensor:
        # Opened again each time, because closing a file lets the system release the memory that was read.
        with safe_open(self.files[self.stored_names[key]], framework="pt") as file:
            return file.get_tensor(self.stored_names[key])

    def read(self, name: str) -> Tensor:
        """Read the tensor of a native name."""
        return self._native({key: self._load(key) for key in self.sources[name]})[name]


def host_mllm_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of any Hugging Face or ComfyUI file to ComfyUI's names."""
    head = HEAD_KEY.removesuffix(".weight")
    return {key.replace(head, "lm_head", 1): tensor for key, tensor in normalize_keys(state_dict).items()}


def converted(name: str, tensor: Tensor, form: str, full_precision: bool) -> dict[str, Tensor]:
    """Return a tensor and its scales as they are written. A tensor on the meta device gives empty ones, to measure
    their sizes.

    Raises Step1XError if a weight that needs a scale contains NaN or Inf values.
    """
    if FORMATS[form] is None:
        return {name: tensor.to(torch.bfloat16)}
    module = name.removesuffix("weight")
    out = {module + kind: value for kind, value in FORMATS[form].quantise(tensor).items()}
    if not tensor.is_meta and not all(tensor[rows].float().isfinite().all() for rows in chunks(tensor)):
        raise Step1XError(f"{name} contains NaN or Inf values. The file may be damaged; download it again.")
    return out | {module + "comfy_quant": marker(form, tensor.shape[1], full_precision)}


def plan(
    weights: Weights,
    form: str,
    keep: list[str],
    modulation: str | None,
    weights_only: bool,
    encoder_only: bool = False,
) -> dict[str, tuple[str, bool]]:
    """Return the format of each native tensor and whether it computes in full precision, in writing order: quantised
    ones first.

    form: a name in FORMATS for the large layers; the rest becomes bf16. keep: shell patterns of layers that also stay
    bf16. modulation: the format of the modulation layers, which compute in full precision, or None for bf16.
    weights_only: whether all of them compute in full precision. encoder_only: leave out the language model's head, and
    store its vision tower as fp8 that computes in full precision.

    Raises Step1XError for encoder_only with a transformer, and for weights_only with a format whose inputs ComfyUI always rounds.
    """
    if weights_only and form != "bf16" and FORMATS[form].rounds_inputs:
        raise Step1XError(
            f"ComfyUI always rounds the inputs of {form} layers, so --weights-only has no effect. Omit it, or choose "
            "fp8."
        )
    if encoder_only and weights.kind == "model":
        raise Step1XError("--encoder-only is for language models, but the input is a transformer. Omit it.")
    layers = MODEL_LAYERS if weights.kind == "model" else MLLM_LAYERS
    chosen, rest = {}, {}
    for name, tensor in weights.shapes.items():
        if encoder_only and name == LANGUAGE_HEAD:
            continue
        kept = form == "bf16" or any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in keep)
        if layers.fullmatch(name) and not kept and fitting(form, tensor):
            chosen[name] = (fitting(form, tensor), weights_only)
        elif modulation and MODULATION_LAYERS.fullmatch(name) and not kept and fits(modulation, tensor.shape):
            chosen[name] = (modulation, True)
        elif encoder_only and VISION_LAYERS.fullmatch(name) and not kept and fits("fp8", tensor.shape):
            chosen[name] = ("fp8", True)
        else:
            rest[name] = ("bf16", False)
    return chosen | rest


def fitting(form: str, tensor: Tensor) -> str | None:
    """Return the format for a layer of the chosen one: another if the tensor's sides do not suit it, None if no format
    does."""
    return next((one for one in (form, INSTEAD.get(form)) if one and fits(one, tensor.shape)), None)


def header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the header of a safetensors file with these tensors in this order."""
    entries, start = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": WRITTEN[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(multiple_up(len(text), 8))
    return len(text).to_bytes(8, "little") + text


def check_output(weights: Weights, out: Path, force: bool) -> None:
    """Raise Step1XError unless the output file can be written without overwriting something by accident."""
    if not is_safetensors(out):
        raise Step1XError(f"{out.name} does not end with .safetensors. Add that suffix to the output name.")
    if not out.parent.is_dir():
        raise Step1XError(f"The output folder {out.parent} does not exist. Create it, or choose another path.")
    if out.exists():
        if any(out.samefile(path) for path in weights.files.values()):
            raise Step1XError(f"{out} is the input file. Choose another name for the output.")
        if not force or not out.is_file():
            raise Step1XError(f"{out} already exists. Choose another name, or overwrite it with --force.")


def convert(
    weights: Weights,
    out: Path,
    form: str,
    extra: dict[str, Tensor],
    metadata: dict[str, str],
    keep=(),
    modulation: str | None = None,
    weights_only=False,
    encoder_only=False,
    force=False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write the converted file, and its SHA-256 to `OUT.sha256`; returns the SHA-256.

    extra: uint8 tensors to add to the file. form, keep, modulation, weights_only, encoder_only: as for `plan`. force: overwrite an
    existing file. progress: called with the number of bytes written and the total.

    Peak memory: the source tensors of one native tensor, that tensor, and its quantised form. The file gets its name
    only when it is complete.

    Raises Step1XError for a path that cannot be written, for a full disk, and as `plan` and `converted` do.
    """
    check_output(weights, out, force)
    formats = plan(weights, form, list(keep), modulation, weights_only, encoder_only)
    make = {name: partial(converted, name, form=one, full_precision=full) for name, (one, full) in formats.items()}
    laid_out = {key: tensor for name in make for key, tensor in make[name](weights.shapes[name]).items()} | extra
    head = header(laid_out, metadata)
    total = len(head) + sum(tensor.numel() * tensor.element_size() for tensor in laid_out.values())
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise Step1XError(
            f"{out.parent} has {free / 1e9:.1f} GB free, but the output needs {total / 1e9:.1f} GB. Free disk space, "
            "or choose another path."
        )

    partial_file, digest, done = out.with_name(out.name + ".part"), hashlib.sha256(), 0

    def write(data):
        nonlocal done
        file.write(data)
        digest.update(data)
        done += len(data)
        progress(done, total)

    try:
        with open(partial_file, "wb") as file:
            write(head)
            for name in make:
                for tensor in make[name](weights.read(name)).values():
                    write(raw(tensor))
            for tensor in extra.values():
                write(raw(tensor))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_file, out)
    finally:
        partial_file.unlink(missing_ok=True)
    write_file(out.with_name(out.name + ".sha256"), f"{digest.hexdigest()}  {out.name}\n".encode())
    return digest.hexdigest()


def raw(tensor: Tensor):
    """The bytes of a tensor, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
