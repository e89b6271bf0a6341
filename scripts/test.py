#!/usr/bin/env python3
"""Set up what is missing and run all tests: `python scripts/test.py [pytest arguments]`.

Outside a ComfyUI installation the tests run in ComfyUI 0.30.0 and 0.18.2, inside one in that one.
"""

import os
import subprocess
import sys

import environment


def run(host: environment.Host, tools, *arguments: str, **variables: str) -> int:
    path = [str(tools)] if tools else []
    env = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.run([str(host.python), "-m", *arguments], cwd=environment.PACK, env=env).returncode


def main() -> int:
    hosts = environment.prepare(environment.CURRENT, environment.OLDEST)
    tools = environment.install_test_tools(hosts[0])
    environment.say("ruff")
    failed = run(hosts[0], tools, "ruff", "check", ".") != 0
    for host in hosts:
        environment.say(f"pytest with the ComfyUI in {host.tree}")
        failed |= run(host, tools, "pytest", "--rootdir", "tests", "-c", "tests/pytest.ini", "tests", *sys.argv[1:], STEP1X_COMFYUI=str(host.tree)) != 0
    environment.say("FAILED" if failed else "all tests passed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
