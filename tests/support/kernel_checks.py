"""Compares the Triton kernels with torch, and the blocks that use them with the host's; run in Triton's interpreter, on the CPU, by test_blocks.py."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2] / "scripts" / "support"))
import environment

environment.use_host_in_process()
import tiny_models
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention

from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.network import blocks
from step1x_core.network import kernels

BATCH, TOKENS, WIDTH, HEADS, HEAD = 2, 5, 96, 3, 32


def close(got, expected, dtype):
    torch.testing.assert_close(
        got.float(),
        expected,
        rtol=1e-5 if dtype == torch.float32 else 2**-7,
        atol=1e-5 if dtype == torch.float32 else 1e-3,
    )


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
    kernels.copy_rows(eighths.to(dtype), out, out_scale=torch.tensor(0.5))
    assert torch.equal(out.float(), (eighths.float() * 2).clamp(-448, 448).flatten(0, 1)) and out.float().max() == 448

    for factor in (1, 3, 1e-3, 448 / x.abs().max()):
        largest = torch.cat((x, factor * x), dim=1)[:, 1:, 8:]
        found = kernels.fp8_scale([x * min(factor, 1) / 2, largest])
        assert found.log2() == (largest.float().abs().max() / 448).log2().ceil()
    assert kernels.fp8_scale([0 * x]) == 2**-60
    kernels.copy_rows(eighths, out, torch.tensor(4.0), torch.tensor(8.0))
    assert torch.equal(out.float(), (eighths.flatten(0, 1).float() / 2).to(torch.float8_e4m3fn).float())
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
        kernels.norm_and_rotate(qkv, *weights, pe, q[:, 1:6], k[:, 1:9], v[:, 1:9], text=3, repeats=3)
        assert torch.equal(q[:, 1:6], rotated[:, :, 0]) and (q[:, [0, 6]] == 7).all()
        for got, part in ((k, 1), (v, 2)):
            assert torch.equal(got[:, 1:9], rotated[:, order, part]) and (got[:, [0, 9]] == 7).all()
        q, k, v = (torch.empty((BATCH, tokens, HEADS, HEAD), dtype=torch.float8_e4m3fn) for tokens in (5, 8, 8))
        v_scale = kernels.fp8_scale([qkv[:, :, 2].flatten(2)])
        kernels.norm_and_rotate(qkv, *weights, pe, q, k, v, v_scale, 3, 3)
        for got, part, times in ((q, rotated[:, :, 0], 1), (k, rotated[:, order, 1], 1), (v, qkv[:, order, 2], v_scale)):
            assert torch.isclose(got.float() * times, part.float(), rtol=0.126, atol=2**-9).float().mean() > 0.95


def check_cards():
    """Every launch has the card of its tensors as the current one: on the CPU this can only be seen by what is asked for."""
    asked, device_of = [], torch.cuda.device_of
    torch.cuda.device_of = lambda tensor: asked.append(tensor) or device_of(tensor)
    try:
        x, gate, qkv = torch.randn(1, 4, 64), torch.randn(1, 1, 64), torch.randn(1, 4, 3, 1, 32)
        kernels.modulate(x, gate, gate)
        kernels.fp8_scale([x])
        kernels.copy_rows(x, torch.empty(4, 64))
        kernels.add_gated(x, x.clone(), gate)
        kernels.norm_and_rotate(qkv, torch.ones(32), torch.ones(32), torch.randn(1, 1, 4, 16, 2, 2), qkv[:, :, 0], qkv[:, :, 1])
    finally:
        torch.cuda.device_of = device_of
    assert len(asked) == 5 and all(tensor is expected for tensor, expected in zip(asked, (x, x, x, x, qkv)))


def attend_rounded(q, k, v):
    """What the fp8 attention of a GPU takes and gives."""
    assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn
    out = scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).flatten(2).to(torch.float8_e4m3fn)


def check_blocks():
    """Text of 3 tokens, the last of which stands for 4, and 5 of the picture, of which 2 are read after the last block."""
    heads, width, repeats = 2, 64, 3
    whole = [0, 1, 2, 2, 2, 2]
    text, image, vec = torch.randn(2, 3, width), torch.randn(2, 5, width), torch.randn(2, width)
    pe = torch.randn(1, 1, 8, width // heads // 2, 2, 2)
    pe_whole = pe[:, :, [*whole, *range(3, 8)]]
    options = {blocks.REPEATED_TEXT: (3, repeats), "block_type": "single", "block_index": 0, "total_blocks": 1, "img_slice": [3, 8]}
    for kind, fused, settings in (
        (DoubleStreamBlock, blocks.FusedDoubleStreamBlock, {"qkv_bias": True}),
        (SingleStreamBlock, blocks.FusedSingleStreamBlock, {}),
    ):
        plain, ours = (
            block(
                width,
                heads,
                mlp_ratio=4,
                dtype=torch.float32,
                device="cpu",
                operations=blocks.disable_weight_init,
                **settings,
            )
            for block in (kind, fused)
        )
        weights = {name: torch.randn(tensor.shape) / 8 for name, tensor in plain.state_dict().items()}
        plain.load_state_dict(weights)
        ours.load_state_dict(weights)

        def run(block, options, text, pe):
            if kind is DoubleStreamBlock:
                return torch.cat(block(img=image.clone(), txt=text.clone(), vec=vec, pe=pe, transformer_options=options)[::-1], dim=1)
            return block(torch.cat((text, image), dim=1), vec=vec, pe=pe, transformer_options=options)

        expected = run(plain, {}, text[:, whole], pe_whole)[:, [0, 1, 2, *range(6, 11)]]
        # torch's GELU within a product is the exact one on a CPU.
        torch.testing.assert_close(run(ours, options, text, pe), expected, rtol=1e-2, atol=5e-3)
        changed = run(ours, options | {blocks.FP8_ATTENTION: attend_rounded}, text, pe) - expected
        assert 1e-4 < changed.norm() / expected.norm() < 0.05
        # Values far too small for e4m3, which the layer behind the attention enlarges again.
        for name, tensor in ours.named_parameters():
            if ".qkv." in name or name.startswith("linear1."):
                tensor[2 * width:3 * width] /= 1024
            elif name.endswith("attn.proj.weight"):
                tensor *= 1024
            elif name == "linear2.weight":
                tensor[:, :width] *= 1024
        small = run(ours, options | {blocks.FP8_ATTENTION: attend_rounded}, text, pe) - expected
        torch.testing.assert_close(small, changed)
        ours.load_state_dict(weights)
        if kind is SingleStreamBlock:
            read = run(ours, options | {blocks.TOKENS_READ: 2}, text, pe)
            torch.testing.assert_close(read[:, 3:5], expected[:, 3:5], rtol=1e-2, atol=5e-3)
            assert torch.equal(read[:, [0, 1, 2, 5, 6, 7]], torch.cat((text, image), dim=1)[:, [0, 1, 2, 5, 6, 7]])


def check_fp8_layer():
    """What is e4m3 already, a part of a larger tensor, is multiplied as it is, however small its scale makes it; joined with another part it takes the layer's scale."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.write_transformer(Path(folder) / "step1x-edit-v1p1.safetensors", "v1.1")
        transformer = load_model(Path(folder) / "step1x-edit-v1p1.safetensors", quantise="fp8").model.diffusion_model.to(torch.bfloat16)
    for layer, scale in ((transformer.double_blocks[0].img_attn.proj, 2.0**-12), (transformer.single_blocks[0].linear2, 2.0)):
        layer._full_precision_mm = False
        layer.bias.zero_()
        width = transformer.hidden_size
        x, mlp = (
            torch.randn(2, 20, width).to(torch.float8_e4m3fn)[:, 4:],
            torch.randint(0, 8, (2, 16, layer.in_features - width)).bfloat16(),
        )
        parts = [blocks.Part(x, torch.tensor(scale))] + [blocks.Part(mlp)] * (layer.in_features > width)
        expected = torch.nn.functional.linear(torch.cat((x.float() * scale, mlp.float()), dim=-1), layer.weight.dequantize().float())
        got = blocks.projected(layer, parts, torch.bfloat16)
        assert got.dtype == torch.bfloat16 and (got.float() - expected).norm() / expected.norm() < 5e-3


torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    check(dtype)
check_cards()
blocks.kernels_on = lambda device: kernels
with torch.inference_mode():
    check_blocks()
    check_fp8_layer()
print("kernels agree")
