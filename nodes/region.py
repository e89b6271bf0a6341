from comfy_api.latest import io

from ..step1x_core.host.sampling.sampler import check_model
from ..step1x_core.host.speed.region import apply_region
from ..step1x_core.speed.region import RegionSettings
from .categories import MAIN
from .widgets import check_widgets


class Step1XEditRegion(io.ComfyNode):
    """Region-aware denoising: most steps compute only the part of the picture that the edit changes."""

    @classmethod
    def define_schema(cls):
        default = RegionSettings()
        return io.Schema(
            node_id="Step1XEditRegion",
            display_name="Step1X-Edit Region Denoising",
            category=MAIN,
            description="Finds out in the first steps which part of the picture the instruction changes, and computes only that part in most of the others. "
                        "Faster for local edits; takes memory.",
            search_aliases=["regione", "region", "local", "speed"],
            inputs=[
                io.Model.Input("model", tooltip="A Step1X-Edit model."),
                io.Float.Input("similarity", default=default.similarity, min=-1.0, max=1.0, step=0.01,
                               tooltip="A place counts as edited when the predicted picture is no more alike to the source than this. "
                                       "Higher takes in fainter changes and is slower; at 1 everything is computed."),
                io.Float.Input("warmup", default=default.warmup, min=0.0, max=1.0, step=0.05,
                               tooltip="Part of the steps, at the start, that compute everything. After it the edit has to be recognisable."),
                io.Int.Input("refreshes", default=default.refreshes, min=0, max=20,
                             tooltip="Steps in between that compute everything and look anew where the edit is."),
                io.Float.Input("reuse", default=default.reuse, min=0.0, max=1.0, step=0.01,
                               tooltip="A step is left out altogether while the prediction is expected to change less than this part of itself. 0 leaves none out."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, similarity, warmup, refreshes, reuse) -> io.NodeOutput:
        check_widgets(cls, similarity=similarity, warmup=warmup, refreshes=refreshes, reuse=reuse)
        check_model(model)
        return io.NodeOutput(apply_region(model, RegionSettings(similarity, warmup, refreshes, reuse)))
