"""The text encoder as the judge of pairs, and which of them are kept."""

from dataclasses import replace

import comfy.utils
from PIL import Image

from ...pairs.record import Pair, digest
from ...pairs.review import Thresholds, describe, sift
from ..reasoning.generation import check_can_generate
from ..reasoning.judging import judge_edits


def judge_pairs(clip, pairs: tuple[Pair, ...], seed: int) -> tuple[tuple[Pair, ...], str]:
    """The pairs with a verdict each, and a report. Those that have scores keep them. A reply that cannot be read is
    asked for anew four times."""
    check_can_generate(clip)
    judged = list(pairs)
    waiting = [(place, pair) for place, pair in enumerate(pairs) if pair.verdict is None or pair.verdict.problem]
    edits = (
        (
            f"pair {digest(pair.source.tobytes(), pair.target.tobytes())}",
            Image.fromarray(pair.source),
            Image.fromarray(pair.target),
            pair.instruction,
        )
        for _, pair in waiting
    )
    progress = comfy.utils.ProgressBar(len(waiting))
    for done, (number, verdict) in enumerate(judge_edits(clip, edits, seed), 1):
        place, pair = waiting[number]
        judged[place] = pair.with_verdict(verdict)
        progress.update_absolute(done)
    scores = [
        pair.verdict.problem or f"semantics {min(pair.verdict.semantics):g}, quality {min(pair.verdict.quality):g}"
        for pair in judged
    ]
    usable = sum(not pair.verdict.problem for pair in judged)
    return tuple(judged), "\n".join(
        [
            f"{usable} of {len(judged)} pairs judged.",
            *(f"{text} ({describe(pair)})" for pair, text in zip(judged, scores)),
        ]
    )


def judge_and_sift(clip, pairs: tuple[Pair, ...], seed: int,
                   limits: Thresholds) -> tuple[tuple[Pair, ...], tuple[Pair, ...], str]:
    """Score the pairs that have no scores -> those that are kept, those that are dropped, a report. Raises as
    `judge_pairs`."""
    judged, scores = judge_pairs(clip, pairs, seed)
    kept, dropped, reasons = sift(judged, limits)
    return kept, dropped, f"{reasons}\n\n{scores}"


def sift_as_they_are(pairs: tuple[Pair, ...], limits: Thresholds) -> tuple[tuple[Pair, ...], tuple[Pair, ...], str]:
    """The same without a text encoder: by the scores that are there, and pairs that were never judged by change alone.
    """
    kept, dropped, report = sift(pairs, replace(limits, unasked=True))
    unscored = sum(pair.verdict is None for pair in pairs)
    if unscored:
        report += f"\n\n{unscored} pairs have no scores and were filtered by change only. Connect 'clip' to score them."
    return kept, dropped, report
