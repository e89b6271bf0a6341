"""Checks the installation and prints advice; downloads models on request.

Without arguments, as ComfyUI-Manager runs it after an installation, it only checks: it installs and downloads nothing,
and it always succeeds.
`python install.py --download v1.1 mllm vae` downloads model files into ComfyUI's models folders. Importing this file
needs only the standard library.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

PACK = Path(__file__).absolute().parent
OLDEST_COMFYUI = (0, 18, 2)

# The files that a diffusers repository needs: those of the component folders, without images and papers.
COMPONENTS = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt")


@dataclass(frozen=True)
class Model:
    """What --download gets. folder: ComfyUI's name of the folder. files: lower-case patterns of paths or names in the
    repository.

    whole: the files keep their paths, in a folder named like the repository. rename: another name for a single file.
    """

    title: str
    folder: str
    repository: str
    files: tuple[str, ...]
    whole: bool = False
    rename: str | None = None


MODELS = {
    "v1.0": Model("Step1X-Edit v1.0", "diffusion_models", "stepfun-ai/Step1X-Edit", ("step1x-edit-i1258.safetensors",)),
    "v1.1": Model(
        "Step1X-Edit v1.1", "diffusion_models", "stepfun-ai/Step1X-Edit", ("step1x-edit-v1p1-official.safetensors",)
    ),
    "v1.2": Model(
        "Step1X-Edit v1.2 with text encoder and VAE", "diffusers", "stepfun-ai/Step1X-Edit-v1p2", COMPONENTS, whole=True
    ),
    "v1.2-preview": Model(
        "Step1X-Edit v1.2-preview with text encoder and VAE",
        "diffusers",
        "stepfun-ai/Step1X-Edit-v1p2-preview",
        COMPONENTS,
        whole=True,
    ),
    # A fine-tune of v1.1; its weights are for non-commercial academic research only.
    # Text encoder and VAE are those of v1.1.
    "realrestorer": Model(
        "RealRestorer", "diffusers", "RealRestorer/RealRestorer",
        ("model_index.json", "transformer/*.json", "transformer/*.safetensors"), whole=True,
    ),
    # A community repository; there are others, hence --repo.
    "fp8": Model("Step1X-Edit in fp8", "diffusion_models", "meimeilook/Step1X-Edit-FP8", ("*fp8*.safetensors",)),
    "mllm": Model("Qwen2.5-VL-7B", "text_encoders", "Comfy-Org/Qwen-Image_ComfyUI", ("qwen_2.5_vl_7b.safetensors",)),
    "mllm-fp8": Model(
        "Qwen2.5-VL-7B in fp8",
        "text_encoders",
        "Comfy-Org/Qwen-Image_ComfyUI",
        ("qwen_2.5_vl_7b_fp8_scaled.safetensors",),
    ),
    # Renamed to the name that workflows use; it is the FLUX VAE.
    "vae": Model("FLUX VAE", "vae", "stepfun-ai/Step1X-Edit", ("vae.safetensors",), rename="ae.safetensors"),
    "lora": Model("LoRA", "loras", "stepfun-ai/Step1X-Edit", ("*lora*.safetensors",)),
}

# What an edit needs: title, ComfyUI's folder name, subfolder of a diffusers repository, matching names, what to
# download.
NEEDED = (
    ("Step1X-Edit model", "diffusion_models", "transformer", r"^(?!.*vae\.).*(step1x|reasonedit)", "v1.1"),
    ("Qwen2.5-VL-7B", "text_encoders", "text_encoder", r"^MLLM|qwen.?2[._]?5.?vl|step1x.*/$", "mllm"),
    ("FLUX VAE", "vae", "vae", r"(^|[\\/])v?ae\.|flux|step1x.*/$", "vae"),
)

# ComfyUI's start-up options for the attention packages that it supports.
ATTENTION = {
    "flash_attn": "--use-flash-attention",
    "sageattention": "--use-sage-attention",
    "xformers": "used by itself",
}
FLASH_ATTN = "2.8.3"


def host_root() -> Path:
    """Return ComfyUI's folder: the one named by STEP1X_COMFYUI or the Manager's COMFYUI_PATH, else the one around this
    pack."""
    named = os.environ.get("STEP1X_COMFYUI") or os.environ.get("COMFYUI_PATH")
    return Path(named).absolute() if named else PACK.parent.parent


def comfyui_version(root: Path) -> tuple[int, ...] | None:
    """Return the version in a ComfyUI folder's comfyui_version.py, or None if there is none."""
    file = root / "comfyui_version.py"
    match = re.search(r'"(\d+(?:\.\d+)*)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return tuple(map(int, match[1].split("."))) if match else None


def use_host(root: Path):
    """Return the host's module folder_paths, with extra_model_paths.yaml read. Afterwards this pack's core can be
    imported.

    Raises ImportError if this Python lacks packages that ComfyUI needs.
    """
    sys.path.insert(0, str(root))
    sys.path.append(str(PACK))
    from comfy.cli_args import args
    if "COMFYUI_FOLDERS_BASE_PATH" in os.environ:  # set by the Manager
        args.base_directory = os.environ["COMFYUI_FOLDERS_BASE_PATH"]
    import folder_paths
    config = root / "extra_model_paths.yaml"
    if config.is_file():
        from utils.extra_config import load_extra_path_config
        load_extra_path_config(str(config))
    return folder_paths


def flash_attn_wheel(torch) -> str | None:
    """Return the name of the flash-attn wheel for this Python, torch, CUDA, C++ ABI and platform; None without CUDA."""
    if torch.version.cuda is None:
        return None
    system = "win_amd64" if sys.platform == "win32" else f"linux_{platform.machine()}"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    built_for = f"cu{torch.version.cuda.split('.')[0]}torch{'.'.join(torch.__version__.split('.')[:2])}cxx11abi{str(torch.compiled_with_cxx11_abi()).upper()}"
    return f"flash_attn-{FLASH_ATTN}+{built_for}-{python}-{python}-{system}.whl"


def advise_torch() -> list[str]:
    """Describe torch, its device, and the attention packages."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [
            f"torch cannot be used by {sys.executable} ({error}). Run install.py with the Python that starts ComfyUI."
        ]
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    elif torch.backends.mps.is_available():
        device = "Apple Metal"
    elif torch.xpu.is_available():
        device = torch.xpu.get_device_name()
    else:
        device = "no GPU that torch can use: full-size models would run on the CPU, which takes hours"
    lines = [f"torch {torch.__version__}, Python {platform.python_version()}; {device}"]

    found = []
    for name, option in ATTENTION.items():
        try:
            found.append(f"{name} {importlib.metadata.version(name)} ({option})")
        except importlib.metadata.PackageNotFoundError:
            continue
    lines.append(f"Attention: PyTorch's own; other packages installed: {', '.join(found) or 'none (optional)'}")
    wheel = flash_attn_wheel(torch)
    if wheel is not None and not any(name.startswith("flash_attn") for name in found):
        lines.append(
            f"flash-attn is optional; this file fits: {wheel} (if its makers built it: "
            "github.com/Dao-AILab/flash-attention/releases)"
        )
    return lines


def command(*arguments: str) -> str:
    return subprocess.list2cmdline([sys.executable, str(PACK / "install.py"), *arguments])


def advise_models(folder_paths) -> list[str]:
    """List the files that the loaders would find, and the command that downloads what is missing."""
    from step1x_core.host.checkpoints.folders import choices

    lines, missing = [], []
    for title, folder, subfolder, pattern, name in NEEDED:
        found = [
            path for choice, path in choices(folder, subfolder).items() if re.search(pattern, choice, re.IGNORECASE)
        ]
        lines += [f"{title}: {path}" for path in found]
        if not found:
            missing.append(name)
            lines.append(f"{title}: not found in {', '.join(folder_paths.get_folder_paths(folder))}")
    models = Path(folder_paths.models_dir)
    lines.append(
        f"Free on the disk of {models}: {shutil.disk_usage(models).free / 1e9:.0f} GB (v1.1, mllm and vae take about 42 GB)"
    )
    lines.append(
        f"To download what is missing: {command('--download', *missing)}"
        if missing
        else "Nothing is missing for an edit."
    )
    return lines


def advise(root: Path) -> Iterator[str]:
    """Yield what a user should know about the ComfyUI in `root`, line by line."""
    version = comfyui_version(root)
    if version is None:
        yield (
            f"{root} is not a ComfyUI folder. Put this pack into ComfyUI/custom_nodes, or set COMFYUI_PATH to "
            "ComfyUI's folder."
        )
        yield from advise_torch()
        return
    number, oldest = (".".join(map(str, v)) for v in (version, OLDEST_COMFYUI))
    yield (
        f"ComfyUI {number} is too old: update it to {oldest} or newer."
        if version < OLDEST_COMFYUI
        else f"ComfyUI {number} in {root}"
    )
    yield from advise_torch()
    try:
        yield from advise_models(use_host(root))
    except ImportError as error:
        yield f"The models folders were not checked: {error}. Run install.py with the Python that starts ComfyUI."


def download_folder(folder_paths, folder: str) -> Path:
    """Return the folder for this kind of file: the default in extra_model_paths.yaml, else the folder of that name in
    the models folder."""
    models, first = Path(folder_paths.models_dir), Path(folder_paths.get_folder_paths(folder)[0])
    return models / folder if models in first.parents else first


def items_of(model: Model, source: str, repository: str, folder: Path, folder_paths=None) -> list:
    """Return the download items of a model, for `folder` or, with folder_paths, at the place where ComfyUI already has
    a file of that name.

    Raises HubError for a repository that cannot be read or lacks such files.
    """
    import download
    import hub

    files = hub.list_files(source, repository)
    chosen = []
    for file in files:
        names = file.path.lower(), PurePosixPath(file.path.lower()).name
        if any(fnmatchcase(name, pattern) for name in names for pattern in model.files):
            chosen.append(file)
    if not any(file.path.endswith(".safetensors") for file in chosen):
        others = ", ".join(file.path for file in files if file.path.endswith(".safetensors")) or "none"
        raise hub.HubError(
            f"{repository} on {source} does not contain the files of {model.title}; its safetensors files: {others}. "
            "Name another repository with --repo."
        )
    if model.whole:
        return [download.Item(file, folder / PurePosixPath(repository).name / file.path) for file in chosen]
    items = []
    for file in chosen:
        name = model.rename or PurePosixPath(file.path).name
        present = folder_paths.get_full_path(model.folder, name) if folder_paths else None
        items.append(download.Item(file, Path(present) if present else folder / name))
    return items


def run_download(names: list[str], source: str, repository: str | None, folder: Path | None) -> int:
    """Download the named models; returns the exit status."""
    sys.path.insert(0, str(PACK / "scripts" / "support"))
    try:
        import download
        import environment
        import hub
        folder_paths = None if folder else use_host(host_root())
    except ImportError as error:
        sys.exit(
            f"{error}. Run install.py with the Python that starts ComfyUI, inside ComfyUI/custom_nodes or with --dir."
        )
    except Exception as error:  # of the host's code: extra_model_paths.yaml may hold anything
        sys.exit(
            f"The models folders of ComfyUI cannot be read ({' '.join(str(error).split())}). Correct its "
            "extra_model_paths.yaml, or name a folder with --dir."
        )

    groups, failures = [], []
    for name in dict.fromkeys(names):
        model = MODELS[name]
        place = repository or model.repository
        print(f"Listing the files of {place} on {source}", flush=True)
        try:
            items = items_of(model, source, place, folder or download_folder(folder_paths, model.folder), folder_paths)
        except hub.HubError as error:
            failures.append(str(error))
            continue
        groups += [items] if model.whole else [[item] for item in items]
        for item in items:
            print(f"{model.title}: {item.file.path} -> {item.target}, {download.gigabytes(item.file.size)}", flush=True)
    with environment.cancellable():
        try:
            failures += download.download(groups)
        except (hub.HubError, OSError) as error:
            failures.append(str(error))
    for failure in failures:
        print(failure, file=sys.stderr)
    if not failures:
        print("All files are in place. In ComfyUI, press R to refresh the lists of the loaders.")
    return int(bool(failures))


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # folder names may contain characters that the console lacks
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--download", nargs="+", choices=MODELS, metavar="NAME", help=f"what to download: {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--source", choices=("huggingface", "modelscope"), default="huggingface", help="the hub to download from"
    )
    parser.add_argument("--repo", metavar="OWNER/NAME", help="repository to use instead of the default one")
    parser.add_argument("--dir", type=Path, help="folder to use instead of ComfyUI's models folders")
    options = parser.parse_args()
    if options.download:
        return run_download(options.download, options.source, options.repo, options.dir and options.dir.absolute())
    try:
        for line in advise(host_root()):
            print(f"[Step1X-Edit] {line}", flush=True)
    except Exception as error:  # whatever it may be, advice must not make an installation fail
        print(f"[Step1X-Edit] The setup advice failed: {error!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
