"""Judgements of GEdit-Bench: the record of them, the official tables, and the means (docs/model.md, GEdit-Bench).

Every item of the dataset is in one of the states below. The official code leaves out those without scores, which lifts
its means; so
there are two sets of means: official-style ones, over the items with scores, and strict ones, in which an item without
counts 0.
"""

import csv
import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..files import is_picture, write_file
from ..reasoning.judge import Verdict
from ..tasks import ordered_types
from .dataset import LANGUAGES, Item, result_path

JUDGED = "judged"
# No readable edited picture; the judge's answers could not be read; not asked yet, or the judge could not be reached.
MISSING, UNPARSABLE, UNJUDGED = "missing", "unparsable", "unjudged"
STATES = (JUDGED, MISSING, UNPARSABLE, UNJUDGED)

# "sementics" is how the official tables spell it.
CSV_COLUMNS = (
    "key",
    "edited_image",
    "instruction",
    "sementics_score",
    "quality_score",
    "intersection_exist",
    "instruction_language",
)
OFFICIAL, STRICT = "official-style", "strict"
FULL_SET, INTERSECTION = "full set", "intersection"
ALL = "all"
# Replies are kept for people to read.
KEPT_CHARACTERS = 2000


def scores_folder(results: Path, method: str, judge: str) -> Path:
    """Where everything about one judge's view of one method is kept."""
    return results / method / "scores" / judge


def records_path(results: Path, method: str, judge: str) -> Path:
    return scores_folder(results, method, judge) / "judgements.jsonl"


def digest(item: Item, picture: Path) -> str:
    """Stands for what was judged: a picture made anew, or another instruction, is judged again."""
    return hashlib.sha256(item.instruction.encode() + b"\0" + picture.read_bytes()).hexdigest()


def append_record(path: Path, item: Item, picture: str, verdict: Verdict) -> None:
    """Put a verdict on record. picture: the digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {
        "item": item.name,
        "digest": picture,
        "semantics": verdict.semantics,
        "quality": verdict.quality,
        "problem": verdict.problem,
        "replies": [reply[:KEPT_CHARACTERS] for reply in verdict.replies],
    }
    # Escaped, as replies may hold half a character.
    line = json.dumps(row) + "\n"
    with open(path, "ab+") as file:
        # What a killed run left in its last line must not swallow this one.
        if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(line.encode())


def read_records(path: Path) -> dict[str, dict]:
    """The last record of each item, by its name; lines that a killed run left unfinished are passed over."""
    records = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            records[row["item"]] = {name: row[name] for name in ("digest", "semantics", "quality", "problem")}
        except (ValueError, LookupError, TypeError):
            continue
    return records


@dataclass(frozen=True)
class Entry:
    """One item of the dataset and what became of it. semantics, quality: SC and PQ, 0..10, the lower of each pair; None
    unless judged."""

    item: Item
    picture: Path
    state: str
    semantics: float | None = None
    quality: float | None = None
    problem: str = ""

    @property
    def overall(self) -> float:
        return math.sqrt(self.semantics * self.quality)


def find_entries(items: list[Item], results: Path, method: str, judge: str) -> list[Entry]:
    """The state of every item, in the dataset's order. Edited pictures are read, to see whether they are those that
    were judged."""
    records = read_records(records_path(results, method, judge))
    entries = []
    for item in items:
        path = result_path(results, method, item)
        record = records.get(item.name)
        if not is_picture(path):
            entries.append(Entry(item, path, MISSING))
        elif record is None or record["digest"] != digest(item, path):
            entries.append(Entry(item, path, UNJUDGED))
        elif record["semantics"] is None or record["quality"] is None:
            entries.append(Entry(item, path, UNPARSABLE, problem=record["problem"]))
        else:
            entries.append(Entry(item, path, JUDGED, min(record["semantics"]), min(record["quality"])))
    return entries


@dataclass(frozen=True)
class Means:
    """count: items that went in. semantics, quality, overall: means of SC, PQ and O; NaN without items."""

    count: int
    semantics: float
    quality: float
    overall: float


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def means_of(entries: list[Entry], strict: bool) -> Means:
    """strict: items without scores count 0; else they are left out."""
    rows = [(entry.semantics, entry.quality, entry.overall) if entry.state == JUDGED else (0.0, 0.0, 0.0)
            for entry in entries if strict or entry.state == JUDGED]
    return Means(len(rows), *(mean([row[i] for row in rows]) for i in range(3)))


@dataclass(frozen=True)
class Summary:
    """Means of one language (or all), set and way of counting: by task type, and their average, the mean over types and
    not over items."""

    language: str
    subset: str
    counting: str
    types: dict[str, Means]

    @property
    def average(self) -> Means:
        counted = [means for means in self.types.values() if means.count]
        averages = (mean([getattr(means, name) for means in counted]) for name in ("semantics", "quality", "overall"))
        return Means(sum(means.count for means in counted), *averages)


def summarise(entries: list[Entry]) -> list[Summary]:
    """All means: each language that occurs, and all if there are several; the full set and the intersection;
    official-style and strict."""
    languages = [language for language in LANGUAGES if any(entry.item.language == language for entry in entries)]
    types = ordered_types([entry.item for entry in entries])
    summaries = []
    for language in languages + [ALL] * (len(languages) > 1):
        for subset in (FULL_SET, INTERSECTION):
            chosen = [
                entry
                for entry in entries
                if language in (ALL, entry.item.language) and (subset == FULL_SET or entry.item.intersection)
            ]
            for counting in (OFFICIAL, STRICT):
                by_type = {
                    name: means_of([entry for entry in chosen if entry.item.task_type == name], counting == STRICT)
                    for name in types
                }
                summaries.append(Summary(language, subset, counting, by_type))
    return summaries


def csv_text(columns, rows) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def write_official_tables(entries: list[Entry], results: Path, method: str, folder: Path) -> list[Path]:
    """Write `{method}_{task_type}_{language}_vie_score.csv` for each task type and language, and for all languages: the
    items with scores.

    edited_image is the picture's path within `results`.
    """
    written = []
    for task_type in ordered_types([entry.item for entry in entries]):
        for language in (ALL, *LANGUAGES):
            rows = [
                entry
                for entry in entries
                if entry.item.task_type == task_type and language in (ALL, entry.item.language)
            ]
            if not rows:
                continue
            table = [
                (
                    entry.item.key,
                    entry.picture.relative_to(results).as_posix(),
                    entry.item.instruction,
                    entry.semantics,
                    entry.quality,
                    entry.item.intersection,
                    entry.item.language,
                )
                for entry in rows
                if entry.state == JUDGED
            ]
            path = folder / f"{method}_{task_type}_{language}_vie_score.csv"
            write_file(path, csv_text(CSV_COLUMNS, table).encode())
            written.append(path)
    return written


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def summary_table(summaries: list[Summary]) -> str:
    """All means as CSV, a line for each task type and one for their average."""
    rows = []
    for summary in summaries:
        for name, means in (*summary.types.items(), ("average", summary.average)):
            values = (
                "" if math.isnan(value) else round(value, 6)
                for value in (means.semantics, means.quality, means.overall)
            )
            rows.append((summary.language, summary.subset, summary.counting, name, means.count, *values))
    return csv_text(("language", "set", "counting", "task_type", "items", "semantics", "quality", "overall"), rows)


def count_states(entries: list[Entry]) -> dict[str, int]:
    return {state: sum(entry.state == state for entry in entries) for state in STATES}


def describe_states(entries: list[Entry]) -> str:
    counts = count_states(entries)
    return f"{counts[JUDGED]} of {len(entries)} items judged; {counts[MISSING]} missing, {counts[UNPARSABLE]} unparsable, {counts[UNJUDGED]} not judged yet."


def cell(text: str) -> str:
    """A text as part of a Markdown table or list."""
    return " ".join(text.split()).replace("|", "\\|")


def markdown_report(
    method: str, judge: str, entries: list[Entry], summaries: list[Summary], shown: list[Entry] = ()
) -> str:
    """Tables of all means, and every item without scores with the reason. shown: the items of the contact sheet,
    numbered as there."""
    lines = [
        f"# GEdit-Bench: {method}, judged by {judge}",
        "",
        describe_states(entries),
        "SC is semantics, PQ is perceptual quality, O is the root of their product, per item. Averages are over task "
        "types.",
        "Official-style: items without scores are left out. Strict: they count 0.",
    ]
    for summary in summaries:
        if summary.counting == STRICT:
            continue
        strict = next(
            other
            for other in summaries
            if (other.language, other.subset, other.counting) == (summary.language, summary.subset, STRICT)
        )
        lines += [
            "",
            f"## {summary.language}, {summary.subset}",
            "",
            "| Task type | Items | SC | PQ | O | Items, strict | SC, strict | PQ, strict | O, strict |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, means in (*summary.types.items(), ("**average**", summary.average)):
            other = strict.types.get(name, strict.average)
            values = [
                part
                for row in (means, other)
                for part in (str(row.count), number(row.semantics), number(row.quality), number(row.overall))
            ]
            lines.append(f"| {name} | {' | '.join(values)} |")
    without = [entry for entry in entries if entry.state != JUDGED]
    if without:
        lines += ["", "## Items without scores", ""]
        lines += [
            f"- {entry.item.name}: {entry.state}{f' ({cell(entry.problem)})' if entry.problem else ''}"
            for entry in without
        ]
    if shown:
        lines += ["", "## Contact sheet", ""]
        lines += [
            f"{i}. {entry.item.name}: SC {entry.semantics:g}, PQ {entry.quality:g}, O {entry.overall:.2f}. {cell(entry.item.instruction)}"
            for i, entry in enumerate(shown, 1)
        ]
    return "\n".join(lines) + "\n"


def best_and_worst(entries: list[Entry], count: int) -> tuple[list[Entry], list[Entry]]:
    """The judged items with the highest and the lowest O, at most `count` of each and none twice; among equals the
    dataset's order decides."""
    ranked = sorted((entry for entry in entries if entry.state == JUDGED), key=lambda entry: -entry.overall)
    best = ranked[:min(count, (len(ranked) + 1) // 2)]
    return best, ranked[len(best):][-count:][::-1]
