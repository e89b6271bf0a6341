#!/usr/bin/env python3
"""Run golden files through this pack: `python scripts/parity.py DIR...`.

Prints one line per file, `PASS|FAIL <file> max_err=<x> tol=<y>`, and exits with 1 if any file failed or
is unknown. Works from a bare checkout: it prepares the same environment as the tests.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent / "support"))  # missing in an embedded Python
import environment

if __name__ == "__main__":
    with environment.cancellable():
        environment.reexecute_in_host(__file__)
        environment.use_host_in_process()

        sys.path.insert(0, str(environment.PACK / "tests" / "parity"))
        import golden_runner

        sys.exit(golden_runner.main(sys.argv[1:]))
