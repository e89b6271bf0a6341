"""Detects other packs' functions in place of the transformer's own."""

from types import MethodType

from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock

from ...errors import Step1XError
from ...versions import VERSIONS
from .blocks import FusedDoubleStreamBlock, FusedSingleStreamBlock

# In transformer_options: what must be the only one to decide which blocks and tokens run, by the name of its node, and
# the foreign parts that it tolerates.
ALONE = "step1x_alone"


def foreign_parts(transformer) -> frozenset[str]:
    """Return the names of the transformer's parts that another pack has replaced. A block that is only compiled counts
    as the transformer's own."""
    parts = {name for name in ("forward", "_forward", "forward_orig") if name in vars(transformer)}
    for name, depth, kind in (("double_blocks", transformer.params.depth, DoubleStreamBlock),
                              ("single_blocks", transformer.params.depth_single_blocks, SingleStreamBlock)):
        blocks = [getattr(block, "_orig_mod", block) for block in getattr(transformer, name)]
        if (
            len(blocks) != depth
            or not all(isinstance(block, kind) for block in blocks)
            or any(bound_forward(block) for block in blocks)
        ):
            parts.add(name)
    return frozenset(parts)


def bound_forward(block) -> bool:
    """Return whether a method has replaced a block's own. Training wraps it in plain functions, which do not count."""
    return isinstance(vars(block).get("forward"), MethodType)


def stand_alone(model_options: dict, node: str, allowed: frozenset[str] = frozenset()) -> dict:
    """Return a copy of model_options that marks this node's patch as one that cannot share the blocks with another
    pack's."""
    options = model_options["transformer_options"]
    return model_options | {"transformer_options": options | {ALONE: options.get(ALONE, {}) | {node: allowed}}}


def check_alone(transformer, transformer_options: dict) -> None:
    """Raise Step1XError if another pack runs the blocks in a call in which one of our patches decides what they
    compute.

    Such packs replace the parts only during the model call, so this is checked inside the call.
    """
    for node, allowed in transformer_options.get(ALONE, {}).items():
        refuse_shared(node, foreign_parts(transformer) - allowed)


def refuse_shared(node: str, parts) -> None:
    """Raise Step1XError if there are any such parts."""
    if parts:
        raise Step1XError(
            f"'{node}' cannot be combined with another node pack that runs the transformer's blocks itself (it "
            f"replaces {', '.join(sorted(parts))}), such as another TeaCache or First Block Cache: both decide what a "
            "step computes. Remove one of the two."
        )


def runs_own_blocks(transformer) -> bool:
    """Return whether only our own code runs from the text tokens to the last block, uncompiled; only that handles the
    shortcuts in transformer_options."""
    blocks = (*transformer.double_blocks, *transformer.single_blocks)
    return "forward_orig" not in vars(transformer) and all(
        type(block) in (FusedDoubleStreamBlock, FusedSingleStreamBlock)
        and "forward" not in vars(block)
        and block._compiled_call_impl is None
        for block in blocks
    )


def check_own_forward(transformer) -> None:
    """Raise Step1XError if something else runs the blocks of a model whose text has positions.

    Such functions are written for FLUX, whose text is all at position 0, as in v1.0 and v1.1. raylight's, for example,
    rotates only the image's tokens, which would go unnoticed except in the image.
    """
    methods = any(bound_forward(block) for block in (*transformer.double_blocks, *transformer.single_blocks))
    if VERSIONS[transformer.version].layout.text_positions and (methods or "forward_orig" in vars(transformer)):
        raise Step1XError(
            f"Another node pack has replaced the forward pass of this Step1X-Edit {transformer.version} model with "
            "FLUX's, as raylight's sequence parallelism does. It would give the text wrong positions. Use v1.1 there, "
            "or 'MultiGPU CFG Split' to use two GPUs."
        )
