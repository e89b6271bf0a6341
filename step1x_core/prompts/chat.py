"""Qwen2.5-VL's chat template with images anywhere in the user turn and without image numbers
(docs/model.md, Text generation)."""

from .v11 import IMAGE_PAD, TURN_END, clean_prompt, plain_text

# The template's own system turn, for a conversation that brings none.
DEFAULT_SYSTEM = "You are a helpful assistant."
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


def split_at_pictures(content: list) -> tuple[list[str], list]:
    """Texts and images in any order -> the n images, and the n + 1 texts before, between and after them, as they are.

    Whatever is not a string is an image. Its start and end tokens are part of the texts, its own tokens stand between them.
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
    """Texts and images -> the same with texts in which nothing is a special token; neighbouring texts are one, as two halves make a token."""
    parts = []
    for item in content:
        if isinstance(item, str) and parts and isinstance(parts[-1], str):
            parts[-1] += item
        else:
            parts.append(item)
    return [plain_text(item) if isinstance(item, str) else item for item in parts]


def chat(system: str | None, content: list) -> tuple[list[str], list]:
    """System text and the user turn's texts and images in order -> texts and images as `split_at_pictures` gives them.

    The only special tokens in the texts are those of the template and around the images, whatever the system text and the content hold.
    """
    system = DEFAULT_SYSTEM if system is None else plain_text(system)
    return split_at_pictures([f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n", *plain_content(content), TURN_END])


def untemplated(text: str, pictures: list) -> tuple[list[str], list]:
    """A text that is its own template -> texts and images as `split_at_pictures` gives them. Its special tokens are meant as such.

    The images take the places of the image tokens where the text has as many of them; otherwise they stand before it.
    """
    texts = text.split(IMAGE_PAD)
    if len(texts) == len(pictures) + 1:
        return [clean_prompt(part) for part in texts], pictures
    return split_at_pictures([*pictures, clean_prompt(text)])
