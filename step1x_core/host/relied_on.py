"""What this pack relies on in ComfyUI's own classes and functions, checked once before the first model is loaded.

ComfyUI changes every week. Where one of these has changed, the log names it, and the plain path is taken: ComfyUI's own
blocks or attention instead of ours. What has no plain path is refused with a sentence, since it would give a wrong
image or fail in the middle of a run.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import NamedTuple

import comfy.ops
import torch
from comfy.ldm.flux import layers
from comfy.ldm.flux import model as flux
from comfy.ldm.modules import attention
from comfy.text_encoders import llama

from ..errors import Step1XError

log = logging.getLogger(__name__)

# The parts of this pack that lean on the host. The first two have a plain path.
BLOCKS, ATTENTION, TRANSFORMER, TEXT_ENCODER = "faster blocks", "attention override", "transformer", "text encoder"
PLAIN_PATH = (BLOCKS, ATTENTION)


class Function(NamedTuple):
    """A host function and the parameters that this pack gives it by name or overrides. whole: it takes no others, since
    an override would not know them."""

    part: str
    owner: object
    name: str
    parameters: tuple[str, ...]
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"

    def intact(self) -> bool:
        found = list(inspect.signature(getattr(self.owner, self.name)).parameters)
        expected = list(self.parameters)
        return found == expected if self.whole else [name for name in found if name in expected] == expected


class Behaviour(NamedTuple):
    """Something that a small run shows. check: whether it is as this pack relies on."""

    part: str
    name: str
    check: Callable[[], bool]

    def __str__(self) -> str:
        return self.name

    def intact(self) -> bool:
        return self.check()


def override_is_asked() -> bool:
    """Whether attention gives q, k, v, heads and the mask to transformer_options' override and returns its result."""
    x, answer, seen = torch.zeros(1, 2, 4, 8), torch.ones(1, 4, 16), []

    def override(function, *args, **kwargs):
        seen.append((args, kwargs))
        return answer

    out = attention.optimized_attention(
        x, x, x, 2, mask=None, skip_reshape=True, transformer_options={"optimized_attention_override": override}
    )
    ((args, kwargs),) = seen
    return (
        out is answer
        and len(args) == 4
        and args[0] is x
        and args[3] == 2
        and kwargs["skip_reshape"] is True
        and "transformer_options" in kwargs
    )


@torch.inference_mode()
def blocks_agree() -> bool:
    """Whether our blocks compute what the host's compute, on small random weights."""
    from .network.blocks import FusedDoubleStreamBlock, FusedSingleStreamBlock

    def torch_attention(function, *args, **kwargs):
        return attention.attention_pytorch(*args, **kwargs)  # the chosen one may not take these tensors

    random = torch.Generator().manual_seed(0)
    options = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    double = FusedDoubleStreamBlock(32, 2, mlp_ratio=2.0, qkv_bias=True, **options)
    single = FusedSingleStreamBlock(32, 2, mlp_ratio=2.0, **options)
    for block, kind, settings in (
        (double, layers.DoubleStreamBlock, {"qkv_bias": True}),
        (single, layers.SingleStreamBlock, {}),
    ):
        # Names and shapes of plain torch layers: with dynamic VRAM the host's have no weights before they are loaded.
        names = kind(
            32, 2, mlp_ratio=2.0, dtype=torch.float32, device="meta", operations=torch.nn, **settings
        ).state_dict()
        block.load_state_dict(
            {name: torch.randn(tensor.shape, generator=random) * 0.2 for name, tensor in names.items()}
        )
    txt, img, vec = (torch.randn(shape, generator=random) for shape in ((1, 3, 32), (1, 5, 32), (1, 32)))
    pe = flux.EmbedND(dim=16, theta=10000, axes_dim=[4, 6, 6])(torch.arange(24.0).view(1, 8, 3))
    call = {"block_index": 0, "total_blocks": 2, "img_slice": [3, 8], "optimized_attention_override": torch_attention}

    def run(double_forward, single_forward):
        out_img, out_txt = double_forward(
            double, img=img.clone(), txt=txt.clone(), vec=vec, pe=pe, attn_mask=None, transformer_options=call.copy()
        )
        x = torch.cat((out_txt, out_img), 1)
        return single_forward(single, x.clone(), vec=vec, pe=pe, attn_mask=None, transformer_options=call.copy())

    ours = run(FusedDoubleStreamBlock.forward, FusedSingleStreamBlock.forward)
    theirs = run(layers.DoubleStreamBlock.forward, layers.SingleStreamBlock.forward)
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


RELIED_ON = (
    Function(
        BLOCKS,
        layers.DoubleStreamBlock,
        "forward",
        (
            "self",
            "img",
            "txt",
            "vec",
            "pe",
            "attn_mask",
            "modulation_dims_img",
            "modulation_dims_txt",
            "transformer_options",
        ),
        whole=True,
    ),
    Function(
        BLOCKS,
        layers.SingleStreamBlock,
        "forward",
        ("self", "x", "vec", "pe", "attn_mask", "modulation_dims", "transformer_options"),
        whole=True,
    ),
    Function(
        BLOCKS,
        comfy.ops,
        "cast_bias_weight",
        ("s", "input", "dtype", "device", "bias_dtype", "offloadable", "compute_dtype", "want_requant"),
    ),
    Function(BLOCKS, comfy.ops, "uncast_bias_weight", ("s", "weight", "bias", "offload_stream")),
    Behaviour(BLOCKS, "the arithmetic of FLUX's blocks", blocks_agree),
    Behaviour(ATTENTION, "optimized_attention_override", override_is_asked),
    Function(
        TRANSFORMER,
        flux.Flux,
        "forward_orig",
        ("self", "img", "img_ids", "txt", "txt_ids", "timesteps", "y", "control", "transformer_options"),
    ),
    Function(
        TRANSFORMER, flux.Flux, "process_img", ("self", "x", "index", "h_offset", "w_offset", "transformer_options")
    ),
    Function(
        TEXT_ENCODER, llama.Llama2_, "forward", ("self", "x", "attention_mask", "embeds", "dtype", "position_ids")
    ),
    Function(
        TEXT_ENCODER,
        llama.TransformerBlock,
        "forward",
        ("self", "x", "attention_mask", "freqs_cis", "optimized_attention", "past_key_value"),
    ),
    Function(
        TEXT_ENCODER,
        llama,
        "precompute_freqs_cis",
        ("head_dim", "position_ids", "theta", "rope_scale", "rope_dims", "device"),
    ),
    Function(TEXT_ENCODER, llama, "apply_rope", ("xq", "xk", "freqs_cis")),
)


@functools.cache
def changed() -> dict[str, list[str]]:
    """What has changed in this ComfyUI, by the part of this pack that leans on it; logged once."""
    out = {}
    for entry in RELIED_ON:
        try:
            intact = entry.intact()
        except Exception:  # whatever a changed host raises in there
            log.debug("Step1X-Edit: %s", entry, exc_info=True)
            intact = False
        if not intact:
            out.setdefault(entry.part, []).append(str(entry))
    for part in PLAIN_PATH:
        if part in out:
            log.warning(
                "This ComfyUI is newer than this Step1X-Edit pack knows: %s changed. ComfyUI's own code runs in place "
                "of the pack's %s: the images are right, "
                "but sampling is slower. Update the pack.",
                ", ".join(out[part]),
                part,
            )
    return out


def intact(part: str) -> bool:
    """Whether everything that a part of this pack leans on is as it was."""
    return part not in changed()


def check_intact(part: str) -> None:
    """Raise Step1XError where something has changed that a part without a plain path leans on."""
    if not intact(part):
        raise Step1XError(
            f"This ComfyUI is newer than this Step1X-Edit pack knows: {', '.join(changed()[part])} changed, which the {part} needs. "
            "Update the Step1X-Edit pack, or use the ComfyUI version that its README names as tested."
        )
