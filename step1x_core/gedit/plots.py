"""Pictures for reports on GEdit-Bench, drawn with Pillow: bars, a radar chart, and a contact sheet."""

import math

from PIL import Image, ImageDraw, ImageFont

from ..errors import Step1XError
from ..reasoning.replies import MAX_SCORE
from ..sheets import GRID, INK, MARGIN, PAPER, THUMBNAIL, thumbnail
from .scores import Entry

COLOURS = ("#2f6db3", "#d9822b", "#3b8f4e", "#a3478f", "#8a6d3b", "#c0392b", "#16a0a0", "#666666")

# A chart shows several series: name -> task type -> score 0..10; NaN where there is none.
Series = dict[str, dict[str, float]]


def draw_legend(canvas: ImageDraw.ImageDraw, names: list[str], left: int, top: int, font) -> None:
    for i, name in enumerate(names):
        canvas.rectangle((left, top + 22 * i, left + 14, top + 22 * i + 14), fill=COLOURS[i % len(COLOURS)])
        canvas.text((left + 22, top + 22 * i - 1), name, fill=INK, font=font)


def bar_chart(series: Series, title: str) -> Image.Image:
    """A group of bars for each task type, one for each series. A score that is missing has no bar."""
    types = list(next(iter(series.values())))
    font, bar, gap = ImageFont.load_default(14), max(8, 48 // len(series)), 24
    group = bar * len(series) + gap
    left, top, plot, bottom = 96, 48 + 22 * len(series), 300, 150
    width = max(left + group * len(types) + MARGIN, 420)
    picture = Image.new("RGB", (width, top + plot + bottom), PAPER)
    canvas = ImageDraw.Draw(picture)
    canvas.text((left, MARGIN), title, fill=INK, font=ImageFont.load_default(18))
    draw_legend(canvas, list(series), left, 42, font)
    for score in range(0, 11, 2):
        y = top + plot - plot * score / MAX_SCORE
        canvas.line((left, y, width - MARGIN, y), fill=GRID)
        canvas.text((left - 28, y - 8), str(score), fill=INK, font=font)
    for i, name in enumerate(types):
        start = left + gap // 2 + group * i
        for j, scores in enumerate(series.values()):
            if not math.isnan(scores[name]):
                x, y = start + bar * j, top + plot - plot * scores[name] / MAX_SCORE
                canvas.rectangle((x, y, x + bar - 2, top + plot), fill=COLOURS[j % len(COLOURS)])
        label = Image.new("RGBA", (140, 20))
        ImageDraw.Draw(label).text((138, 2), name, fill=INK, font=font, anchor="ra")
        turned = label.rotate(45, expand=True)
        picture.paste(turned, (start + bar * len(series) // 2 - turned.width + 10, top + plot + 4), turned)
    return picture


def radar_chart(series: Series, title: str) -> Image.Image:
    """A web with one spoke for each task type and one outline for each series. A score that is missing lies at the
    centre."""
    types = list(next(iter(series.values())))
    size, radius = 720, 220
    top = 48 + 22 * len(series)
    centre = size / 2, top + size / 2 - 40
    picture = Image.new("RGB", (size, top + size - 80), PAPER)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    canvas.text((MARGIN, MARGIN), title, fill=INK, font=ImageFont.load_default(18))
    draw_legend(canvas, list(series), MARGIN, 42, font)

    def point(i, score):
        angle = 2 * math.pi * i / len(types) - math.pi / 2
        return centre[0] + math.cos(angle) * radius * score / MAX_SCORE, centre[1] + math.sin(
            angle
        ) * radius * score / MAX_SCORE

    for score in range(2, 11, 2):
        canvas.line([point(i, score) for i in range(len(types) + 1)], fill=GRID)
        canvas.text((centre[0] + 4, centre[1] - radius * score / MAX_SCORE), str(score), fill=INK, font=font)
    for i, name in enumerate(types):
        canvas.line((*centre, *point(i, MAX_SCORE)), fill=GRID)
        x, y = point(i, MAX_SCORE * 1.08)
        canvas.text(
            (x, y),
            name,
            fill=INK,
            font=font,
            anchor="mm" if abs(x - centre[0]) < 40 else "lm" if x > centre[0] else "rm",
        )
    for j, scores in enumerate(series.values()):
        outline = [point(i, 0 if math.isnan(scores[name]) else scores[name]) for i, name in enumerate(types)]
        canvas.line([*outline, outline[0]], fill=COLOURS[j % len(COLOURS)], width=3)
    return picture


def entry_pictures(entry: Entry) -> tuple[Image.Image, Image.Image]:
    """Source and edited picture of an entry that has both; grey in place of a source that cannot be read."""
    try:
        source = entry.item.load()
    except Step1XError:
        source = Image.new("RGB", (THUMBNAIL, THUMBNAIL), GRID)
    with Image.open(entry.picture) as edited:
        return thumbnail(source), thumbnail(edited)


def contact_sheet(best: list[Entry], worst: list[Entry], columns: int = 3) -> Image.Image:
    """The best and the worst edits as pairs of source and result, numbered through, best first. The instructions are in
    the report."""
    font, heading = ImageFont.load_default(14), ImageFont.load_default(18)
    cell_width, cell_height = 2 * THUMBNAIL + MARGIN, THUMBNAIL + 48
    rows = [math.ceil(len(entries) / columns) for entries in (best, worst)]
    picture = Image.new(
        "RGB", (columns * (cell_width + MARGIN) + MARGIN, sum(rows) * cell_height + 2 * 36 + MARGIN), PAPER
    )
    canvas = ImageDraw.Draw(picture)
    y, number = MARGIN, 1
    for title, entries in (("Best", best), ("Worst", worst)):
        canvas.text((MARGIN, y), title if entries else f"{title}: nothing judged", fill=INK, font=heading)
        y += 36
        for i, entry in enumerate(entries):
            x = MARGIN + i % columns * (cell_width + MARGIN)
            for j, part in enumerate(entry_pictures(entry)):
                picture.paste(part, (x + j * (THUMBNAIL + 4), y + i // columns * cell_height))
            for j, line in enumerate(
                (
                    f"{number}. {entry.item.name}"[:52],
                    f"SC {entry.semantics:g}  PQ {entry.quality:g}  O {entry.overall:.2f}",
                )
            ):
                canvas.text((x, y + i // columns * cell_height + THUMBNAIL + 4 + 18 * j), line, fill=INK, font=font)
            number += 1
        y += math.ceil(len(entries) / columns) * cell_height
    return picture
