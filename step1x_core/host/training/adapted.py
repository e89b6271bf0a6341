"""The transformer with a LoRA that is trained in it: layers, norms and checkpointed blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import comfy.model_management
import comfy.ops
import comfy.samplers
import torch
from comfy.cli_args import args as comfy_args
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...training.objective import LoraLayer


class FrozenLinear(torch.autograd.Function):
    """A linear layer of the host whose weight is not trained. Nothing is kept for the backward pass: the weight is
    cast, moved or unpacked anew."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: torch.nn.Module, forward: Callable) -> Tensor:
        ctx.layer = layer
        return forward(x.detach())

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, bias, stream = comfy.ops.cast_bias_weight(ctx.layer, gradient, offloadable=True)
        out = gradient @ weight
        comfy.ops.uncast_bias_weight(ctx.layer, weight, bias, stream)
        return out, None, None


def linear_forward(layer: torch.nn.Module, forward: Callable, lora: LoraLayer | None, x: Tensor) -> Tensor:
    out = FrozenLinear.apply(x, layer, forward)
    return out + lora(x) if lora is not None and lora.enabled else out


def first_forward(layer: torch.nn.Module, forward: Callable, x: Tensor) -> Tensor:
    """For the layer of the noisy latent, which has gradients where several steps are made: the blocks add to its output
    in place."""
    return FrozenLinear.apply(x, layer, forward).clone()


def norm_forward(norm: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    # The host's weights are inference tensors, which autograd cannot keep.
    out = torch.nn.functional.rms_norm(x, norm.normalized_shape, weight.clone(), norm.eps)
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return out


def copying_forward(forward: Callable, x: Tensor) -> Tensor:
    """For layer norms: the blocks add to their input in place, of which autograd needs the earlier values."""
    return forward(x.clone())


def checkpointed_forward(forward: Callable, *args, **kwargs):
    """A block that is run again for its gradients. It gets copies of its tokens, to which it adds in place; they
    themselves wait in main memory."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    streams = {name: kwargs.pop(name) for name in ("img", "txt") if name in kwargs}
    names, unnamed = tuple(streams), len(args)

    # It must not hold on to the tokens: only what is handed over by position is moved.
    def run(*tokens):
        copies = [part.clone() for part in tokens]
        return forward(*copies[:unnamed], **dict(zip(names, copies[unnamed:])), **kwargs)

    tokens = (*args, *streams.values())
    with torch.autograd.graph.save_on_cpu(pin_memory=tokens[0].is_cuda and not comfy_args.disable_pinned_memory):
        return checkpoint(run, *tokens, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def adapted(transformer: torch.nn.Module, layers: dict[str, LoraLayer], checkpointing: bool = True) -> Iterator[None]:
    """While this is open, the layers add their change to the transformer, with and without gradients, and gradients
    pass through all of its blocks.

    The model has to be loaded. Its weights are not touched; every model that shares them is changed for the time being.
    """
    blocks = [*transformer.double_blocks, *transformer.single_blocks]
    loras = {transformer.get_submodule(name): lora for name, lora in layers.items()}
    changed = {}
    for module in (module for part in (*blocks, transformer.final_layer) for module in part.modules()):
        if hasattr(module, "in_features"):
            changed[module] = partial(linear_forward, module, module.forward, loras.get(module))
        elif isinstance(module, torch.nn.RMSNorm):
            changed[module] = partial(norm_forward, module)
        elif isinstance(module, torch.nn.LayerNorm):
            changed[module] = partial(copying_forward, module.forward)
    changed[transformer.img_in] = partial(first_forward, transformer.img_in, transformer.img_in.forward)
    if checkpointing:
        changed |= {block: partial(checkpointed_forward, block.forward) for block in blocks}
    # The host's own bypass puts a forward into the instance, too.
    earlier = {module: module.__dict__["forward"] for module in changed if "forward" in module.__dict__}
    try:
        for module, forward in changed.items():
            module.forward = forward
        yield
    finally:
        for module in changed:
            del module.forward
        for module, forward in earlier.items():
            module.forward = forward


@contextmanager
def switched_off(layers: dict[str, LoraLayer]) -> Iterator[None]:
    """While this is open, the layers change nothing in the transformer that they are in."""
    for layer in layers.values():
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enabled = True


def linear_shapes(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the transformer's linear layers by name."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if hasattr(module, "in_features")
    }
