"""Qwen2.5-VL's chat template with images anywhere in the user turn and without image numbers (docs/model.md, Text
generation)."""

from .v11 import IMAGE_PAD, TURN_END, clean_prompt, plain_text

# The template's default system turn, for a conversation without one.
DEFAULT_SYSTEM = "You are a helpful assistant."
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


def split_at_pictures(content: list) -> tuple[list[str], list]:
    """Split texts and images in any order into the n images and the n + 1 texts before, between and after them.

    Everything that is not a string is an image. Its start and end tokens become part of the texts; its own tokens go
    between them.
    """
    texts, pictures = [""], []
    for item in content:
        if isinstance(item, str):
            texts[-1] += item
        else:
            texts[-1] += VISION_START
            texts.append(VISION_END)
            pictures.append(item)
    return texts, pictures


def plain_content(content: list) -> list:
    """Turn special tokens in the texts into plain text. Adjacent texts are joined first, because two halves can form a
    token."""
    parts = []
    for item in content:
        if isinstance(item, str) and parts and isinstance(parts[-1], str):
            parts[-1] += item
        else:
            parts.append(item)
    return [plain_text(item) if isinstance(item, str) else item for item in parts]


def chat(system: str | None, content: list) -> tuple[list[str], list]:
    """Build a chat of a system text and a user turn of texts and images; returns texts and images as
    `split_at_pictures` does.

    The texts contain no special tokens except those of the template and around the images, whatever the input contains.
    """
    system = DEFAULT_SYSTEM if system is None else plain_text(system)
    return split_at_pictures(
        [f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n", *plain_content(content), TURN_END]
    )


def untemplated(text: str, pictures: list) -> tuple[list[str], list]:
    """Split a text that is its own template into texts and images as `split_at_pictures` does. Its special tokens keep
    their meaning.

    The images replace the image tokens of the text if their numbers are equal; otherwise they are placed before it.
    """
    texts = text.split(IMAGE_PAD)
    if len(texts) == len(pictures) + 1:
        return [clean_prompt(part) for part in texts], pictures
    return split_at_pictures([*pictures, clean_prompt(text)])
