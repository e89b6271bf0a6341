"""Golden files and how far results are from them."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

TOLERANCE = 1e-5
MISMATCH = 1.0
# How far sines and cosines of times up to 1000 may be apart: a frequency is exp of a number, whose last bit depends on the processor's math library (seen: 3.1e-5).
WAVE_TOLERANCE = 1000 * 2**-23


class Golden:
    """Tensors of one golden file by group, and its configuration."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata()
            self.config = json.loads(metadata["meta"]) if "meta" in metadata else json.loads(metadata["json"])["config"]
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        self.weights, self.inputs, self.outputs = (
            {k[len(group):]: v for k, v in tensors.items() if k.startswith(group)} for group in ("weights.", "inputs.", "outputs.")
        )


class Errors:
    """Collects the largest error of a file.

    Errors are absolute differences after division by the expected tensor's maximum; ids and tables are exact (an error of 1 stands for any mismatch).
    """

    def __init__(self):
        self.max = 0.0

    def tensor(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Within the tolerance. Another shape and NaN, on either side, count as an infinite error."""
        error = math.inf
        if found.shape == expected.shape:
            scale = expected.float().abs().max().clamp(min=1e-12)
            error = float((found.float() - expected.float()).abs().max() / scale)
        self.max = max(self.max, math.inf if math.isnan(error) else error)

    def waves(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Sines and cosines of times 0..1000 as float32, within WAVE_TOLERANCE, which counts as TOLERANCE."""
        apart = Errors()
        apart.tensor(found, expected)
        self.max = max(self.max, apart.max * TOLERANCE / WAVE_TOLERANCE)

    def equal(self, found, expected) -> None:
        """Exactly equal: numbers, lists, or tensors by value."""
        if torch.is_tensor(found):
            found, expected = found.tolist(), expected.tolist()
        if found != expected:
            self.max = max(self.max, MISMATCH)
