#!/usr/bin/env python3
"""The products of one step of the language model alone, at full size: `python benchmarks/gpu_text_pieces.py`.

Each is timed over several copies of its weights, which together are larger than the GPU's cache, in a CUDA graph: cuBLAS
through torch, and the pack's kernels with several tiles. `--tiny` runs the same code with small layers, without a GPU in
Triton's interpreter: it shows that the script works, not how fast anything is.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment

# Inputs and outputs of each product, and how much time of a step a microsecond of it is.
SHAPES = {
    "down": (18944, (3584,), 28),
    "gate": (3584, (18944, 18944), 28),
    "qkv": (3584, (3584, 512, 512), 28),
    "out": (3584, (3584,), 28),
    "head": (3584, (152064,), 1),
}
TINY = {"down": (128, (32,), 28), "gate": (64, (32, 32), 28), "head": (64, (32,), 1)}
# Outputs, inputs, warps, stages of a tile; the parts come from SPLITS.
TILES = [(32, 256, 4, 4), (32, 256, 4, 3), (32, 128, 4, 4), (32, 512, 4, 3), (64, 128, 4, 4), (64, 256, 8, 3),
         (32, 128, 2, 5), (16, 256, 4, 4), (64, 128, 8, 5), (32, 256, 8, 4), (128, 128, 8, 3)]
SPLITS = {"down": (3, 2, 4, 6, 1), "qkv": (2, 3, 1, 4), "out": (3, 2, 4, 1), "gate": (1,), "head": (1,)}
ROWS = (1, 8)
CACHE_BYTES = 400_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", type=float, nargs="?", default=200.0, help="try no further tiles after this many")
    parser.add_argument("--formats", nargs="+", choices=("fp8", "bf16"), default=["fp8", "bf16"])
    parser.add_argument("--tiny", action="store_true", help="small layers")
    return parser.parse_args()


def microseconds(calls) -> float:
    """Of one call, in a graph of them all, or on a CPU as they come."""
    import torch

    calls[0]()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - start) * 1e6
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
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


class Bench:
    def __init__(self, options):
        import torch

        self.options, self.begun = options, time.perf_counter()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # The interpreter multiplies no bf16.
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float16
        self.copy = self.bandwidth()
        self.found: dict[tuple, dict[str, float]] = {}

    def bandwidth(self) -> float:
        """Bytes that a copy reads and writes in a microsecond."""
        import torch

        source = torch.empty(2**30 if self.device == "cuda" else 2**20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / microseconds([lambda: target.copy_(source)])

    def late(self) -> bool:
        return time.perf_counter() - self.begun > self.options.seconds

    def show(self, name: str, kind: str, rows: int, label: str, size: int, calls) -> None:
        try:
            time_of_one = microseconds(calls)
        except Exception as error:
            print(f"{name:<6} {kind} {rows} rows {label:<24} {type(error).__name__}: {str(error)[:80]}", flush=True)
            return
        self.found.setdefault((name, kind, rows), {})[label] = time_of_one
        share = f" {size / time_of_one / self.copy:6.1%} of a copy" if size else ""
        print(f"{time.perf_counter() - self.begun:6.1f} {name:<6} {kind} {rows} rows {label:<24} {time_of_one:8.1f} us{share}", flush=True)

    def weights(self, outputs: int, inputs: int, kind: str):
        import torch

        from step1x_core.reasoning import decode_kernels as kernels

        weight = torch.randn(outputs, inputs, device=self.device) * inputs**-0.5
        if kind == "fp8":
            return kernels.Projection(weight.to(kernels.FP8), torch.ones((), device=self.device))
        return kernels.Projection(weight.to(self.dtype))

    def product(self, name: str, inputs: int, outputs: tuple[int, ...], kind: str) -> None:
        """One product with all tiles."""
        import torch
        from torch.nn.functional import linear, silu

        from step1x_core.reasoning import decode_kernels as kernels

        size = inputs * sum(outputs) * (1 if kind == "fp8" else 2)
        copies = 1 if self.options.tiny else max(1, -(-CACHE_BYTES // size))
        sets = [[self.weights(count, inputs, kind) for count in outputs] for _ in range(copies)]
        xs = {rows: torch.randn(rows, inputs, device=self.device).to(self.dtype) for rows in ROWS}
        now = getattr(kernels, name.upper())[1 if kind == "fp8" else 2]
        tiles = [(now.outputs, now.inputs, now.warps, now.stages, now.splits)]
        tiles += [tile for split in SPLITS[name] for tile in ((*tile, split) for tile in TILES) if tile not in tiles]
        for rows, x in xs.items():
            if kind == "bf16" and name == "gate":
                self.show(name, kind, rows, "cuBLAS", size, [
                    lambda a=a, b=b, x=x: silu(linear(x, a.weight)) * linear(x, b.weight) for a, b in sets])
            elif kind == "bf16":
                self.show(name, kind, rows, "cuBLAS", size, [
                    lambda parts=parts, x=x: [linear(x, part.weight) for part in parts] for parts in sets])
        for numbers in tiles[:2] if self.options.tiny else tiles:
            # Room for the tile's weights and inputs in the memory of a multiprocessor.
            used = numbers[1] * numbers[3] * (numbers[0] * len(outputs) ** (name == "gate") * (1 + (kind == "bf16")) + 32)
            if self.late() or used > 220_000:
                continue
            tile = kernels.Tile(*numbers)
            for rows, x in xs.items():
                if name == "gate":
                    calls = [lambda parts=parts, x=x, tile=tile: kernels.gate(x, *parts, tile) for parts in sets]
                else:
                    calls = [lambda parts=parts, x=x, tile=tile: kernels.project(x, parts, tile) for parts in sets]
                self.show(name, kind, rows, str(numbers), size, calls)

    def small(self) -> None:
        """The kernels between the products."""
        import torch

        from step1x_core.reasoning import decode_kernels as kernels

        heads, width, columns = (28, 128, 3584) if not self.options.tiny else (4, 32, 128)
        norm = torch.ones(columns, device=self.device, dtype=self.dtype)
        repeats = 1 if self.options.tiny else 20
        for rows in ROWS:
            x = torch.randn(rows, columns, device=self.device).to(self.dtype)
            self.show("norm", "bf16", rows, "", 0, [lambda x=x: kernels.norm(x, norm, 1e-6)] * repeats)
            filled, capacity = (40, 64) if self.options.tiny else (700, 1024)
            keys, values = (torch.randn(rows, capacity, heads // 4, width, device=self.device).to(self.dtype).transpose(1, 2)
                            for _ in range(2))
            kv = keys.shape[1]
            lengths, cos = torch.full((rows,), filled, device=self.device), torch.ones(rows, width // 2, device=self.device)
            q = torch.randn(rows, heads, width, device=self.device).to(self.dtype)
            self.show("attend", "bf16", rows, f"{filled} of {capacity}", 0,
                      [lambda q=q, k=keys, v=values, n=lengths: kernels.attend(q, k, v, n)] * repeats)
            for splits in (1, 3) if self.options.tiny else (1, 2, 3, 4):
                parts = torch.randn(splits, rows, columns, device=self.device)
                self.show("add", "bf16", rows, f"and norm of {splits}", 0,
                          [lambda x=x, parts=parts: kernels.add_norm(x, parts, norm, 1e-6)] * repeats)
                qkv = torch.randn(splits, rows, (heads + 2 * kv) * width, device=self.device)
                self.show("rotate", "bf16", rows, f"of {splits}", 0, [
                    lambda p=qkv, c=cos, k=keys, v=values, n=lengths: kernels.rotate(p, c, c, k, v, n, heads)] * repeats)

    def summary(self) -> None:
        """The best tiles for both numbers of rows, which share one, and what that makes of a step."""
        shapes = TINY if self.options.tiny else SHAPES
        totals = {}
        for (name, kind), _ in itertools.groupby(self.found, lambda key: key[:2]):
            if name not in shapes:
                continue
            one, several = (self.found.get((name, kind, rows), {}) for rows in ROWS)
            ranked = sorted((one[label] + several[label], label) for label in one if label in several)
            print(f"best {name} {kind}, 1 and 8 rows: " + ", ".join(
                f"{label} {one[label]:.1f} and {several[label]:.1f} us" for _, label in ranked[:5]), flush=True)
            if ranked:
                totals[kind] = totals.get(kind, 0.0) + one[ranked[0][1]] * shapes[name][2]
        for kind, total in totals.items():
            print(f"products of a step with the best tiles, {kind}, 1 row: {total / 1000:.3f} ms", flush=True)


def main() -> int:
    options = arguments()
    import torch

    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with torch.inference_mode():
        bench = Bench(options)
        print(f"{name}, torch {torch.__version__}, copy {bench.copy / 1e6:.2f} TB/s", flush=True)
        bench.small()
        for kind in options.formats:
            for shape, (inputs, outputs, _) in (TINY if options.tiny else SHAPES).items():
                bench.product(shape, inputs, outputs, kind)
        bench.summary()
    return 0


if __name__ == "__main__":
    if "--tiny" in sys.argv[1:]:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    environment.reexecute_in_host(__file__)
    sys.exit(main())
