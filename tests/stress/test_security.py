"""Weights from safetensors only, no code from files, no network, no file outside the model folders: read off the source, and watched in a run."""

import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny_models
from conftest import PACK
from diffusers_layout import diffusers_repository, to_diffusers
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.once

# What runs in ComfyUI, and what else is shipped.
NODE_PACK = ("__init__.py", "nodes", "step1x_core")
SHIPPED = (*NODE_PACK, "install.py", "scripts", "miniature", "benchmarks")
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty"}
NETWORK_MODULES = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "urllib3",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "xmlrpc",
    "webbrowser",
    "huggingface_hub",
    "modelscope",
}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "numpy.load",
    "np.load",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "importlib.import_module",
}
UNSAFE_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}


def unsafe(source: str) -> list[str]:
    """Imports, calls and keyword arguments that run or unpickle what is in a file or on the network."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if f"{node.module}.{alias.name}" in UNSAFE_CALLS]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in UNSAFE_CALLS else []
            found += [keyword.arg for keyword in node.keywords if keyword.arg in UNSAFE_KEYWORDS and ast.unparse(keyword.value) != "False"]
    return found + sorted(imported(source) & UNSAFE_MODULES)


def imported(source: str) -> set[str]:
    """The top-level packages that a source imports from outside."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def sources(parts) -> dict[str, str]:
    paths = [path for part in parts for path in ([PACK / part] if part.endswith(".py") else sorted((PACK / part).rglob("*.py")))]
    return {path.relative_to(PACK).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill.source",
        "eval('1')",
        "exec(text)",
        "__import__(name)",
        "torch.load(path, map_location='cpu')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "numpy.load(path)",
        "importlib.import_module(name)",
        "from torch import load",
        "from os import path, system",
        "f(allow_pickle=flag)",
    ],
)
def test_the_search_finds(source):
    assert unsafe(source)
    assert not unsafe(
        "model.eval()\nre.compile('x')\nimport json\nfrom .pickle import own\ntorch.compile(model)\nfrom os import path\nf(trust_remote_code=False)"
    )


def test_nothing_shipped_runs_or_unpickles_what_it_reads():
    found = {path: problems for path, source in sources(SHIPPED).items() if (problems := unsafe(source))}
    assert found == {}


def test_no_node_can_reach_the_network():
    found = {path: modules for path, source in sources(NODE_PACK).items() if (modules := imported(source) & NETWORK_MODULES)}
    # The endpoint that the person names to scripts/gedit.py; nodes judge with the local language model.
    found.pop("step1x_core/reasoning/judge.py", None)
    assert found == {} and not [path for path, source in sources(("nodes", "step1x_core/host")).items() if "Endpoint" in source]


def test_no_node_can_start_a_process():
    assert {path for path, source in sources(NODE_PACK).items() if {"subprocess", "ctypes"} & imported(source)} == set()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `guarded_run.py` has seen while the host started, while nodes edited, and while they kept what they made; and its folder."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    base = tmp_path_factory.mktemp("guarded")
    tiny_models.write_all(base / "models", terse=True)
    weights = load_file(base / "models" / "diffusion_models" / tiny_models.V11_FILE)
    diffusers_repository(base / "models" / "diffusers" / "shards-v1p1", to_diffusers(weights))
    config = ViTConfig(image_size=32, patch_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    for part in (ViTForImageClassification(config), ViTImageProcessor(size={"height": 32, "width": 32})):
        part.save_pretrained(base / "models" / "image_classification" / "classifier")
    for part in ("source", "target"):
        (base / "input" / "pairs" / part).mkdir(parents=True)
        Image.new("RGB", (64, 64), "green").save(base / "input" / "pairs" / part / "1.png")
    (base / "input" / "pairs" / "target" / "1.txt").write_text("nothing")
    command = [sys.executable, str(PACK / "tests" / "support" / "guarded_run.py"), str(base), str(base / "report.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((base / "report.json").read_text(encoding="utf-8")), base


def outside(paths: list[str], *folders) -> list[str]:
    roots = [Path(folder).resolve() for folder in folders]
    return [path for path in paths if not any(Path(path).resolve().is_relative_to(root) for root in roots)]


def test_the_guard_stops_a_connection():
    code = "import sys, socket; sys.path.insert(0, sys.argv[1]); import guarded_run; sys.addaudithook(guarded_run.hook); socket.create_connection(('127.0.0.1', 9))"
    result = subprocess.run([sys.executable, "-c", code, str(PACK / "tests" / "support")], capture_output=True, text=True)
    assert "PermissionError: no network: socket." in result.stderr


def test_a_run_never_reaches_for_the_network(run):
    seen, _ = run
    assert [part["network"] for part in seen.values()] == [[], [], []]


def test_a_run_starts_no_process_and_unpickles_nothing(run):
    seen, _ = run
    assert [seen[part][name] for part in ("editing", "keeping") for name in ("processes", "unpickled")] == [[], [], [], []]


def test_an_edit_writes_no_file(run):
    seen, base = run
    written = seen["editing"]["written"]
    # torch makes itself a folder among the temporary ones; the models of this test are there, too.
    assert outside(written, tempfile.gettempdir()) == [] and outside(written, base) == written


def test_what_is_kept_lies_in_the_hosts_folders(run):
    seen, base = run
    written = seen["keeping"]["written"]
    kept = [path for path in written if path not in outside([path], base)]
    assert outside(kept, base / "input" / "pairs", base / "output", base / "temp") == [] and outside(written, tempfile.gettempdir()) == []
    assert all(
        any(Path(path).is_relative_to(base / folder) for path in kept)
        for folder in (
            "input/pairs/.step1x_cache",
            "output/step1x_training/lora",
            "output/edit_pairs/pairs",
            "output/gedit_bench/x",
        )
    )


def test_a_run_reads_no_file_but_code_and_models(run):
    seen, base = run
    code = (PACK, os.environ["STEP1X_COMFYUI"], sys.prefix, sys.base_prefix, "/proc", "/sys")
    assert outside(seen["editing"]["read"], base / "models", *code) == []
    assert outside(seen["keeping"]["read"], base, *code) == []
