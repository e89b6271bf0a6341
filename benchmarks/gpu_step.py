#!/usr/bin/env python3
"""One call of the full-size transformer, as a step of an edit with CFG makes it: `python benchmarks/gpu_step.py`.

Prints for bf16 and fp8_scaled weights (random ones) the time of a call with the pack's blocks, without one of their savings, without Python, and with the host's blocks; the
relative difference of the velocities to those of the host's blocks in bf16; and the kernels of a call. `--tiny` runs a miniature, on a CPU too.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment
import gpu_edit


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="size level of a square picture")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--kernels", type=int, default=20, help="lines of the table of kernels")
    parser.add_argument("--tiny", action="store_true", help="a miniature model")
    parser.add_argument(
        "--models", type=Path, help="keep the checkpoint in this folder, or take the one that an earlier run kept there"
    )
    return parser.parse_args()


def inputs(transformer, size: int, device) -> dict:
    """Arguments of a call for both prompts, 360 text tokens and padding each."""
    import torch

    width = transformer.connector.S.c_embedder.linear_1.in_features
    *conds, latent = gpu_edit.made_up_conditioning("v1.1", size, width)
    context, mask = (
        torch.cat(parts).to(device)
        for parts in ([cond[0][0] for cond in conds], [cond[0][1]["attention_mask"] for cond in conds])
    )
    x = torch.randn(2, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(1))
    dtype = transformer.dtype
    return {
        "x": x.to(device, dtype),
        "timestep": torch.full((2,), 0.7, device=device),
        "context": context.to(dtype),
        "text_mask": mask,
        "text_tokens": 361,
        "ref_latents": [latent["samples"].to(device, dtype).expand(2, -1, -1, -1)],
    }


def median_time(call, repeats: int) -> float:
    """Milliseconds."""
    times = {}
    for number in range(-2, repeats):
        with gpu_edit.Clock(times, number):
            call()
    return 1000 * statistics.median(times[number] for number in range(repeats))


def variants(transformer, kwargs: dict, fp8: bool):
    """Names of what is compared, and the calls."""
    from step1x_core.host.network import blocks
    from step1x_core.host.network.attention import cudnn_is_fastest
    from step1x_core.host.speed.fp8_attention import attend_fp8

    def call(options=None, plain=False, cudnn=True, **changes):
        with gpu_edit.in_place_of_ours(blocks=plain, attention=not cudnn):
            return transformer(**kwargs | changes, transformer_options=options or {})

    yield "the pack's blocks", call
    yield "padding not put together", lambda: call(text_tokens=None)
    yield "last block in full", lambda: call({blocks.TOKENS_READ: None})
    if fp8 and cudnn_is_fastest(kwargs["x"].device):
        yield "with fp8 attention", lambda: call({blocks.FP8_ATTENTION: attend_fp8})
    if kwargs["x"].device.type == "cuda":
        yield "the pack's blocks as a CUDA graph", captured(call)
    yield "the host's blocks", lambda: call(plain=True)
    yield "the host's blocks and attention", lambda: call(plain=True, cudnn=False)


def captured(call):
    """A call that replays the kernels of another: what is left without Python."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = call()

    def replay():
        graph.replay()
        return out

    return replay


def print_kernels(call, lines: int) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in record.key_averages() if event.device_time_total]
    print(
        f"   {sum(event.device_time_total for event in kernels) / 1000:.1f} ms in {sum(event.count for event in kernels)} kernels"
    )
    for event in sorted(kernels, key=lambda event: -event.device_time_total)[:lines]:
        print(
            f"   {event.device_time_total / 1000:8.2f} ms {event.count:5d} x {event.device_time_total / event.count:7.1f} us  {event.key[:100]}"
        )


def main() -> int:
    import torch

    options = arguments()
    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    import comfy.model_management

    from step1x_core.host.checkpoints.loading import load_model

    device = comfy.model_management.get_torch_device()
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, {options.size}x{options.size}, two prompts"
        f"{' (miniature)' if options.tiny else ''}, {time.strftime('%Y-%m-%d')}"
    )
    exact = None
    with (
        gpu_edit.models_folder(options.models) as folder,
        torch.inference_mode(),
    ):
        path = gpu_edit.write_models(folder, "v1.1", options.tiny, device, only_sampling=True)["transformer"]
        for fp8 in (False, True):
            model = load_model(path, "v1.1", quantise="fp8" if fp8 else None)
            comfy.model_management.load_models_gpu([model], force_full_load=True)
            transformer = model.model.diffusion_model
            kwargs = inputs(transformer, options.size, device)
            calls = list(variants(transformer, kwargs, fp8))
            if exact is None:
                exact = dict(calls)["the host's blocks"]().float()
            print(f"{'fp8_scaled' if fp8 else 'bf16'}{'ms a call':>42}{'difference':>12}")
            for name, call in calls:
                difference = ((call().float() - exact).norm() / exact.norm()).item()
                print(f"   {name:<35}{median_time(call, options.repeats):14.1f}{difference:12.2e}")
            if device.type == "cuda":
                print_kernels(dict(calls).get("with fp8 attention", calls[0][1]), options.kernels)
            del model, transformer
            comfy.model_management.unload_all_models()
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
