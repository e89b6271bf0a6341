"""Downloads files from a model hub: resumable, several at once, with checksums, and under their final names only when
complete.

While a file is downloaded it is named NAME.CHECKSUM.part, which allows an interrupted download to resume. After the
checksum is verified, it is named NAME.CHECKSUM.ready until every file of its group is. ComfyUI lists neither. Files of
a group get their names together, those that identify a model folder last.
"""

import contextlib
import glob
import os
import shutil
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import filelock
import hub
import requests
from hub import Cancelled, HubError, HubFile

AT_ONCE = 4
CHUNK = 1 << 20
# Bytes lost when a connection is cut.
RECEIVED_CHUNK = 1 << 16
# Number of checksum digits in the names of unfinished files.
CHECKSUM_DIGITS = 8
# Seconds over which the speed is averaged.
SPEED_WINDOW = 20
# Loaders identify a model folder by these files; they get their names last, in this order.
RECOGNISED_BY = ("config.json", "model_index.json")


@dataclass(frozen=True)
class Item:
    """A file of a hub and its target path."""

    file: HubFile
    target: Path

    def beside(self, suffix: str) -> Path:
        return self.target.with_name(f"{self.target.name}.{self.file.checksum[:CHECKSUM_DIGITS]}.{suffix}")

    @property
    def part(self) -> Path:
        return self.beside("part")

    @property
    def ready(self) -> Path:
        return self.beside("ready")


class Progress:
    """Bytes done of `total`, counted by several threads. received: bytes that came over the network."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.received = 0
        self.lock = threading.Lock()
        self.samples = deque([(time.monotonic(), 0)])

    def add(self, count: int, received: bool = False) -> None:
        with self.lock:
            self.done += count
            self.received += count if received else 0

    def line(self) -> str:
        now = time.monotonic()
        self.samples.append((now, self.received))
        while now - self.samples[0][0] > SPEED_WINDOW and len(self.samples) > 2:
            self.samples.popleft()
        start, received = self.samples[0]
        speed = (self.received - received) / max(now - start, 1e-3)
        text = f"{gigabytes(self.done)} of {gigabytes(self.total)}, {speed / 1e6:.1f} MB/s"
        if speed > 0:
            minutes, seconds = divmod(int((self.total - self.done) / speed), 60)
            text += f", {minutes} min {seconds:02} s left"
        return text


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def check(item: Item, path: Path, progress: Progress, cancelled: threading.Event) -> bool:
    """Return whether a file has the hub's checksum."""
    digest = item.file.digest()
    with open(path, "rb") as content:
        while chunk := content.read(CHUNK):
            if cancelled.is_set():
                raise Cancelled
            digest.update(chunk)
            progress.add(len(chunk))
    return digest.hexdigest() == item.file.checksum


def check_answer(item: Item, response: requests.Response, have: int) -> None:
    """Raise HubError if the server announces another range or length than expected, such as a proxy's page."""
    size = item.file.size
    if response.status_code == 206:
        announced, expected = response.headers.get("Content-Range", ""), f"bytes {have}-{size - 1}/{size}"
    else:
        announced, expected = response.headers.get("Content-Length", str(size)), str(size)
    if announced != expected:
        raise HubError(
            f"The server sent {announced} for {item.file.path}, expected {expected}. Check for a proxy or a login page "
            "in between."
        )


def fetch(item: Item, progress: Progress, cancelled: threading.Event) -> None:
    """Download the rest of the part file and turn it into the ready file.

    Raises HubError for a server that fails repeatedly without sending a byte, and for a wrong checksum, which also
    deletes the part file.
    """
    size = item.file.size
    digest = item.file.digest()
    failures = furthest = have = 0
    with open(item.part, "a+b") as part:
        part.seek(0)
        while chunk := part.read(CHUNK):
            digest.update(chunk)
            have += len(chunk)
        progress.add(have)
        while have < size:
            with hub.get(item.file.url, cancelled, have) as response:
                if response.status_code != 206 and have:  # a server without ranges
                    part.truncate(0)
                    digest = item.file.digest()
                    progress.add(-have)
                    have = 0
                if response.status_code != 416:
                    check_answer(item, response, have)
                    with contextlib.suppress(
                        requests.RequestException
                    ):  # a cut connection; the loop goes on from there
                        for chunk in response.iter_content(RECEIVED_CHUNK):
                            if cancelled.is_set():
                                raise Cancelled
                            part.write(chunk)
                            digest.update(chunk)
                            have += len(chunk)
                            progress.add(len(chunk), received=True)
            failures = 0 if have > furthest else failures + 1
            furthest = max(have, furthest)
            if failures >= hub.ATTEMPTS:
                raise HubError(f"The connection for {item.file.path} keeps failing. Rerun the command later to resume.")
            if have < size and cancelled.wait(hub.FIRST_WAIT * 2**failures):
                raise Cancelled
        part.flush()
        os.fsync(part.fileno())
    if digest.hexdigest() != item.file.checksum:
        item.part.unlink()
        raise HubError(
            f"{item.file.path} has a wrong checksum and was deleted. Rerun the command; if it fails again, try the "
            "other --source."
        )
    os.replace(item.part, item.ready)


def obtain(item: Item, progress: Progress, cancelled: threading.Event) -> None:
    """Make the ready file of an item, unless it or the file itself exists. Raises HubError if another file is in its
    place."""
    if item.target.exists():
        if item.target.stat().st_size != item.file.size or not check(item, item.target, progress, cancelled):
            raise HubError(
                f"{item.target} already exists, but differs from {item.file.path} of the hub. Delete it or move it "
                "away to download the file."
            )
    elif item.ready.exists():
        progress.add(item.file.size)
    else:
        fetch(item, progress, cancelled)


def publish(group: list[Item]) -> None:
    """Give the ready files of a group their final names."""
    def order(item):
        name = item.target.name
        return RECOGNISED_BY.index(name) + 2 if name in RECOGNISED_BY else int(not name.endswith(".safetensors"))

    for item in sorted(group, key=order):
        if not item.target.exists():
            os.replace(item.ready, item.target)
        for leftover in item.target.parent.glob(f"{glob.escape(item.target.name)}.{'[0-9a-f]' * CHECKSUM_DIGITS}.part"):
            leftover.unlink()  # of another version of the file


def check_disk(items: list[Item]) -> None:
    """Raise HubError if a disk has too little space for the remaining downloads. The folders must exist."""
    needed, folders = {}, {}
    for item in items:
        if not item.target.exists() and not item.ready.exists():
            folder = item.target.parent
            device = folder.stat().st_dev
            folders[device] = folder
            needed[device] = (
                needed.get(device, 0) + item.file.size - (item.part.stat().st_size if item.part.exists() else 0)
            )
    for device, count in needed.items():
        free = shutil.disk_usage(folders[device]).free
        if count > free:
            raise HubError(
                f"{gigabytes(count)} to download, but the disk of {folders[device]} has {gigabytes(free)} free. Free "
                "disk space, or name another folder with --dir."
            )


@contextlib.contextmanager
def locked(items: list[Item]):
    """Lock the files against a second download. Raises HubError if one is running."""
    def unlock(lock):
        lock.release()
        with contextlib.suppress(OSError):  # on Windows another process may look at it
            os.unlink(lock.lock_file)

    with contextlib.ExitStack() as stack:
        for item in items:
            lock = filelock.FileLock(str(item.beside("lock")))
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout as error:
                raise HubError(f"{item.target} is already being downloaded. Wait until that download ends.") from error
            stack.callback(unlock, lock)
        yield


def show(progress: Progress, pending) -> None:
    """Print the progress until all futures are done: on a terminal one line that updates, else a line every 10 s."""
    terminal = sys.stdout.isatty()
    while pending:
        _, pending = wait(pending, timeout=0.5 if terminal else 10)
        print("\r" * terminal + progress.line().ljust(78), end="" if terminal and pending else "\n", flush=True)


def download(groups: list[list[Item]]) -> list[str]:
    """Download all items that do not exist yet. Returns the failures, a sentence for each file; all other files are in
    place.

    An incomplete group stays invisible; rerun to resume. Raises HubError before anything is transferred if a folder
    cannot be created, the disk is too small or another download uses the same files. KeyboardInterrupt and SystemExit
    stop the transfers and keep part files.
    """
    items = [item for group in groups for item in group]
    for item in items:
        try:
            item.target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HubError(
                f"The folder {item.target.parent} cannot be created ({error.strerror}). Name another one with --dir."
            ) from error
    check_disk(items)
    cancelled = threading.Event()
    progress = Progress(sum(item.file.size for item in items))
    with locked([item for item in items if not item.target.exists()]), ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {item: pool.submit(obtain, item, progress, cancelled) for item in items}
        try:
            show(progress, set(futures.values()))
        finally:
            cancelled.set()
            pool.shutdown(cancel_futures=True)
        failures = {item: future.exception() for item, future in futures.items() if future.exception() is not None}
        for group in groups:
            if failures.keys().isdisjoint(group):
                publish(group)
    for error in failures.values():
        if not isinstance(error, (HubError, OSError)):
            raise error
    return [
        f"{item.target} could not be written ({error})." if isinstance(error, OSError) else str(error)
        for item, error in failures.items()
    ]
