"""The parts of the suite: every file is in one, and in the right one."""

from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from conftest import PARTS, in_random_order, part_of

FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def test_every_test_has_one_part(request):
    declared = {line.split(":")[0] for line in request.config.getini("markers")}
    assert {*PARTS, "model"} <= declared
    for item in request.session.items:
        assert [mark.name for mark in item.iter_markers() if mark.name in {*PARTS, "model"}] == [part_of(item.path.name)]


def test_the_table_of_parts_is_up_to_date():
    for patterns in PARTS.values():
        for pattern in patterns:
            assert any(fnmatch(path.name, pattern) for path in FILES), pattern
    for path in FILES:
        assert sum(fnmatch(path.name, pattern) for patterns in PARTS.values() for pattern in patterns) <= 1, path.name


def test_no_file_of_part_model_or_training_starts_a_server():
    sources = {path.name: path.read_text(encoding="utf-8") for path in FILES if path.name != "test_parts.py"}
    starts = {name: part_of(name) for name, source in sources.items() if "ComfyServer(" in source or "demo_client(" in source}
    assert starts["test_host.py"] == "server" and not {"model", "training"} & {*starts.values()}, starts


def test_a_random_order_has_every_test_once_and_keeps_files_together():
    items = [SimpleNamespace(path=Path(f"test_{file}.py"), name=f"{file}{i}") for file in "abcdef" for i in range(10)]
    names = {seed: [item.name for item in in_random_order(items, seed)] for seed in (1, 1, 2)}
    assert [item.name for item in in_random_order(list(reversed(items)), 1)] != [item.name for item in items]
    assert names[1] == [item.name for item in in_random_order(items, 1)] != names[2]
    for order in names.values():
        assert sorted(order) == sorted(item.name for item in items) != order
        assert len([file for file, _ in groupby(order, key=lambda name: name[0])]) == 6
