"""GEdit-Bench in the host: its folders, results and judgements."""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
import folder_paths
import numpy as np
from PIL import Image
from torch import Tensor

from ...checks import check_pictures
from ...errors import Step1XError
from ...files import check_name, open_picture, png, save_picture
from ...gedit.dataset import LANGUAGES, Item, dataset_files, read_dataset, result_path, select
from ...gedit.miniature import miniature
from ...gedit.report import Report, write_report
from ...gedit.scores import (
    ALL,
    UNJUDGED,
    UNPARSABLE,
    Entry,
    append_record,
    describe_states,
    digest,
    find_entries,
    records_path,
)
from ...images import from_uint8, to_rgb, truncate_uint8
from ...reasoning.judge import Verdict
from ..reasoning.generation import check_can_generate
from ..reasoning.judging import judge_edits

log = logging.getLogger(__name__)

RESULTS = "gedit_bench"


@dataclass(frozen=True)
class Bench:
    """What is measured: items of a dataset, and whose results they get."""

    items: tuple[Item, ...]
    method: str
    results: Path


def results_folder() -> Path:
    """The folder of all results, in the host's output folder."""
    return Path(folder_paths.get_output_directory(), RESULTS)


def dataset_path(name: str) -> Path:
    """A dataset in the host's input folder. Raises Step1XError for a name that leads out of it."""
    root = os.path.abspath(folder_paths.get_input_directory())
    path = os.path.abspath(os.path.join(root, name))
    # A link in the input folder is the person's own; a path out of it may be a stranger's workflow.
    if os.path.commonprefix([path, root + os.sep]) != root + os.sep:
        raise Step1XError(
            f"The dataset {name[:80]!r} is not in ComfyUI's input folder. Put the dataset's folder there and give its name."
        )
    if not os.path.exists(path):  # unlike Path.is_file, it takes a name that no file can have, too
        raise Step1XError(
            f"There is no GEdit-Bench in {root} under the name {name[:80]!r}. Put the dataset's folder there, or correct its name."
        )
    return Path(path)


def open_bench(dataset: str, method: str, language: str, task_types: str, limit: int) -> Bench:
    """dataset: a folder's name, "" for the drawn miniature. language: one of them, or all. task_types: names with
    commas between them, "" for all.

    Raises Step1XError as `read_dataset` does, for a method that cannot be a folder's name, and if no item is left.
    """
    check_name(method, "name of a method")
    items = read_dataset(dataset_path(dataset.strip())) if dataset.strip() else miniature()
    wanted = [name.strip() for name in task_types.split(",") if name.strip()]
    known = {item.task_type for item in items}
    for name in wanted:
        if name not in known:
            raise Step1XError(
                f"The dataset has no task type {name[:80]!r}; it has {', '.join(sorted(known))}. Correct the input 'task_types'."
            )
    chosen = select(items, LANGUAGES if language == ALL else (language,), wanted, limit)
    if not chosen:
        raise Step1XError(f"The dataset has no item in the language '{language}' of these task types. Choose others.")
    return Bench(tuple(chosen), method, results_folder())


def bench_fingerprint(dataset: str | None, method: str | None) -> str:
    """Another text whenever a file of the dataset, a result or a judgement changes.

    None is a connected input: the host does not know its value yet, and the node that it comes from has its own
    fingerprint. Without the method's name those of all methods count.
    """
    folder = results_folder() / check_name(method, "name of a method") if method is not None else results_folder()
    depth = "" if method is not None else "*/"
    files = sorted([*folder.glob(f"{depth}fullset/*/*/*.png"), *folder.glob(f"{depth}scores/*/*.jsonl")])
    files += dataset_files(dataset_path(dataset.strip())) if dataset and dataset.strip() else []
    state = hashlib.sha256()
    for path in files:
        status = path.stat()
        state.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return state.hexdigest()


def source_image(item: Item) -> Tensor:
    """The source picture as the host's IMAGE, [1, H, W, 3]."""
    return from_uint8(np.asarray(item.load()))[None]


def save_edit(bench: Bench, item: Item, image: Tensor) -> Path:
    """Store an edited picture [1, H, W, C] in the official layout, as 8-bit PNG by truncation as the host saves it ->
    its path."""
    check_pictures(image, "images")
    if image.shape[0] != 1:
        raise Step1XError(
            f"There are {image.shape[0]} edited pictures for the item {item.name}; it takes one. Connect the picture of a single edit."
        )
    path = result_path(bench.results, bench.method, item)
    save_picture(path, png(Image.fromarray(truncate_uint8(to_rgb(image[0])).numpy())))
    return path


def judge_entries(clip, entries: list[Entry], seed: int) -> Iterator[tuple[Entry, Verdict]]:
    """The entries with their verdicts, in the order of `judge_edits`. Raises Step1XError for a source picture that
    cannot be read."""
    edits = (
        (
            f"gedit {entry.item.name}",
            entry.item.load(),
            open_picture(entry.picture, str(entry.picture)),
            entry.item.instruction,
        )
        for entry in entries
    )
    for number, verdict in judge_edits(clip, edits, seed):
        yield entries[number], verdict


def judge_bench(bench: Bench, clip, judge: str, seed: int, again: bool) -> str:
    """Judge every stored edit that has not been judged yet; each verdict is put on record at once -> what is judged and
    what is not.

    judge: the name that the judgements are kept under. again: whether those whose answers could not be read are asked
    for anew.

    Raises Step1XError for a text encoder that cannot write and for a source picture that cannot be read, and the host's
    exception when the run is cancelled.
    """
    check_name(judge, "name of a judge")
    check_can_generate(clip)
    entries = find_entries(bench.items, bench.results, bench.method, judge)
    waiting = [entry for entry in entries if entry.state == UNJUDGED or again and entry.state == UNPARSABLE]
    progress = comfy.utils.ProgressBar(len(waiting))
    for done, (entry, verdict) in enumerate(judge_entries(clip, waiting, seed), 1):
        append_record(
            records_path(bench.results, bench.method, judge), entry.item, digest(entry.item, entry.picture), verdict
        )
        log.info(
            "GEdit-Bench: %s %s",
            entry.item.name,
            verdict.problem or f"SC {min(verdict.semantics):g} PQ {min(verdict.quality):g}",
        )
        progress.update_absolute(done)
    return describe_states(find_entries(bench.items, bench.results, bench.method, judge) if waiting else entries)


def report_images(bench: Bench, judge: str) -> tuple[Report, list[Tensor]]:
    """Write the report -> it, and its pictures as the host's IMAGEs: bars, radar, contact sheet."""
    check_name(judge, "name of a judge")
    report = write_report(bench.items, bench.results, bench.method, judge)
    return report, [from_uint8(np.asarray(picture))[None] for picture in (report.bars, report.radar, report.sheet)]
