"""Many algorithmic pairs at once: pictures are handed to several processes, and what comes back goes into a dataset in
a fixed order."""

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import Step1XError
from ..files import PICTURE_SUFFIXES, open_picture
from .orders import carry_out, orders, shrink
from .store import Encoded, PairStore, encode

# Orders of one picture that are carried out together: its source is read and written once for all of them.
ORDERS = 8
# So many orders for each pair that is wanted, before it is clear that the pictures do not give as many.
PATIENCE = 4


@dataclass(frozen=True)
class Task:
    """Orders `first` to `first + count` of a picture, without those that are done."""

    path: Path
    name: str
    kinds: tuple[str, ...]
    first: int
    count: int
    seed: int
    max_side: int
    done: frozenset[str]


@dataclass
class Tally:
    """What became of the orders. unreadable: pictures, with the reason."""

    added: int = 0
    duplicates: int = 0
    unsuited: int = 0
    unreadable: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.added} pairs added; {self.duplicates} looked like others, {self.unsuited} edits did not suit their image.",
            *self.unreadable,
        ]
        return "\n".join(lines)


def order_name(seed: int, name: str, number: int) -> str:
    return f"{seed}/{name}/{number}"


def carry_out_task(task: Task) -> list[tuple[str, Encoded | None]] | str:
    """Each order's name and pair, None where the edit does not suit the picture; or why the picture cannot be used."""
    try:
        picture = shrink(np.asarray(open_picture(task.path, task.name)), task.max_side)
    except Step1XError as problem:
        return str(problem)
    results = []
    for order in orders(task.name, list(task.kinds), task.first, task.count, task.seed):
        name = order_name(task.seed, task.name, order.number)
        if name not in task.done:
            pair = carry_out(picture, task.name, order, task.seed)
            results.append((name, pair and encode(pair)))
    return results


def find_pictures(folder: Path) -> dict[str, Path]:
    """All pictures below a folder, by their names relative to it. Raises Step1XError where there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not paths:
        raise Step1XError(f"There are no images in {folder} or its subfolders. "
                          f"Name a folder with {', '.join(PICTURE_SUFFIXES)} files.")
    return {path.relative_to(folder).as_posix(): path for path in paths}


def tasks(
    pictures: dict[str, Path],
    kinds: tuple[str, ...],
    count: int,
    seed: int,
    max_side: int,
    store: PairStore,
    unreadable: set[str],
) -> Iterator[Task]:
    """All pictures in turn, again and again, each time with its next orders."""
    size = max(1, min(ORDERS, count // len(pictures)))
    for first in range(0, PATIENCE * (count // len(pictures) + size), size):
        for name, path in pictures.items():
            done = frozenset(order_name(seed, name, number) for number in range(first, first + size)) & store.done
            if len(done) < size and name not in unreadable:
                yield Task(path, name, kinds, first, size, seed, max_side, done)


def start_worker() -> None:
    """Ctrl-C reaches all processes of a terminal; the first one tells the others to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class SameProcess(Executor):
    """Computes here, for a single worker: another process would take seconds to start."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def fill_dataset(
    store: PairStore,
    pictures: dict[str, Path],
    kinds: tuple[str, ...],
    count: int,
    seed: int,
    max_side: int,
    workers: int,
    tell: Callable[[int], None],
) -> Tally:
    """Add pairs until the dataset has `count`, or the pictures give no more. tell: is called with the number that it
    has.

    Results are taken in the order of the tasks: the dataset does not depend on the number of processes, nor on where an
    earlier run was killed.

    Raises Step1XError as the store does, and where a process was killed, by a lack of memory, say.
    """
    # Each process computes on one core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tally, unreadable = Tally(), set()
    waiting = tasks(pictures, kinds, count, seed, max_side, store, unreadable)
    running = deque()
    pool = (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
        if workers > 1
        else SameProcess()
    )
    try:
        while len(store.rows) < count:
            for task in itertools.islice(waiting, 2 * workers - len(running)):
                running.append((task, pool.submit(carry_out_task, task)))
            if not running:
                break
            task, future = running.popleft()
            results = future.result()
            if isinstance(results, str):
                if task.name not in unreadable:
                    unreadable.add(task.name)
                    tally.unreadable.append(results)
                continue
            for order, encoded in results:
                if len(store.rows) == count:
                    break
                if encoded is None:
                    store.turn_down("does not suit the picture", order)
                    tally.unsuited += 1
                elif store.add(encoded, order):
                    tally.duplicates += 1
                else:
                    tally.added += 1
            tell(len(store.rows))
    except BrokenProcessPool as problem:
        raise Step1XError(
            "A worker process was killed, perhaps because memory ran out. The pairs made so far are kept. "
            "Rerun the command with fewer workers."
        ) from problem
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return tally
