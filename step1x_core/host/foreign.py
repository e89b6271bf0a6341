"""Other packs' functions in place of the transformer's own."""

from types import MethodType

from ..config import VERSIONS, Step1XError
from .blocks import FusedDoubleStreamBlock, FusedSingleStreamBlock


def runs_own_blocks(transformer) -> bool:
    """Whether nothing but our own code runs from the text tokens to the last block, uncompiled: only that knows the shortcuts in transformer_options."""
    blocks = (*transformer.double_blocks, *transformer.single_blocks)
    return "forward_orig" not in vars(transformer) and all(
        type(block) in (FusedDoubleStreamBlock, FusedSingleStreamBlock) and "forward" not in vars(block) and block._compiled_call_impl is None for block in blocks)


def check_own_forward(transformer) -> None:
    """Raise Step1XError where something else runs the blocks of a model whose text has positions.

    Such functions are written for FLUX, whose text is all at position 0, as it is in v1.0 and v1.1. raylight's, for one, rotates the picture's tokens only,
    which nobody would notice but by the picture.
    """
    # Training puts plain functions around the blocks' own; only a bound method takes their place.
    methods = any(isinstance(vars(block).get("forward"), MethodType) for block in (*transformer.double_blocks, *transformer.single_blocks))
    if VERSIONS[transformer.version].layout == "v1.2" and (methods or "forward_orig" in vars(transformer)):
        raise Step1XError(f"Another node pack has replaced the forward pass of this Step1X-Edit {transformer.version} model by one for FLUX, as raylight's sequence "
                          "parallelism does, which would place the text wrongly. Use v1.1 there, or 'MultiGPU CFG Split' to use two graphics cards.")
