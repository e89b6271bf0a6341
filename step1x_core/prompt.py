"""Prompt layout of v1.0 and v1.1: template, quotation splitting, token ids (spec v1.md c.2, c.3).

The tokenizer is passed in as a function `text -> list of ids` that recognises special tokens and adds none.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

IMAGE_PAD = "<|image_pad|>"
IMAGE_PAD_ID = 151655
VISION_END_ID = 151653

# "Picture 1: <|vision_start|>", between the head and the picture.
PICTURE_LABEL_IDS = [24669, 220, 16, 25, 220, 151652]
TURN_END = "<|im_end|>\n<|im_start|>assistant\n"

QUOTE = '"'
LEFT_QUOTE, RIGHT_QUOTE = "\u201c", "\u201d"
LEFT_QUOTE_ID, RIGHT_QUOTE_ID = 2073, 854

# The apostrophe and both curly double quotes count as quotation marks; curly single quotes do not.
_TO_QUOTE = str.maketrans({"'": QUOTE, LEFT_QUOTE: QUOTE, RIGHT_QUOTE: QUOTE})


@cache
def prompt_head_ids() -> tuple[int, ...]:
    """System turn and instruction prefix (218 ids). The network depends on this text to the letter."""
    table = Path(__file__).parent / "data" / "prompt_head.json"
    return tuple(json.loads(table.read_text(encoding="utf-8"))["head"])


def clean_prompt(prompt: str) -> str:
    """Make any string safe to tokenise: lone surrogates become U+FFFD, a literal image token becomes plain text.

    The official code fails on both; a second image token would have no picture behind it.
    """
    prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return prompt.replace(IMAGE_PAD, "<| image_pad |>")


def split_quotations(text: str) -> list[str]:
    """Split a text at its quotation marks; inside a quotation each character becomes a piece of its own in curly quotes.

    The opening mark ends the plain piece before it, the closing mark begins the one after it. An
    unpaired mark, an apostrophe too, leaves the rest of the text quoted.
    """
    pieces = []
    running = ""
    inside = False
    for char in text.translate(_TO_QUOTE):
        if char == QUOTE:
            if inside:
                running = char
            else:
                pieces.append(running + char)
                running = ""
            inside = not inside
        elif inside:
            pieces.append(LEFT_QUOTE + char + RIGHT_QUOTE)
        else:
            running += char
    pieces.append(running)
    return pieces


def piece_ids(piece: str, tokenize: Callable[[str], list[int]]) -> list[int]:
    """Ids of one piece; the curly quotes around a quoted character are dropped where they stayed tokens of their own."""
    ids = list(tokenize(piece))
    if len(ids) > 1 and ids[0] == LEFT_QUOTE_ID and ids[-1] == RIGHT_QUOTE_ID:
        return ids[1:-1]
    return ids


def prompt_ids(prompt: str, tokenize: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Token ids before and after the picture. The picture's own tokens (id 151655) stand between the two lists."""
    after = [VISION_END_ID]
    for piece in split_quotations(clean_prompt(prompt) + TURN_END):
        after += piece_ids(piece, tokenize)
    return [*prompt_head_ids(), *PICTURE_LABEL_IDS], after
