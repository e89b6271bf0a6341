"""The style of contact sheets and charts, and text drawn on images."""

from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER, INK, GRID = "#ffffff", "#202020", "#d0d0d0"
THUMBNAIL = 200
MARGIN = 12


def thumbnail(picture: Image.Image) -> Image.Image:
    """Fit an image into a square thumbnail, padded with grey."""
    return ImageOps.pad(picture.convert("RGB"), (THUMBNAIL, THUMBNAIL), color=GRID)


def wrap(canvas: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; a word wider than that gets a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and canvas.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
