"""What a training shows of itself while it runs: the curve of its losses above pictures of its edits."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 640, 240, 28
PAPER, INK, LINE, RAW = "white", "black", "#2458b8", "#b9cdf0"
# Share of the steps over which the curve is averaged.
SMOOTHING = 0.05


def smooth(losses: list[float]) -> np.ndarray:
    """Running mean of each loss and those before it, over a twentieth of all."""
    window = max(1, round(SMOOTHING * len(losses)))
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_losses(losses: list[float]) -> Image.Image:
    """Losses by step, single ones pale and their running mean on top, from 0 to the highest."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    top = max(losses) or 1.0

    def points(values):
        return [
            (
                MARGIN + (WIDTH - 2 * MARGIN) * i / max(1, len(losses) - 1),
                HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * value / top,
            )
            for i, value in enumerate(values)
        ]

    mean = smooth(losses)
    draw.line([(MARGIN, MARGIN), (MARGIN, HEIGHT - MARGIN), (WIDTH - MARGIN, HEIGHT - MARGIN)], fill=INK)
    for values, colour, width in ((losses, RAW, 1), (mean, LINE, 2)):
        draw.line(points(values) * (2 if len(losses) == 1 else 1), fill=colour, width=width)
    draw.text((MARGIN, 6), f"loss {mean[-1]:.4f} (highest {top:.4f})", fill=INK, font=font)
    draw.text((WIDTH - MARGIN, HEIGHT - 8), f"step {len(losses)}", fill=INK, font=font, anchor="rs")
    return picture


def draw_progress(losses: list[float], rows: list[np.ndarray]) -> Image.Image:
    """The curve, and below it uint8 pictures [H, W, 3], each shrunk to its width."""
    parts = [draw_losses(losses)]
    for row in map(Image.fromarray, rows):
        parts.append(
            row.resize(
                (WIDTH, math.ceil(WIDTH * row.height / row.width)),
                Image.Resampling.BICUBIC if row.width > WIDTH else Image.Resampling.NEAREST,
            )
        )
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), PAPER)
    for i, part in enumerate(parts):
        sheet.paste(part, (0, sum(above.height for above in parts[:i])))
    return sheet
