"""What training keeps: counted at full size on the meta device, which has shapes and no memory."""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import pytest
import tiny_models
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from step1x_core.checkpoints.detection import detect_config
from step1x_core.host.network.transformer import Step1XTransformer
from step1x_core.host.training.adapted import adapted, linear_shapes
from step1x_core.host.training.train import TRAINED_BYTES, load_for_training, training_mode
from step1x_core.training.objective import RANK, Settings, lora_layers, parameters


class Meter(TorchDispatchMode):
    """Bytes of the tensors on the meta device that are alive, and the most at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self.release, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return out

    def release(self, key):
        self.bytes -= self.alive.pop(key)


class Attention(torch.autograd.Function):
    """What a fused attention kernel keeps: queries, keys, values and the result."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def attention(original, q, k, v, heads, skip_reshape=False, **kwargs):
    return Attention.apply(q, k, v).transpose(1, 2).flatten(2) if skip_reshape else torch.empty_like(q)


def full_size():
    """The published transformer in fp8, with the layers of a LoRA of the default rank, on the meta device."""
    shapes = tiny_models.transformer_shapes("v1.1", tiny_models.FULL_TRANSFORMER)
    config = detect_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    transformer = Step1XTransformer(
        **config.transformer_params(), dtype=torch.float8_e4m3fn, device="meta", operations=comfy.ops.manual_cast
    ).requires_grad_(False)
    layers = lora_layers(linear_shapes(transformer), Settings(steps=1, rank=1))
    for layer in layers.values():
        layer.down, layer.up = (torch.nn.Parameter(torch.empty(shape, device="meta"))
                                for shape in ((RANK, layer.down.shape[1]), (layer.up.shape[0], RANK)))
    return transformer, layers


def moved(*args, **kwargs):
    """Stands for `save_on_cpu`: what it packs leaves the device."""
    return saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.dtype),
        lambda packed: torch.empty(packed[0], dtype=packed[1], device="meta"),
    )


@pytest.mark.once
@pytest.mark.parametrize("size", [512, 1024])
def test_training_keeps_the_tokens_of_no_block_on_the_device(model, monkeypatch, size):
    transformer, layers = full_size()
    trained = sum(weight.numel() for weight in parameters(layers).values())
    side, blocks = size // 8, len(transformer.double_blocks) + len(transformer.single_blocks)
    latent = torch.empty(1, 16, side, side, device="meta", dtype=torch.bfloat16)
    context, mask = torch.empty(1, 640, 3584, device="meta", dtype=torch.bfloat16), torch.ones(1, 640, dtype=torch.long, device="meta")
    tokens = (640 + 2 * (side // 2) ** 2) * transformer.hidden_size * 2
    counts = {}
    for name, context_manager in (("kept", lambda **kwargs: nullcontext()), ("moved", moved)):
        monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", context_manager)
        with Meter() as meter, training_mode(), adapted(transformer, layers):
            loss = transformer(latent, torch.empty(1, device="meta"), context, ref_latents=[latent], text_mask=mask,
                               transformer_options={"optimized_attention_override": attention}).float().square().mean()
            after_forward = meter.bytes
            loss.backward()
        counts[name] = after_forward, meter.peak - 4 * trained
        for weight in parameters(layers).values():
            weight.grad = None
    assert counts["kept"][0] >= blocks * tokens and counts["moved"][0] < 2 * tokens

    # And the host makes room for what is left.
    estimates = []
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, memory_required: estimates.append(memory_required))
    monkeypatch.setattr(model.model, "get_dtype_inference", lambda: torch.bfloat16)
    for checkpointing in (True, False):
        load_for_training(model, SimpleNamespace(pairs=[SimpleNamespace(size=(side, side))]), Settings(steps=1), trained, checkpointing)
    working = estimates[0] - TRAINED_BYTES * trained
    assert counts["moved"][1] < working < 2 * counts["moved"][1] and estimates[1] > estimates[0] + working
