"""Makes PyPI's torchvision and torchaudio importable beside a CPU build of torch. Changes only this virtual environment; can be repeated.

 - torchvision: its C++ library needs CUDA and stays unloaded. Only the schemas of torchvision::nms and ::qnms are
   declared, because their shape functions are registered unconditionally; calling them raises a clear error.
 - torchaudio: its CUDA-linked extension is set aside, so that it takes its own path without one.
"""

import importlib.util
import pathlib
import subprocess
import sys

import torch

MARK = "# cpu_compat"
DECLARATIONS = f"""
{MARK}
if not _has_ops():
    _cpu_lib = torch.library.Library("torchvision", "FRAGMENT")
    for _op in ("nms", "qnms"):
        _cpu_lib.define(_op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def package(name: str) -> pathlib.Path:
    return pathlib.Path(importlib.util.find_spec(name).submodule_search_locations[0])


if torch.version.cuda is None and torch.version.hip is None:
    extension = package("torchvision") / "extension.py"
    source = extension.read_text()
    if MARK not in source:
        extension.write_text(source + DECLARATIONS)
    if subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True).returncode != 0:
        for library in (package("torchaudio") / "lib").glob("*.so"):
            library.rename(library.with_suffix(".so.cuda"))
