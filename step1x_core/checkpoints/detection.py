"""Reads the configuration off a checkpoint: which model, which version, which sizes."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from ..errors import Step1XError
from ..versions import FINE_TUNES, HEAD_DIM, LAYOUT_V11, LAYOUT_V12, VERSIONS, PromptLayout
from .files import Checkpoint
from .formats import is_packed

# Name under which a configuration is stored: a safetensors metadata key in small checkpoints, and the uint8 JSON tensor
# that carries it through the host's loader (like the host's `comfy_quant`).
CONFIG_KEY = "step1x_edit_config"

CONNECTOR_KEY = "connector.S.input_embedder.weight"
# Only in v1.0.
SCALE_FACTOR_KEY = "connector.scale_factor"
# Only in v1.2; the preview may lack it (docs/model.md, Telling versions apart).
TEXT_MAPPING_KEY = "text_token_mapping.weight"


@dataclass
class Step1XConfig:
    """Hyper-parameters of one checkpoint. `in_channels` and `out_channels` count latent channels (16 in every published
    model)."""

    version: str
    in_channels: int
    out_channels: int
    hidden_size: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    mlp_ratio: float
    axes_dim: list[int]
    theta: int
    context_in_dim: int
    vec_in_dim: int
    connector_in_channels: int
    connector_hidden_size: int
    connector_heads: int
    connector_depth: int
    scale_factor: bool
    text_token_mapping: bool

    def flux_params(self) -> dict:
        """Return the keyword arguments of the host's Flux class."""
        names = ("in_channels", "out_channels", "hidden_size", "num_heads", "depth", "depth_single_blocks",
                 "mlp_ratio", "axes_dim", "theta", "context_in_dim", "vec_in_dim")
        values = asdict(self)
        return {
            **{name: values[name] for name in names},
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": False,
            "txt_ids_dims": [],
        }

    def connector_params(self) -> dict:
        return {
            "in_channels": self.connector_in_channels,
            "hidden_size": self.connector_hidden_size,
            "num_heads": self.connector_heads,
            "depth": self.connector_depth,
            "vec_in_dim": self.vec_in_dim,
            "scale_factor": self.scale_factor,
        }

    def transformer_params(self) -> dict:
        """Return the keyword arguments of this pack's transformer."""
        return {
            "version": self.version,
            "connector": self.connector_params(),
            "text_token_mapping": self.text_token_mapping,
            **self.flux_params(),
        }


def default_axes_dim(head_dim: int) -> list[int]:
    """Return the rope axes: (16, 56, 56) at head width 128 as in the published models, scaled for other widths."""
    time = head_dim // 8
    return [time, (head_dim - time) // 2, (head_dim - time) // 2]


def config_tensor(values: dict) -> torch.Tensor:
    """Encode a configuration as the uint8 tensor stored under CONFIG_KEY in a state dict."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def parse_config(text: str | bytes) -> dict:
    """Parse a stored configuration. Raises Step1XError unless it is a JSON object."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Step1XError(
            f"The model configuration stored in the file ({CONFIG_KEY}) is damaged. Download the file again."
        )
    return values


def stored_config(state_dict, prefix: str = "") -> dict:
    """Return the configuration stored in a state dict under CONFIG_KEY, or {}. Raises Step1XError if it is damaged."""
    key = prefix + CONFIG_KEY
    # GGUF converters turn it into float16.
    return parse_config(bytes(state_dict[key].flatten().to(torch.uint8).tolist())) if key in state_dict else {}


def check_overrides(config: "Step1XConfig", head_dim: int, names: Iterable[str]) -> None:
    """Raise Step1XError for a stored value that no network can be built with; the host would fail on it in the middle
    of a run."""
    axes, heads, theta = config.axes_dim, config.connector_heads, config.theta
    fits = {
        "axes_dim": isinstance(axes, list)
        and len(axes) == 3
        and all(isinstance(n, int) and n > 0 and n % 2 == 0 for n in axes)
        and sum(axes) == head_dim,
        "connector_heads": isinstance(heads, int) and heads > 0 and config.connector_hidden_size % heads == 0,
        "theta": isinstance(theta, (int, float)) and 0 < theta < math.inf,
    }
    for name in fits.keys() & names:
        if not fits[name]:
            raise Step1XError(
                f"The configuration stored with the weights has {name} = {getattr(config, name)!r}, which does not "
                "match them. Download the file, or the config.json of its folder, again."
            )


def detect_config(state_dict, prefix: str = "") -> Step1XConfig:
    """Detect the configuration of a state dict in the original key layout (docs/model.md, Key names).

    Sizes are derived from shapes. What shapes do not show (rope axes, connector heads, a version override) is read from
    the optional `step1x_edit_config` entry, otherwise taken from the published models.

    Without an override the version is a guess: v1.1 and a v1.2-preview without mapping have the same tensor names.

    Raises Step1XError for an unknown version, for one that the weights contradict, and for a stored value that does not
    match them.
    """
    def rows(key):
        return state_dict[prefix + key].shape[0]

    def columns(key):
        weight = state_dict[prefix + key]
        return weight.shape[1] * (2 if is_packed(prefix + key, weight, state_dict) else 1)

    def count(block):
        return len({k[len(prefix) + len(block):].split(".")[0] for k in state_dict if k.startswith(prefix + block)})

    overrides = stored_config(state_dict, prefix)
    norm = "double_blocks.0.img_attn.norm.key_norm."
    head_dim = rows(norm + ("scale" if prefix + norm + "scale" in state_dict else "weight"))
    hidden = rows("img_in.weight")
    connector_hidden = rows(CONNECTOR_KEY)
    scale_factor = prefix + SCALE_FACTOR_KEY in state_dict
    mapping = prefix + TEXT_MAPPING_KEY in state_dict

    config = Step1XConfig(
        version="v1.0" if scale_factor else "v1.2" if mapping else "v1.1",
        in_channels=columns("img_in.weight") // 4,
        out_channels=rows("final_layer.linear.weight") // 4,
        hidden_size=hidden,
        num_heads=hidden // head_dim,
        depth=count("double_blocks."),
        depth_single_blocks=count("single_blocks."),
        mlp_ratio=rows("double_blocks.0.img_mlp.0.weight") / hidden,
        axes_dim=default_axes_dim(head_dim),
        theta=10000,
        context_in_dim=connector_hidden,
        vec_in_dim=rows("connector.global_proj_out.weight"),
        connector_in_channels=columns(CONNECTOR_KEY),
        connector_hidden_size=connector_hidden,
        connector_heads=max(1, connector_hidden // HEAD_DIM),
        connector_depth=count("connector.S.individual_token_refiner.blocks."),
        scale_factor=scale_factor,
        text_token_mapping=mapping,
    )
    for name in ("version", "axes_dim", "theta", "connector_heads"):
        if name in overrides:
            setattr(config, name, overrides[name])
    check_overrides(config, head_dim, overrides)
    if not isinstance(config.version, str) or config.version not in VERSIONS:
        raise Step1XError(
            f"Version '{config.version}' of Step1X-Edit is unknown. Choose one of: {', '.join(VERSIONS)}."
        )
    for key, found, layout, owner in (
        (SCALE_FACTOR_KEY, scale_factor, LAYOUT_V11, "v1.0"),
        (TEXT_MAPPING_KEY, mapping, LAYOUT_V12, "v1.2"),
    ):
        if found and VERSIONS[config.version].layout is not layout:
            raise Step1XError(
                f"The version is set to {config.version}, but the weights contain {key}, which only {owner} has. Set "
                f"the version to auto or to {owner}."
            )
    return config


# The class names of diffusers repositories and the prompt layout of their versions
# (docs/model.md, Telling versions apart).
PIPELINE_LAYOUTS = {
    "Step1XEditPipeline": LAYOUT_V11,
    "Step1XEditPipelineV1P2": LAYOUT_V12,
    "RealRestorerPipeline": LAYOUT_V11,
}
# The prefix of RealRestorer's published weights. Trainers use it, too, so it decides only where no name does.
FINE_TUNE_PREFIXES = {"inner_model.": "RealRestorer"}
# How file and folder names spell a version. Without a v only "1.1" and "1p1" count, and not within a longer number:
# "1-1" and "1_1" may be anything.
NAMED_LAYOUTS = {
    layout: re.compile(rf"v1[.p_-]?{minor}(?!\d)|(?<![\d.])1[.p]{minor}(?!\d|[gm]?b\b){more}", re.IGNORECASE)
    for layout, minor, more in ((LAYOUT_V12, 2, "|preview|reasonedit"), (LAYOUT_V11, 1, ""))
}


def pipeline_layout(checkpoint: Checkpoint) -> PromptLayout | None:
    """Return the prompt layout of a diffusers repository by its pipeline class, or None without one.

    Raises Step1XError for the class of another model.
    """
    if checkpoint.pipeline is None:
        return None
    if not isinstance(checkpoint.pipeline, str) or checkpoint.pipeline not in PIPELINE_LAYOUTS:
        raise Step1XError(
            f"{checkpoint.path} belongs to the pipeline {checkpoint.pipeline}, which this node pack does not support. "
            f"Choose a model of one of these pipelines: {', '.join(PIPELINE_LAYOUTS)}."
        )
    return PIPELINE_LAYOUTS[checkpoint.pipeline]


def named_layout(names) -> PromptLayout | None:
    """Return the prompt layout of the first name that contains a version, or None if there is none or it contains
    several."""
    found = ([layout for layout, pattern in NAMED_LAYOUTS.items() if pattern.search(name)] for name in names)
    layouts = next(filter(None, found), [])
    return layouts[0] if len(layouts) == 1 else None


def fine_tune(names) -> str | None:
    """Return the fine-tune that one of these names contains, as in VERSIONS, or None."""
    plain = [re.sub(r"[^a-z0-9]", "", str(name).lower()) for name in names]
    return next((version for word, version in FINE_TUNES.items() if any(word in name for name in plain)), None)


def choose_version(checkpoint: Checkpoint, state_dict, prefix: str = "") -> str:
    """Detect the version of a checkpoint: by its tensors if they identify it, else by the pipeline class, the file
    name, the folder name, and the prefix of the tensor names.

    prefix: what stood in front of the tensor names in the file.

    Raises Step1XError if nothing distinguishes v1.1 from a v1.2-preview without text-token mapping, and if pipeline
    class and tensors contradict each other.
    """
    layout = pipeline_layout(checkpoint)
    names = checkpoint.path.parts[:-3:-1]
    if SCALE_FACTOR_KEY in state_dict:
        if layout is not None:
            raise Step1XError(
                f"{checkpoint.path} is inconsistent: the pipeline {checkpoint.pipeline} is not v1.0, but the weights "
                f"contain {SCALE_FACTOR_KEY}, which only v1.0 has. Choose the version in the loader, or download the "
                "folder again."
            )
        return "v1.0"
    if TEXT_MAPPING_KEY in state_dict:
        if layout is LAYOUT_V11:
            raise Step1XError(
                f"{checkpoint.path} is inconsistent: the pipeline {checkpoint.pipeline} is v1.1, but the weights "
                f"contain {TEXT_MAPPING_KEY}, which only v1.2 has. Choose the version in the loader, or download the "
                "folder again."
            )
        return "v1.2-preview" if any("preview" in name.lower() for name in names) else "v1.2"
    tuned = fine_tune((checkpoint.pipeline, *names))
    if tuned is not None:
        return tuned
    layout = layout or named_layout(names)
    if layout is not None:
        return "v1.2-preview" if layout is LAYOUT_V12 else "v1.1"
    if prefix in FINE_TUNE_PREFIXES:
        return FINE_TUNE_PREFIXES[prefix]
    raise Step1XError(
        f"{checkpoint.path.name} is Step1X-Edit v1.1 or v1.2-preview, or a fine-tune of v1.1: their tensors have the "
        "same names and shapes, and neither the file name nor a model_index.json identifies the version. Choose the version in 'Load "
        "Step1X-Edit Model' instead of auto."
    )
