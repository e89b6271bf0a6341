"""The style of contact sheets and charts."""

from PIL import Image, ImageOps

PAPER, INK, GRID = "#ffffff", "#202020", "#d0d0d0"
THUMBNAIL = 200
MARGIN = 12


def thumbnail(picture: Image.Image) -> Image.Image:
    """Fit an image into a square thumbnail, padded with grey."""
    return ImageOps.pad(picture.convert("RGB"), (THUMBNAIL, THUMBNAIL), color=GRID)
