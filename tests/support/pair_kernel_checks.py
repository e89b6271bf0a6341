"""Compares the Triton kernels for paired prompts with those for single ones, and fp8 blocks with pairs with those
without; run in Triton's interpreter, on the CPU, by test_blocks.py."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2] / "scripts" / "support"))
import environment

environment.use_host_in_process()
import tiny_models
import torch

from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.network import blocks
from step1x_core.network import kernels, pair_kernels

TOKENS, WIDTH, HEADS, HEAD = 5, 96, 3, 32
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def random(*shape):
    return torch.randn(*shape).to(BF16)


def pairs(x):
    one, other = x.float().chunk(2)
    return torch.cat(((one + other) / 2, (one - other) / 2))


def rounded_alike(got, expected):
    """The interpreter carries no rounded mantissa into the exponent, so a few values come out as half; a GPU does."""
    assert got.dtype == FP8
    assert torch.isclose(got.float(), expected, rtol=0.126, atol=2**-8).float().mean() > 0.95


def check_kernels(batch):
    one = torch.ones(())
    x, product = random(batch, TOKENS, WIDTH), random(batch, TOKENS, WIDTH)
    shift, scale, gate = random(batch, 1, 3 * WIDTH).chunk(3, dim=-1)
    bias = random(WIDTH)
    single = pairs(product) * 2 + bias.float()  # what the product stands for: mean + half, mean - half
    rounded_alike(pair_kernels.modulate(x, shift, scale, one), pairs(kernels.modulate(x.float(), shift, scale)))

    wide = torch.zeros(batch * TOKENS, 3 * WIDTH).to(FP8)
    pair_kernels.copy_rows(x, wide[:, :WIDTH], one)
    rounded_alike(wide[:, :WIDTH].unflatten(0, (batch, -1)), pairs(x))
    pair_kernels.copy_rows(product[:, 1:], wide[:batch * (TOKENS - 1), WIDTH : 2 * WIDTH], one, bias, gelu=True)
    expected = pairs(torch.nn.functional.gelu(single[:, 1:], approximate="tanh"))
    rounded_alike(wide[:batch * (TOKENS - 1), WIDTH : 2 * WIDTH].unflatten(0, (batch, -1)), expected)
    assert (wide[:, 2 * WIDTH :].float() == 0).all()
    pair_kernels.copy_rows((2 * x).to(FP8), wide[:, :WIDTH], one, x_scale=torch.tensor(0.5))
    rounded_alike(wide[:, :WIDTH].unflatten(0, (batch, -1)), pairs((2 * x).to(FP8).float() / 2))

    longer = random(batch, TOKENS + 2, WIDTH)
    changed = longer.clone()
    pair_kernels.add_gated(changed[:, 2:], product, bias, gate)
    torch.testing.assert_close(changed[:, 2:].float(), longer[:, 2:].float() + single * gate.float(), rtol=2**-7, atol=2e-3)
    assert torch.equal(changed[:, :2], longer[:, :2])

    qkv, bias, weights = random(batch, TOKENS, 3 * HEADS * HEAD), random(3 * HEADS * HEAD), random(2, HEAD)
    whole = (pairs(qkv) * 2 + bias.float()).to(BF16).unflatten(-1, (3, HEADS, HEAD))
    for batches in (1, batch):
        pe = torch.randn(batches, 1, TOKENS, HEAD // 2, 2, 2)
        results = []
        for rotate in (
            lambda *out: kernels.norm_and_rotate(whole, *weights, pe, *out, text=3, repeats=3),
            lambda *out: pair_kernels.norm_and_rotate(
                qkv.unflatten(-1, (3, HEADS, HEAD)), bias, *weights, pe, *out, text=3, repeats=3
            ),
        ):
            out = [torch.zeros(batch, tokens, HEADS, HEAD).to(BF16) for tokens in (TOKENS, TOKENS + 3, TOKENS + 3)]
            rotate(*out)
            results.append(out)
        for found, expected in zip(results[1], results[0]):
            assert expected.abs().sum() > 0
            torch.testing.assert_close(found.float(), expected.float(), rtol=2**-6, atol=0.05)


def check_blocks():
    """With pairs, the blocks stay as near to the exact ones, and the difference of two near prompts much nearer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step1x-edit-v1p1.safetensors"
        tiny_models.write_transformer(path, "v1.1")
        exact, fp8 = (load_model(path, quantise=one).model.diffusion_model for one in (None, "fp8"))
    # Loading compares the blocks with the host's, for which the interpreter's GELU is too exact.
    blocks.kernels_on = lambda device: kernels
    blocks.pair_kernels_on = lambda device: pair_kernels
    fp8 = fp8.to(BF16)
    for layer in fp8.modules():
        if hasattr(layer, "_full_precision_mm"):
            layer._full_precision_mm = False
    width, heads = exact.hidden_size, exact.num_heads
    base = torch.randn(1, 8, width)
    x = torch.cat((base, base + 0.02 * torch.randn(1, 8, width)))
    vec, pe = torch.randn(1, width).expand(2, -1), torch.randn(1, 1, 8, width // heads // 2, 2, 2)
    options = {"block_type": "single", "block_index": 0, "total_blocks": 1, "img_slice": [3, 8]}

    def run(model, kind, options, dtype):
        given = [y.to(dtype) for y in (x[:, :3], x[:, 3:], vec)]
        if kind == "double":
            out = model.double_blocks[0](
                img=given[1].clone(), txt=given[0].clone(), vec=given[2], pe=pe, transformer_options=options
            )
            return torch.cat(out[::-1], dim=1).float()
        return model.single_blocks[0](
            torch.cat(given[:2], dim=1), vec=given[2], pe=pe, transformer_options=options
        ).float()

    def error(found, expected):
        return float((found - expected).norm() / expected.norm())

    for kind in ("double", "single"):
        expected = run(exact, kind, options, torch.float32)
        apart, together = (run(fp8, kind, options | {blocks.PAIRED: one}, BF16) for one in (False, True))
        assert not torch.equal(apart, together) and error(together, expected) < 1.2 * error(apart, expected) < 0.2
        near = error(together[0] - together[1], expected[0] - expected[1])
        assert near < error(apart[0] - apart[1], expected[0] - expected[1]) / 4
    part = run(fp8, "single", options | {blocks.PAIRED: True, blocks.TOKENS_READ: 2}, BF16)
    torch.testing.assert_close(part[:, 3:5], together[:, 3:5], rtol=2**-6, atol=0.02)


def check_trial():
    """What is run before the first use: the interpreter rounds to e4m3 as roughly as said above, so only the rest of it
    can be seen here; a wrong result is refused."""
    checked, check = [], pair_kernels._check
    pair_kernels._check = lambda found, expected: checked.append(float((found.float() - expected.float()).norm() / expected.float().norm()))
    try:
        pair_kernels.check_agreement(torch.device("cpu"))
    finally:
        pair_kernels._check = check
    print(checked)
    assert max(checked[:2]) < 0.4 and max(checked[2:]) < 0.01
    try:
        pair_kernels._check(torch.zeros(3), torch.ones(3))
    except RuntimeError:
        return
    raise AssertionError("a wrong result passed")


torch.manual_seed(0)
check_trial()
for batch in (2, 4):
    check_kernels(batch)
with torch.inference_mode():
    check_blocks()
print("pairs agree")
