"""Prompt layout of v1.0 and v1.1: template, quotation splitting, token ids (docs/model.md, Prompt; Quotes).

Which of the states behind the ids are kept (the 217 rule, the 640 positions) is in cut.py.

The tokenizer is passed in as a function `text -> list of ids` that recognises special tokens and adds none.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

IMAGE_PAD = "<|image_pad|>"
IMAGE_PAD_ID = 151655
VISION_END_ID = 151653

# "Picture 1: <|vision_start|>", between the head and the image.
PICTURE_LABEL_IDS = [24669, 220, 16, 25, 220, 151652]
TURN_END = "<|im_end|>\n<|im_start|>assistant\n"

# What tokenizers of Qwen and other families read as one special token: "<|im_end|>" and similar, and the tags of tools
# and thoughts.
_SPECIAL = re.compile(r"<(\|[^\s<>|]+\||/?(?:tool_call|tool_response|think))>")

QUOTE = '"'
LEFT_QUOTE, RIGHT_QUOTE = "\u201c", "\u201d"
LEFT_QUOTE_ID, RIGHT_QUOTE_ID = 2073, 854

# The apostrophe and both curly double quotes count as quotation marks; curly single quotes do not.
_TO_QUOTE = str.maketrans({"'": QUOTE, LEFT_QUOTE: QUOTE, RIGHT_QUOTE: QUOTE})


@cache
def prompt_head_ids() -> tuple[int, ...]:
    """Return the ids of the system turn and the instruction prefix (218 ids). The network depends on this exact
    text."""
    table = Path(__file__).parent.parent / "data" / "prompt_head.json"
    return tuple(json.loads(table.read_text(encoding="utf-8"))["head"])


def clean_prompt(prompt: str) -> str:
    """Make any string safe to tokenise: lone surrogates become U+FFFD, a literal image token becomes plain text.

    The official code fails on both; a second image token would have no image. Other special tokens keep their meaning
    in an edit prompt, for v1.0 and v1.1 (`prompt_ids`) and for v1.2 (`prompt_ids_v12`): the official layout reads them
    so, and goldens hold their ids (tests/parity/goldens/tokenization.json, tests/parity/goldens/v12/tokens.json). An
    edit prompt asks nothing, so there is no answer to forge. Questions to the language model go through `plain_text`.
    """
    prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return prompt.replace(IMAGE_PAD, "<| image_pad |>")


def plain_text(text: str) -> str:
    """Turn special tokens in a text into plain text: "<|im_end|>" becomes "<| im_end |>" and "<think>" becomes "< think
    >".

    Otherwise a text could end its turn in a chat and answer in place of the model.
    """
    return _SPECIAL.sub(
        lambda match: "<| " + match[1][1:-1] + " |>" if match[1][0] == "|" else f"< {match[1]} >", clean_prompt(text)
    )


def split_quotations(text: str) -> list[str]:
    """Split a text at its quotation marks; each character inside a quotation becomes a separate piece in curly quotes.

    The opening mark ends the plain piece before it, the closing mark starts the one after it. After an unpaired mark,
    including an apostrophe, the rest of the text counts as quoted.
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
    """Return the ids of one piece, without the curly quotes around a quoted character if they are separate tokens."""
    ids = list(tokenize(piece))
    if len(ids) > 1 and ids[0] == LEFT_QUOTE_ID and ids[-1] == RIGHT_QUOTE_ID:
        return ids[1:-1]
    return ids


def prompt_ids(prompt: str, tokenize: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Return the token ids before and after the image. The image's own tokens (id 151655) go between the two lists."""
    after = [VISION_END_ID]
    for piece in split_quotations(clean_prompt(prompt) + TURN_END):
        after += piece_ids(piece, tokenize)
    return [*prompt_head_ids(), *PICTURE_LABEL_IDS], after
