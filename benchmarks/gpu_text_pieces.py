#!/usr/bin/env python3
"""The products of one step of the language model alone, at full size: `python benchmarks/gpu_text_pieces.py`. Needs an NVIDIA GPU.

Each is timed over several copies of its weights, which together are larger than the GPU's cache, in a CUDA graph: cuBLAS through torch, and the pack's kernels with several tiles.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment

HIDDEN, INNER, VOCABULARY = 3584, 18944, 152064
SHAPES = {
    "qkv": (HIDDEN, (3584, 512, 512)),
    "out": (HIDDEN, (HIDDEN,)),
    "down": (INNER, (HIDDEN,)),
    "head": (HIDDEN, (VOCABULARY,)),
}
TILES = [
    (16, 256, 4, 4),
    (16, 256, 4, 6),
    (16, 512, 4, 3),
    (16, 512, 8, 4),
    (32, 128, 4, 5),
    (32, 256, 4, 4),
    (32, 256, 8, 3),
    (64, 128, 4, 4),
    (64, 128, 8, 5),
]


def microseconds(calls) -> float:
    """Of one call, in a graph of them all."""
    import torch

    calls[0]()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(8):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000 / 8 / len(calls)


def main() -> int:
    import torch
    from torch.nn.functional import linear, silu

    environment.use_host_in_process(cpu=False)
    from step1x_core.reasoning import decode_kernels as kernels

    limit = float(sys.argv[1]) if len(sys.argv) > 1 else 200.0
    begun = time.perf_counter()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)

    def weights(outputs, inputs, fp8, copies):
        scale = torch.ones((), device="cuda") if fp8 else None
        made = [
            (torch.randn(outputs, inputs, device="cuda") * inputs**-0.5).to(kernels.FP8 if fp8 else torch.bfloat16)
            for _ in range(copies)
        ]
        return [kernels.Projection(weight, scale) for weight in made]

    best = {}

    def show(name, size, rows, fp8, label, calls):
        try:
            time_of_one = microseconds(calls)
        except Exception as error:
            print(
                f"{name:<5} {'fp8' if fp8 else 'bf16'} {rows} rows {label:<28} {type(error).__name__}: {str(error)[:80]}",
                flush=True,
            )
            return
        best[name, fp8, label] = best.get((name, fp8, label), 0.0) + time_of_one
        print(
            f"{name:<5} {'fp8' if fp8 else 'bf16'} {rows} rows {label:<28} {time_of_one:8.1f} us {size / time_of_one / 1e6:6.2f} TB/s",
            flush=True,
        )

    with torch.inference_mode():
        for fp8 in (False, True):
            for name, (inputs, outputs) in SHAPES.items():
                size = inputs * sum(outputs) * (1 if fp8 else 2)
                copies = max(1, -(-400_000_000 // size))
                sets = [[weights(count, inputs, fp8, 1)[0] for count in outputs] for _ in range(copies)]
                for rows in (1, 8):
                    x = torch.randn(rows, inputs, device="cuda").bfloat16()
                    if not fp8:
                        show(
                            name,
                            size,
                            rows,
                            fp8,
                            "cuBLAS",
                            [lambda parts=parts: [linear(x, part.weight) for part in parts] for parts in sets],
                        )
                    for tile in TILES:
                        if time.perf_counter() - begun < limit:
                            show(
                                name,
                                size,
                                rows,
                                fp8,
                                str(tile),
                                [
                                    lambda parts=parts, tile=tile: kernels.project(x, parts, tile=kernels.Tile(*tile))
                                    for parts in sets
                                ],
                            )
                del sets
            size = 2 * HIDDEN * INNER * (1 if fp8 else 2)
            pairs = list(zip(weights(INNER, HIDDEN, fp8, 3), weights(INNER, HIDDEN, fp8, 3)))
            for rows in (1, 8):
                x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
                if not fp8:
                    show(
                        "gate",
                        size,
                        rows,
                        fp8,
                        "cuBLAS",
                        [lambda a=a, b=b: silu(linear(x, a.weight)) * linear(x, b.weight) for a, b in pairs],
                    )
                for tile in TILES:
                    if time.perf_counter() - begun < limit:
                        show(
                            "gate",
                            size,
                            rows,
                            fp8,
                            str(tile),
                            [
                                lambda a=a, b=b, tile=tile: kernels.gate(x, a, b, tile=kernels.Tile(*tile))
                                for a, b in pairs
                            ],
                        )
            del pairs
        for name in (*SHAPES, "gate"):
            for fp8 in (False, True):
                ranked = sorted(
                    (time_of_both, label)
                    for (own, kind, label), time_of_both in best.items()
                    if own == name and kind == fp8
                )
                shown = ", ".join(f"{label} {time_of_both:.0f} us" for time_of_both, label in ranked[:4])
                print(f"best {name} {'fp8' if fp8 else 'bf16'}, both numbers of rows: {shown}", flush=True)
        norm = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
        for rows in (1, 8):
            x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
            show("norm", 0, rows, False, "", [lambda: kernels.norm(x, norm, 1e-6)] * 20)
            for capacity, filled in ((1024, 700), (2048, 1500)):
                keys, values = (
                    torch.randn(rows, capacity, 4, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(2)
                )
                q, lengths = (
                    torch.randn(rows, 28, 128, device="cuda").bfloat16(),
                    torch.full((rows,), filled, device="cuda"),
                )
                show(
                    "attend",
                    0,
                    rows,
                    False,
                    f"{filled} of {capacity}",
                    [lambda: kernels.attend(q, keys, values, lengths)] * 20,
                )
                qkv, cos = torch.randn(rows, 36 * 128, device="cuda").bfloat16(), torch.ones(rows, 64, device="cuda")
                show(
                    "rotate",
                    0,
                    rows,
                    False,
                    "",
                    [lambda: kernels.rotate(qkv, cos, cos, keys, values, lengths, 28)] * 20,
                )
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
