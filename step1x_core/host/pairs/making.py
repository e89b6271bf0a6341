"""Edit pairs in the host: pictures to pairs, the text encoder that proposes and judges, and the folder of the datasets."""

import logging
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
from PIL import Image
from torch import Tensor

from ...checks import check_pictures
from ...errors import Step1XError
from ...files import check_name
from ...images import from_uint8, to_uint8
from ...pairs.makers import ORDER_KINDS, carry_out, check_side, orders, shrink
from ...pairs.propose import PROPOSED, Proposal, parse_kinds, propose
from ...pairs.record import Pair, digest, make_pair
from ...pairs.review import card, contact_sheet, describe, statistics, stored_card
from ...pairs.spool import spooled
from ...pairs.store import JOURNAL, PairStore, encode
from ..gedit.benchmark import judge_edits
from ..reasoning.generation import check_can_generate
from ..reasoning.thinking import Asker, single_picture

log = logging.getLogger(__name__)

DATASETS = "edit_pairs"
FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
DIRECTIONS = (FORWARD, BACKWARD, BOTH)


def pictures(images: list[Tensor], name: str) -> list[np.ndarray]:
    """Batches [B, H, W, C] of any sizes -> their pictures, uint8 [H, W, 3]. name: the input, for the error."""
    for batch in images:
        check_pictures(batch, name)
    return [to_uint8(picture) for batch in images for picture in batch]


def with_progress(entries: list) -> Iterator:
    """The entries, with a progress bar. Raises the host's exception when the run is cancelled."""
    progress = comfy.utils.ProgressBar(len(entries))
    for number, entry in enumerate(entries, 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield entry
        progress.update_absolute(number)


def propose_edits(clip, image: Tensor, kinds: str, count: int, seed: int) -> tuple[list[Proposal], str]:
    """Edits of one picture [1, H, W, C], and a report. Raises Step1XError as `propose` does, and for a text encoder that cannot write."""
    check_can_generate(clip)
    picture = single_picture(image, "image")
    return propose(Asker(clip, "propose", seed), picture, parse_kinds(kinds, PROPOSED), count, seed)


def algorithmic_pairs(images: list[Tensor], kinds: str, count: int, seed: int, max_side: int) -> tuple[tuple[Pair, ...], str]:
    """At most `count` pairs of each picture, and a report. The same picture and seed give the same pairs.

    One picture is worked on at a time, and what is made waits in the host's temporary folder: it may be more than main memory holds.
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
    lines = [f"{len(pairs)} pairs made; {total - len(pairs)} edits did not suit their picture."]
    return pairs, "\n".join(lines + [f"{pair.maker}, {describe(pair)} / {pair.chinese}" for pair in pairs])


def one_each(values: list, count: int, name: str) -> list:
    """As many values as pairs: a single one goes with all. Raises Step1XError for any other number."""
    if len(values) not in (1, count):
        raise Step1XError(f"The input '{name}' brings {len(values)} for {count} edited pictures, so they cannot be told apart. Connect one for each, or one for all.")
    return values * count if len(values) == 1 else values


def record_pairs(source: list[Tensor], target: list[Tensor], proposals: list[Proposal], kinds: list[str], english: list[str], chinese: list[str], maker: list[str],
                 direction: str) -> tuple[tuple[Pair, ...], str]:
    """Pairs of what other nodes made, and a report.

    proposals: where there are any, kind and instructions come from them. direction: whether each pair is also, or only, read from its end to its
    beginning; proposals that have no words for that are left out there.

    Raises Step1XError as `make_pair` does, and where the numbers do not agree.
    """
    targets = pictures(target, "target")
    sources = one_each(pictures(source, "source"), len(targets), "source")
    makers = one_each(maker, len(targets), "maker")
    if proposals:
        edits = one_each(proposals, len(targets), "proposals")
    else:
        if direction != FORWARD:
            raise Step1XError("A pair without a proposal can only be read forward: nobody wrote the instruction of the way back. "
                              "Set 'direction' to forward, and to read it backward exchange source and target.")
        columns = (one_each(values, len(targets), name) for values, name in ((kinds, "kind"), (english, "english"), (chinese, "chinese")))
        edits = [Proposal(*row) for row in zip(*columns)]
    pairs, wordless = [], 0
    for before, after, edit, made_by in zip(sources, targets, edits, makers):
        details = {"object": edit.thing, "content": edit.content} if proposals else {}
        if direction != BACKWARD:
            pairs.append(make_pair(before, after, edit.kind, edit.english, edit.chinese, made_by, {**details, "direction": FORWARD}))
        if direction != FORWARD and edit.back_kind:
            pairs.append(make_pair(after, before, edit.back_kind, edit.back_english, edit.back_chinese, made_by, {**details, "direction": BACKWARD}))
        wordless += direction != FORWARD and not edit.back_kind
    lines = [f"{len(pairs)} pairs."] + [f"{wordless} edits have no words for the way back."] * bool(wordless)
    return tuple(pairs), "\n".join(lines + [f"{describe(pair)} / {pair.chinese}" for pair in pairs])


def judge_pairs(clip, pairs: tuple[Pair, ...], seed: int) -> tuple[tuple[Pair, ...], str]:
    """The pairs with a verdict each, and a report. Those that have scores keep them. A reply that cannot be read is asked for anew four times."""
    check_can_generate(clip)
    judged = list(pairs)
    waiting = [(place, pair) for place, pair in enumerate(pairs) if pair.verdict is None or pair.verdict.problem]
    edits = ((f"pair {digest(pair.source.tobytes(), pair.target.tobytes())}", Image.fromarray(pair.source), Image.fromarray(pair.target), pair.instruction)
             for _, pair in waiting)
    progress = comfy.utils.ProgressBar(len(waiting))
    for done, (number, verdict) in enumerate(judge_edits(clip, edits, seed), 1):
        place, pair = waiting[number]
        judged[place] = pair.with_verdict(verdict)
        progress.update_absolute(done)
    scores = [pair.verdict.problem or f"semantics {min(pair.verdict.semantics):g}, quality {min(pair.verdict.quality):g}" for pair in judged]
    usable = sum(not pair.verdict.problem for pair in judged)
    return tuple(judged), "\n".join([f"{usable} of {len(judged)} pairs judged.", *(f"{text} ({describe(pair)})" for pair, text in zip(judged, scores))])


def dataset_folder(name: str) -> Path:
    """The folder of a dataset, in the host's output folder. Raises Step1XError for what cannot be a folder's name."""
    return Path(folder_paths.get_output_directory(), DATASETS, check_name(name, "name of a dataset"))


def journal_state(name: str | None) -> str:
    """Another text whenever pairs were added, or the dataset was deleted.

    name: None is a connected input, whose value the host does not know yet: then every dataset counts.
    """
    if name is None:
        journals = sorted(Path(folder_paths.get_output_directory(), DATASETS).glob(f"*/{JOURNAL}"))
    else:
        journals = [path for path in [dataset_folder(name) / JOURNAL] if path.is_file()]
    return " ".join(f"{path.parent.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in journals)


def save_pairs(pairs: tuple[Pair, ...], name: str) -> tuple[str, str]:
    """Add pairs to a dataset -> its folder, and a report with the statistics of all it holds. What looks like a pair that is there is left out."""
    folder = dataset_folder(name)
    with PairStore(folder) as store:
        known = [store.add(encode(pair)) for pair in with_progress(list(pairs))]
        cards = [stored_card(folder, row) for row in store.rows]
    twins = [f"left out: looks like {twin} ({describe(pair)})" for pair, twin in zip(pairs, known) if twin]
    return str(folder), "\n".join([f"{len(pairs) - len(twins)} pairs added to {folder}, which has {len(cards)}.", *twins, "", statistics(cards)])


def show_pairs(pairs: tuple[Pair, ...], limit: int) -> tuple[Tensor, str]:
    """A contact sheet as the host's IMAGE, and the statistics of the pairs."""
    cards = [card(pair) for pair in pairs]
    return from_uint8(np.asarray(contact_sheet(cards, limit)))[None], statistics(cards)
