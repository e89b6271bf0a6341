"""Compares the Triton kernels with torch; run in Triton's interpreter, on the CPU, by test_blocks.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch.nn.functional import gelu, layer_norm, rms_norm

from step1x_core import kernels

BATCH, TOKENS, WIDTH, HEADS, HEAD = 2, 5, 96, 3, 32


def close(got, expected, dtype):
    torch.testing.assert_close(got.float(), expected, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5 if dtype == torch.float32 else 1e-3)


def check(dtype):
    def random(*shape):
        return torch.randn(*shape).to(dtype)

    x = random(BATCH, TOKENS, WIDTH)
    shift, scale, gate = random(BATCH, 1, 3 * WIDTH).chunk(3, dim=-1)
    normed = layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + scale.float()) + shift.float()
    close(kernels.modulate(x, shift, scale), normed, dtype)

    # What e4m3 can hold comes out as it is; what is beyond 448 becomes 448.
    eighths = torch.randn(BATCH, TOKENS, WIDTH).mul(200).clamp(-448, 448).to(torch.float8_e4m3fn)
    out = torch.empty_like(eighths).flatten(0, 1)
    kernels.copy_rows(eighths.to(dtype), out, torch.tensor(0.5))
    assert torch.equal(out.float(), (eighths.float() * 2).clamp(-448, 448).flatten(0, 1)) and out.float().max() == 448

    # The interpreter carries no rounded mantissa into the exponent, so a few values come out as half of what they are; a GPU does.
    scale_8 = torch.tensor(2.0**-5)
    got = kernels.modulate(x, shift, scale, scale_8)
    assert got.dtype == torch.float8_e4m3fn
    assert torch.isclose(got.float() * scale_8, normed, rtol=0.126, atol=2**-12).float().mean() > 0.95

    update = random(BATCH, TOKENS, WIDTH)
    changed = x.clone()
    kernels.add_gated(changed, update, gate)
    close(changed, x.float() + update.float() * gate.float(), dtype)

    hidden = random(BATCH, TOKENS, 3 * HEADS * HEAD + 2 * WIDTH)
    qkv, mlp = hidden.split([3 * HEADS * HEAD, 2 * WIDTH], dim=-1)
    joined = torch.zeros((BATCH * TOKENS, 3 * WIDTH), dtype=dtype)
    kernels.copy_rows(x, joined[:, :WIDTH])
    kernels.copy_rows(mlp, joined[:, WIDTH:], gelu=True)
    close(joined, torch.cat((x.float(), gelu(mlp.float(), approximate="tanh")), dim=-1).flatten(0, 1), dtype)
    qkv = qkv.unflatten(-1, (3, HEADS, HEAD))
    weights = random(2, HEAD)
    for batches in (1, BATCH):
        pe = torch.randn(batches, 1, TOKENS, HEAD // 2, 2, 2)
        expected = []
        for part in (0, 1):
            normed = rms_norm(qkv[:, :, part].float(), (HEAD,), weights[part].float(), 1e-6).to(dtype).float().unflatten(-1, (-1, 1, 2))
            expected.append((pe.transpose(1, 2) * normed).sum(-1).flatten(-2))
        rotated = qkv.clone()
        kernels.norm_and_rotate(rotated, *weights, pe, rotated[:, :, 0], rotated[:, :, 1])
        # Two ulps: the norm is rounded before the rotation, and may round the other way.
        torch.testing.assert_close(rotated[:, :, :2].float(), torch.stack(expected, dim=2), rtol=1e-4 if dtype == torch.float32 else 2**-6,
                                   atol=1e-4 if dtype == torch.float32 else 0.1)
        assert torch.equal(rotated[:, :, 2], qkv[:, :, 2])

        # Token 2 stands for three more; what is written lies within larger tensors.
        order = [0, 1, 2, 2, 2, 2, 3, 4]
        q, k, v = (torch.full((BATCH, 10, HEADS, HEAD), 7.0, dtype=dtype) for _ in range(3))
        kernels.norm_and_rotate(qkv, *weights, pe, q[:, 1:6], k[:, 1:9], v[:, 1:9], 3, 3)
        assert torch.equal(q[:, 1:6], rotated[:, :, 0]) and (q[:, [0, 6]] == 7).all()
        for got, part in ((k, 1), (v, 2)):
            assert torch.equal(got[:, 1:9], rotated[:, order, part]) and (got[:, [0, 9]] == 7).all()


torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    check(dtype)
print("kernels agree")
