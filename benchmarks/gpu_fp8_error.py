#!/usr/bin/env python3
"""Where the error of small formats comes from, at full size: `python benchmarks/gpu_fp8_error.py`.

Random weights of v1.1; both prompts of an edit are one batch. Every variant rounds weights and inputs of the large
matrices to a format's values and multiplies in bf16; "as it runs" are the pack's fp8 layers. The columns are relative
L2 distances to this pack's float32: of the velocities, of the difference of the two prompts (which CFG multiplies), and
of the final latent. "paired": what is rounded is the mean of the two prompts' inputs and half their difference, and the
two products are put together again.
`--tiny` runs a miniature, on a CPU too.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment
import gpu_edit
from gpu_step import median_time

KINDS = ("qkv", "proj", "mlp.0", "mlp.2", "linear1", "linear2")
GUIDANCE, TEXT_TOKENS = 6.0, 361


class Variant(NamedTuple):
    """Formats of weights and inputs (None: not rounded), whether inputs are paired, whether all steps are run, and the
    ends of the names of the rounded layers."""

    weights: str | None = None
    inputs: str | None = None
    paired: bool = False
    final: bool = False
    kinds: tuple[str, ...] = KINDS


VARIANTS = {
    "bf16": Variant(final=True),
    "fp8": Variant("fp8", "fp8", final=True),
    "fp8 paired": Variant("fp8", "fp8_rows", paired=True, final=True),
    "int8_convrot": Variant("int8_convrot", "int8_convrot", final=True),
    "fp8, weights alone": Variant("fp8", final=True),
    "fp8, inputs alone": Variant(None, "fp8", final=True),
    "w4a8": Variant("w4a8", "w4a8", final=True),
    "fp8 by rows": Variant("fp8_rows", "fp8_rows"),
    "fp8 rotated, by rows": Variant("fp8_convrot", "fp8_convrot"),
    "int8": Variant("int8", "int8"),
    "w4a4": Variant("w4a4", "w4a4"),
    "nvfp4, weights alone": Variant("nvfp4"),
    **{
        f"{form} in {kind}": Variant(form, form, kinds=(kind,))
        for form in ("w4a8", "w4a4", "fp8")
        for kind in KINDS
    },
    "fp8, inputs alone, paired": Variant(None, "fp8_rows", paired=True),
    "int8_convrot paired": Variant("int8_convrot", "int8_convrot", paired=True),
    "w4a8 paired": Variant("w4a8", "w4a8", paired=True),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="size level of the velocities and times")
    parser.add_argument("--latent-size", type=int, default=512, help="size level of the sampled latents")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=130, help="start no further variant after this time")
    parser.add_argument("--tiny", action="store_true", help="a miniature model")
    parser.add_argument("--json", type=Path, default=Path("gpu_fp8_error.json"), help="where all numbers go")
    return parser.parse_args()


def built(weights: dict, operations, device):
    """The transformer of these weights, which it shares."""
    import torch

    from step1x_core.checkpoints.detection import CONFIG_KEY, config_tensor, detect_config
    from step1x_core.host.network.transformer import Step1XTransformer

    config = detect_config(weights | {CONFIG_KEY: config_tensor({"version": "v1.1"})})
    # The host's quantised layers take their weights to the device of their construction, and have none before.
    place = device if "comfy_quant" in " ".join(weights) else "meta"
    model = Step1XTransformer(operations=operations, device=place, dtype=torch.bfloat16, **config.transformer_params())
    model.load_state_dict({key.replace("_norm.scale", "_norm.weight"): x for key, x in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def made_up(transformer, size: int, device) -> dict:
    """Both prompts' arguments of a call but the latent and the time, in float32."""
    import torch

    width = transformer.connector.S.c_embedder.linear_1.in_features
    *conds, latent = gpu_edit.made_up_conditioning("v1.1", size, width)
    states, masks = ([cond[0][0] for cond in conds], [cond[0][1]["attention_mask"] for cond in conds])
    return {
        "context": torch.cat(states).to(device),
        "text_mask": torch.cat(masks).to(device),
        "text_tokens": TEXT_TOKENS,
        "ref_latents": latent["samples"].to(device),
    }


def velocities(transformer, arguments: dict, x, t: float, dtype):
    """Both prompts' velocities, float32 [2, C, H, W], of one latent x [1, C, H, W]."""
    import torch

    return transformer(
        x.to(dtype).expand(2, -1, -1, -1),
        torch.full((2,), t, device=x.device),
        **arguments | {
            "context": arguments["context"].to(dtype),
            "ref_latents": [arguments["ref_latents"].to(dtype).expand(2, -1, -1, -1)],
        },
    ).float()


def sampled(transformer, arguments: dict, steps: int, dtype, kept: list | None = None):
    """The final latent of an edit with norm-limited guidance. kept: is filled with the latent, time and velocities of
    three of the steps."""
    import torch

    from step1x_core.sampling.guidance import NormLimiter
    from step1x_core.sampling.schedule import latent_tokens, sigma_schedule

    shape = arguments["ref_latents"].shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(arguments["context"].device)
    sigmas = sigma_schedule(steps, latent_tokens(*shape[-2:]))
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        both = velocities(transformer, arguments, x, float(sigma), dtype)
        if kept is not None and step in (steps // 4, 3 * steps // 4):
            kept.append((x.clone(), float(sigma), both))
        difference = both[:1] - both[1:]
        limit = NormLimiter().divisor(difference, sigma.to(x.device).view(1, 1, 1, 1))
        x += float(following - sigma) * (both[1:] + GUIDANCE * difference / limit)
    return x


def distance(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def errors(transformer, points: list, dtype) -> dict[str, list[float]]:
    """Relative errors of velocities and of the prompts' difference. points: (arguments, latent, time, velocities)."""
    out = {"velocity": [], "difference": []}
    for arguments, x, t, expected in points:
        both = velocities(transformer, arguments, x, t, dtype)
        out["velocity"].append(distance(both, expected))
        out["difference"].append(distance(both[0] - both[1], expected[0] - expected[1]))
    return out


def forward_of(layer, variant: Variant):
    """A layer's forward that rounds its inputs [2, S, K] or [2 * S, K], the first half of them the first prompt's."""
    import rounded
    import torch

    def forward(x):
        flat = x.reshape(-1, x.shape[-1])
        if variant.paired:
            one, other = flat.float().chunk(2)
            flat = torch.cat(((one + other) / 2, (one - other) / 2))
        out = torch.nn.functional.linear(rounded.rounded_inputs(variant.inputs, flat).to(x.dtype), layer.weight)
        if variant.paired:
            mean, half = out.float().chunk(2)
            out = torch.cat((mean + half, mean - half))
        return (out + layer.bias).to(x.dtype).reshape(*x.shape[:-1], -1)

    return forward


def apply_variant(layers: dict, originals: dict, variant: Variant) -> float:
    """Round the layers' weights and have their inputs rounded; returns the relative error of the weights."""
    import rounded

    wrong = whole = 0.0
    for name, layer in layers.items():
        vars(layer).pop("forward", None)
        layer.weight.data.copy_(originals[name])
        if not name.endswith(variant.kinds):
            continue
        if variant.weights:
            layer.weight.data.copy_(rounded.rounded_weight(variant.weights, originals[name]))
            wrong += (layer.weight.data.float() - originals[name].float()).square().sum()
            whole += originals[name].float().square().sum()
        if variant.inputs:
            layer.forward = forward_of(layer, variant)
    return float((wrong / whole) ** 0.5) if whole else 0.0


def row(name: str, found: dict, final: float | None = None, weights: float = 0.0) -> str:
    cells = "".join(f"{x:11.2e}" for kind in ("velocity", "difference") for x in found[kind])
    return f"{name:<38}{weights:9.1e}{cells}{'' if final is None else format(final, '11.2e')}"


def products(device, width: int, rows: int) -> None:
    """Times of the products in fp8 with one scale and with a scale for each row, and of int8 products."""
    import torch

    one = torch.ones((), device=device)
    for name, columns, outputs in (("linear1", width, 7 * width), ("linear2", 5 * width, width), ("mlp.2", 4 * width, width)):
        x = torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)
        weight = torch.randn(outputs, columns, device=device).to(torch.float8_e4m3fn)
        bias = torch.zeros(outputs, device=device, dtype=torch.bfloat16)
        whole, part = torch.ones(rows, 1, device=device), torch.ones(1, outputs, device=device)
        calls = {
            "fp8": lambda: torch._scaled_mm(x, weight.t(), one, one, bias=bias, out_dtype=bias.dtype, use_fast_accum=True),
            "fp8 by rows": lambda: torch._scaled_mm(x, weight.t(), whole, part, bias=bias, out_dtype=bias.dtype, use_fast_accum=True),
        }
        x8, weight8 = x.view(torch.int8), weight.view(torch.int8)
        calls["int8"] = lambda: torch._int_mm(x8, weight8.t())
        for kind, call in calls.items():
            try:
                print(f"   {name} {kind:<12}{median_time(call, 10):9.3f} ms", flush=True)
            except RuntimeError as error:
                print(f"   {name} {kind}: {str(error).splitlines()[0]}", flush=True)


def as_it_runs(weights: dict, points: list, exact, arguments: dict, options, device) -> dict:
    """Errors and times of the pack's fp8 layers, and with fp8 attention where there is one."""
    import comfy.ops
    import torch

    from step1x_core.host.checkpoints.quantising import quantised
    from step1x_core.host.network.attention import cudnn_is_fastest
    from step1x_core.host.network.blocks import FP8_ATTENTION, PAIRED
    from step1x_core.host.speed.fp8_attention import attend_fp8

    dtype = torch.bfloat16
    model = built(quantised(weights, "fp8"), comfy.ops.mixed_precision_ops({}, dtype), device)
    ways = {"fp8": {}, "fp8 paired": {PAIRED: True}}
    if cudnn_is_fastest(device):
        ways |= {f"{name}, fp8 attention": {**way, FP8_ATTENTION: attend_fp8} for name, way in ways.items()}
    times = {}

    def measure(name: str, way: dict) -> None:
        with_way = {"transformer_options": way}
        found = errors(model, [(one | with_way, *rest) for one, *rest in points], dtype)
        final = distance(sampled(model, arguments | with_way, options.steps, dtype), exact)
        print(row(f"as it runs: {name}", found, final), flush=True)
        one, x, t, _ = points[0]
        times[name] = median_time(lambda: velocities(model, one | with_way, x, t, dtype), options.repeats)
        print(f"   {times[name]:.1f} ms a call", flush=True)

    for name, way in ways.items():
        attempt(name, lambda: measure(name, way))
    return times


def attempt(name: str, call):
    """What a call returns; a failure is printed, and the rest is still measured."""
    try:
        return call()
    except Exception:
        print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        return None


def main() -> int:
    started = time.monotonic()
    import torch

    options = arguments()
    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    import comfy.model_management
    import comfy.ops
    import tiny_models

    from step1x_core.checkpoints import plain_formats
    from step1x_core.checkpoints.conversion import MODEL_LAYERS

    device = comfy.model_management.get_torch_device()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, v1.1{' (miniature)' if options.tiny else ''}, velocities at {options.size} and on the way "
          f"at {options.latent_size}, {options.steps} steps, {time.strftime('%Y-%m-%d')}", flush=True)
    plain_formats.CHUNK = 2**25 if device.type == "cuda" else plain_formats.CHUNK
    results, bf16 = {}, torch.bfloat16
    with torch.inference_mode():
        size = tiny_models.TINY_TRANSFORMER if options.tiny else tiny_models.FULL_TRANSFORMER
        weights = tiny_models.random_weights(tiny_models.transformer_shapes("v1.1", size), 0, bf16, device)
        # 50 GB in float32: the bf16 weights make room for it, and are made of it again without a loss.
        floats = {name: weights.pop(name).to(device).float() for name in list(weights)}
        exact_model = built(floats, comfy.ops.disable_weight_init, device)
        large, small = (made_up(exact_model, one, device) for one in (options.size, options.latent_size))
        kept = []
        exact = sampled(exact_model, small, options.steps, torch.float32, kept)
        x = torch.randn(large["ref_latents"].shape, generator=torch.Generator().manual_seed(1)).to(device)
        points = [(large, x, 0.7, velocities(exact_model, large, x, 0.7, torch.float32))]
        points += [(small, *point) for point in kept]
        del exact_model
        weights = {name: floats.pop(name).to(bf16) for name in list(floats)}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"float32 done after {time.monotonic() - started:.0f} s", flush=True)
        heads = "".join(f"{kind:>11}" for kind in ("velocity", *("on the way",) * 2, "difference", *("on the way",) * 2, "final"))
        print(f"{'':<38}{'weights':>9}{heads}", flush=True)
        times = attempt("fp8, as it runs", lambda: as_it_runs(weights, points, exact, small, options, device)) or {}
        transformer = built({name: x.clone() for name, x in weights.items()}, comfy.ops.disable_weight_init, device)
        times["bf16"] = median_time(lambda: velocities(transformer, *points[0][:3], bf16), options.repeats)
        print("   ".join(f"{name} {value:.1f} ms a call" for name, value in times.items()), flush=True)
        layers = {name: x for name, x in transformer.named_modules() if MODEL_LAYERS.fullmatch(f"{name}.weight")}
        originals = {name: weights[f"{name}.weight"] for name in layers}

        def measure(name: str, variant: Variant) -> None:
            lost = apply_variant(layers, originals, variant)
            found = errors(transformer, points, bf16)
            final = distance(sampled(transformer, small, options.steps, bf16), exact) if variant.final else None
            results[name] = {**found, "final": final, "weights": lost}
            print(row(name, found, final, lost), flush=True)
            numbers = json.dumps({"card": card, "times": times, "variants": results}, indent=1)
            options.json.write_text(numbers, encoding="utf-8")

        for name, variant in VARIANTS.items():
            if time.monotonic() - started > options.seconds:
                print(f"{name}: left out, no time", flush=True)
                continue
            attempt(name, lambda: measure(name, variant))
        if device.type == "cuda":
            rows = 2 * (TEXT_TOKENS + 2 * (options.size // 16) ** 2)
            attempt("products", lambda: products(device, size.hidden, rows))
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
