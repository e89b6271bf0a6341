"""Files that a loader is given, and what it must say to them."""

from pathlib import Path

import pytest
import torch
from bad_input_host import MEMORY_GROWTH, peak_memory
from node_inputs import file_input
from safetensors.torch import save_file

from step1x_core.checkpoints.detection import CONFIG_KEY

MODEL, LANGUAGE, VAE, LORA = "bad-v1p1.safetensors", "bad_mllm.safetensors", "bad_vae.safetensors", "bad_lora.safetensors"
DAMAGED = r"is damaged, incomplete or not a safetensors file .* Download it again"
INCOMPLETE = r"lacks .* download it again|lacks the tensor"
WRONG = "could not be loaded|does not fit the model: .* has shape"
NO_WEIGHTS = "which is not a weight dtype"
QKV = "double_blocks.0.img_attn.qkv.weight"
NAN = float("nan")
# For entries that hold JSON.
UNREADABLE = {"no_json": "{", "list": "[]", "null": "null", "empty": "", "nested": "[" * 100000}
# Of tensors that are no weights.
TYPES = {"int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "bool": torch.bool, "complex": torch.complex64}


def write(path: Path, content) -> None:
    """content: bytes, tensors, or (tensors, metadata)."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors, metadata = content if isinstance(content, tuple) else (content, None)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)


def check(host, memory, outcome, expected):
    """expected: a pattern or the host's refusal; None for a file that is fine."""
    if expected is None:
        outcome.made()
    else:
        host.refuses(outcome, expected)
    assert peak_memory() - memory < MEMORY_GROWTH


def load(host, node, name, **changes):
    """Run one of our loaders on a file, whatever the node calls its list of files."""
    return host.call(node, **{file_input(node): name, **changes})


def load_model(host, model=MODEL, **changes):
    return load(host, "Step1XEditLoader", model, **changes)


class Bomb:
    """What a malicious pickle does when it is opened."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def without(*names):
    return lambda w: {key: tensor for key, tensor in w.items() if not key.startswith(names)}


def changed(name, change):
    return lambda w: {**w, name: change(w[name])}


def configured(text):
    return lambda w: (w, {CONFIG_KEY: text})
