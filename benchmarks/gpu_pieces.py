#!/usr/bin/env python3
"""The pieces of a step alone, at the shapes of an edit at 1024 with CFG: `python benchmarks/gpu_pieces.py`.

Memory bandwidth, the matrix products in bf16 and fp8 with and without what is fused into them, the kernels between them, and attention. Needs an NVIDIA card.
The clock and the power at the end say whether the card was held back.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment

WIDTH, HEADS = 3072, 24
# Text tokens before the padding with one token for it, all text tokens, picture and reference tokens; prompts.
TEXT, PADDED, IMAGE, PROMPTS = 361, 640, 8192, 2


def report(name: str, call, operations: float = 0.0) -> None:
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=60, rep=120, return_mode="median")
    print(
        f"{name:<48}{milliseconds:8.3f} ms" + (f"{operations / milliseconds / 1e9:8.0f} TFLOP/s" if operations else ""),
        flush=True,
    )


def products(rows: int) -> None:
    import torch
    from torch.nn.functional import linear

    def random(*shape):
        return torch.randn(*shape, device="cuda").bfloat16()

    scale = torch.ones((), device="cuda")
    for name, columns, outputs in (
        ("linear1", WIDTH, 7 * WIDTH),
        ("qkv", WIDTH, 3 * WIDTH),
        ("proj", WIDTH, WIDTH),
        ("mlp.0", WIDTH, 4 * WIDTH),
        ("mlp.2", 4 * WIDTH, WIDTH),
        ("linear2", 5 * WIDTH, WIDTH),
    ):
        x, weight, bias, operations = (
            random(rows, columns),
            random(outputs, columns),
            random(outputs),
            2.0 * rows * columns * outputs,
        )
        report(f"{name} of {rows} rows", lambda: linear(x, weight, bias), operations)
        if name == "mlp.0":
            report(
                f"{name} with GELU in the product", lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
            )
        if name == "linear2":
            report(
                f"{name} in two parts",
                lambda: torch.addmm(bias, x[:, :WIDTH], weight[:, :WIDTH].t()).addmm_(
                    x[:, WIDTH:], weight[:, WIDTH:].t()
                ),
            )
        x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        for fast in (False, True):
            report(
                f"{name} in fp8, {'sums in the tensor cores' if fast else 'float32 sums'}",
                lambda: torch._scaled_mm(
                    x,
                    weight.t(),
                    scale_a=scale,
                    scale_b=scale,
                    bias=bias,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=fast,
                ),
                operations,
            )


def passes() -> None:
    import torch

    from step1x_core.network import kernels

    tokens = TEXT + IMAGE
    hidden = torch.randn(PROMPTS, tokens, 7 * WIDTH, device="cuda").bfloat16()
    qkv, mlp = hidden[..., :3 * WIDTH].unflatten(-1, (3, HEADS, -1)), hidden[..., 3 * WIDTH:]
    x, update = (torch.randn(PROMPTS, tokens, WIDTH, device="cuda").bfloat16() for _ in range(2))
    shift, scale, gate = torch.randn(PROMPTS, 1, 3 * WIDTH, device="cuda").bfloat16().chunk(3, dim=-1)
    weights = torch.ones(2, WIDTH // HEADS, device="cuda").bfloat16()
    pe = torch.randn(1, 1, tokens, WIDTH // HEADS // 2, 2, 2, device="cuda")
    q, k, v = (
        torch.empty(PROMPTS, tokens + repeats, *qkv.shape[3:], device="cuda", dtype=x.dtype)
        for repeats in (0, PADDED - TEXT, PADDED - TEXT)
    )
    joined = torch.empty(PROMPTS * tokens, 5 * WIDTH, device="cuda", dtype=x.dtype)
    report(
        "norm and rotation, q, k, v joined with repeats",
        lambda: kernels.norm_and_rotate(qkv, *weights, pe, q, k, v, text=TEXT, repeats=PADDED - TEXT),
    )
    rounded = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    report(
        "the same as e4m3, with the scale of the values",
        lambda: kernels.norm_and_rotate(
            qkv, *weights, pe, *rounded, kernels.fp8_scale([hidden[..., 2 * WIDTH : 3 * WIDTH]]), TEXT, PADDED - TEXT
        ),
    )
    report("norm and modulation", lambda: kernels.modulate(x, shift, scale))
    report("gated residual", lambda: kernels.add_gated(x, update, gate))
    report("GELU as a pass", lambda: kernels.copy_rows(mlp, joined[:, WIDTH:], gelu=True))
    report("copy of the attention's result", lambda: kernels.copy_rows(x, joined[:, :WIDTH]))


def attention() -> None:
    import importlib.util

    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from step1x_core.host.network.attention import cudnn_first
    from step1x_core.host.speed.fp8_attention import attend_fp8

    def random(tokens):
        return torch.randn(PROMPTS, tokens, HEADS, WIDTH // HEADS, device="cuda").bfloat16()

    for queries, keys in (
        (PADDED + IMAGE, PADDED + IMAGE),
        (TEXT + IMAGE, PADDED + IMAGE),
        (TEXT + IMAGE, TEXT + IMAGE),
    ):
        q, k, v = random(queries), random(keys), random(keys)
        operations = 4.0 * PROMPTS * WIDTH * queries * keys
        shown = [x.transpose(1, 2) for x in (q, k, v)]
        report(
            f"attention {queries} x {keys}, cuDNN",
            lambda: cudnn_first(None, *shown, HEADS, skip_reshape=True),
            operations,
        )
        report(
            f"attention {queries} x {keys}, torch's first choice",
            lambda: scaled_dot_product_attention(*shown),
            operations,
        )
        if importlib.util.find_spec("cudnn"):
            rounded = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
            report(f"attention {queries} x {keys}, fp8", lambda: attend_fp8(*rounded), operations)
            exact = scaled_dot_product_attention(*(x[:1].float() for x in shown)).transpose(1, 2).flatten(2)
            print(
                f"{'':<48}relative error of fp8 {((attend_fp8(*rounded)[:1].float() - exact).norm() / exact.norm()).item():.1e}"
            )


def main() -> int:
    import torch

    environment.use_host_in_process(cpu=False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    report("copy of 2 GiB", lambda: target.copy_(source))
    with torch.inference_mode():
        for text in (PADDED, TEXT):
            products(PROMPTS * (text + IMAGE))
        passes()
        attention()
    print(
        subprocess.run(
            ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,power.limit", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
