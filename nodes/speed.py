from comfy_api.latest import io

from ..step1x_core.host.sampling.sampler import check_model
from ..step1x_core.host.speed.presets import apply_speed, settings_of
from ..step1x_core.speed.presets import ALL_STEPS, BALANCED, EXACT, FAST, REGION, TEACACHE
from ..step1x_core.speed.region import RegionSettings
from ..step1x_core.speed.teacache import DEFAULT_THRESHOLD
from .categories import MAIN
from .widgets import check_widgets


def guided_part() -> list[io.Input]:
    return [
        io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                       tooltip="Guidance starts after this part of the steps. Keep 0: the first steps decide what is "
                               "edited."),
        io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                       tooltip="Guidance ends after this part of the steps. The remaining steps leave the negative "
                               "prompt out and take half the time. 1 guides every step."),
    ]


def attention() -> list[io.Input]:
    return [io.Combo.Input("attention", options=["exact", "fp8", "int8"], default="exact",
                           tooltip="fp8 is faster on an H100, H200, B200 or B300 with the package "
                                   "nvidia-cudnn-frontend. Best with fp8_scaled weights. int8 is ComfyUI's own (0.33.0 "
                                   "or newer), for NVIDIA GPUs from the RTX 20 series on; not timed yet.")]


def threshold() -> list[io.Input]:
    return [io.Float.Input("threshold", default=DEFAULT_THRESHOLD, min=0.0, max=2.0, step=0.05,
                           tooltip="How much change may accumulate before the blocks run again. Higher is faster and "
                                   "less exact. The official default is 0.2; below 0.18 no step is skipped.")]


def region() -> list[io.Input]:
    default = RegionSettings()
    return [
        io.Float.Input("similarity", default=default.similarity, min=-1.0, max=1.0, step=0.01,
                       tooltip="An area counts as edited when its similarity to the source is at most this value. "
                               "Higher includes fainter changes and is slower; 1 computes everything."),
        io.Float.Input("warmup", default=default.warmup, min=0.0, max=1.0, step=0.05,
                       tooltip="Part of the steps, at the start, that compute the whole image. "
                               "The edit has to be recognisable after it."),
        io.Int.Input("refreshes", default=default.refreshes, min=0, max=20,
                     tooltip="Number of later steps that compute the whole image and detect the edited area again."),
        io.Float.Input("reuse", default=default.reuse, min=0.0, max=1.0, step=0.01,
                       tooltip="Skip a step while its predicted relative change is below this value. 0 skips none."),
    ]


class Step1XEditSpeedPreset(io.ComfyNode):
    """Everything that saves work in sampling: presets, and the knobs behind them.

    One level of choices, with what is skipped in the choice itself: combinations that cannot work together cannot be
    chosen, and the editor, which hands on only top-level values when it replaces a node, keeps what an old workflow
    skipped.
    """

    @classmethod
    def define_schema(cls):
        modes = {
            BALANCED: [], FAST: [], EXACT: [],
            TEACACHE: [*threshold(), *attention(), *guided_part()],
            # Region denoising has to see keys and values, which fp8 attention keeps to itself.
            REGION: [*region(), *guided_part()],
            ALL_STEPS: [*attention(), *guided_part()],
        }
        return io.Schema(
            node_id="Step1XEditSpeedPreset",
            display_name="Step1X-Edit Speed",
            category=MAIN,
            description="Makes sampling faster by leaving work out: TeaCache, region denoising, guidance in a part of "
                        "the "
            "steps, fp8 attention. Choose a preset, or a custom mode for the single settings. The log says "
            "what was chosen for this graphics card.",
            search_aliases=["speed", "faster", "teacache", "cache", "region", "guidance interval", "fp8 attention"],
            inputs=[
                io.Model.Input("model", tooltip="A Step1X-Edit model."),
                io.DynamicCombo.Input(
                    "mode",
                    options=[io.DynamicCombo.Option(key, inputs) for key, inputs in modes.items()],
                    tooltip="balanced skips steps that hardly change anything. fast also ends guidance halfway and "
                            "uses "
                    "fp8 attention where the graphics card can. exact leaves nothing out. The custom modes show "
                    "their settings.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with these settings.")],
        )

    @classmethod
    def execute(cls, model, mode=None) -> io.NodeOutput:
        # The host leaves a choice out that it does not know, or that another node hands over.
        check_widgets(cls, mode=mode)
        check_model(model)
        return io.NodeOutput(apply_speed(model, mode["mode"], settings_of(mode)))
