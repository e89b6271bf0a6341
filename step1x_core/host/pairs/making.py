"""Edit pairs in the host: the text encoder proposes edits, and pictures become pairs."""

from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
from torch import Tensor

from ...checks import check_pictures
from ...errors import Step1XError
from ...images import to_uint8
from ...pairs.orders import ORDER_KINDS, carry_out, check_side, orders, shrink
from ...pairs.propose import PROPOSED, Proposal, parse_kinds, proposing
from ...pairs.record import Pair, digest, make_pair
from ...pairs.review import describe
from ...pairs.spool import spooled
from ..reasoning.generation import check_can_generate
from ..reasoning.pool import answer_all, tasks_at_a_time
from ..reasoning.thinking import Asker, single_picture

FORWARD, BACKWARD, BOTH = "forward", "backward", "both"


def pictures(images: list[Tensor], name: str) -> list[np.ndarray]:
    """Batches [B, H, W, C] of any sizes -> their pictures, uint8 [H, W, 3]. name: the input, for the error."""
    for batch in images:
        check_pictures(batch, name)
    return [to_uint8(picture) for batch in images for picture in batch]


def propose_edits(clip, rows: list[dict]) -> list[tuple[list[Proposal], str]]:
    """Edits of several images, and a report for each; a few images are asked about at a time.

    rows: for each its "image" [1, H, W, C], "kinds", "count" and "seed".

    Raises Step1XError as `proposing` does, and for a text encoder that cannot generate text.
    """
    check_can_generate(clip)
    tasks = [
        (
            Asker(clip, "propose", row["seed"]),
            proposing(
                single_picture(row["image"], "image"), parse_kinds(row["kinds"], PROPOSED), row["count"], row["seed"]
            ),
        )
        for row in rows
    ]
    progress = comfy.utils.ProgressBar(len(rows))
    found = {}
    for number, result in answer_all(clip, tasks, tasks_at_a_time(clip)):
        found[number] = result
        progress.update_absolute(len(found))
    return [found[number] for number in range(len(rows))]


def algorithmic_pairs(
    images: list[Tensor], kinds: str, count: int, seed: int, max_side: int
) -> tuple[tuple[Pair, ...], str]:
    """At most `count` pairs of each picture, and a report. The same picture and seed give the same pairs.

    One picture is worked on at a time, and what is made waits in the host's temporary folder: it may be more than main
    memory holds.
    """
    chosen = parse_kinds(kinds, ORDER_KINDS)
    for batch in images:
        check_pictures(batch, "images")
        check_side(*batch.shape[1:3])
    total = sum(len(batch) for batch in images) * count
    progress = comfy.utils.ProgressBar(total)

    def make() -> Iterator[Pair]:
        for picture in (shrink(to_uint8(picture), max_side) for batch in images for picture in batch):
            name = digest(picture.tobytes())
            for order in orders(name, chosen, 0, count, seed):
                comfy.model_management.throw_exception_if_processing_interrupted()
                pair = carry_out(picture, name, order, seed)
                if pair:
                    yield pair
                progress.update(1)

    pairs = spooled(make(), Path(folder_paths.get_temp_directory()))
    lines = [f"{len(pairs)} pairs made; {total - len(pairs)} edits did not suit their image."]
    return pairs, "\n".join(lines + [f"{pair.maker}, {describe(pair)} / {pair.chinese}" for pair in pairs])


def one_each(values: list, count: int, name: str) -> list:
    """As many values as pairs: a single one goes with all. Raises Step1XError for any other number."""
    if len(values) not in (1, count):
        raise Step1XError(f"The input '{name}' has {len(values)} values for {count} edited images. "
                          "Connect one for each, or one for all.")
    return values * count if len(values) == 1 else values


def edits_of(proposals: list[Proposal], kinds: list[str], english: list[str], chinese: list[str],
             count: int) -> list[Proposal]:
    """Kind and instructions of each of `count` targets: as proposed, or without proposals as typed in."""
    if proposals:
        return one_each(proposals, count, "proposals")
    columns = {"kind": kinds, "english": english, "chinese": chinese}
    return [Proposal(*row) for row in zip(*(one_each(values, count, name) for name, values in columns.items()))]


def read_forward(before: np.ndarray, after: np.ndarray, edit: Proposal, maker: str, details: dict) -> Pair:
    """The pair as it was made."""
    return make_pair(before, after, edit.kind, edit.english, edit.chinese, maker, {**details, "direction": FORWARD})


def read_backward(before: np.ndarray, after: np.ndarray, edit: Proposal, maker: str, details: dict) -> Pair | None:
    """The pair from its end to its beginning; None where the proposal has no words for that."""
    if not edit.back_kind:
        return None
    return make_pair(after, before, edit.back_kind, edit.back_english, edit.back_chinese, maker,
                     {**details, "direction": BACKWARD})


READINGS = {FORWARD: (read_forward,), BACKWARD: (read_backward,), BOTH: (read_forward, read_backward)}
DIRECTIONS = tuple(READINGS)


def record_pairs(source: list[Tensor], target: list[Tensor], proposals: list[Proposal], kinds: list[str],
                 english: list[str], chinese: list[str], maker: list[str],
                 direction: str) -> tuple[tuple[Pair, ...], str]:
    """Pairs of what other nodes made, and a report.

    proposals: where there are any, kind and instructions come from them. direction: whether each pair is also, or only,
    read from its end to its beginning; proposals that have no words for that are left out there.

    Raises Step1XError as `make_pair` does, and where the numbers do not agree.
    """
    if not proposals and direction != FORWARD:
        raise Step1XError(
            f"'direction' is {direction}, but without proposals there is no instruction for the way back. "
            "Set it to forward, or connect proposals. To reverse a pair yourself, swap source and target."
        )
    targets = pictures(target, "target")
    sources = one_each(pictures(source, "source"), len(targets), "source")
    makers = one_each(maker, len(targets), "maker")
    edits = edits_of(proposals, kinds, english, chinese, len(targets))
    details = [{"object": edit.thing, "content": edit.content} if proposals else {} for edit in edits]
    rows = zip(sources, targets, edits, makers, details)
    read = [reading(*row) for row in rows for reading in READINGS[direction]]
    pairs = tuple(pair for pair in read if pair)
    wordless = len(read) - len(pairs)
    lines = [f"{len(pairs)} pairs."] + [f"{wordless} edits have no instruction for the way back."] * bool(wordless)
    return pairs, "\n".join(lines + [f"{describe(pair)} / {pair.chinese}" for pair in pairs])
