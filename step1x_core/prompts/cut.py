"""What of a prompt reaches the transformer: the 217 rule of v1.0 and v1.1, the window of v1.2, and the warning when the
end of a long prompt is cut off."""

import functools
import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Text conditioning of v1.0 and v1.1 (docs/model.md, The 217 rule).
PROMPT_DROP_TOKENS = 217
PROMPT_MAX_TOKENS = 640
# The part of a sequence that the transformer gets. The template and the prefix are dropped except for the last token,
# and the end of a long prompt is cut off (docs/model.md, v1.2 conditioning).
KEPT = slice(90, 90 + 2048)


def layout_states(states: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the hidden states [1, L, C] of a sequence to the conditioning [1, 640, C], zero-padded on the right, and its
    mask [1, 640].

    The fixed head is dropped except for its last token, and the end of a long prompt is cut off. The mask is 1 on every
    kept token, including lone exclamation marks.
    """
    kept = states[:, PROMPT_DROP_TOKENS:PROMPT_DROP_TOKENS + PROMPT_MAX_TOKENS]
    length = kept.shape[1]
    mask = torch.zeros((kept.shape[0], PROMPT_MAX_TOKENS), dtype=torch.long, device=kept.device)
    mask[:, :length] = 1
    return torch.nn.functional.pad(kept, (0, 0, 0, PROMPT_MAX_TOKENS - length)), mask


@functools.lru_cache(maxsize=64)
def say_cut(prompt: str, tokens: int, picture_tokens: int = 0) -> None:
    """Log, once for each prompt, how many tokens are cut off its end and off the image after it. Values below 1 mean
    none."""
    if tokens > 0:
        log.warning(
            "The prompt is too long: its last %d tokens are cut off and have no effect. Shorten it. It begins: %s",
            tokens, prompt[:60],
        )
    elif picture_tokens > 0:
        log.warning(
            "The prompt is so long that the language model does not see the last %d tokens of the image. Shorten it. "
            "It begins: %s",
            picture_tokens, prompt[:60],
        )
