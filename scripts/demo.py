#!/usr/bin/env python3
"""Edit a picture with the shipped workflow in the real ComfyUI: `python scripts/demo.py`.

Sets up what is missing, starts ComfyUI without a window, runs workflows/step1x_edit.json and says where
the picture is. Inside a ComfyUI installation it uses that one and its models. Where there is no
Step1X-Edit model it takes the miniature one in miniature/weights, which edits simple scenes; and where
that is missing, too, a tiny one with random weights, which shows the path but makes no sense of the picture.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).absolute().parent / "support"))  # missing in an embedded Python
import demo_model
import environment

WORKFLOW = environment.PACK / "workflows" / "step1x_edit.json"
SAMPLE = environment.PACK / "assets" / "coffee.jpg"
SAMPLE_PROMPT = "replace the cup of coffee with a glass of orange juice"
say = environment.say


@dataclass
class Setup:
    """Models and the values that suit them; None leaves the workflow's own. chosen: file name by loader node; lora: of a few-step LoRA, whose steps and CFG count."""

    models: Path
    chosen: dict[str, str]
    image: Path = SAMPLE
    prompt: str = SAMPLE_PROMPT
    size_level: int | None = None
    steps: int | None = None
    cfg: float | None = None
    lora: str | None = None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="the picture to edit (default: a sample)")
    parser.add_argument("--prompt", help="what to change (default: something in the sample)")
    parser.add_argument("--output", type=Path, default=environment.PACK / "output", help="folder for the result")
    parser.add_argument("--size-level", type=int, help="working size; default 1024, less for the small models")
    parser.add_argument("--steps", type=int, help="denoising steps; default 28, less for the small models")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--fast",
        action="store_true",
        help="edit in a few steps: with the few-step LoRA of the miniature model, or the first one of the installation",
    )
    return parser.parse_args()


def pick(offered: list[str], *words: str) -> str | None:
    """The first file whose name contains the first word that occurs in any."""
    return next((name for word in words for name in offered if word in name.lower()), None)


def pick_vae(offered: list[str]) -> str | None:
    """The FLUX VAE by its published name, or one that lies in a folder named after Step1X. (Wan's and Qwen's names end in ...vae.safetensors, too.)"""
    paths = {name: PurePosixPath(name.lower().replace("\\", "/")) for name in offered}
    own = (
        name
        for name, path in paths.items()
        if "step1x" in str(path.parent) and (path.name == "vae.safetensors" or path.name.startswith("ae"))
    )
    return next((name for name, path in paths.items() if path.name == "ae.safetensors"), None) or next(own, None)


def choose_models(object_info: dict) -> dict[str, str] | None:
    """Names of an installed Step1X-Edit model, its language model and its VAE, or None when one of them is missing."""
    def offered(node, name):
        definition = object_info[node]["input"]["required"][name]
        return definition[0] if isinstance(definition[0], list) else definition[1]["options"]

    chosen = {
        "Step1XEditLoader": pick(offered("Step1XEditLoader", "unet_name"), "step1x-edit-v1p1", "step1x"),
        "Step1XEditMLLM": pick(offered("Step1XEditMLLM", "clip_name"), "qwen_2.5_vl_7b", "qwen2.5-vl-7b", "step1x"),
        "VAELoader": pick_vae(offered("VAELoader", "vae_name")),
    }
    return chosen if all(chosen.values()) else None


def choose_lora(object_info: dict) -> str:
    """The name of an installed few-step LoRA. Raises FileNotFoundError where there is none."""
    definition = object_info["Step1XEditLoadLora"]["input"]["required"]["lora_name"]
    found = pick(
        definition[0] if isinstance(definition[0], list) else definition[1]["options"], "lightning", "fast", "few"
    )
    if found is None:
        raise FileNotFoundError(
            "--fast needs a few-step LoRA in models/loras, with 'lightning', 'fast' or 'few' in its name. See "
            "docs/few_steps.md, or leave --fast out."
        )
    return found


def with_lora(prompt: dict, name: str) -> None:
    """Put a LoRA behind the model's loader, for every node that reads the model."""
    loader = next(node for node, content in prompt.items() if content["class_type"] == "Step1XEditLoader")
    for content in prompt.values():
        content["inputs"].update(
            {name: ["lora", 0] for name, value in content["inputs"].items() if value == [loader, 0]}
        )
    for content in prompt.values():
        if content["class_type"] == "Step1XEditEncode":
            content["inputs"]["model"] = ["lora", 0]  # so that the negative prompt is not encoded for nothing
    prompt["lora"] = {
        "class_type": "Step1XEditLoadLora",
        "inputs": {"model": [loader, 0], "lora_name": name, "strength": 1.0},
    }


def demo_setup(fast: bool = False) -> Setup:
    """The miniature model that comes with the pack. fast: with its few-step LoRA."""
    chosen = {
        "Step1XEditLoader": demo_model.MODEL_FILE,
        "Step1XEditMLLM": demo_model.MLLM_FILE,
        "VAELoader": demo_model.VAE_FILE,
    }
    steps, cfg, lora = (0, 0.0, demo_model.FAST_FILE.name) if fast else (demo_model.STEPS, demo_model.CFG, None)
    return Setup(
        demo_model.FOLDER,
        chosen,
        demo_model.SAMPLE_IMAGE,
        demo_model.SAMPLE_PROMPT,
        demo_model.SIZE_LEVEL,
        steps,
        cfg,
        lora,
    )


def tiny_setup() -> Setup:
    """Models with random weights, enough to see the whole path on a CPU. Files of another version of this pack are not used."""
    import tiny_models

    version = hashlib.sha256(Path(tiny_models.__file__).read_bytes()).hexdigest()[:12]
    models = environment.home() / f"tiny-models-{version}"
    tiny_models.write_all(models, prefix="tiny-")
    chosen = {
        "Step1XEditLoader": tiny_models.V11_FILE,
        "Step1XEditMLLM": tiny_models.MLLM_FILE,
        "VAELoader": tiny_models.VAE_FILE,
    }
    return Setup(models, {node: f"tiny-{name}" for node, name in chosen.items()}, size_level=512, steps=12)


def progress_bar(names: dict[str, str]):
    def show(node, value, maximum):
        filled = 30 * value // maximum
        print(
            f"\r  {names[node]:<24} [{'#' * filled}{'.' * (30 - filled)}] {value}/{maximum}",
            end="\n" if value == maximum else "",
            flush=True,
        )

    return show


def edit(client, setup: Setup, options: argparse.Namespace) -> Path:
    """Run the workflow in a ComfyUI that offers the models of `setup` -> the result's file."""
    from comfy_server import find_nodes, to_api

    info = client.get("/object_info")
    prompt = to_api(json.loads(WORKFLOW.read_text(encoding="utf-8")), info)

    def change(class_type, **values):
        prompt[find_nodes(prompt, class_type)[0]]["inputs"].update(
            {name: value for name, value in values.items() if value is not None}
        )

    for class_type, name in setup.chosen.items():
        change(class_type, **{info[class_type]["input_order"]["required"][0]: name})
    image, text = options.image or setup.image, options.prompt or setup.prompt
    client.upload_image(image, f"source{image.suffix}")
    change("LoadImage", image=f"source{image.suffix}")
    change("Step1XEditEncode", prompt=text, size_level=options.size_level or setup.size_level)
    change("Step1XEditSampler", seed=options.seed, steps=options.steps or setup.steps, cfg=setup.cfg)
    if setup.lora is not None:
        with_lora(prompt, setup.lora)

    say("model {Step1XEditLoader}, MLLM {Step1XEditMLLM}, VAE {VAELoader}".format(**setup.chosen))
    say(f"editing {image.name}: {text}")
    started = time.monotonic()
    run = client.run(
        prompt,
        on_progress=progress_bar({node: content["class_type"] for node, content in prompt.items()}),
        timeout=3600,
    )
    say(f"done in {time.monotonic() - started:.0f} s")
    options.output.mkdir(parents=True, exist_ok=True)
    result = options.output / f"{image.stem}_edited.png"
    result.write_bytes(run.images[0])
    return result


def run_demo(options: argparse.Namespace) -> Path:
    """Start ComfyUI in a temporary folder, edit, stop it -> the result's file."""
    from comfy_server import Client, ComfyServer, install_pack

    tree = Path(os.environ["STEP1X_COMFYUI"])
    # On Windows the log may still be open for a moment.
    with tempfile.TemporaryDirectory(prefix="step1x-demo-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        install_pack(base)

        def serve(models):
            return ComfyServer(tree, base, models, () if has_accelerator() else ("--cpu",))

        say("starting ComfyUI")
        if os.environ.get("STEP1X_COMFYUI_INSTALLED", "1"):
            with serve(tree / "models") as server:
                client = Client(server.url, server.log)
                chosen = choose_models(client.get("/object_info"))
                if chosen is not None:
                    fast = (
                        {"steps": 0, "cfg": 0.0, "lora": choose_lora(client.get("/object_info"))}
                        if options.fast
                        else {}
                    )
                    return edit(client, Setup(tree / "models", chosen, **fast), options)
        if (demo_model.FOLDER / "diffusion_models" / demo_model.MODEL_FILE).is_file():
            say("no Step1X-Edit model found: using the miniature one that comes with the pack")
            setup = demo_setup(options.fast)
            if options.fast and not demo_model.FAST_FILE.is_file():
                raise FileNotFoundError(
                    f"{demo_model.FAST_FILE} is missing. Download the pack again, make the file with miniature/few_steps.py, or leave --fast out."
                )
        else:
            say("no Step1X-Edit model found: using a tiny one with random weights (its pictures make no sense)")
            setup = tiny_setup()
        with serve(setup.models) as server:
            return edit(Client(server.url, server.log), setup, options)


def main() -> int:
    options = arguments()
    if options.image is not None and not options.image.is_file():
        print(f"{options.image} does not exist.", file=sys.stderr)
        return 2

    from comfy_server import ExecutionError, ServerStopped

    try:
        result = run_demo(options)
    except (ExecutionError, ServerStopped, TimeoutError, FileNotFoundError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    say("ComfyUI is stopped again")
    print(result)
    return 0


def has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


if __name__ == "__main__":
    with environment.cancellable():
        environment.reexecute_in_host(__file__)
        sys.exit(main())
