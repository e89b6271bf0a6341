"""The blocks that write in place against the host's own, and what makes them step aside."""

import os
import subprocess
import sys

import comfy.model_management
import pytest
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, EmbedND, SingleStreamBlock
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ops import disable_weight_init
from conftest import PACK
from tiny_models import write_transformer

from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.network import blocks
from step1x_core.host.network.blocks import FusedDoubleStreamBlock, FusedSingleStreamBlock

WIDTH, HEADS, TEXT, IMAGE = 64, 2, 3, 6


def pair(kind, fused, **options):
    """The host's block and ours with the same random weights."""
    plain, ours = (
        block(WIDTH, HEADS, mlp_ratio=4, dtype=torch.float32, device="cpu", operations=disable_weight_init, **options)
        for block in (kind, fused)
    )
    weights = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)) / 8
        for i, (name, tensor) in enumerate(plain.state_dict().items())
    }
    plain.load_state_dict(weights)
    ours.load_state_dict(weights)
    return plain, ours


def stream(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions(tokens):
    return EmbedND(WIDTH // HEADS, 10000, [8, 12, 12])(torch.arange(2 * tokens * 3).reshape(2, tokens, 3))


def run_double(block, **options):
    return block(
        img=stream(2, IMAGE, WIDTH, seed=1),
        txt=stream(2, TEXT, WIDTH, seed=2),
        vec=stream(2, WIDTH, seed=3),
        pe=positions(TEXT + IMAGE),
        **options,
    )


def run_single(block, **options):
    return block(stream(2, TEXT + IMAGE, WIDTH, seed=1), vec=stream(2, WIDTH, seed=3), pe=positions(TEXT + IMAGE), **options)


@pytest.fixture(scope="module")
def fp8_block(tmp_path_factory):
    """A block whose large layers are e4m3 with a scale, in bfloat16."""
    path = tmp_path_factory.mktemp("fp8") / "step1x-edit-v1p1.safetensors"
    write_transformer(path, "v1.1")
    with torch.inference_mode():
        return load_model(path, quantise="fp8").model.diffusion_model.single_blocks[0].to(torch.bfloat16)


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
def test_a_product_of_e4m3_is_that_of_its_numbers(fp8_block, bias_dtype):
    """With the layer as it is, and where the host has to prepare it."""
    layer = fp8_block.linear2
    x = stream(32, layer.in_features, seed=1).to(torch.float8_e4m3fn)
    with torch.inference_mode():
        layer._full_precision_mm, layer.bias = False, torch.nn.Parameter(layer.bias.to(bias_dtype), requires_grad=False)
        assert blocks.is_ready(layer, x.device, torch.bfloat16) == (bias_dtype == torch.bfloat16)
        assert blocks.fp8_input_scale(layer, x).item() == 1
        expected = torch.nn.functional.linear(x.float() * 0.25, layer.weight.dequantize().float(), layer.bias.float())
        got = blocks.multiplied_as_fp8(layer, x, torch.tensor(0.25), torch.bfloat16)
    assert got.dtype == torch.bfloat16 and (got.float() - expected).norm() / expected.norm() < 5e-3


def test_what_the_host_would_change_is_not_ready():
    layer = disable_weight_init.Linear(4, 4, dtype=torch.float32, device="cpu")
    x = torch.zeros(1, 4)
    assert blocks.is_ready(layer, x.device, x.dtype)
    assert not blocks.is_ready(layer, torch.device("meta"), x.dtype) and not blocks.is_ready(layer, x.device, torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    layer.weight_function = [lambda weight: weight + 1]  # how the host applies a LoRA to weights that are not on the card
    assert not blocks.is_ready(layer, x.device, x.dtype) and blocks.ready_weight_and_bias(layer, x.device, x.dtype)[
        0
    ].unique().tolist() == [2.0]
    layer.weight_function, layer.bias_function = [], [lambda bias: bias]
    assert not blocks.is_ready(layer, x.device, x.dtype)


@pytest.fixture
def double():
    return pair(DoubleStreamBlock, FusedDoubleStreamBlock, qkv_bias=True)


@pytest.fixture
def single():
    return pair(SingleStreamBlock, FusedSingleStreamBlock)


def test_blocks_equal_the_hosts(double, single, monkeypatch):
    with torch.inference_mode():
        expected, one = [run_double(double[0]), run_single(single[0])], torch.full((2, 1, 1, TEXT + IMAGE), -1e9)
        one[..., 0] = 0
        masked = run_single(single[0], attn_mask=one)
        for kind in (DoubleStreamBlock, SingleStreamBlock):
            monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: pytest.fail("the host's forward ran"))
        for got, wanted in zip(run_double(double[1]), expected[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run_single(single[1]), expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run_single(single[1], attn_mask=one), masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attn1_patch", "attn1_output_patch"])
def test_patches_see_what_the_host_shows_them(double, single, name):
    def patch(first, *args, extra_options=None, **kwargs):
        return {"v": args[1] * 2} if name == "attn1_patch" else first * 2

    options = {"transformer_options": {"patches": {name: [patch]}, "block_index": 0, "block_type": "double"}}
    with torch.inference_mode():
        for run, (plain, ours) in ((run_double, double), (run_single, single)):
            torch.testing.assert_close(run(ours, **options), run(plain, **options))


def test_gradients_go_through_the_hosts_forward(single, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    gradients = [torch.autograd.grad(run_single(block).square().sum(), block.linear2.weight)[0] for block in single]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.once
def test_compiling_breaks_no_graph_and_only_new_shapes_compile_again(double, single):
    from torch._dynamo.testing import CompileCounter

    # A GPU has torch's attention; the one that the host takes on a CPU asks for the free memory.
    options = {
        "transformer_options": {
            "optimized_attention_override": lambda attention, *args, **kwargs: attention_pytorch.__wrapped__(
                *args, **kwargs
            )
        }
    }
    counter = CompileCounter()
    compiled = torch.compile(single[1], backend=counter, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        vec = stream(2, WIDTH, seed=3)
        for tokens in (9, 9, 7, 9):
            compiled(stream(2, tokens, WIDTH, seed=tokens), vec=vec, pe=positions(tokens), **options)
        assert counter.frame_count == 2
        torch.compile(double[1], backend="eager", fullgraph=True)(
            img=stream(2, IMAGE, WIDTH, seed=1), txt=stream(2, TEXT, WIDTH, seed=2), vec=vec, pe=positions(TEXT + IMAGE), **options)


@pytest.mark.once
@pytest.mark.parametrize("checks, said", [("kernel_checks", "kernels agree"), ("pair_kernel_checks", "pairs agree")])
def test_triton_kernels_agree_with_torch(checks, said):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    pytest.importorskip("triton", reason="Triton, which is published for Linux only, is not installed")
    done = subprocess.run(
        [sys.executable, PACK / "tests" / "support" / f"{checks}.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
