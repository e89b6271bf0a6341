"""Triton kernels around fp8 products of two prompts of one image, which are rounded as a pair.

The inputs of the two prompts are nearly the same, and CFG multiplies the difference of the results. Rounded apart, each
gets an error of its own, as large as the difference. Here the mean of the two and half their difference are rounded:
the error of the mean is the same for both prompts, that of the difference is in proportion to it. What a product gives
of them is put together again by the kernel that reads it. The batch [B, ...] holds one prompt in its first half, the
other in its second.
"""

import torch
from torch import Tensor

from ..rounding import divided_up, next_power_of_2
from . import kernels
from .kernels import COLUMNS, FP8, HEADS, on_its_card


@on_its_card
def modulate(x: Tensor, shift: Tensor, scale: Tensor, out_scale: Tensor) -> Tensor:
    """As kernels.modulate, with a paired result: e4m3 [B, S, C], the means before the halves of the differences."""
    from .triton_kernels import modulate_pairs_kernel

    batch, tokens, columns = x.shape
    x = x.contiguous()
    out = torch.empty_like(x, dtype=FP8)
    modulate_pairs_kernel[(batch // 2 * tokens,)](
        x,
        shift,
        scale,
        out,
        out_scale,
        tokens,
        columns,
        batch,
        shift.stride(0),
        scale.stride(0),
        1e-6,
        BLOCK=next_power_of_2(columns),
        num_warps=8,
    )
    return out


@on_its_card
def copy_rows(
    x: Tensor, out: Tensor, out_scale: Tensor, bias: Tensor | None = None, x_scale: Tensor | None = None, gelu=False
) -> None:
    """As kernels.copy_rows, with a paired e4m3 result. bias [C]: x is a paired product, and this is added to it."""
    from .triton_kernels import pair_rows_kernel

    batch, tokens, columns = x.shape
    pair_rows_kernel[(batch // 2 * tokens, divided_up(columns, COLUMNS))](
        x,
        out,
        x_scale,
        out_scale,
        bias,
        tokens,
        columns,
        batch,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        BLOCK=COLUMNS,
        SCALED=x_scale is not None,
        GELU=gelu,
        PAIRED=bias is not None,
    )


@on_its_card
def add_gated(x: Tensor, update: Tensor, bias: Tensor, gate: Tensor) -> None:
    """Add (update + bias) * gate to x [B, S, C], whose rows may be strided, in place. update [B, S, C]: a paired
    product."""
    from .triton_kernels import add_gated_pairs_kernel

    batch, tokens, columns = x.shape
    update = update.contiguous()
    add_gated_pairs_kernel[(batch // 2 * tokens, divided_up(columns, COLUMNS))](
        x, update, gate, bias, tokens, columns, batch, x.stride(0), x.stride(1), gate.stride(0), BLOCK=COLUMNS
    )


@on_its_card
def norm_and_rotate(
    qkv: Tensor,
    bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    pe: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_scale: Tensor | None = None,
    text: int = 0,
    repeats: int = 0,
) -> None:
    """As kernels.norm_and_rotate, for a paired product qkv [B, S, 3, H, D] and its bias [3 * H * D]; q, k and v do not
    share its memory."""
    from .triton_kernels import norm_and_rotate_pairs_kernel

    batch, tokens, _, heads, width = qkv.shape
    group = min(HEADS, next_power_of_2(heads))
    norm_and_rotate_pairs_kernel[(tokens + repeats, divided_up(heads, group), batch // 2)](
        qkv,
        bias,
        q_weight,
        k_weight,
        pe,
        q,
        k,
        v,
        v_scale,
        text,
        repeats,
        heads,
        batch,
        *qkv.stride()[:2],
        pe.stride(0) if pe.shape[0] > 1 else 0,
        pe.stride(2),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        1e-6,
        HEADS=group,
        WIDTH=width,
        FP8_OUT=v_scale is not None,
        num_warps=4,
    )


def check_agreement(device: torch.device) -> None:
    """Launch every kernel once on small inputs. Raises RuntimeError if a result differs from that of single prompts,
    and whatever Triton raises if it cannot build one."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    one, (x, product), bias = torch.ones((), device=device), random(2, 2, 4, 64), random(96)
    shift, scale, gate = random(3, 2, 1, 64)
    mean, half = product.float().chunk(2)
    whole = (torch.cat((mean + half, mean - half)) + bias[:64].float()).bfloat16()
    exact, rounded = torch.empty(8, 64, device=device).bfloat16(), torch.empty(8, 64, device=device, dtype=FP8)
    kernels.copy_rows(whole, exact, gelu=True)
    copy_rows(product, rounded, one, bias[:64], gelu=True)
    _check(unpaired(rounded.unflatten(0, (2, 4))), exact.unflatten(0, (2, 4)))
    _check(unpaired(modulate(x, shift, scale, one)), kernels.modulate(x, shift, scale))
    expected, found = x.clone(), x.clone()
    kernels.add_gated(expected, whole, gate)
    add_gated(found, product, bias[:64], gate)
    _check(found, expected)
    qkv, pe, weight = random(2, 4, 96), torch.randn(1, 1, 4, 8, 2, 2, device=device), random(16)
    mean, half = qkv.float().chunk(2)
    whole = (torch.cat((mean + half, mean - half)) + bias.float()).bfloat16()
    results = []
    for product, given, rotate in ((whole, (), kernels.norm_and_rotate), (qkv, (bias,), norm_and_rotate)):
        out = [torch.empty(2, 4, 2, 16, device=device).bfloat16() for _ in range(3)]
        rotate(product.unflatten(-1, (3, 2, 16)), *given, weight, weight, pe, *out)
        results.append(torch.stack(out))
    _check(*results)


def unpaired(x: Tensor) -> Tensor:
    """Return both members of the pairs in x [B, ...], as float32."""
    mean, half = x.float().chunk(2)
    return torch.cat((mean + half, mean - half))


def _check(found: Tensor, expected: Tensor) -> None:
    """Raise RuntimeError for a difference larger than e4m3's rounding."""
    if not (found.float() - expected.float()).norm() <= 0.1 * expected.float().norm():
        raise RuntimeError("a result differs from that for single prompts")
