"""The language model's file: tensor names, and the configuration read off it."""

from dataclasses import dataclass, field

from torch import Tensor

from ..errors import Step1XError
from ..images import VISION_CELL
from ..versions import HEAD_DIM
from .prefixes import LANGUAGE_WRAPPERS, language_name

VISION_KEY = "visual.patch_embed.proj.weight"
TEXT_KEY = "model.layers.0.self_attn.q_proj.weight"
HEAD_KEY = "model.lm_head.weight"


@dataclass
class MLLMConfig:
    """Hyper-parameters of a Qwen2.5-VL checkpoint. Defaults are those of the 7B model, for what shapes do not show."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_depth: int
    vision_heads: int = 16
    vision_window_size: int = 112
    vision_full_attention: list[int] = field(default_factory=lambda: [7, 15, 23, 31])
    head_dim: int = HEAD_DIM
    rope_theta: float = 1e6
    mrope_section: list[int] = field(default_factory=lambda: [16, 24, 24])
    rms_norm_eps: float = 1e-6
    # Whether there is a language-model head. A model with tied embeddings generates from the embedding table instead.
    lm_head: bool = False
    tie_word_embeddings: bool = False


def normalize_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of any known file to `model.*` and `visual.*`, and the language-model head to
    `model.lm_head.*`.

    Of a full checkpoint, only the language model is kept.
    """
    own = {language_name(key): tensor for key, tensor in state_dict.items() if key.startswith(LANGUAGE_WRAPPERS[0])}
    return own if TEXT_KEY in own else {language_name(key): tensor for key, tensor in state_dict.items()}


def check_config(config: MLLMConfig) -> None:
    """Raise Step1XError for a value of `config.json` that no network can be built with; the host would fail on it in
    the middle of a run."""
    section, window, whole = config.mrope_section, config.vision_window_size, config.vision_full_attention
    fits = {
        "head_dim": config.head_dim > 0,
        "rope_theta": isinstance(config.rope_theta, (int, float)) and config.rope_theta > 0,
        "rms_norm_eps": isinstance(config.rms_norm_eps, (int, float)) and config.rms_norm_eps > 0,
        "mrope_section": isinstance(section, list)
        and len(section) == 3
        and all(isinstance(n, int) and n > 0 for n in section)
        and sum(section) * 2 == config.head_dim,
        "vision_heads": isinstance(config.vision_heads, int)
        and config.vision_heads > 0
        and config.vision_hidden_size % config.vision_heads == 0,
        "vision_window_size": isinstance(window, int) and window >= VISION_CELL,
        "vision_full_attention": isinstance(whole, list) and all(isinstance(n, int) for n in whole),
    }
    for name, fit in fits.items():
        if not fit:
            raise Step1XError(
                f"The configuration of the text encoder has {name} = {getattr(config, name)!r}, which does not match "
                "its weights. Download it again, with its config.json."
            )


def detect_mllm_config(state_dict, hf_config: dict) -> MLLMConfig:
    """Detect the configuration of a state dict with normalised keys.

    hf_config: the content of a Hugging Face `config.json`, or {} for a single file, whose sizes are derived from the
    shapes.

    Raises KeyError for a missing tensor, and Step1XError for a value that does not match the weights.
    """
    text = hf_config.get("text_config", hf_config)
    vision = hf_config.get("vision_config", {})
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    layer = "model.layers.0."
    hidden = state_dict["model.norm.weight"].shape[0]
    heads = text.get("num_attention_heads")
    head_dim = hidden // heads if heads else HEAD_DIM

    def rows(key):
        return state_dict[key].shape[0]

    def count(block):
        return len({k[len(block):].split(".")[0] for k in state_dict if k.startswith(block)})

    known = {
        "rope_theta": text.get("rope_theta", rope.get("rope_theta")),
        "mrope_section": rope.get("mrope_section"),
        "rms_norm_eps": text.get("rms_norm_eps"),
        "vision_heads": vision.get("num_heads"),
        "vision_window_size": vision.get("window_size"),
        "vision_full_attention": vision.get("fullatt_block_indexes"),
    }
    config = MLLMConfig(
        vocab_size=rows("model.embed_tokens.weight"),
        hidden_size=hidden,
        intermediate_size=rows(layer + "mlp.gate_proj.weight"),
        num_hidden_layers=count("model.layers."),
        num_attention_heads=rows(layer + "self_attn.q_proj.weight") // head_dim,
        num_key_value_heads=rows(layer + "self_attn.k_proj.weight") // head_dim,
        vision_hidden_size=rows(VISION_KEY),
        vision_intermediate_size=rows("visual.blocks.0.mlp.gate_proj.weight"),
        vision_depth=count("visual.blocks."),
        head_dim=head_dim,
        lm_head=HEAD_KEY in state_dict,
        tie_word_embeddings=bool(hf_config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        **{k: v for k, v in known.items() if v is not None},
    )
    check_config(config)
    return config
