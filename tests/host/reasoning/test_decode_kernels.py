"""The kernels of a step of writing text against torch, in Triton's interpreter on a CPU. float16, because the
interpreter multiplies no bf16."""

import subprocess
import sys

import pytest
from conftest import PACK

pytest.importorskip("triton", reason="Triton, which is published for Linux only, is not installed")

PROGRAM = """
import sys
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from step1x_core.reasoning import decode_kernels as kernels
from step1x_core.reasoning.kv_cache import Cache

torch.manual_seed(0)


def layer(outputs, inputs, bias=False, fp8=False):
    weight, scale = torch.randn(outputs, inputs) / inputs**0.5, None
    if fp8:
        scale = weight.abs().max() / 448
        weight = (weight / scale).to(kernels.FP8)
    return kernels.Projection(weight if fp8 else weight.half(), scale, torch.randn(outputs).half() if bias else None)


def product(x, part):
    out = x.float() @ part.weight.float().T * (1 if part.scale is None else part.scale)
    return out if part.bias is None else out + part.bias.float()


def near(found, expected, what):
    error = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < 2e-3, (what, error)


for fp8, rows, splits in ((False, 19, 1), (True, 3, 2)):
    tile = kernels.Tile(16, 64, 4, 2, splits)
    x = torch.randn(rows, 192).half()
    parts = [layer(count, 192, True, fp8) for count in (48, 16, 40)]
    # Three blocks of inputs in two parts are two and one.
    found = kernels.project(x, parts, tile)
    assert found.shape == (splits, rows, 104) and found.dtype == torch.float32
    near(found.sum(0), torch.cat([product(x, part) for part in parts], 1), "qkv")
    assert kernels.project(x[:1], parts[1:2], tile, torch.float16).dtype == torch.float16
    residual, part, weight = torch.randn(rows, 48).half(), layer(48, 192, False, fp8), torch.randn(48).half()
    added, normed = kernels.add_norm(residual, kernels.project(x, [part], tile), weight, 1e-6)
    near(added, product(x, part) + residual.float(), "residual")
    near(normed, rms_norm(added.float(), (48,), weight.float(), 1e-6), "norm of the sum")
    gate, up = layer(48, 192, False, fp8), layer(48, 192, False, fp8)
    near(kernels.gate(x, gate, up, tile), silu(product(x, gate)) * product(x, up), "gate")
    near(kernels.norm(x, parts[0].bias[:1].expand(192).contiguous(), 1e-6),
         rms_norm(x.float(), (192,), parts[0].bias[:1].float().expand(192), 1e-6), "norm")
    # A row alone has the very result that it has among others.
    tile = kernels.Tile(32, 64, 4, 2, 3)
    assert torch.equal(kernels.project(x[2:3], parts, tile), kernels.project(x, parts, tile)[:, 2:3])
    # Parts that would get no inputs are not computed.
    assert len(kernels.project(x[:1], parts[1:2], kernels.Tile(16, 64, 4, 2, 4))) == 3

heads, kv_heads, width = 14, 2, 32
cache = Cache(1, kv_heads, width, torch.tensor([5, 64, 200]), torch.tensor([5, 64, 200]), 256, torch.float16)
keys, values = cache.layers[0]
keys.normal_()
values.normal_()
splits = torch.randn(2, 3, (heads + 2 * kv_heads) * width)
qkv = splits.sum(0).half()
cos, sin = torch.randn(2, 3, width // 2).unbind(0)
parts = qkv.float().view(3, -1, width)
a, b, c, s = parts[..., :width // 2], parts[..., width // 2:], cos[:, None], sin[:, None]
turned = torch.cat((a * c - b * s, b * c + a * s), -1)
before = keys.clone()
q = kernels.rotate(splits, cos, sin, keys, values, cache.lengths, heads)
near(q, turned[:, :heads], "q")
out = kernels.attend(q, keys, values, cache.lengths)
for row, length in enumerate(cache.lengths.tolist()):
    near(keys[row, :, length], turned[row, heads:heads + kv_heads], "key")
    assert torch.equal(values[row, :, length].float(), parts[row, heads + kv_heads:])
    own = [part[row, :, :length + 1].float()[None] for part in (keys, values)]
    near(out[row], scaled_dot_product_attention(q[row].float()[None, :, None], *own, enable_gqa=True).flatten(), "attend")
    keys[row, :, length] = before[row, :, length]
assert torch.equal(keys, before)
print("fine")
"""


@pytest.mark.once
def test_kernels_agree_with_torch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=PACK, capture_output=True, text=True)
    assert run.stdout == "fine\n", run.stderr[-2000:]
