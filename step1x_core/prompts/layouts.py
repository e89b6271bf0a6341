"""Builds the sequence of each prompt layout: prompt and image as the language model reads them, cut where the
transformer stops reading."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..images import picture_grid, to_vision_size, to_vision_size_v12
from ..versions import LAYOUT_V11, LAYOUT_V12, PromptLayout
from .cut import KEPT, PROMPT_DROP_TOKENS, PROMPT_MAX_TOKENS
from .image_memory import ImageMemory
from .v11 import IMAGE_PAD_ID, PICTURE_LABEL_IDS, TURN_END, prompt_ids
from .v12 import prompt_ids_v12


@dataclass
class Sequence:
    """One sequence for the language model.

    tokens: ids, with one dict for the image. It carries the memory that keeps what is made of the image.
    cut: number of tokens cut off the end of the prompt. cut_picture: number of tokens cut off the image that follows
    it. Values below 1 mean none.
    """

    tokens: list
    cut: int
    cut_picture: int = 0


def sequence_v11(prompt: str, picture: Tensor, size_level: int, tokenize: Callable[[str], list[int]],
                 memory: ImageMemory, device: torch.device | None = None) -> Sequence:
    """Build the sequence of v1.0 and v1.1: the fixed head, the image at its working size, then the prompt.

    device: where the image is resized (`images.resized`).
    """
    before, after = prompt_ids(prompt, tokenize)
    pixels = memory.once(picture, to_vision_size, lambda picture: to_vision_size(picture, device))
    room = PROMPT_DROP_TOKENS + PROMPT_MAX_TOKENS - len(before) - math.prod(picture_grid(pixels))
    # Further tokens do not reach the transformer, and the cost grows with the square of the length.
    tokens = [*before, {"type": "image", "data": pixels, "memory": memory}, *after[:PROMPT_MAX_TOKENS]]
    return Sequence(tokens, len(after) - len(tokenize(TURN_END)) - room)


def sequence_v12(prompt: str, picture: Tensor, size_level: int, tokenize: Callable[[str], list[int]],
                 memory: ImageMemory, device: torch.device | None = None) -> Sequence:
    """Build the sequence of v1.2: the prompt, then the original image. Its dict carries which tokens are quoted
    characters. device: where the image is resized (`images.resized`)."""
    tokens, mask = prompt_ids_v12(prompt, tokenize)
    pixels, working_size = memory.once(picture, (to_vision_size_v12, size_level),
                                       lambda picture: to_vision_size_v12(picture, size_level, device))
    at = tokens.index(IMAGE_PAD_ID)
    cut, cut_picture = at - len(PICTURE_LABEL_IDS) - KEPT.stop, at + math.prod(picture_grid(pixels)) - KEPT.stop
    # Tokens from there on neither reach the transformer nor affect those before them.
    del tokens[KEPT.stop:at], mask[KEPT.stop:at]
    tokens[min(at, KEPT.stop)] = {"type": "image", "data": pixels, "memory": memory, "working_size": working_size,
                                  "text_mask": mask}
    return Sequence(tokens, cut, cut_picture)


SEQUENCES: dict[PromptLayout, Callable[..., Sequence]] = {LAYOUT_V11: sequence_v11, LAYOUT_V12: sequence_v12}
