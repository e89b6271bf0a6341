"""GEdit-Bench: the dataset and the official layout of its results (docs/model.md, GEdit-Bench).

A dataset is a folder in one of two layouts, with the same columns:
- parquet files as on the hub (`data/train-*.parquet`), which need pyarrow to read;
- `metadata.jsonl`, one item a line, with the picture's path in `file_name`. Hugging Face's imagefolder reads it, too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image

from .. import languages
from ..errors import Step1XError
from ..files import check_name, is_picture, open_picture, png, safe_path, save_picture, write_file

LANGUAGES = tuple(language.gedit for language in languages.LANGUAGES)
METADATA = "metadata.jsonl"
PICTURE_COLUMN = "input_image_raw"
COLUMNS = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")


@dataclass(frozen=True)
class Item:
    """One edit to make. `load` gives the source picture as RGB; it raises Step1XError where the picture cannot be read.
    """

    key: str
    task_type: str
    language: str
    instruction: str
    intersection: bool
    load: Callable[[], Image.Image] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """What tells an item from all others."""
        return f"{self.task_type}/{self.language}/{self.key}"


def make_item(row: dict, load: Callable[[], Image.Image], place: str) -> Item:
    """An item of a row's columns. Raises Step1XError for a row with other values than the dataset has; place: for the
    error."""
    missing = [name for name in COLUMNS if row.get(name) is None]
    if missing:
        raise Step1XError(
            f"{place} has no '{missing[0]}'. The dataset must have the columns {', '.join(COLUMNS)} and the picture."
        )
    key, task_type, instruction, language, intersection = (row[name] for name in COLUMNS)
    if not isinstance(instruction, str) or language not in LANGUAGES or not isinstance(intersection, bool):
        raise Step1XError(
            f"{place} does not hold a text as instruction, one of {', '.join(LANGUAGES)} as instruction_language, "
            "or true or false as Intersection_exist."
        )
    return Item(check_name(key, "key"), check_name(task_type, "task type"), language, instruction, intersection, load)


def read_folder(folder: Path) -> list[Item]:
    """The items of a folder with `metadata.jsonl`, in its order. Pictures outside of the folder are refused."""
    items = []
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8-sig").splitlines(), 1):
        place = f"Line {number} of {folder / METADATA}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise Step1XError(f"{place} is no JSON ({problem}). Correct it or make the folder anew.") from problem
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise Step1XError(f"{place} has no 'file_name'. Each line is an object with the picture's path in it.")
        path = safe_path(folder, row["file_name"], folder, place)
        items.append(make_item(row, partial(open_picture, path, str(path)), place))
    return items


def parquet():
    """The module that reads parquet files. Raises Step1XError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as problem:
        raise Step1XError(
            "The dataset is in parquet files, which need the package pyarrow: install it with "
            "`python -m pip install pyarrow` in ComfyUI's "
            "Python. `python scripts/gedit.py unpack`, run where it is installed, makes a folder that needs nothing."
        ) from problem
    return pyarrow.parquet


# Items come in the file's order, so the group at hand is nearly always the last one.
@lru_cache(maxsize=1)
def picture_group(path: Path, group: int, stamp: tuple[int, ...]) -> list:
    """The picture column of one row group: dicts with the file's content under "bytes", or the content itself. stamp:
    see `file_stamp`."""
    return (
        parquet().ParquetFile(path).read_row_group(group, columns=[PICTURE_COLUMN]).column(PICTURE_COLUMN).to_pylist()
    )


def file_stamp(path: Path) -> tuple[int, ...]:
    """Other numbers whenever a file was replaced or written to."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_parquet_picture(path: Path, group: int, row: int, stamp: tuple[int, ...]) -> Image.Image:
    """stamp: of the file when its rows were read. Raises Step1XError where it was replaced since: its pictures would go
    with other instructions."""
    place = f"The picture of row {row} in group {group} of {path}"
    try:
        if file_stamp(path) != stamp:
            raise Step1XError(
                f"{path} was replaced after its rows were read. Run the node that opens the dataset again."
            )
        value = picture_group(path, group, stamp)[row]
    # pyarrow's own errors are ValueErrors and OSErrors.
    except (ValueError, OSError, LookupError) as problem:
        if isinstance(problem, Step1XError):
            raise
        raise Step1XError(f"{place} cannot be read ({problem}). Get the file again.") from problem
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise Step1XError(f"{place} is missing. Get the file again.")
    return open_picture(content, place)


def read_parquet(path: Path) -> list[Item]:
    """The items of one parquet file, in its order; pictures are read when they are asked for."""
    module = parquet()
    items = []
    try:
        stamp = file_stamp(path)
        file = module.ParquetFile(path)
        absent = [name for name in (*COLUMNS, PICTURE_COLUMN) if name not in file.schema_arrow.names]
        if absent:
            raise Step1XError(
                f"{path} has no column '{absent[0]}': it is not GEdit-Bench. Its columns are {', '.join(file.schema_arrow.names)}."
            )
        groups = [file.read_row_group(group, columns=list(COLUMNS)).to_pylist() for group in range(file.num_row_groups)]
    # pyarrow's own errors are ValueErrors and OSErrors.
    except (ValueError, OSError) as problem:
        if isinstance(problem, Step1XError):
            raise
        raise Step1XError(f"{path} cannot be read as a parquet file ({problem}). Download it again.") from problem
    for group, rows in enumerate(groups):
        for row, values in enumerate(rows):
            items.append(
                make_item(
                    values,
                    partial(open_parquet_picture, path, group, row, stamp),
                    f"Row {row} in group {group} of {path}",
                )
            )
    return items


def dataset_files(path: Path) -> list[Path]:
    """The files that a dataset is read from: its metadata.jsonl, or parquet files, those of the split `train` where
    there are others."""
    if path.is_file():
        return [path]
    if (path / METADATA).is_file():
        return [path / METADATA]
    files = sorted(path.rglob("*.parquet"))
    return [file for file in files if file.name.startswith("train")] or files


def read_dataset(path: Path) -> list[Item]:
    """The items of a dataset: a folder in either layout, or one parquet file.

    Raises Step1XError where there is none, for faulty rows, for two items with the same name, and for parquet files
    without pyarrow.
    """
    files = dataset_files(path)
    if not files:
        raise Step1XError(f"There is no GEdit-Bench in {path}: neither {METADATA} nor parquet files. "
                          "Put the dataset of the hub (stepfun-ai/GEdit-Bench) there.")
    items = [
        item for file in files for item in (read_folder(file.parent) if file.name == METADATA else read_parquet(file))
    ]
    seen = set()
    for item in items:
        # File names on Windows and macOS do not tell capitals.
        if item.name.lower() in seen:
            raise Step1XError(
                f"The dataset {path} has two items {item.name}; one result would take the other's place. Remove one of them."
            )
        seen.add(item.name.lower())
    return items


def select(items: list[Item], languages=LANGUAGES, task_types=(), limit: int = 0) -> list[Item]:
    """The items of these languages and task types (none: all), at most `limit` (0: all) of each type in each language.
    """
    counts, chosen = {}, []
    for item in items:
        if item.language in languages and (not task_types or item.task_type in task_types):
            group = item.task_type, item.language
            counts[group] = counts.get(group, 0) + 1
            if not limit or counts[group] <= limit:
                chosen.append(item)
    return chosen


def write_folder(items: list[Item], folder: Path) -> None:
    """Write a dataset as a folder. Pictures that are there are kept; the list is written last, so that a folder with it
    is whole."""
    rows = []
    for item in items:
        name = f"images/{item.name}.png"
        if not is_picture(folder / name):
            save_picture(folder / name, png(item.load()))
        values = (item.key, item.task_type, item.instruction, item.language, item.intersection)
        rows.append({"file_name": name, **dict(zip(COLUMNS, values))})
    write_file(folder / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def result_path(results: Path, method: str, item: Item) -> Path:
    """Where the official code looks for an edited picture."""
    return results / method / "fullset" / item.task_type / item.language / f"{item.key}.png"


def unedited(items: list[Item], results: Path, method: str) -> list[Item]:
    """The items that have no readable result yet."""
    return [item for item in items if not is_picture(result_path(results, method, item))]
