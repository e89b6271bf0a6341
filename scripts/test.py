#!/usr/bin/env python3
"""Set up what is missing and run all tests: `python scripts/test.py [pytest arguments]`.

Outside a ComfyUI installation the tests run in ComfyUI 0.30.0 and 0.18.2, inside one in that one. The parts of the suite (folders of tests/)
run side by side, one for each core, the longest first. tests/pure, which needs no ComfyUI, and tests marked `once` run in the first ComfyUI only,
in the others a test with many cases runs one of n (4 in tests/host, or what a mark `sampled(n)` says), and of the other tests of tests/host half run.
`--comfyui FOLDER` runs them in the ComfyUI of that folder instead, a checkout of a newer one for instance: with the packages that its
requirements.txt pins, in an environment of its own, which is built once. So does STEP1X_COMFYUI where the Python that runs this has no torch.
`--browser` also runs the workflows in Chromium (scripts/dev/browser_test.py --install). All output is in output/tests, too, in a file for each part.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent / "support"))  # missing in an embedded Python
import environment

LOGS = environment.PACK / "output" / "tests"


def python_m(host: environment.Host, tools: Path | None, module: str, *arguments: str) -> list[str]:
    """The command `python -m module`, where the module may be in the tools folder. An embedded Python ignores PYTHONPATH, hence the detour."""
    code = f"import runpy, sys; sys.path[:0] = {[str(tools)] if tools else []}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [str(host.python), "-c", code, *arguments]


# The folders of tests/ that run in every ComfyUI.
PARTS = {"host": ("tests/host", "tests/parity"), "stress": ("tests/stress",), "server": ("tests/server",)}
# Seconds that a part takes on a core, in the first ComfyUI and in a further one. Only their order matters: what starts
# last should be short.
SECONDS = {"host": (650, 250), "browser": (300, 0), "server": (330, 120), "stress": (230, 80), "pure": (50, 0)}
# More at once need more memory than a small machine has.
MOST_TOGETHER = 4
# pytest's exit status where no test was selected, as with -k or -m.
NO_TESTS = 5


@dataclass(frozen=True)
class Job:
    """A command of its own and what it needs to know. name: of its log, and in front of its lines; seconds: about as long as it takes."""

    name: str
    command: list[str]
    tree: Path
    seconds: int

    def variables(self, threads: int) -> dict[str, str]:
        variables = {**os.environ, "STEP1X_COMFYUI": str(self.tree), "PYTHONUNBUFFERED": "1"}
        variables.setdefault("OMP_NUM_THREADS", str(threads))
        return variables


def pytest_jobs(hosts: list[environment.Host], tools: Path | None, arguments: list[str]) -> list[Job]:
    """The parts in every host, and what needs none."""
    def job(number: int, part: str, *what: str) -> Job:
        host = hosts[number]
        command = python_m(host, tools, "pytest", "--rootdir", "tests", "-c", "tests/pytest.ini", *what, *arguments)
        return Job(
            f"{host.tree.name}-{part}" if part != "pure" else part, command, host.tree, SECONDS[part][min(number, 1)]
        )

    jobs = [job(number, part, *folders, *(["--once-elsewhere"] if number else []))
            for part, folders in PARTS.items() for number in range(len(hosts))]
    return [*jobs, job(0, "pure", "tests/pure")]


def browser_job(host: environment.Host) -> Job:
    command = [str(host.python), str(environment.PACK / "scripts" / "dev" / "browser_test.py"), "--install"]
    return Job("browser", command, host.tree, SECONDS["browser"][0])


class Run(threading.Thread):
    """A job that runs. Its output is written to a log and shown line by line, each with the job's name in front."""

    def __init__(self, job: Job, threads: int):
        super().__init__(name=job.name)
        self.started = time.monotonic()
        self.child = subprocess.Popen(
            job.command,
            cwd=environment.PACK,
            env=job.variables(threads),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        self.start()

    def run(self) -> None:
        with open(LOGS / f"{self.name}.log", "w", encoding="utf-8") as log:
            for line in self.child.stdout:
                log.write(line)
                print(f"[{self.name}] {line}", end="", flush=True)
        self.child.wait()

    def status(self) -> int:
        """Waits for the end."""
        self.join()
        environment.say(f"{self.name} ended after {time.monotonic() - self.started:.0f} s")
        return self.child.returncode


def run_jobs(jobs: list[Job]) -> list[int]:
    """The exit status of every job, as they end; the longest starts first. Cancelled, it stops what it started."""
    cores = os.cpu_count() or 1
    together = max(1, min(cores, len(jobs), MOST_TOGETHER))
    LOGS.mkdir(parents=True, exist_ok=True)
    waiting, running, found = sorted(jobs, key=lambda job: -job.seconds), [], []
    try:
        while waiting or running:
            while waiting and len(running) < together:
                running.append(Run(waiting.pop(0), max(1, cores // together)))
            time.sleep(0.1)
            ended = [run for run in running if not run.is_alive()]
            running = [run for run in running if run not in ended]
            found += [run.status() for run in ended]
    except SystemExit:
        for run in running:
            run.child.terminate()
        raise
    finally:
        for run in running:
            run.child.wait()  # Ctrl-C reaches the child as well, and it cleans up.
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--comfyui", metavar="FOLDER", help="the ComfyUI source tree to run in")
    parser.add_argument("--browser", action="store_true", help="run the shipped workflows in Chromium, too")
    options, arguments = parser.parse_known_args()
    named = environment.tree_host(options.comfyui)
    hosts = [named] if named else environment.prepare(environment.CURRENT, environment.OLDEST)
    tools = environment.install_test_tools(hosts[0])
    environment.say("ruff")
    failed = environment.call(python_m(hosts[0], tools, "ruff", "check", "."), cwd=environment.PACK) != 0
    environment.say(f"pytest with the ComfyUI in {' and '.join(str(host.tree) for host in hosts)}")
    found = run_jobs([*([browser_job(hosts[0])] if options.browser else []), *pytest_jobs(hosts, tools, arguments)])
    failed |= any(status not in (0, NO_TESTS) for status in found) or all(status == NO_TESTS for status in found)
    environment.say("FAILED" if failed else "all tests passed")
    return int(failed)


if __name__ == "__main__":
    with environment.cancellable():
        sys.exit(main())
