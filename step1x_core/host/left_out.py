"""A negative conditioning that was not encoded, because nothing was expected to read it.

It is an ordinary conditioning for every node, with the positive's tensors; a pass of the model over it is refused.
"""

import comfy.conds

from ..errors import Step1XError

# Entry of a conditioning's dict.
LEFT_OUT = "step1x_left_out"


class CONDLeftOut(comfy.conds.CONDConstant):
    """Refuses to be part of a pass. The host prepares the conditionings of all prompts, but processes only those that
    it runs: at CFG 1, the negative one is not among them."""

    def __init__(self):
        super().__init__(True)

    def process_cond(self, *args, **kwargs):
        raise Step1XError(
            "The negative prompt was not encoded, because the model samples at CFG 1 by default, but this sampling "
            "reads it. Set cfg to 0 or 1 and remove nodes that need the negative prompt, or disconnect 'model' from "
            "'Step1X-Edit Encode'."
        )


def is_left_out(conditioning: list) -> bool:
    """Return whether no part of this conditioning was encoded."""
    return all(entry[1].get(LEFT_OUT) for entry in conditioning)


def left_out(positive: list) -> list:
    """Return the replacement of the negative conditioning that belongs to this positive one."""
    return [[cond, {**extra, LEFT_OUT: True}] for cond, extra in positive]
