"""A dataset of pairs on disk, in the layout of the official training code, that grows and survives a kill
(docs/model.md, LoRA training).

`sources/ab/KEY.png`, `targets/ab/KEY.png`: the pictures, a source once however many pairs it has.
`pairs.jsonl`: the journal, one line for each pair that is there or was turned down. It alone is the truth, all else
follows from it.
`en-00000.json`, `zh-00000.json`: the official JSON in each language, so many pairs in a file.
"""

import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import Step1XError
from ..files import unwritable, write_file
from ..languages import LANGUAGES
from ..training.dataset import CAPTION, REFERENCE
from .hashing import SIZE, Index, fingerprint
from .record import Pair, digest

JOURNAL = "pairs.jsonl"
PICTURE = re.compile(r"(sources|targets)/[0-9a-f]{2}/[0-9a-f]{20}\.png")
SHARD = 1000
# Pairs after which the JSON files are brought up to date, for whoever reads them while the dataset grows.
REFRESH = 100
# 1 of 0..9: larger by a seventh than the default, several times as fast.
COMPRESSION = 1


@dataclass(frozen=True)
class Encoded:
    """A pair as it is stored: the files, and its line in the journal. Made in any process."""

    source: bytes
    target: bytes
    row: dict


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=COMPRESSION)
    return content.getvalue()


def encode(pair: Pair) -> Encoded:
    """Files, names, hash and provenance of a pair."""
    source_key = digest(pair.source.tobytes(), str(pair.source.shape))
    key = digest(source_key, pair.target.tobytes(), pair.kind, pair.maker)
    verdict = pair.verdict and {
        "semantics": pair.verdict.semantics,
        "quality": pair.verdict.quality,
        "problem": pair.verdict.problem,
    }
    row = {
        "key": key,
        "source": f"sources/{source_key[:2]}/{source_key}.png",
        "target": f"targets/{key[:2]}/{key}.png",
        "kind": pair.kind,
        "en": pair.english,
        "zh": pair.chinese,
        "maker": pair.maker,
        "details": pair.details,
        "verdict": verdict,
        "hash": fingerprint(pair.source, pair.target).tobytes().hex(),
    }
    return Encoded(png(pair.source), png(pair.target), row)


def read_journal(path: Path) -> tuple[list[dict], int]:
    """The rows of a journal, and how many of its bytes hold whole lines: a kill may have cut the last one.

    Raises Step1XError for any other line that is no row.
    """
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            if "turned_down" not in row:
                valid = all(isinstance(row[name], str) for name in ("key", "kind", "en", "zh", "maker")) and isinstance(
                    row["verdict"], dict | None
                )
                # A dataset may come from somebody else: no name in it leads out of its folder.
                valid = valid and all(PICTURE.fullmatch(row[name]) for name in ("source", "target"))
                if not valid or len(bytes.fromhex(row["hash"])) != SIZE or not isinstance(row["details"], dict):
                    raise ValueError("values of another form")
        except (ValueError, LookupError, TypeError, RecursionError) as problem:
            raise Step1XError(f"Line {number} of {path} is damaged ({type(problem).__name__}: {problem}). "
                              "Delete that line, or start another dataset.") from problem
        rows.append(row)
    return rows, whole


class PairStore:
    """An open dataset. `with PairStore(folder) as store: store.add(encoded)`; one process at a time writes to it.

    Raises Step1XError for a damaged journal, and for a disk that is full or write-protected.
    """

    def __init__(self, folder: Path):
        self.folder, self.journal = folder, folder / JOURNAL
        rows, whole = read_journal(self.journal)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.journal, "ab", buffering=0)
            self.file.truncate(whole)
            # What a killed run was writing. No other process writes here now.
            for left in folder.rglob("*.part"):
                left.unlink()
        except OSError as problem:
            raise self.unwritable(problem) from problem
        self.rows = [row for row in rows if "turned_down" not in row]
        # Orders that need not be carried out again, whatever came of them.
        self.done = {row["order"] for row in rows if row.get("order")}
        self.index = Index()
        for row in self.rows:
            self.index.add(group(row), np.frombuffer(bytes.fromhex(row["hash"]), np.uint8), row["key"])
        self.fresh = 0
        self.stale = set(range(len(self.rows) // SHARD + 1))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self.refresh()
        finally:
            self.file.close()

    def unwritable(self, problem: OSError) -> Step1XError:
        return unwritable(f"The dataset {self.folder}", problem)

    def write_row(self, row: dict) -> None:
        """A line of the journal, whole or not at all: half of one would spoil the next. Raises Step1XError where the
        disk is full."""
        data, place = json.dumps(row).encode() + b"\n", self.journal.stat().st_size
        try:
            if self.file.write(data) != len(data):
                raise OSError("No space left on device")
        except OSError as problem:
            self.file.truncate(place)
            raise self.unwritable(problem) from problem

    def add(self, encoded: Encoded, order: str = "") -> str | None:
        """Store a pair unless one that looks the same is there -> the name of that one. order: what it was made for, to
        be found in `done`.

        The pictures come before their line: what the journal names is there as a whole.
        """
        row = encoded.row
        print_ = np.frombuffer(bytes.fromhex(row["hash"]), np.uint8)
        known = self.index.find(group(row), print_)
        if known:
            self.turn_down(f"looks like {known}", order)
            return known
        try:
            for name, content in ((row["source"], encoded.source), (row["target"], encoded.target)):
                if not (self.folder / name).is_file():
                    write_file(self.folder / name, content)
            self.write_row({**row, "order": order})
        except OSError as problem:
            raise self.unwritable(problem) from problem
        self.index.add(group(row), print_, row["key"])
        self.stale.add(len(self.rows) // SHARD)
        self.rows.append(row)
        if order:
            self.done.add(order)
        self.fresh += 1
        if self.fresh % REFRESH == 0:
            self.refresh()
        return None

    def turn_down(self, reason: str, order: str) -> None:
        """Remember that an order gave no pair."""
        if order:
            self.write_row({"turned_down": reason, "order": order})
            self.done.add(order)

    def refresh(self) -> None:
        """Bring the official JSON files up to date."""
        try:
            for number in sorted(self.stale):
                for language in (language.code for language in LANGUAGES):
                    entries = official(self.rows[number * SHARD:(number + 1) * SHARD], language)
                    path = self.folder / f"{language}-{number:05}.json"
                    if entries:
                        write_file(path, json.dumps(entries, ensure_ascii=False, indent=1).encode())
                    else:
                        path.unlink(missing_ok=True)
        except OSError as problem:
            raise self.unwritable(problem) from problem
        self.stale.clear()


def group(row: dict) -> str:
    """What a near duplicate has in common with its double besides the looks."""
    return f"{row['kind']}/{row['maker']}"


def official(rows: Iterable[dict], language: str) -> dict:
    """The pairs that have an instruction in this language, as the official training code reads them; it passes over
    what is added to each entry."""
    return {
        row["target"]: {
            REFERENCE: row["source"],
            CAPTION: row[language],
            "provenance": {name: row[name] for name in ("kind", "maker", "details", "verdict")},
        }
        for row in rows
        if row[language]
    }
