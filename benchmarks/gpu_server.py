#!/usr/bin/env python3
"""What a new seed and a new instruction cost in the real server: `python benchmarks/gpu_server.py`.

Starts ComfyUI with random full-size weights, runs the graph of the first shipped workflow (v1.1) and reads the times off the server's own
log. `--tiny` runs the same code with a miniature model on a CPU: it shows that the script works, not how fast anything is.
"""

import argparse
import importlib.util
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment
import gpu_edit
import numpy as np
from PIL import Image

FOLDERS = {"transformer": "diffusion_models", "mllm": "text_encoders", "vae": "vae"}
INSTRUCTIONS = ("replace the cup with a glass of orange juice", "make the table blue", "add a cat beside the cup",
                "turn the picture into a pencil drawing", "remove the spoon")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4, help="new seeds, and new instructions")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=1024, help="size level")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no further run after so many")
    parser.add_argument("--arguments", nargs="*", default=[], help="further arguments of ComfyUI, without their dashes")
    parser.add_argument("--tiny", action="store_true", help="a miniature model on a CPU")
    parser.add_argument("--models", type=Path, help="keep the checkpoints in this folder, or take those kept there")
    return parser.parse_args()


def write_checkpoints(folder: Path, tiny: bool) -> dict[str, str]:
    """Checkpoints in ComfyUI's folders of models; returns their names by kind. Those that lie in `folder` are used."""
    import torch

    gpu = torch.cuda.is_available() and not tiny
    environment.use_host_in_process(cpu=not gpu)
    device = torch.device("cuda" if gpu else "cpu")
    paths = gpu_edit.write_models(folder, "v1.1", tiny, device, only_sampling=False)
    for kind, path in paths.items():
        link = folder / "comfyui" / FOLDERS[kind] / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path.absolute())
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {kind: path.name for kind, path in paths.items()}


def graph(names: dict[str, str], options) -> dict:
    """The workflow in API form."""
    nodes = {
        "model": ("Step1XEditLoader", {"unet_name": names["transformer"], "version": "auto", "weight_dtype": "default"}),
        "clip": ("Step1XEditMLLM", {"clip_name": names["mllm"], "device": "default", "version": "v1.1"}),
        "vae": ("VAELoader", {"vae_name": names["vae"]}),
        "image": ("LoadImage", {"image": "source.png"}),
        "encode": ("Step1XEditEncode", {"clip": ["clip", 0], "vae": ["vae", 0], "image": ["image", 0], "prompt": "",
                                        "negative_prompt": "", "size_level": options.size}),
        "sample": ("Step1XEditSampler", {"model": ["model", 0], "positive": ["encode", 0], "negative": ["encode", 1],
                                         "latent_image": ["encode", 2], "seed": 0, "steps": options.steps, "cfg": 0.0,
                                         "sampler_name": "euler", "denoise": 1.0}),
        "decode": ("Step1XEditDecode", {"vae": ["vae", 0], "samples": ["sample", 0], "source": ["image", 0]}),
        "show": ("PreviewImage", {"images": ["decode", 0]}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def install_pack(base: Path) -> None:
    """A copy of the pack's code in ComfyUI's folder of custom nodes."""
    target = base / "custom_nodes" / "ComfyUI-Step1X-Edit"
    for folder in ("nodes", "step1x_core"):
        shutil.copytree(environment.PACK / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"),
                        dirs_exist_ok=True)
    for file in ("__init__.py", "pyproject.toml"):
        shutil.copy(environment.PACK / file, target / file)


def executed(log: str) -> list[float]:
    """The seconds of each prompt, by the server's log."""
    return [float(found) for found in re.findall(r"Prompt executed in ([\d.]+) seconds", log)]


def measure(options, server, client, prompt: dict, say) -> None:
    encode, sampler = prompt["encode"]["inputs"], prompt["sample"]["inputs"]
    times: dict[str, list[float]] = {}

    def run(kind: str) -> None:
        if time.perf_counter() - options.begun > options.seconds:
            say(f"no time left for {kind}")
            return
        client.run(prompt)
        deadline = time.perf_counter() + 5
        while len(executed(server.log_text())) <= sum(map(len, times.values())) and time.perf_counter() < deadline:
            time.sleep(0.02)
        times.setdefault(kind, []).append(executed(server.log_text())[-1])
        say(f"{kind}: {times[kind][-1]:.2f} s")

    for number in range(2):
        encode["prompt"], sampler["seed"] = f"warm up {number}", number
        run("first runs")
    for number in range(options.repeats):
        sampler["seed"] = 10 + number
        run("new seed")
        encode["prompt"] = INSTRUCTIONS[number % len(INSTRUCTIONS)] + "!" * (number // len(INSTRUCTIONS))
        run("new instruction")
    if len(times.get("new seed", [])) and len(times.get("new instruction", [])):
        seed, instruction = (statistics.median(times[kind]) for kind in ("new seed", "new instruction"))
        say(f"new seed {seed:.2f} s, new instruction {instruction:.2f} s ({options.steps} steps at size {options.size}): {instruction - seed:.2f} s more")


def main() -> int:
    options = arguments()
    options.begun = time.perf_counter()
    host = environment.named_host()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - options.begun:6.1f} {text}", flush=True)

    from comfy_server import Client, ComfyServer

    shared = Path("/dev/shm")
    with gpu_edit.models_folder(options.models, shared if shared.is_dir() and not options.tiny else None) as folder:
        names = write_checkpoints(folder, options.tiny)
        say(f"checkpoints {names}")
        base = folder / "server"
        install_pack(base)
        flags = [f"--{argument}" for argument in options.arguments] + (["--cpu"] if options.tiny else [])
        if importlib.util.find_spec("comfyui_frontend_package") is None:  # nobody looks
            (base / "face").mkdir(exist_ok=True)
            (base / "face" / "index.html").write_text("", encoding="utf-8")
            flags += ["--front-end-root", str(base / "face")]
        with ComfyServer(host.tree, base, folder / "comfyui", tuple(flags), keep_path=True) as server:
            say("the server answers")
            client = Client(server.url, server.log)
            side = 64 if options.tiny else 1024
            noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise).save(base / "input" / "source.png")
            prompt = graph(names, options)
            try:
                measure(options, server, client, prompt, say)
            finally:
                for line in server.log_text().splitlines():
                    if re.search(r"Total VRAM|pytorch version|Device:|Prompt executed|Step1X-Edit|rror|attention", line):
                        print("   log:", line[:160], flush=True)
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
