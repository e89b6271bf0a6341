"""Datasets of pairs in the host's output folder: adding to them, and looking at what is added."""

from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
from torch import Tensor

from ...files import check_name
from ...images import from_uint8
from ...pairs.record import Pair
from ...pairs.review import card, contact_sheet, describe, statistics, stored_card
from ...pairs.store import JOURNAL, PairStore, encode

DATASETS = "edit_pairs"
# The name that saves nothing.
PREVIEW = ""


def with_progress(entries: list) -> Iterator:
    """The entries, with a progress bar. Raises the host's exception when the run is cancelled."""
    progress = comfy.utils.ProgressBar(len(entries))
    for number, entry in enumerate(entries, 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield entry
        progress.update_absolute(number)


def dataset_folder(name: str) -> Path:
    """The folder of a dataset, in the host's output folder. Raises Step1XError for what cannot be a folder's name."""
    return Path(folder_paths.get_output_directory(), DATASETS, check_name(name, "name of a dataset"))


def journal_state(name: str | None) -> str:
    """Another text whenever pairs were added, or the dataset was deleted.

    name: None is a connected input, whose value the host does not know yet: then every dataset counts.
    """
    if name == PREVIEW:
        return ""
    if name is None:
        journals = sorted(Path(folder_paths.get_output_directory(), DATASETS).glob(f"*/{JOURNAL}"))
    else:
        journals = [path for path in [dataset_folder(name) / JOURNAL] if path.is_file()]
    return " ".join(f"{path.parent.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in journals)


def save_pairs(pairs: tuple[Pair, ...], name: str) -> tuple[str, str]:
    """Add pairs to a dataset -> its folder, and a report with the statistics of all it holds. What looks like a pair
    that is there is left out."""
    folder = dataset_folder(name)
    with PairStore(folder) as store:
        known = [store.add(encode(pair)) for pair in with_progress(list(pairs))]
        cards = [stored_card(folder, row) for row in store.rows]
    twins = [f"left out: looks like {twin} ({describe(pair)})" for pair, twin in zip(pairs, known) if twin]
    return str(folder), "\n".join(
        [f"{len(pairs) - len(twins)} pairs added to {folder}, which has {len(cards)}.", *twins, "", statistics(cards)]
    )


def show_pairs(pairs: tuple[Pair, ...], limit: int) -> tuple[Tensor, str]:
    """A contact sheet as the host's IMAGE, and the statistics of the pairs."""
    cards = [card(pair) for pair in pairs]
    return from_uint8(np.asarray(contact_sheet(cards, limit)))[None], statistics(cards)


def save_or_preview(pairs: tuple[Pair, ...], name: str, limit: int) -> tuple[str, Tensor, str]:
    """The dataset's folder, "" where the name is empty and nothing is saved; a contact sheet of the pairs; a report."""
    if name == PREVIEW:
        sheet, table = show_pairs(pairs, limit)
        return "", sheet, f"Preview of {len(pairs)} pairs. Nothing was saved: 'name' is empty.\n\n{table}"
    folder, report = save_pairs(pairs, name)
    return folder, show_pairs(pairs, limit)[0], report
