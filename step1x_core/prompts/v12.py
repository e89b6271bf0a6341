"""Prompt layout of v1.2: chat text, quotation splitting, token ids, text mask
(docs/model.md, v1.2 prompt; v1.2 quotes).

The tokenizer is passed in as a function `text -> list of ids` that recognises special tokens and adds none.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .v11 import IMAGE_PAD, LEFT_QUOTE, QUOTE, RIGHT_QUOTE, clean_prompt

# All of Qwen2.5-VL, ids 151643 to 151664. Later Qwen tokenizers have more, which are plain text here.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_PAD,
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
_SPECIAL = re.compile("({})".format("|".join(map(re.escape, SPECIAL_TOKENS))))

# The text after the instruction follows without a separator.
CHAT_TEMPLATE = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{prefix} {instruction}"
                 "Picture 1: <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n")

@cache
def prompt_prefix() -> str:
    """Return the 449 characters before every instruction. The network depends on this exact text."""
    table = Path(__file__).parent.parent / "data" / "prompt_v12.json"
    return json.loads(table.read_text(encoding="utf-8"))["prefix"]


def chat_text(prompt: str) -> str:
    """Return the whole conversation, with one image token for the image."""
    return CHAT_TEMPLATE.format(prefix=prompt_prefix(), instruction=clean_prompt(prompt))


def split_quotations(text: str, protected: int = 0) -> list[tuple[str, bool]]:
    """Split a text at its quotation marks into pieces, each with whether it is a quoted character.

    protected: number of characters at the start that are not searched for marks.

    The opening mark ends the plain piece before it, the closing mark starts the one after it. Only straight and curly
    double quotes count, and only a mark of the same kind closes a quotation. An unclosed quotation is plain text. A
    curly mark at the very start of the text is lost, as in the official code.
    """
    pieces = []
    plain, quoted = text[:protected], ""
    closing = None
    for char in text[protected:]:
        if closing is None:
            if char == QUOTE or (char == LEFT_QUOTE and plain):
                pieces.append((plain + char, False))
                plain = ""
            elif char != LEFT_QUOTE:
                plain += char
            closing = {QUOTE: QUOTE, LEFT_QUOTE: RIGHT_QUOTE}.get(char)
        elif char == closing:
            pieces += [(inner, True) for inner in quoted]
            plain, quoted = char, ""
            closing = None
        else:
            quoted += char
    # Inside a quotation the last piece, if there is one, ends with its opening mark.
    if quoted and pieces:
        pieces[-1] = (pieces[-1][0] + quoted, False)
    elif quoted or plain:
        pieces.append((quoted or plain, False))
    return pieces


def split_chat(text: str, protected: int) -> list[tuple[str, bool]]:
    """Split a text at special tokens, then the parts between them at quotation marks. A quotation does not extend past
    a special token.

    protected: number of characters at the start, special tokens included, that are not searched for quotation marks.
    """
    pieces = []
    start = 0
    for part in _SPECIAL.split(text):
        if part in SPECIAL_TOKENS:
            pieces.append((part, False))
        else:
            pieces += split_quotations(part, max(0, protected - start))
        start += len(part)
    return pieces


def prompt_ids_v12(prompt: str, tokenize: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Return the token ids of the whole conversation, with one id 151655 for the image, and the text mask.

    The mask is 1 on the tokens of quoted characters.
    """
    ids, mask = [], []
    for piece, quoted in split_chat(chat_text(prompt), len(prompt_prefix())):
        tokens = tokenize(piece)
        ids += tokens
        mask += [int(quoted)] * len(tokens)
    return ids, mask
