"""Attention on e4m3 queries, keys and values, through NVIDIA's package nvidia-cudnn-frontend (docs/performance.md)."""

import functools
import importlib.util

import torch
from torch import Tensor

from ...errors import Step1XError
from ..network.attention import cudnn_is_fastest
from ..network.blocks import FP8_ATTENTION, kernels_on

# By what the softmax's weights, which are 0 to 1, are multiplied before they are rounded to e4m3, which holds up to
# 448.
WEIGHTS_SCALE = 256.0

NO_CARD = "no data-centre GPU with Triton and ComfyUI's default attention"
NO_PACKAGE = "no nvidia-cudnn-frontend"


@functools.cache
def handle_for(device: torch.device):
    """cuDNN's handle of a device."""
    import cudnn

    return cudnn.create_handle()


class Plan:
    """cuDNN's attention for tensors of one layout: shape and stride each of q [B, H, S, D], k and v [B, H, K, D], and
    the result out [B, H, S, D]."""

    def __init__(self, device: torch.device, q: tuple, k: tuple, v: tuple, out: tuple):
        import cudnn

        self.handle = handle_for(device)
        self.set_stream = cudnn.set_stream
        float32, e4m3 = cudnn.data_type.FLOAT, cudnn.data_type.FP8_E4M3
        self.graph = cudnn.pygraph(
            io_data_type=e4m3, intermediate_data_type=float32, compute_data_type=float32, handle=self.handle
        )
        self.inputs = [
            self.graph.tensor(name=name, dim=list(shape), stride=list(stride), data_type=e4m3)
            for name, (shape, stride) in zip("qkv", (q, k, v))
        ]
        scalars = {
            "descale_q": 1.0,
            "descale_k": 1.0,
            "descale_v": 1.0,
            "descale_s": 1 / WEIGHTS_SCALE,
            "scale_s": WEIGHTS_SCALE,
            "scale_o": 1.0,
        }
        one = {"dim": [1] * 4, "stride": [1] * 4, "data_type": float32}
        nodes = {name: self.graph.tensor(name=name, **one) for name in scalars}
        self.out, _, *maxima = self.graph.sdpa_fp8(
            **dict(zip("qkv", self.inputs)), **nodes, attn_scale=q[0][-1] ** -0.5, generate_stats=False
        )
        self.out.set_output(True).set_dim(list(out[0])).set_stride(list(out[1])).set_data_type(e4m3)
        for node in maxima:
            node.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(float32)
        self.constants = {node: torch.full((1, 1, 1, 1), scalars[name], device=device) for name, node in nodes.items()}
        self.constants |= {node: torch.empty((1, 1, 1, 1), device=device) for node in maxima}
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A])
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace_size = max(1, self.graph.get_workspace_size())

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        self.set_stream(handle=self.handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
        workspace = torch.empty(self.workspace_size, dtype=torch.uint8, device=q.device)
        self.graph.execute(
            {**dict(zip(self.inputs, (q, k, v))), self.out: out, **self.constants}, workspace, handle=self.handle
        )


# Two, for the last block and the others, for each size of picture, number of prompts at a time and length of the text.
@functools.lru_cache(maxsize=16)
def plan_for(device: torch.device, *layouts: tuple) -> Plan:
    return Plan(device, *layouts)


def attend_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, S, H, D], k and v [B, K, H, D], all e4m3 -> e4m3 [B, S, H * D]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors = [x.transpose(1, 2) for x in (q, k, v, out)]
    with torch.cuda.device(q.device):
        plan_for(q.device, *((tuple(x.shape), x.stride()) for x in tensors)).run(*tensors)
    return out.flatten(2)


def missing_for_fp8(device: torch.device) -> str | None:
    """What keeps fp8 attention from running on this device, in a few words; None if nothing does."""
    if not cudnn_is_fastest(device) or kernels_on(device) is None:
        return NO_CARD
    return NO_PACKAGE if importlib.util.find_spec("cudnn") is None else None


def set_fp8_attention(model):
    """A clone of a Step1X-Edit model whose blocks attend in e4m3. Raises Step1XError where that cannot run."""
    missing = missing_for_fp8(model.load_device)
    if missing == NO_CARD:
        raise Step1XError(
            "The fp8 attention of 'Step1X-Edit Speed' needs an NVIDIA data-centre GPU (H100, H200, B200 or "
            "B300) with Triton, and ComfyUI started without an option that chooses another attention. Set "
            "attention to exact."
        )
    if missing:
        raise Step1XError(
            "The fp8 attention of 'Step1X-Edit Speed' needs NVIDIA's package nvidia-cudnn-frontend. Install "
            "it with the Python that starts ComfyUI: python -m pip install nvidia-cudnn-frontend; or set "
            "attention to exact."
        )
    model = model.clone()
    model.model_options["transformer_options"][FP8_ATTENTION] = attend_fp8
    return model
