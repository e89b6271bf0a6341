#!/usr/bin/env python3
"""Speed and memory of an edit with full-size models: `python benchmarks/gpu_edit.py`.

The models have random weights, which cost the same time as trained ones, and run through the pack's loaders and the host's own sampling.
Every number is the median of repeated runs after a warm-up; the last lines are a table, and a JSON file beside it holds every run.
`--tiny` runs the same code with miniature models, on a CPU too: it shows that the script works, not how fast anything is.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts"))
import environment

MODES = {
    "bf16": {},
    "bf16 compiled": {"compile": True},
    "fp8": {"dtype": "fp8_e4m3fn_fast"},
    "fp8 compiled": {"dtype": "fp8_e4m3fn_fast", "compile": True},
}
FULL_MLLM = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                      "out_hidden_size": 3584},
}
PROMPT = "replace the modern sofa with a vintage leather couch"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", choices=("v1.1", "v1.2"), default="v1.1")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["bf16"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 768, 1024], help="size levels of a square picture")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-sampling", action="store_true", help="leave the language model and the VAE out: made-up conditioning of the real size")
    parser.add_argument("--tiny", action="store_true", help="miniature models")
    parser.add_argument("--json", type=Path, default=Path("gpu_edit.json"), help="where all numbers go")
    return parser.parse_args()


def write_models(folder: Path, version: str, tiny: bool, device, only_sampling: bool) -> dict[str, Path]:
    """Checkpoints with random weights in bf16, made on the device. Returns their paths by kind."""
    import tiny_models
    import torch
    from safetensors.torch import save_file

    mllm = tiny_models.TINY_MLLM if tiny else FULL_MLLM
    shapes = {"transformer": tiny_models.transformer_shapes(version, tiny_models.TINY_TRANSFORMER if tiny else tiny_models.FULL_TRANSFORMER)}
    if not only_sampling:
        shapes |= {"mllm": tiny_models.mllm_shapes(mllm), "vae": tiny_models.vae_shapes() if tiny else tiny_models.flux_vae_shapes()}
    paths = {}
    for kind, tensors in shapes.items():
        weights = tiny_models.random_weights(tensors, 0, torch.bfloat16, device)
        paths[kind] = folder / f"{kind}-{version.replace('.', 'p')}.safetensors"
        save_file(weights, paths[kind], metadata={"step1x_edit_config": json.dumps(mllm if kind == "mllm" else {"version": version})})
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


def made_up_conditioning(version: str, size: int, width: int):
    """Conditioning and latent of an edit without a language model and a VAE."""
    import torch

    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, size // 8, size // 8, generator=generator)
    if version == "v1.1":
        extra = {"attention_mask": (torch.arange(640) < 360).long()[None]}
        states = torch.randn(1, 640, width, generator=generator)
    else:
        states = torch.randn(1, 430, width, generator=generator)
        extra = {"text_ids": torch.zeros(1, 430, 3), "text_embeds": states, "text_mask": torch.zeros(1, 430, dtype=torch.long)}
    conds = [[[states, {**extra, "reference_latents": [latent]}]] for _ in range(2)]
    return *conds, {"samples": latent}


def edit(options, parts: dict, size: int) -> dict[str, float]:
    """One edit: seconds by phase, and the peaks of the device's memory in GiB."""
    import torch

    from step1x_core.host.encoding import decode_edit, encode_edit
    from step1x_core.host.sampling import flow_sigmas, sample

    times = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if options.only_sampling:
        width = parts["model"].model.diffusion_model.connector.S.c_embedder.linear_1.in_features
        positive, negative, latent = made_up_conditioning(options.version, size, width)
    else:
        picture = torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(0))
        with Clock(times, "encode"):
            positive, negative, latent = encode_edit(parts["clip"], parts["vae"], picture, PROMPT, "", size)
    with Clock(times, "sample"):
        out = sample(parts["model"], positive, negative, latent, flow_sigmas(options.steps, latent["samples"]), options.cfg, 0, callback=lambda *args: None)
    if not torch.isfinite(out["samples"]).all():
        raise FloatingPointError(f"The latent of size {size} is not finite.")
    if not options.only_sampling:
        with Clock(times, "decode"):
            decode_edit(parts["vae"], out)
    if torch.cuda.is_available():
        times |= {"allocated": torch.cuda.max_memory_allocated() / 2**30, "reserved": torch.cuda.max_memory_reserved() / 2**30}
    return times


def load_parts(options, paths: dict[str, Path], mode: str) -> dict:
    """Loaded models of a mode by kind."""
    import comfy.sd
    import comfy.utils
    import torch

    from step1x_core.host.loading import load_model, load_text_encoder

    settings = MODES[mode]
    dtype = {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True} if "dtype" in settings else {}
    model = load_model(paths["transformer"], model_options=dtype)
    if settings.get("compile"):
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        model = TorchCompileModel.execute(model, "inductor").args[0]
    parts = {"model": model}
    if not options.only_sampling:
        parts |= {"clip": load_text_encoder(paths["mllm"], options.version), "vae": comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(paths["vae"])))}
    return parts


def main() -> int:
    options = arguments()
    environment.use_host_in_process()
    import comfy.model_management
    import comfy.utils
    import torch
    from comfyui_version import __version__ as host_version

    comfy.utils.set_progress_bar_enabled(False)
    device = comfy.model_management.get_torch_device()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    head = (f"{card}, torch {torch.__version__}, ComfyUI {host_version}, Step1X-Edit {options.version}{' (miniature)' if options.tiny else ''}, "
            f"{options.steps} steps, CFG {options.cfg}, {options.repeats} runs after a warm-up")
    rows, runs = [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        paths = write_models(Path(folder), options.version, options.tiny, device, options.only_sampling)
        for mode in options.modes:
            loading = {}
            with Clock(loading, "load"):
                parts = load_parts(options, paths, mode)
            for size in options.sizes:
                first, *rest = (edit(options, parts, size) for _ in range(options.repeats + 1))
                runs.append({"mode": mode, "size": size, "load": loading["load"], "first": first, "runs": rest})
                middle = {name: statistics.median(run[name] for run in rest) for name in rest[0]}
                spread = max(run["sample"] for run in rest) - min(run["sample"] for run in rest)
                rows.append((mode, size, loading["load"], first["sample"], middle, spread))
                print(f"{mode} {size}: sampling {middle['sample']:.2f} s", file=sys.stderr, flush=True)
            del parts
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
    options.json.write_text(json.dumps({"head": head, "runs": runs}, indent=1), encoding="utf-8")

    print(head)
    print(f"{'mode':<15}{'size':>5}{'load':>8}{'first':>8}{'encode':>8}{'sample':>8}{'+-':>6}{'decode':>8}{'alloc':>7}{'resrv':>7}   (seconds; GiB)")
    for mode, size, load, first, middle, spread in rows:
        def cell(name, width, middle=middle):
            return f"{middle[name]:{width}.2f}" if name in middle else f"{'-':>{width}}"

        print(f"{mode:<15}{size:>5}{load:8.2f}{first:8.2f}{cell('encode', 8)}{cell('sample', 8)}{spread / 2:6.2f}{cell('decode', 8)}{cell('allocated', 7)}{cell('reserved', 7)}")
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
