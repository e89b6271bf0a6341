#!/usr/bin/env python3
"""Speed and memory of an edit with full-size models: `python benchmarks/gpu_edit.py`.

The models have random weights, which cost the same time as trained ones, and run through the pack's loaders and the host's own sampling. "bf16 host" is
without the pack's blocks and attention; "split" is with the stock MultiGPU CFG Split on two devices.
After "float32" the column "differ" has the relative L2 distance of each mode's final latent to that of "float32".
Every number is the median of repeated runs after a warm-up; the last lines are a table, and a JSON file beside it holds every run.
`--tiny` runs the same code with miniature models, on a CPU too: it shows that the script works, not how fast anything is.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment

MODES = {
    "float32": {"float32": True},
    "bf16": {},
    "bf16 host": {"host_blocks": True},
    "bf16 compiled": {"compile": True},
    "bf16 teacache": {"teacache": True},
    "bf16 interval": {"interval": True},
    "fp8": {"fp8": True},
    "fp8 compiled": {"fp8": True, "compile": True},
    "fp8 teacache": {"fp8": True, "teacache": True},
    "fp8 interval": {"fp8": True, "interval": True},
    "fp8 both": {"fp8": True, "interval": True, "teacache": True},
    "fp8 attention": {"fp8": True, "attention": True},
    "fp8 attention both": {"fp8": True, "attention": True, "interval": True, "teacache": True},
    "bf16 split": {"split": True},
    "fp8 split": {"fp8": True, "split": True},
}
FULL_MLLM = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "depth": 32,
        "num_heads": 16,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 3584,
    },
}
PROMPT = "replace the modern sofa with a vintage leather couch"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", choices=("v1.1", "v1.2"), default="v1.1")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["bf16"])
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[512, 768, 1024], help="size levels of a square picture"
    )
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--teacache", type=float, default=0.2, help="threshold of the modes with TeaCache")
    parser.add_argument(
        "--interval",
        type=float,
        default=0.5,
        help="part of the steps that is guided, in the modes with a guidance interval",
    )
    parser.add_argument(
        "--vram",
        nargs="+",
        type=float,
        default=[0.0],
        metavar="GIB",
        help="leave only so much of the card's memory free, by an allocation that fills the rest",
    )
    parser.add_argument(
        "--dynamic-vram",
        action="store_true",
        help="with the memory manager that ComfyUI switches on at its start on NVIDIA cards",
    )
    parser.add_argument(
        "--new-seed",
        action="store_true",
        help="repeat the sampling only, as ComfyUI does when nothing but the seed changes",
    )
    parser.add_argument(
        "--think", type=int, default=0, metavar="TOKENS", help="also time so many tokens of generated text"
    )
    parser.add_argument(
        "--only-sampling",
        action="store_true",
        help="leave the language model and the VAE out: made-up conditioning of the real size",
    )
    parser.add_argument("--tiny", action="store_true", help="miniature models")
    parser.add_argument(
        "--models", type=Path, help="keep the checkpoints in this folder, or take those that an earlier run kept there"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_edit.json"), help="where all numbers go")
    return parser.parse_args()


@contextmanager
def models_folder(chosen: Path | None, otherwise: Path | None = None):
    """The folder for the checkpoints: the chosen one, made if it is missing, or a temporary one (below `otherwise`)."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
    else:
        with tempfile.TemporaryDirectory(dir=otherwise) as folder:
            yield Path(folder)


def write_language_models(folder: Path, tiny: bool, device, formats, fp8_head: bool) -> dict[str, Path]:
    """Checkpoints of the language model with random weights, by format (bf16, fp8). fp8: its layers, and the head if
    asked for, not the table and the vision tower."""
    import tiny_models
    import torch
    from safetensors.torch import save_file

    config = tiny_models.TINY_MLLM if tiny else FULL_MLLM
    names = {name: f"{name}-head" if name == "fp8" and fp8_head else name for name in formats}
    paths = {name: folder / f"mllm-{file}.safetensors" for name, file in names.items()}
    if all(path.is_file() for path in paths.values()):
        return paths
    weights = tiny_models.random_weights(tiny_models.mllm_shapes(config), 0, torch.bfloat16, device)
    quantised = ("model.layers.", "lm_head.") if fp8_head else ("model.layers.",)
    for name, path in paths.items():
        if name == "fp8":
            weights |= tiny_models.scaled_fp8({key: weights.pop(key) for key in list(weights) if key.startswith(quantised)})
        save_file(weights, path, metadata={"step1x_edit_config": json.dumps(config)})
    return paths


def write_models(folder: Path, version: str, tiny: bool, device, only_sampling: bool) -> dict[str, Path]:
    """Checkpoints with random weights in bf16, made on the device. Returns their paths by kind."""
    import tiny_models
    import torch
    from safetensors.torch import save_file

    mllm = tiny_models.TINY_MLLM if tiny else FULL_MLLM
    shapes = {
        "transformer": tiny_models.transformer_shapes(
            version, tiny_models.TINY_TRANSFORMER if tiny else tiny_models.FULL_TRANSFORMER
        )
    }
    if not only_sampling:
        shapes |= {
            "mllm": tiny_models.mllm_shapes(mllm),
            "vae": tiny_models.vae_shapes() if tiny else tiny_models.flux_vae_shapes(),
        }
    paths = {}
    for kind, tensors in shapes.items():
        paths[kind] = folder / f"{kind}-{version.replace('.', 'p')}.safetensors"
        if paths[kind].is_file():
            continue
        weights = tiny_models.random_weights(tensors, 0, torch.bfloat16, device)
        save_file(
            weights,
            paths[kind],
            metadata={"step1x_edit_config": json.dumps(mllm if kind == "mllm" else {"version": version})},
        )
    return paths


class Clock:
    """Wall time of a block in seconds, the device's work included."""

    def __init__(self, times: dict, name: str):
        self.times, self.name = times, name

    def __enter__(self):
        self.wait()
        self.start = time.perf_counter()

    def __exit__(self, *exception):
        self.wait()
        self.times[self.name] = time.perf_counter() - self.start

    @staticmethod
    def wait() -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def made_up_conditioning(version: str, size: int, width: int) -> tuple:
    """Conditioning and latent of an edit without a language model and a VAE, with as much text as a picture and a sentence make."""
    import tiny_models

    return tiny_models.made_up_edit(version, size // 8, (360, 360) if version == "v1.1" else (430, 430), width)


def edit(options, parts: dict, size: int, filled: float) -> dict[str, float]:
    """One edit: seconds by phase, and the peaks of memory in GiB of the device that needs most, without the `filled` ones."""
    import torch

    from step1x_core.host.prompts.encoding import decode_edit, encode_edit
    from step1x_core.host.reasoning.generation import generate_text
    from step1x_core.host.sampling.sampler import flow_sigmas, sample

    times, devices = {}, range(torch.cuda.device_count())
    if devices:
        torch.cuda.empty_cache()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    if options.only_sampling:
        width = parts["model"].model.diffusion_model.connector.S.c_embedder.linear_1.in_features
        positive, negative, latent = made_up_conditioning(options.version, size, width)
    else:
        picture = torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(0))
        if not (options.new_seed and size in parts["encoded"]):
            with Clock(times, "encode"):
                parts["encoded"][size] = encode_edit(parts["clip"], parts["vae"], picture, PROMPT, "", size)
        positive, negative, latent = parts["encoded"][size]
        if options.think:
            with Clock(times, "think"):
                generate_text(parts["clip"], None, [picture[0], PROMPT], options.think, 0)
    parts["rows"].clear()
    with Clock(times, "sample"):
        out = sample(
            parts["model"],
            positive,
            negative,
            latent,
            flow_sigmas(options.steps, latent["samples"]),
            options.cfg,
            0,
            callback=lambda *args: None,
        )
    if parts["rows"]:
        times["work"] = 100 * sum(parts["rows"]) / (2 * options.steps)
    if not torch.isfinite(out["samples"]).all():
        raise FloatingPointError(f"The latent of size {size} is not finite.")
    times |= distance(parts, size, out["samples"].float().cpu())
    if not options.only_sampling:
        with Clock(times, "decode"):
            decode_edit(parts["vae"], out)
    if devices:
        times |= {
            "allocated": max(map(torch.cuda.max_memory_allocated, devices)) / 2**30 - filled,
            "reserved": max(map(torch.cuda.max_memory_reserved, devices)) / 2**30 - filled,
        }
    times["whole"] = sum(times[phase] for phase in ("encode", "sample", "decode") if phase in times)
    return times


def distance(parts: dict, size: int, latent) -> dict[str, float]:
    """The relative L2 distance of a final latent [B, C, H, W] to that of mode float32, by the column's name.

    Empty where that mode did not run before this one. Its own latent is kept.
    """
    if parts["is_float32"]:
        parts["float32"][size] = latent
    if size not in parts["float32"]:
        return {}
    exact = parts["float32"][size]
    return {"differ": ((latent - exact).norm() / exact.norm()).item()}


def load_parts(options, paths: dict[str, Path], mode: str, float32: dict) -> dict:
    """Loaded models of a mode by kind. float32: the final latents of that mode by size, which it fills."""
    import comfy.sd
    import comfy.utils
    import torch

    from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
    from step1x_core.host.sampling.sampler import set_guidance_interval
    from step1x_core.host.speed.fp8_attention import set_fp8_attention
    from step1x_core.host.speed.teacache import apply_teacache

    settings = MODES[mode]
    dtype = {"dtype": torch.float32} if settings.get("float32") else {}
    model = load_model(paths["transformer"], options.version, model_options=dtype, quantise="fp8" if settings.get("fp8") else None)
    if settings.get("attention"):
        model = set_fp8_attention(model)
    if settings.get("teacache"):
        model = apply_teacache(model, options.teacache)
    if settings.get("interval"):
        model = set_guidance_interval(model, 0.0, options.interval)
    if settings.get("compile"):
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        model = TorchCompileModel.execute(model, "inductor").args[0]
    if settings.get("split"):
        from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

        model = MultiGPUCFGSplitNode.execute(model, 2).args[0]
        if not model.get_additional_models_with_key("multigpu"):
            raise RuntimeError(f"Mode {mode} needs two devices.")
    parts = {"model": model, "rows": [], "encoded": {}, "float32": float32, "is_float32": bool(dtype)}
    if settings.get("teacache") or settings.get("interval"):
        model.model.diffusion_model.single_blocks[0].register_forward_pre_hook(
            lambda module, args: parts["rows"].append(len(args[0]))
        )
    if not options.only_sampling:
        parts |= {
            "clip": load_text_encoder(paths["mllm"], options.version),
            "vae": comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(paths["vae"]))),
        }
    return parts


def use_dynamic_vram() -> None:
    """What ComfyUI's main.py does at its start, after comfy_aimdo.control.init()."""
    try:
        import comfy_aimdo.control
        from comfy.model_management import get_all_torch_devices
    except ImportError:
        raise RuntimeError("--dynamic-vram needs ComfyUI 0.30.0 or newer with comfy-aimdo.") from None
    import comfy.memory_management
    import comfy.model_patcher

    if not comfy_aimdo.control.init_devices((device.index, 0) for device in get_all_torch_devices()):
        raise RuntimeError("comfy-aimdo does not work here.")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


@contextmanager
def in_place_of_ours(blocks: bool, attention: bool) -> Iterator[None]:
    """The host's blocks, or the attention that it chooses, run within this."""
    from step1x_core.host.network import blocks as blocks_module
    from step1x_core.host.network import transformer

    with ExitStack() as stack:
        for module in (blocks_module, transformer) if blocks else ():
            stack.enter_context(mock.patch.object(module, "plain_needed", lambda options: True))
        if attention:
            stack.enter_context(mock.patch.object(transformer, "cudnn_is_fastest", lambda device: False))
        yield


def fill_memory(free: float):
    """A tensor that leaves `free` GiB of the card's memory; None for 0."""
    import torch

    if not free:
        return None
    torch.cuda.empty_cache()
    return torch.empty(max(0, torch.cuda.mem_get_info()[0] - int(free * 2**30)), dtype=torch.uint8, device="cuda")


def measure(options, paths: dict[str, Path], mode: str, vram: float, float32: dict) -> list[dict]:
    """Runs of one mode at all sizes. float32: as for `load_parts`."""
    import comfy.model_management
    import torch

    filler = fill_memory(vram)
    loading, runs = {}, []
    with Clock(loading, "load"):
        parts = load_parts(options, paths, mode, float32)
    for size in options.sizes:
        filled = 0.0 if filler is None else filler.numel() / 2**30
        try:
            first, *rest = (edit(options, parts, size, filled) for _ in range(options.repeats + 1))
        except torch.OutOfMemoryError:
            print(f"{mode} {size}: out of memory", file=sys.stderr, flush=True)
            continue
        runs.append(
            {"mode": mode, "size": size, "vram": vram, "load": loading["load"], "first": first, "runs": rest or [first]}
        )
        print(
            f"{mode} {size} {vram or ''}: sampling {statistics.median(run['sample'] for run in rest or [first]):.2f} s",
            file=sys.stderr,
            flush=True,
        )
    del parts, filler
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    torch._dynamo.reset()
    return runs


def table(runs: list[dict]) -> str:
    """Medians of the runs, a line for each mode and size."""
    columns = {"encode": 8, "sample": 8, "decode": 8, "whole": 8, "think": 7, "work": 6, "allocated": 7, "reserved": 7}
    lines = [
        f"{'mode':<19}{'size':>5}{'vram':>6}{'load':>7}{'first':>7}{'encode':>8}{'sample':>8}{'decode':>8}{'whole':>8}{'think':>7}{'work':>6}"
        f"{'alloc':>7}{'resrv':>7}{'+-':>6}{'differ':>9}"
        "   (seconds, first: whole edit of the warm-up, +-: for sampling; % of the blocks' runs; GiB)"
    ]
    for run in runs:
        middle = {name: statistics.median(values[name] for values in run["runs"]) for name in run["runs"][0]}
        spread = max(values["sample"] for values in run["runs"]) - min(values["sample"] for values in run["runs"])
        cells = "".join(
            f"{middle[name]:{width}.2f}" if name in middle else f"{'-':>{width}}" for name, width in columns.items()
        )
        lines.append(
            f"{run['mode']:<19}{run['size']:>5}{run['vram'] or '-':>6}{run['load']:7.1f}{run['first']['whole']:7.2f}{cells}{spread / 2:6.2f}"
            f"{format(middle['differ'], '9.2e') if 'differ' in middle else ''}"
        )
    return "\n".join(lines)


def main() -> int:
    import torch

    options = arguments()
    if options.dynamic_vram:  # Modules of the host bind its library when they are imported.
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    import comfy.model_management
    import comfy.utils
    from comfyui_version import __version__ as host_version

    comfy.utils.set_progress_bar_enabled(False)
    if options.dynamic_vram:
        use_dynamic_vram()
    device = comfy.model_management.get_torch_device()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    head = (
        f"{card}, torch {torch.__version__}, ComfyUI {host_version}, Step1X-Edit {options.version}{' (miniature)' if options.tiny else ''}, "
        f"{options.steps} steps, CFG {options.cfg}, {options.repeats} runs after a warm-up{', dynamic VRAM' if options.dynamic_vram else ''}"
    )
    runs, float32 = [], {}
    with (
        models_folder(options.models) as folder,
        torch.inference_mode(),
    ):
        paths = write_models(folder, options.version, options.tiny, device, options.only_sampling)
        for mode in options.modes:
            host = MODES[mode].get("host_blocks", False)
            for vram in options.vram:
                with in_place_of_ours(blocks=host, attention=host):
                    runs += measure(options, paths, mode, vram, float32)
                options.json.write_text(json.dumps({"head": head, "runs": runs}, indent=1), encoding="utf-8")
    print(head)
    print(table(runs))
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
