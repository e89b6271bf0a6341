#!/usr/bin/env python3
"""Set up what is missing and run all tests: `python scripts/test.py [pytest arguments]`.

Outside a ComfyUI installation the tests run in ComfyUI 0.30.0 and 0.18.2, both at once where there is more than one core, inside one in that one.
`--comfyui FOLDER` runs them in the ComfyUI of that folder instead, a checkout of a newer one for instance: with the packages that its
requirements.txt pins, in an environment of its own, which is built once. So does STEP1X_COMFYUI where the Python that runs this has no torch.
What pytest prints is in output/tests, too, in a file for each ComfyUI.
"""

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent / "support"))  # missing in an embedded Python
import environment

LOGS = environment.PACK / "output" / "tests"


def python_m(host: environment.Host, tools: Path | None, module: str, *arguments: str) -> list[str]:
    """The command `python -m module`, where the module may be in the tools folder. An embedded Python ignores PYTHONPATH, hence the detour."""
    code = f"import runpy, sys; sys.path[:0] = {[str(tools)] if tools else []}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [str(host.python), "-c", code, *arguments]


class Run(threading.Thread):
    """pytest in one host. Its output is written to a log and shown line by line, each with the host's name in front."""

    def __init__(self, host: environment.Host, tools: Path | None, threads: int, arguments: list[str]):
        super().__init__(name=host.tree.name)
        command = python_m(host, tools, "pytest", "--rootdir", "tests", "-c", "tests/pytest.ini", "tests", *arguments)
        variables = {**os.environ, "STEP1X_COMFYUI": str(host.tree), "PYTHONUNBUFFERED": "1"}
        variables.setdefault("OMP_NUM_THREADS", str(threads))
        self.child = subprocess.Popen(command, cwd=environment.PACK, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
        self.start()

    def run(self) -> None:
        with open(LOGS / f"{self.name}.log", "w", encoding="utf-8") as log:
            for line in self.child.stdout:
                log.write(line)
                print(f"[{self.name}] {line}", end="", flush=True)

    def succeeded(self) -> bool:
        """Waits for the end."""
        status = self.child.wait()
        self.join()
        return status == 0


def run_pytest(hosts: list[environment.Host], tools: Path | None, arguments: list[str]) -> bool:
    """Whether all tests passed in all hosts. Cancelled, it stops what it started."""
    cores = os.cpu_count() or 1
    together = len(hosts) if cores >= len(hosts) else 1
    LOGS.mkdir(parents=True, exist_ok=True)
    succeeded = True
    for first in range(0, len(hosts), together):
        runs = []
        try:
            for host in hosts[first:first + together]:
                runs.append(Run(host, tools, cores // together, arguments))
            succeeded &= all([run.succeeded() for run in runs])
        except SystemExit:
            for run in runs:
                run.child.terminate()
            raise
        finally:
            for run in runs:
                run.child.wait()  # Ctrl-C reaches the child as well, and it cleans up.
    return succeeded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--comfyui", metavar="FOLDER", help="the ComfyUI source tree to run in")
    options, arguments = parser.parse_known_args()
    named = environment.tree_host(options.comfyui)
    hosts = [named] if named else environment.prepare(environment.CURRENT, environment.OLDEST)
    tools = environment.install_test_tools(hosts[0])
    environment.say("ruff")
    failed = environment.call(python_m(hosts[0], tools, "ruff", "check", "."), cwd=environment.PACK) != 0
    environment.say(f"pytest with the ComfyUI in {' and '.join(str(host.tree) for host in hosts)}")
    failed |= not run_pytest(hosts, tools, arguments)
    environment.say("FAILED" if failed else "all tests passed")
    return int(failed)


if __name__ == "__main__":
    with environment.cancellable():
        sys.exit(main())
