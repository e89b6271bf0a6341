"""Looking through pairs: thresholds, statistics by kind, and a contact sheet."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..files import safe_path
from ..rounding import divided_up
from ..sheets import INK, MARGIN, PAPER, THUMBNAIL, thumbnail, wrap
from ..tasks import ordered_types
from .record import Pair, changed_pixels

# Height of the three lines of text below a pair.
TEXT = 44


@dataclass(frozen=True)
class Thresholds:
    """What a pair must have. semantics, quality: least score, the lower of two, 0..10. min_change, max_change: share of
    the pixels that the edit changed, 0..1.

    unjudged: whether a pair without scores may pass. unasked: whether one may that no judge was asked about.
    """

    semantics: float = 7.0
    quality: float = 6.0
    min_change: float = 0.002
    max_change: float = 1.0
    unjudged: bool = False
    unasked: bool = False


def objection(pair: Pair, limits: Thresholds) -> str:
    """Why a pair is dropped; "" for one that is kept."""
    change = float(changed_pixels(pair.source, pair.target).mean())
    if not limits.min_change <= change <= limits.max_change:
        return f"{change:.2%} of the pixels changed"
    if pair.verdict is None:
        return "" if limits.unjudged or limits.unasked else "not judged"
    if pair.verdict.semantics is None or pair.verdict.quality is None:
        return "" if limits.unjudged else f"no usable judgement: {pair.verdict.problem}"
    for name, value, least in (
        ("semantics", min(pair.verdict.semantics), limits.semantics),
        ("quality", min(pair.verdict.quality), limits.quality),
    ):
        if value < least:
            return f"{name} {value:g} is below {least:g}"
    return ""


def describe(pair: Pair) -> str:
    return f"{pair.kind}: {pair.instruction}"


def sift(pairs: tuple[Pair, ...], limits: Thresholds) -> tuple[tuple[Pair, ...], tuple[Pair, ...], str]:
    """The pairs that are kept, those that are dropped, and a report with the reason for each of these."""
    kept, dropped, lines = [], [], []
    for pair in pairs:
        reason = objection(pair, limits)
        (dropped if reason else kept).append(pair)
        if reason:
            lines.append(f"dropped: {reason} ({describe(pair)})")
    return tuple(kept), tuple(dropped), "\n".join([f"{len(kept)} of {len(pairs)} pairs kept.", *lines])


@dataclass(frozen=True)
class Card:
    """A pair as statistics and sheet see it. load: source and target. scores: semantics and quality, the lower of two
    each, None without."""

    task_type: str
    maker: str
    english: str
    chinese: str
    scores: tuple[float, float] | None
    load: Callable[[], tuple[Image.Image, Image.Image]]


def lower_scores(semantics, quality) -> tuple[float, float] | None:
    return None if semantics is None or quality is None else (min(semantics), min(quality))


def card(pair: Pair) -> Card:
    scores = pair.verdict and lower_scores(pair.verdict.semantics, pair.verdict.quality)
    return Card(
        pair.kind,
        pair.maker,
        pair.english,
        pair.chinese,
        scores,
        lambda: (Image.fromarray(pair.source), Image.fromarray(pair.target)),
    )


def stored_card(folder, row: dict) -> Card:
    """A pair of a dataset by its row in the journal."""
    verdict = row["verdict"] or {}
    return Card(
        row["kind"],
        row["maker"],
        row["en"],
        row["zh"],
        lower_scores(verdict.get("semantics"), verdict.get("quality")),
        lambda: tuple(Image.open(safe_path(folder, row[side], folder, str(folder))) for side in ("source", "target")),
    )


def mean(values: list[float]) -> str:
    return f"{math.fsum(values) / len(values):.2f}" if values else "-"


def statistics(cards: list[Card]) -> str:
    """A table with a line for each kind: pairs, those with an instruction in each language, mean scores of those that
    were judged, makers."""
    lines = ["| kind | pairs | en | zh | judged | semantics | quality | made by |", "|---|---|---|---|---|---|---|---|"]
    kinds = ordered_types(cards)
    for name in [*kinds, "all"]:
        group = [entry for entry in cards if name in (entry.task_type, "all")]
        scores = [entry.scores for entry in group if entry.scores]
        makers = ", ".join(f"{maker} {count}" for maker, count in Counter(entry.maker for entry in group).most_common())
        counts = (
            len(group),
            sum(bool(entry.english) for entry in group),
            sum(bool(entry.chinese) for entry in group),
            len(scores),
        )
        means = mean([semantics for semantics, _ in scores]), mean([quality for _, quality in scores])
        lines.append(f"| {' | '.join(map(str, (name, *counts, *means, '' if name == 'all' else makers)))} |")
    return "\n".join(lines)


def spread(cards: list[Card], limit: int) -> list[Card]:
    """At most so many, the kinds in turn, so that none is missing, in the order of the kinds."""
    groups = [[entry for entry in cards if entry.task_type == kind] for kind in ordered_types(cards)]
    turns = sorted((number, kind) for kind, group in enumerate(groups) for number in range(len(group)))
    return [groups[kind][number] for kind, number in sorted((kind, number) for number, kind in turns[:limit])]


def caption(canvas: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return the first two lines of an instruction. The font has no Chinese characters; the report has them."""
    return wrap(canvas, "".join(char if ord(char) < 0x2000 else "?" for char in text), font, width)[:2]


def contact_sheet(cards: list[Card], limit: int = 48, columns: int = 3) -> Image.Image:
    """Source and target side by side with kind and instruction, at most `limit` pairs of all kinds."""
    shown = spread(cards, limit)
    cell_width, cell_height = 2 * THUMBNAIL + 4 + MARGIN, THUMBNAIL + TEXT + MARGIN + 8
    picture = Image.new(
        "RGB", (columns * cell_width + MARGIN, max(1, divided_up(len(shown), columns)) * cell_height + MARGIN + 28), PAPER
    )
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    canvas.text(
        (MARGIN, MARGIN - 4),
        f"{len(shown)} of {len(cards)} pairs, source and target",
        fill=INK,
        font=ImageFont.load_default(16),
    )
    for number, entry in enumerate(shown):
        x, y = MARGIN + number % columns * cell_width, MARGIN + 24 + number // columns * cell_height
        for side, part in enumerate(entry.load()):
            picture.paste(thumbnail(part), (x + side * (THUMBNAIL + 4), y))
        scores = f"  SC {entry.scores[0]:g}  PQ {entry.scores[1]:g}" if entry.scores else ""
        for line, text in enumerate(
            (f"{entry.task_type}{scores}", *caption(canvas, entry.english or entry.chinese, font, cell_width - MARGIN))
        ):
            canvas.text((x, y + THUMBNAIL + 3 + 16 * line), text, fill=INK, font=font)
    return picture
