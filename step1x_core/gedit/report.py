"""Everything about one judge's view of one method, written beside its judgements."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..files import png, write_file
from .dataset import Item
from .plots import bar_chart, contact_sheet, radar_chart
from .scores import (
    FULL_SET,
    OFFICIAL,
    STRICT,
    Entry,
    Summary,
    best_and_worst,
    find_entries,
    markdown_report,
    number,
    scores_folder,
    summarise,
    summary_table,
    write_official_tables,
)

SHOWN = 6


@dataclass(frozen=True)
class Report:
    """text: the tables as Markdown. bars, radar, sheet: the pictures. folder: where all of it was written."""

    entries: list[Entry]
    summaries: list[Summary]
    text: str
    bars: Image.Image
    radar: Image.Image
    sheet: Image.Image
    folder: Path


def chart_series(summaries: list[Summary], label: str = "") -> dict[str, dict[str, float]]:
    """O by task type on the full set, for each language and way of counting. label: goes before the names."""
    series = {}
    for counting in (OFFICIAL, STRICT):
        for summary in summaries:
            if summary.subset == FULL_SET and summary.counting == counting:
                name = f"{label}{summary.language}, {counting}, average {number(summary.average.overall)}"
                series[name] = {task_type: means.overall for task_type, means in summary.types.items()}
    return series


def write_report(items: list[Item], results: Path, method: str, judge: str, shown: int = SHOWN) -> Report:
    """Tables (official CSVs, summary.csv, report.md) and pictures (bars.png, radar.png, contact_sheet.png) of what has
    been judged so far.

    All are made anew from the judgements on record. shown: how many of the best, and of the worst, the contact sheet
    has at most.
    """
    folder = scores_folder(results, method, judge)
    entries = find_entries(items, results, method, judge)
    summaries = summarise(entries)
    best, worst = best_and_worst(entries, shown)
    series, title = chart_series(summaries), f"GEdit-Bench, O: {method}, judged by {judge}"
    text = markdown_report(method, judge, entries, summaries, [*best, *worst])
    report = Report(
        entries,
        summaries,
        text,
        bar_chart(series, title),
        radar_chart(series, title),
        contact_sheet(best, worst),
        folder,
    )
    write_official_tables(entries, results, method, folder)
    write_file(folder / "summary.csv", summary_table(summaries).encode())
    write_file(folder / "report.md", report.text.encode())
    for name, picture in (("bars", report.bars), ("radar", report.radar), ("contact_sheet", report.sheet)):
        write_file(folder / f"{name}.png", png(picture))
    return report
