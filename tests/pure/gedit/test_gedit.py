"""GEdit-Bench without a server: reading the dataset, the layout of results, the judge, and the arithmetic with known answers."""

import csv
import json
import math
import sys

import numpy as np
import pytest
from chat_server import SCORES
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.files import png, save_picture
from step1x_core.gedit import plots as gedit_plots
from step1x_core.gedit.dataset import COLUMNS, LANGUAGES, METADATA, Item, read_dataset, result_path, select, unedited, write_folder
from step1x_core.gedit.miniature import miniature
from step1x_core.gedit.report import write_report
from step1x_core.gedit.scores import (
    ALL,
    FULL_SET,
    INTERSECTION,
    JUDGED,
    MISSING,
    OFFICIAL,
    STRICT,
    UNJUDGED,
    UNPARSABLE,
    append_record,
    best_and_worst,
    digest,
    find_entries,
    read_records,
    records_path,
    summarise,
)
from step1x_core.reasoning.judge import TRIES, BadReply, Verdict, judge_edit, judge_size, read_scores
from step1x_core.tasks import TASK_TYPES


def pixels(item) -> bytes:
    return np.asarray(item.load()).tobytes()


def write_parquet(path, items, as_dict=True, groups=4, **changes):
    """The hub's layout: one row per item, the picture's file with its bytes, and columns that nobody here asks for."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "key": item.key,
            "task_type": item.task_type,
            "instruction": item.instruction,
            "instruction_language": item.language,
            "Intersection_exist": item.intersection,
            "input_image_raw": {"bytes": png(item.load()), "path": None} if as_dict else png(item.load()),
            "prompt_version": 1,
            **changes,
        }
        for item in items
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=groups)


def test_the_miniature_has_the_official_shape_and_survives_as_a_folder(tmp_path):
    items = miniature()
    assert len(items) == 22 and {(item.task_type, item.language) for item in items} == {
        (name, language) for name in TASK_TYPES for language in LANGUAGES
    }
    assert {item.intersection for item in items} == {True, False} and len({pixels(item) for item in items}) == 11
    write_folder(items, tmp_path / "data")
    again = read_dataset(tmp_path / "data")
    assert again == items and [pixels(item) for item in again] == [pixels(item) for item in items]
    rows = [json.loads(line) for line in (tmp_path / "data" / METADATA).read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"file_name", *COLUMNS} for row in rows)


@pytest.mark.parametrize("as_dict", [True, False])
def test_the_hubs_parquet_files_are_read_in_order_and_equal_the_folder(tmp_path, as_dict):
    items = miniature()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", items[:9], as_dict)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", items[9:], as_dict)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", items[:3], as_dict)
    read = read_dataset(tmp_path)
    assert read == items and [pixels(item) for item in reversed(read)] == [pixels(item) for item in reversed(items)]
    write_folder(read, tmp_path / "unpacked")
    assert read_dataset(tmp_path / "unpacked") == items
    assert read_dataset(tmp_path / "data" / "train-00000-of-00002.parquet") == items[:9]


def test_parquet_without_pyarrow_and_other_parquet_files_are_explained(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a" / "train.parquet", miniature()[:2], Intersection_exist=None)
    with pytest.raises(Step1XError, match="Row 0 in group 0 of .*train.parquet has no 'Intersection_exist'"):
        read_dataset(tmp_path / "a")
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(Step1XError, match="has no column 'key': it is not GEdit-Bench"):
        read_dataset(tmp_path / "other.parquet")
    (tmp_path / "page.parquet").write_text("<html>")
    with pytest.raises(Step1XError, match="cannot be read as a parquet file"):
        read_dataset(tmp_path / "page.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(Step1XError, match="need the package pyarrow.*unpack"):
        read_dataset(tmp_path / "a")


GOOD_ROW = {
    "file_name": "a.png",
    "key": "a",
    "task_type": "text_change",
    "instruction": "x",
    "instruction_language": "en",
    "Intersection_exist": True,
}


@pytest.mark.parametrize("rows, message", [
    ([{**GOOD_ROW, "key": None}], "Line 1 of .* has no 'key'"),
    ([{**GOOD_ROW, "key": "../../escape"}], "cannot be a key"),
    ([{**GOOD_ROW, "task_type": ".."}], "cannot be a task type"),
    ([{**GOOD_ROW, "instruction_language": "fr"}], "one of en, cn as instruction_language"),
    ([{**GOOD_ROW, "Intersection_exist": "yes"}], "true or false as Intersection_exist"),
    ([{**GOOD_ROW, "file_name": "../secret.png"}], "an image outside its folder"),
    ([{**GOOD_ROW, "file_name": None}], "has no 'file_name'"),
    ([GOOD_ROW, {**GOOD_ROW, "key": "A"}], "has two items text_change/en/A"),
    (["nonsense"], "has no 'file_name'"),
])
def test_a_faulty_dataset_is_refused_with_its_line(tmp_path, rows, message):
    (tmp_path / METADATA).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(Step1XError, match=message):
        read_dataset(tmp_path)


def test_no_dataset_no_json_and_a_damaged_picture(tmp_path):
    with pytest.raises(Step1XError, match="There is no GEdit-Bench in"):
        read_dataset(tmp_path)
    (tmp_path / METADATA).write_text(json.dumps(GOOD_ROW) + "\n\n{cut", encoding="utf-8")
    with pytest.raises(Step1XError, match="Line 3 of .* is no JSON"):
        read_dataset(tmp_path)
    (tmp_path / METADATA).write_text(json.dumps(GOOD_ROW), encoding="utf-8")
    (tmp_path / "a.png").write_bytes(png(Image.new("RGB", (8, 8)))[:40])
    with pytest.raises(Step1XError, match="a.png cannot be read as an image"):
        read_dataset(tmp_path)[0].load()


def test_selection_and_the_official_layout(tmp_path):
    items = miniature()
    assert [item.language for item in select(items, ["cn"], ["text_change", "subject-add"])] == ["cn", "cn"]
    assert len(select(items + [Item("b", "text_change", "en", "x", True, None)], limit=1)) == 22
    path = result_path(tmp_path / "results", "my method", items[0])
    assert path.relative_to(tmp_path).as_posix() == "results/my method/fullset/background_change/en/en00.png"
    save_picture(path, png(Image.new("RGB", (4, 4))))
    with pytest.raises(Step1XError, match="cannot be read as an image"):
        save_picture(result_path(tmp_path / "results", "my method", items[1]), b"not a picture")
    assert unedited(items, tmp_path / "results", "my method") == items[1:]
    path.write_bytes(path.read_bytes()[:30])
    assert unedited(items, tmp_path / "results", "my method") == items


@pytest.mark.parametrize(
    "size, expected",
    [((512, 512), (512, 512)), ((1024, 512), (724, 362)), ((300, 900), (295, 886)), ((1000, 1), (16190, 16))],
)
def test_judged_pictures_have_512_x_512_pixels_in_their_own_aspect(size, expected):
    assert judge_size(*size) == expected


@pytest.mark.parametrize(
    "reply, scores",
    [
        (SCORES, (6, 9)),
        (f"```json\n{SCORES}\n```", (6, 9)),
        (f"Sure! {SCORES} I hope it helps.", (6, 9)),
        ('{"score": [0, 10.0]}', (0, 10)),
        ('{"score": [7.5, 3]}', (7.5, 3)),
        *(
            (reply, None)
            for reply in (
                "",
                "7 out of 10",
                '{"score": 7}',
                '{"score": [7]}',
                '{"score": [7, 8, 9]}',
                '{"score": ["7", "8"]}',
                '{"score": [true, 8]}',
                '{"score": [85, 90]}',
                '{"score": [-1, 5]}',
                '{"score": [NaN, 5]}',
                '{"score": [1e999, 5]}',
                '{"points": [7, 8]}',
                "{" * 5000 + "}" * 5000,
            )
        ),
    ],
)
def test_only_two_scores_from_0_to_10_are_read(reply, scores):
    if scores is None:
        with pytest.raises(BadReply):
            read_scores(reply)
    else:
        assert read_scores(reply) == scores


class Scripted:
    """A judge that answers from two lists, over and over their last entries. asked: pictures and texts of each question."""

    def __init__(self, edit, quality):
        self.replies, self.asked = {"image editing": list(edit), "picture quality": list(quality)}, []

    def __call__(self, system, content, max_tokens):
        replies = next(replies for words, replies in self.replies.items() if words in system)
        self.asked.append(content)
        return replies.pop(0) if len(replies) > 1 else replies[0]


def picture(width, height, colour):
    return Image.new("RGB", (width, height), colour)


def test_the_judge_sees_source_result_and_instruction_and_then_the_result_alone():
    ask = Scripted([SCORES], ['{"score": [3, 4]}'])
    verdict = judge_edit(ask, picture(1024, 512, "red"), picture(100, 100, "blue"), "turn {red} blue")
    assert verdict == Verdict((6, 9), (3, 4), "", (SCORES, '{"score": [3, 4]}'))
    (source, edited, text), (alone, _) = ask.asked
    assert source.shape == (362, 724, 3) and edited.shape == (512, 512, 3) and "turn {red} blue" in text
    assert source[0, 0].tolist() == [255, 0, 0] and edited[0, 0].tolist() == [0, 0, 255] and np.array_equal(alone, edited)


def test_bad_answers_are_asked_for_again_but_not_for_ever():
    ask = Scripted(["hm", "no idea", SCORES], [SCORES])
    assert judge_edit(ask, picture(9, 9, "red"), picture(9, 9, "red"), "x").semantics == (6, 9) and len(ask.asked) == 4
    ask = Scripted(["hm"], [SCORES])
    verdict = judge_edit(ask, picture(9, 9, "red"), picture(9, 9, "red"), "x")
    assert verdict.semantics is None and verdict.quality == (6, 9) and len(ask.asked) == TRIES + 1
    assert "no usable reply to 'edit_score' in 5 tries" in verdict.problem and verdict.replies == ("hm", SCORES)


# Known answers: (task type, language, key, in the intersection, semantics pair, quality pair), or a state instead of the pairs.
KNOWN = [
    ("text_change", "en", "a", True, (4, 9), (9, 9)),        # SC 4, PQ 9, O 6
    ("text_change", "en", "b", False, (10, 1), (4, 8)),      # SC 1, PQ 4, O 2
    ("text_change", "en", "c", True, MISSING, None),
    ("text_change", "en", "d", False, UNPARSABLE, None),
    ("subject-add", "en", "e", True, (9, 9), (10, 9)),       # SC 9, PQ 9, O 9
    ("subject-add", "cn", "f", True, (0, 10), (5, 5)),       # SC 0, PQ 5, O 0
    ("color_alter", "cn", "g", False, UNJUDGED, None),
]


@pytest.fixture
def known(tmp_path):
    items = []
    for task_type, language, key, intersection, semantics, quality in KNOWN:
        item = Item(key, task_type, language, f"do {key}, 做", intersection, lambda: picture(40, 30, "green"))
        items.append(item)
        path = result_path(tmp_path, "m", item)
        if semantics != MISSING:
            save_picture(path, png(picture(40, 30, (ord(key), 0, 0))))
        if semantics == UNPARSABLE:
            append_record(records_path(tmp_path, "m", "j"), item, digest(item, path), Verdict(None, (5, 5), "no | answer", ("hm", "")))
        elif quality:
            append_record(
                records_path(tmp_path, "m", "j"),
                item,
                digest(item, path),
                Verdict(tuple(map(float, semantics)), tuple(map(float, quality))),
            )
    return items


def values(summaries, language, subset, counting):
    found, = (summary for summary in summaries if (summary.language, summary.subset, summary.counting) == (language, subset, counting))
    return {name: (m.count, *(None if math.isnan(v) else pytest.approx(v) for v in (m.semantics, m.quality, m.overall)))
            for name, m in (*found.types.items(), ("average", found.average)) if m.count}


def test_the_arithmetic_with_known_answers(known, tmp_path):
    entries = find_entries(known, tmp_path, "m", "j")
    assert [entry.state for entry in entries] == [JUDGED, JUDGED, MISSING, UNPARSABLE, JUDGED, JUDGED, UNJUDGED]
    summaries = summarise(entries)
    assert values(summaries, "en", FULL_SET, OFFICIAL) == {
        "text_change": (2, 2.5, 6.5, 4),
        "subject-add": (1, 9, 9, 9),
        "average": (3, 5.75, 7.75, 6.5),
    }
    # A mean over items would be (6 + 2 + 9) / 3.
    assert values(summaries, "en", FULL_SET, STRICT) == {
        "text_change": (4, 1.25, 3.25, 2),
        "subject-add": (1, 9, 9, 9),
        "average": (5, 5.125, 6.125, 5.5),
    }
    assert values(summaries, "en", INTERSECTION, OFFICIAL) == {
        "text_change": (1, 4, 9, 6),
        "subject-add": (1, 9, 9, 9),
        "average": (2, 6.5, 9, 7.5),
    }
    assert values(summaries, "en", INTERSECTION, STRICT) == {
        "text_change": (2, 2, 4.5, 3),
        "subject-add": (1, 9, 9, 9),
        "average": (3, 5.5, 6.75, 6),
    }
    assert values(summaries, "cn", FULL_SET, OFFICIAL) == {"subject-add": (1, 0, 5, 0), "average": (1, 0, 5, 0)}
    assert values(summaries, "cn", FULL_SET, STRICT) == {
        "subject-add": (1, 0, 5, 0),
        "color_alter": (1, 0, 0, 0),
        "average": (2, 0, 2.5, 0),
    }
    assert values(summaries, ALL, FULL_SET, OFFICIAL) == {
        "text_change": (2, 2.5, 6.5, 4),
        "subject-add": (2, 4.5, 7, 4.5),
        "average": (4, 3.5, 6.75, 4.25),
    }


def test_the_official_tables_and_the_report(known, tmp_path):
    report = write_report(known, tmp_path, "m", "j", shown=1)
    assert report.folder == tmp_path / "m" / "scores" / "j"
    tables = {path.name for path in report.folder.glob("*_vie_score.csv")}
    assert tables == {
        f"m_{name}_vie_score.csv"
        for name in (
            "text_change_all",
            "text_change_en",
            "subject-add_all",
            "subject-add_en",
            "subject-add_cn",
            "color_alter_all",
            "color_alter_cn",
        )
    }
    lines = (report.folder / "m_text_change_en_vie_score.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "key,edited_image,instruction,sementics_score,quality_score,intersection_exist,instruction_language"
    assert lines[1:] == [
        'a,m/fullset/text_change/en/a.png,"do a, 做",4.0,9.0,True,en',
        'b,m/fullset/text_change/en/b.png,"do b, 做",1.0,4.0,False,en',
    ]
    rows = list(csv.DictReader((report.folder / "summary.csv").read_text(encoding="utf-8").splitlines()))
    average = {(row["language"], row["set"], row["counting"]): row["overall"] for row in rows if row["task_type"] == "average"}
    assert (
        average["en", "full set", "official-style"],
        average["en", "full set", "strict"],
        average["cn", "intersection", "strict"],
    ) == ("6.5", "5.5", "0.0")
    text = (report.folder / "report.md").read_text(encoding="utf-8")
    assert text == report.text and "4 of 7 items judged; 1 missing, 1 unparsable, 1 not judged yet." in text
    assert "| **average** | 3 | 5.750 | 7.750 | 6.500 | 5 | 5.125 | 6.125 | 5.500 |" in text
    assert (
        "- text_change/en/c: missing" in text
        and "- text_change/en/d: unparsable (no \\| answer)" in text
        and "- color_alter/cn/g: unjudged" in text
    )
    assert "1. subject-add/en/e: SC 9, PQ 9, O 9.00. do e, 做" in text and "2. subject-add/cn/f: SC 0" in text
    for name in ("bars", "radar", "contact_sheet"):
        assert Image.open(report.folder / f"{name}.png").size[0] > 400


def test_a_picture_made_anew_or_another_instruction_is_judged_again(known, tmp_path):
    save_picture(result_path(tmp_path, "m", known[0]), png(picture(40, 30, "white")))
    known[1] = Item("b", "text_change", "en", "something else", False, known[1].load)
    assert [entry.state for entry in find_entries(known, tmp_path, "m", "j")][:2] == [UNJUDGED, UNJUDGED]
    # Another judge has judged nothing.
    assert {entry.state for entry in find_entries(known, tmp_path, "m", "other")} == {MISSING, UNJUDGED}


def test_a_record_cut_by_a_kill_costs_only_itself(known, tmp_path):
    path = records_path(tmp_path, "m", "j")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert find_entries(known, tmp_path, "m", "j")[5].state == UNJUDGED
    item, picture_path = known[5], result_path(tmp_path, "m", known[5])
    append_record(path, item, digest(item, picture_path), Verdict((1, 2), (3, 4), "", ("half a character: \ud83d",)))
    entry = find_entries(known, tmp_path, "m", "j")[5]
    assert (entry.semantics, entry.quality) == (1, 3) and len(read_records(path)) == 5


def test_bars_are_as_high_as_their_scores():
    chart = np.asarray(gedit_plots.bar_chart({"one": {"a": 10.0, "b": 5.0}, "two": {"a": math.nan, "b": 0.0}}, "t")).astype(int)
    first, second = (tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5)) for colour in gedit_plots.COLOURS[:2])
    area = chart[92:393]
    columns = (area == first).all(-1).sum(0)
    heights = [int(columns[start:start + 3].max()) for start in np.flatnonzero((columns[1:] > 0) & (columns[:-1] == 0)) + 1]
    assert heights == [301, 151] and (area == second).all(-1).sum(0).max() == 1


def test_the_radar_reaches_as_far_as_its_scores():
    chart = np.asarray(gedit_plots.radar_chart({"one": {"up": 10.0, "right": 5.0, "down": math.nan, "left": 2.5}}, "t")).astype(int)
    colour = tuple(int(gedit_plots.COLOURS[0][i:i + 2], 16) for i in (1, 3, 5))
    # Below the legend; the centre lies 320 pixels below that, 10 is 220 pixels away.
    rows, columns = np.nonzero((chart[70:] == colour).all(-1))
    assert [columns.max() - 360, 360 - columns.min(), 320 - rows.min(), rows.max() - 320] == pytest.approx([110, 55, 220, 0], abs=3)


def test_the_contact_sheet_shows_source_and_result_of_the_best_and_the_worst(known, tmp_path):
    entries = find_entries(known, tmp_path, "m", "j")
    best, worst = best_and_worst(entries, 2)
    assert [entry.item.key for entry in best] == ["e", "a"] and [entry.item.key for entry in worst] == ["f", "b"]
    assert [entry.item.key for entry in best_and_worst(entries, 9)[0] + best_and_worst(entries, 9)[1]] == ["e", "a", "f", "b"]
    sheet = np.asarray(gedit_plots.contact_sheet(best, worst))
    # Each picture of 40 x 30 fills 200 x 150 pixels of its thumbnail.
    assert [
        int((sheet == colour).all(-1).sum()) for colour in ((0, 128, 0), *((ord(key), 0, 0) for key in "eafbd"))
    ] == [4 * 30000, *[30000] * 4, 0]
    assert gedit_plots.contact_sheet([], []).size[0] > 400
