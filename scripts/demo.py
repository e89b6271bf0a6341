#!/usr/bin/env python3
"""Edit a photograph with the shipped workflow in the real ComfyUI: `python scripts/demo.py`.

Sets up what is missing, starts ComfyUI without a window, runs workflows/step1x_edit.json and says where
the picture is. Inside a ComfyUI installation it uses that one and its models; where there is no
Step1X-Edit model it writes a tiny one with random weights, which shows the path but makes no sense of
the picture.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import environment

WORKFLOW = environment.PACK / "workflows" / "step1x_edit.json"
SAMPLE = environment.PACK / "assets" / "coffee.jpg"
# Enough to see the whole path on a CPU.
TINY_SIZE_LEVEL, TINY_STEPS = 512, 12


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=SAMPLE, help="the picture to edit (default: the sample photograph)")
    parser.add_argument("--prompt", default="replace the cup of coffee with a glass of orange juice", help="what to change")
    parser.add_argument("--output", type=Path, default=environment.PACK / "output", help="folder for the result")
    parser.add_argument("--size-level", type=int, help="working size; default 1024, or 512 with the tiny model")
    parser.add_argument("--steps", type=int, help="denoising steps; default 28, or 12 with the tiny model")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def pick(offered: list[str], *words: str) -> str | None:
    """The first file whose name contains the first word that occurs in any."""
    return next((name for word in words for name in offered if word in name.lower()), None)


def choose_models(object_info: dict) -> dict[str, str] | None:
    """Names of an installed Step1X-Edit model, its language model and its VAE, or None when one of them is missing."""
    def offered(node, name):
        definition = object_info[node]["input"]["required"][name]
        return definition[0] if isinstance(definition[0], list) else definition[1]["options"]

    chosen = {
        "Step1XModelLoader": pick(offered("Step1XModelLoader", "model"), "step1x-edit-v1p1", "step1x"),
        "Step1XMLLMLoader": pick(offered("Step1XMLLMLoader", "mllm"), "qwen_2.5_vl_7b", "qwen2.5-vl-7b", "step1x"),
        "VAELoader": pick(offered("VAELoader", "vae_name"), "ae.safetensors", "step1x"),
    }
    return chosen if all(chosen.values()) else None


def progress_bar(names: dict[str, str]):
    def show(node, value, maximum):
        filled = 30 * value // maximum
        print(f"\r  {names[node]:<24} [{'#' * filled}{'.' * (30 - filled)}] {value}/{maximum}", end="\n" if value == maximum else "", flush=True)

    return show


def main() -> int:
    options = arguments()
    if not options.image.is_file():
        print(f"{options.image} does not exist.", file=sys.stderr)
        return 2

    from comfy_server import Client, ComfyServer, ExecutionError, find_nodes, install_pack, to_api

    tree = Path(os.environ["STEP1X_COMFYUI"])
    base = environment.home() / "demo"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    install_pack(base)

    def serve(models):
        return ComfyServer(tree, base, models, () if has_accelerator() else ("--cpu",))

    say = environment.say
    say("starting ComfyUI")
    models, tiny = tree / "models", True
    if os.environ["STEP1X_COMFYUI_INSTALLED"]:
        with serve(models) as server:
            tiny = choose_models(Client(server.url).get("/object_info")) is None
    if tiny:
        import tiny_models

        say("no Step1X-Edit model found: using a tiny one with random weights (its pictures make no sense)")
        models = environment.home() / "tiny-models"
        tiny_models.write_all(models)

    with serve(models) as server:
        client = Client(server.url)
        info = client.get("/object_info")
        chosen = choose_models(info)
        prompt = to_api(json.loads(WORKFLOW.read_text(encoding="utf-8")), info)
        for class_type, name in chosen.items():
            prompt[find_nodes(prompt, class_type)[0]]["inputs"].update({info[class_type]["input_order"]["required"][0]: name})
        client.upload_image(options.image, options.image.name)
        prompt[find_nodes(prompt, "LoadImage")[0]]["inputs"]["image"] = options.image.name
        encode = prompt[find_nodes(prompt, "Step1XEditEncode")[0]]["inputs"]
        encode.update(prompt=options.prompt, size_level=options.size_level or (TINY_SIZE_LEVEL if tiny else encode["size_level"]))
        sampler = prompt[find_nodes(prompt, "Step1XSampler")[0]]["inputs"]
        sampler.update(seed=options.seed, steps=options.steps or (TINY_STEPS if tiny else sampler["steps"]))

        say(f"model {chosen['Step1XModelLoader']}, MLLM {chosen['Step1XMLLMLoader']}, VAE {chosen['VAELoader']}")
        say(f"editing {options.image.name}: {options.prompt}")
        started = time.monotonic()
        try:
            run = client.run(prompt, on_progress=progress_bar({node: content["class_type"] for node, content in prompt.items()}), timeout=3600)
        except ExecutionError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
    options.output.mkdir(parents=True, exist_ok=True)
    result = options.output / f"{options.image.stem}_edited.png"
    result.write_bytes(run.images[0])
    say(f"done in {time.monotonic() - started:.0f} s; ComfyUI is stopped again")
    print(result)
    return 0


def has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
