"""Datasets of training pairs: the files, growing, shards, damage, many processes, and the command."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from conftest import PACK
from made_pairs import pairs_of, photograph
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.images import to_uint8
from step1x_core.pairs.bulk import fill_dataset, find_pictures
from step1x_core.pairs.orders import MAKERS
from step1x_core.pairs.record import make_pair
from step1x_core.pairs.store import JOURNAL, PairStore, encode
from step1x_core.training.dataset import decode_picture, read_pairs


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return photograph()


@pytest.fixture
def pictures(tmp_path, picture):
    """A folder with three pictures, one that cannot be read, and one file of another kind."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, pixels in (("a.png", picture), ("more/b.png", picture[:, ::-1]), ("more/c.png", np.rot90(picture))):
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def store_pairs(folder, pairs):
    with PairStore(folder) as store:
        return [store.add(encode(pair)) for pair in pairs]


def test_the_training_reads_what_is_stored(picture, tmp_path):
    pairs = pairs_of(picture, 12)
    one_language = make_pair(picture, picture[::-1].copy(), "motion_change", "turn it upside down", "", "by hand")
    assert store_pairs(tmp_path / "set", [*pairs, one_language]) == [None] * (len(pairs) + 1)
    read = read_pairs(tmp_path / "set", tmp_path)
    assert len(read) == 2 * len(pairs) + 1
    english = read_pairs(tmp_path / "set" / "en-00000.json")
    assert [entry.instruction for entry in english] == [pair.english for pair in [*pairs, one_language]]
    assert [entry.instruction for entry in read_pairs(tmp_path / "set" / "zh-00000.json")] == [pair.chinese for pair in pairs]
    for entry, pair in zip(english, pairs):
        for path, pixels in ((entry.source, pair.source), (entry.target, pair.target)):
            assert np.array_equal(to_uint8(decode_picture(path.read_bytes(), path)), pixels)
    provenance = [entry["provenance"] for entry in json.loads((tmp_path / "set" / "en-00000.json").read_text(encoding="utf-8")).values()]
    assert [(row["kind"], row["maker"], row["details"]) for row in provenance[:-1]] == [
        (pair.kind, pair.maker, pair.details) for pair in pairs
    ]
    unedited = {pair.source.tobytes() for pair in pairs if np.array_equal(pair.source, picture)}
    assert len(unedited) == 1 and len(list((tmp_path / "set" / "sources").rglob("*.png"))) == len(
        {pair.source.tobytes() for pair in [*pairs, one_language]}
    )


def test_a_pair_is_stored_once_and_a_dataset_grows(picture, tmp_path):
    pairs = pairs_of(picture, 8)
    store_pairs(tmp_path, pairs[:4])
    known = store_pairs(tmp_path, pairs)
    assert all(known[:4]) and known[4:] == [None] * (len(pairs) - 4)
    first = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.png"))
    assert all(store_pairs(tmp_path, [replace(pair, english="other words") for pair in pairs]))
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")) == first and len(
        read_pairs(tmp_path / "en-00000.json")
    ) == len(pairs)


def test_shards(picture, tmp_path, monkeypatch):
    monkeypatch.setattr("step1x_core.pairs.store.SHARD", 3)
    pairs = pairs_of(picture, 9)[:7]
    store_pairs(tmp_path, pairs[:4])
    store_pairs(tmp_path, pairs[4:])
    assert [len(read_pairs(tmp_path / f"zh-0000{number}.json")) for number in range(3)] == [3, 3, 1]
    assert len(read_pairs(tmp_path)) == 14


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_line_that_a_kill_cut_is_made_again(picture, tmp_path, cut):
    pairs = pairs_of(picture, 6)
    store_pairs(tmp_path, pairs)
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(whole[:-cut])
    (tmp_path / "en-00000.json").unlink()
    known = store_pairs(tmp_path, pairs)
    assert known[-1] is None and all(known[:-1]) and (tmp_path / JOURNAL).read_bytes() == whole
    assert len(read_pairs(tmp_path)) == 2 * len(pairs)


@pytest.mark.parametrize("line", ['{"key": 1}', "nonsense", "[]", '{"turned_down"', "\xff"])
def test_a_damaged_journal_is_refused_and_left_alone(picture, tmp_path, line):
    store_pairs(tmp_path, pairs_of(picture, 2))
    content = line.encode("latin-1") + b"\n" + (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(content)
    with pytest.raises(Step1XError, match="Line 1 of .*pairs.jsonl is damaged"):
        PairStore(tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == content


def test_a_journal_that_names_files_elsewhere_is_refused(picture, tmp_path):
    store_pairs(tmp_path, pairs_of(picture, 1))
    row = json.loads((tmp_path / JOURNAL).read_text())
    for name in ("../../secret.png", "/etc/passwd", "sources/ab/../../x.png"):
        (tmp_path / JOURNAL).write_text(json.dumps({**row, "source": name}) + "\n")
        with pytest.raises(Step1XError, match="Line 1"):
            PairStore(tmp_path)


def test_a_disk_that_cannot_be_written(picture, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Step1XError, match="cannot be written"):
        PairStore(tmp_path / "file" / "set")
    with PairStore(tmp_path / "set") as store:
        (tmp_path / "set" / "sources").write_text("a file where a folder should be")
        with pytest.raises(Step1XError, match="cannot be written"):
            store.add(encode(pairs_of(picture, 1)[0]))
        assert store.rows == []


# many at once

def settings(count, seed=1, max_side=128):
    return {"kinds": tuple(MAKERS), "count": count, "seed": seed, "max_side": max_side}


def fill(folder, pictures, workers, count=16, **changes):
    with PairStore(folder) as store:
        return fill_dataset(store, find_pictures(pictures), **{**settings(count), **changes}, workers=workers, tell=lambda number: None)


def test_a_dataset_does_not_depend_on_the_number_of_processes(pictures, tmp_path):
    tallies = [fill(tmp_path / str(workers), pictures, workers) for workers in (1, 2)]
    assert (tmp_path / "1" / JOURNAL).read_bytes() == (tmp_path / "2" / JOURNAL).read_bytes()
    assert (
        tallies[0] == tallies[1]
        and tallies[0].added == 16
        and len(tallies[0].unreadable) == 1
        and "broken.png cannot be read" in tallies[0].unreadable[0]
    )
    assert len(read_pairs(tmp_path / "1" / "en-00000.json")) == 16
    # More of them come behind those that are there; nothing is made twice.
    before = (tmp_path / "1" / JOURNAL).read_bytes()
    assert fill(tmp_path / "1", pictures, 1, 20).added == 4 and (tmp_path / "1" / JOURNAL).read_bytes().startswith(before)
    assert fill(tmp_path / "1", pictures, 1, 20).added == 0


def test_pictures_that_give_no_more_end_the_run(tmp_path, picture):
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.full((100, 100, 3), 128, np.uint8)).save(tmp_path / "pictures" / "grey.png")
    tally = fill(tmp_path / "set", tmp_path / "pictures", 1, 3, kinds=("color_alter",))
    assert tally.added == 0 and tally.unsuited >= 3
    with pytest.raises(Step1XError, match="There are no images in"):
        find_pictures(tmp_path / "set")


def command(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PACK / "scripts" / "make_pairs.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_goes_on_after_a_kill(pictures, tmp_path):
    choice = [pictures, tmp_path / "set", "--count", 40, "--size", 128, "--workers", 1, "--seed", 7]
    killed = command(*choice)
    journal = tmp_path / "set" / JOURNAL
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 5):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for process in (killed, *psutil.Process(killed.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker may notice that it is alone
            process.kill()
    killed.communicate()
    # As if the kill had struck while an image was being written, which it does now and then.
    half = tmp_path / "set" / "targets" / "00" / "0.png.1-1.part"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half")
    run = command(*choice)
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert fill(tmp_path / "fresh", pictures, 1, 40, seed=7).added == 40
    rows = [[json.loads(line) for line in (tmp_path / name / JOURNAL).read_text().splitlines()] for name in ("set", "fresh")]
    assert rows[0] == rows[1] and len(read_pairs(tmp_path / "set" / "zh-00000.json")) == 40
    assert "| all | 40 | 40 | 40 |" in output and "broken.png cannot be read" in output and not list((tmp_path / "set").rglob("*.part"))
    with Image.open(tmp_path / "set" / "contact_sheet.png") as sheet:
        assert sheet.width > 1000 and "| all | 40 |" in (tmp_path / "set" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kinds", "painting"], "'painting' is not a kind that can be made here"),
        (["--count", "0"], "must be at least 1"),
    ],
)
def test_the_command_says_what_is_wrong(pictures, tmp_path, capsys, arguments, message):
    spec = importlib.util.spec_from_file_location("make_pairs_command", PACK / "scripts" / "make_pairs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        assert script.main([str(pictures), str(tmp_path / "set"), *arguments]) == 1
    except SystemExit as end:
        assert end.code == 2
    assert message in capsys.readouterr().err and not (tmp_path / "set").exists()
