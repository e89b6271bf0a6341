"""What stands in front of tensor names, by the program that wrote the file: one table and one function for each of the
two models.

A prefix that is not in the tables is not guessed: the file is then not known for one of the models.
"""

import re
from collections.abc import Iterable

from ..errors import Step1XError
from .detection import CONNECTOR_KEY

# In front of a transformer's names, one behind the other in any order: ComfyUI ("model.diffusion_model.",
# "diffusion_model."), diffusers, DiffSynth ("dit.", "pipe."), trainers ("net.", "inner_model.", "unet."), PEFT
# ("base_model.model."), and torch's own wrappers ("module." of DDP).
TRANSFORMER_PREFIXES = (
    "model",
    "diffusion_model",
    "transformer",
    "dit",
    "pipe",
    "net",
    "inner_model",
    "unet",
    "base_model",
    "module",
)
# torch.compile puts this in front of the names of whatever it compiled, single blocks included.
COMPILED = "_orig_mod."

# Around a language model of any layout.
LANGUAGE_WRAPPERS = (
    "text_encoders.qwen25_7b.transformer.",
    "qwen25_7b.transformer.",
    "base_model.model.",
    "text_encoder.",
    "module.",
    "transformer.",
)
# Where the layouts keep language model, vision tower and head, and where they are here; the first that fits.
LANGUAGE_PARTS = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "model.lm_head."),
    ("language_model.", "model."),
    ("model.visual.", "visual."),
    ("lm_head.", "model.lm_head."),
)

_TRANSFORMER = re.compile(rf"(?:(?:{'|'.join(TRANSFORMER_PREFIXES)})\.)*")


def is_transformer_prefix(prefix: str) -> bool:
    """Return whether this prefix, with its trailing dot, may precede a transformer's tensor names."""
    return _TRANSFORMER.fullmatch(prefix.replace(COMPILED, "")) is not None


def transformer_names(name: str, keys: Iterable[str], anchors: Iterable[str] = (CONNECTOR_KEY,)) -> dict[str, str]:
    """Map the names of the transformer's tensors in a file to the names without prefix; {} if there is no transformer.

    anchors: names of which a transformer has at least one. If the transformer has a prefix, tensors with another one,
    such as a checkpoint's VAE, are dropped.

    Raises Step1XError for a file with two transformers, because the right one cannot be determined.
    """
    plain = {key: key.replace(COMPILED, "") for key in keys}
    found = {short[:-len(anchor)] for short in plain.values() for anchor in anchors if short.endswith(anchor)}
    prefixes = sorted(prefix for prefix in found if is_transformer_prefix(prefix))
    if len(prefixes) > 1:
        raise Step1XError(
            f"{name} contains {len(prefixes)} transformers, under {' and '.join(repr(prefix) for prefix in prefixes)}; "
            "expected one. Choose another file."
        )
    return (
        {key: short[len(prefixes[0]) :] for key, short in plain.items() if short.startswith(prefixes[0])}
        if prefixes
        else {}
    )


def transformer_prefix(name: str, keys: Iterable[str]) -> str:
    """Return what precedes the names of a file's transformer, "" if nothing does or there is none. Raises Step1XError
    as `transformer_names` does."""
    renamed = transformer_names(name, keys)
    return next((key.replace(COMPILED, "")[: -len(short)] for key, short in renamed.items()), "")


def language_name(key: str) -> str:
    """Normalise a tensor's name in any known layout of Qwen2.5-VL to `model.*`, `visual.*` or, for the head,
    `model.lm_head.*`.

    Other names are returned unchanged.
    """
    name = key.replace(COMPILED, "")
    while (wrapper := next((wrapper for wrapper in LANGUAGE_WRAPPERS if name.startswith(wrapper)), None)) is not None:
        name = name[len(wrapper):]
    for theirs, ours in LANGUAGE_PARTS:
        if name.startswith(theirs):
            return ours + name[len(theirs):]
    return name
