#!/usr/bin/env python3
"""Set up what is missing and run all tests: `python scripts/test.py [pytest arguments]`.

Outside a ComfyUI installation the tests run in ComfyUI 0.30.0 and 0.18.2, inside one in that one.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent))  # missing in an embedded Python
import environment


def run(host: environment.Host, tools: Path | None, module: str, *arguments: str) -> int:
    """`python -m module`, where the module may be in the tools folder. An embedded Python ignores PYTHONPATH, hence the detour."""
    code = f"import runpy, sys; sys.path[:0] = {[str(tools)] if tools else []}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return environment.call([str(host.python), "-c", code, *arguments], cwd=environment.PACK, env={**os.environ, "STEP1X_COMFYUI": str(host.tree)})


def main() -> int:
    hosts = environment.prepare(environment.CURRENT, environment.OLDEST)
    tools = environment.install_test_tools(hosts[0])
    environment.say("ruff")
    failed = run(hosts[0], tools, "ruff", "check", ".") != 0
    for host in hosts:
        environment.say(f"pytest with the ComfyUI in {host.tree}")
        failed |= run(host, tools, "pytest", "--rootdir", "tests", "-c", "tests/pytest.ini", "tests", *sys.argv[1:]) != 0
    environment.say("FAILED" if failed else "all tests passed")
    return int(failed)


if __name__ == "__main__":
    with environment.cancellable():
        sys.exit(main())
