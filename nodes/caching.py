from comfy_api.latest import io

from ..step1x_core.host.sampling.sampler import check_model
from ..step1x_core.host.speed.teacache import apply_teacache
from ..step1x_core.speed.teacache import DEFAULT_THRESHOLD
from .categories import MAIN
from .widgets import check_widgets


class Step1XEditTeaCache(io.ComfyNode):
    """TeaCache exactly as the official code has it. The stock 'EasyCache' works as well and decides differently."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditTeaCache",
            display_name="Step1X-Edit TeaCache",
            category=MAIN,
            description="Skips the transformer's blocks in steps whose input hardly changed: faster, with a small change of the picture.",
            search_aliases=["teacache", "cache", "speed"],
            inputs=[
                io.Model.Input("model", tooltip="A Step1X-Edit model."),
                io.Float.Input("threshold", default=DEFAULT_THRESHOLD, min=0.0, max=2.0, step=0.05,
                               tooltip="How much change may accumulate before the blocks run again: higher is faster and less exact. "
                                       "The official default is 0.2; below 0.18 nothing is ever skipped."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, threshold) -> io.NodeOutput:
        check_widgets(cls, threshold=threshold)
        check_model(model)
        return io.NodeOutput(apply_teacache(model, threshold))
