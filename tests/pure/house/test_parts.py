"""The parts of the suite: every file is in one, and in the right one."""

from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from conftest import PARTS, TESTS, elsewhere, in_random_order, part_of

FILES = sorted(TESTS.rglob("test_*.py"))
ROOMS = {path.name for path in (TESTS.parent / "step1x_core").iterdir() if path.is_dir()}
# Beside the rooms of the core: the nodes' schemas, the scripts, the miniature model, and what holds for the whole repository.
FURTHER = {"nodes", "scripts", "miniature", "house"}


def test_every_test_has_one_part(request):
    assert {*PARTS} <= {line.split(":")[0] for line in request.config.getini("markers")}
    for item in request.session.items:
        assert [mark.name for mark in item.iter_markers() if mark.name in PARTS] == [part_of(item.path)]


def test_every_file_is_in_a_part_and_in_a_room_of_the_house():
    for path in FILES:
        part, *rooms = path.relative_to(TESTS).parts
        assert part in PARTS and {*rooms[:-1]} <= ROOMS | FURTHER, (
            f"{path}: move it to a folder of {', '.join(PARTS)}; scripts/test.py runs nothing else"
        )
    names = [path.name for path in FILES]
    assert len(names) == len({*names}), "tests use each other's helpers by the file's name"


def test_a_server_is_started_by_the_parts_that_may():
    sources = [(part_of(path), path.read_text(encoding="utf-8")) for path in FILES if path.name != "test_parts.py"]
    assert {part for part, source in sources if "ComfyServer(" in source or "demo_client(" in source} == {
        "server",
        "stress",
    }


def test_a_random_order_has_every_test_once_and_keeps_files_together():
    items = [SimpleNamespace(path=Path(f"test_{file}.py"), name=f"{file}{i}") for file in "abcdef" for i in range(10)]
    names = {seed: [item.name for item in in_random_order(items, seed)] for seed in (1, 1, 2)}
    assert [item.name for item in in_random_order(list(reversed(items)), 1)] != [item.name for item in items]
    assert names[1] == [item.name for item in in_random_order(items, 1)] != names[2]
    for order in names.values():
        assert sorted(order) == sorted(item.name for item in items) != order
        assert len([file for file, _ in groupby(order, key=lambda name: name[0])]) == 6


def cases(name: str, count: int, part: str = "parity", **markers) -> list[SimpleNamespace]:
    """A test's cases as pytest collects them, with these markers and their arguments."""
    found = {marker: SimpleNamespace(args=args) for marker, args in markers.items()}
    return [
        SimpleNamespace(
            path=TESTS / part / "test_a.py", originalname=name, number=number, get_closest_marker=found.get, callspec=None
        )
        for number in range(count)
    ]


def test_the_further_hosts_run_one_of_every_n_cases_and_each_value_in_turn():
    plain, host, once, sampled, other = (
        cases("plain", 3),
        cases("host", 9, part="host"),
        cases("once", 3, once=()),
        cases("sampled", 13, sampled=(3,)),
        cases("other", 2, sampled=(5,)),
    )
    left_out = elsewhere([*plain, *host, *once, *sampled, *other])
    assert not [item for item in plain if item in left_out] and [item for item in once if item in left_out] == once
    assert [item.number for item in host if item not in left_out] == [0, 7]
    # Of a product with three columns each row has one, and each column comes.
    assert [item.number for item in sampled if item not in left_out] == [0, 5, 7, 9]
    assert [item.number for item in other if item not in left_out] == [0]


def test_the_further_hosts_run_half_of_the_tests_of_a_file_and_all_marked_everywhere():
    single = [case for name in "abcdef" for case in cases(name, 1, part="host")]
    needed = [case for name in "gh" for case in cases(name, 1, part="host", everywhere=())]
    for case in (*single, *needed):
        del case.callspec
    left_out = elsewhere([*single[:3], *needed, *single[3:]])
    assert [case.originalname for case in single if case not in left_out] == ["a", "d", "e"]
    assert not [case for case in needed if case in left_out]
