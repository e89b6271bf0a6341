"""Other packs' functions in place of the transformer's own."""

from types import MethodType

from ..config import VERSIONS, Step1XError


def has_own_forward(transformer) -> bool:
    """Whether the transformer and its blocks run our functions, which know the shortcuts in transformer_options."""
    # Training puts plain functions around the blocks' own; only a bound method takes their place.
    return "forward_orig" not in vars(transformer) and not any(
        isinstance(vars(block).get("forward"), MethodType) for block in (*transformer.double_blocks, *transformer.single_blocks))


def check_own_forward(transformer) -> None:
    """Raise Step1XError where something else runs the blocks of a model whose text has positions.

    Such functions are written for FLUX, whose text is all at position 0, as it is in v1.0 and v1.1. raylight's, for one, rotates the picture's tokens only,
    which nobody would notice but by the picture.
    """
    if VERSIONS[transformer.version].layout == "v1.2" and not has_own_forward(transformer):
        raise Step1XError(f"Another node pack has replaced the forward pass of this Step1X-Edit {transformer.version} model by one for FLUX, as raylight's sequence "
                          "parallelism does, which would place the text wrongly. Use v1.1 there, or 'MultiGPU CFG Split' to use two graphics cards.")
