from comfy_api.latest import io

from ..step1x_core.editing.local_edit import cut_out, paste
from .categories import MAIN
from .widgets import check_widgets

STITCH = io.Custom("STEP1X_STITCH")


class Step1XEditCropToMask(io.ComfyNode):
    """Cuts out what is to be edited. The stock 'Crop Image' takes numbers, not a mask, and nothing puts its result
    back."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditCropToMask",
            display_name="Step1X-Edit Crop to Mask",
            category=MAIN,
            description="Cuts the masked part out of a picture, with its surroundings, so that a small part is edited "
                        "at the model's full resolution. "
            "'Step1X-Edit Stitch Crop' puts the result back.",
            search_aliases=["inpaint crop", "crop and stitch", "masked edit", "local edit"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture to edit, of any size. For a batch one crop is made around the masks of all "
                            "pictures.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="What may change, from the mask editor or any other node: the same size as the picture, or "
                            "the same shape. Not empty.",
                ),
                io.Float.Input(
                    "context",
                    default=0.5,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much around the masked part the model sees: on each side this many lengths of its "
                            "longer side. 10 is nearly always the whole picture.",
                ),
                io.Int.Input(
                    "min_size",
                    default=256,
                    min=16,
                    max=8192,
                    step=16,
                    advanced=True,
                    tooltip="Least width and height of the crop, where the picture is as large: a tiny part keeps "
                            "surroundings that the model can read.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The crop. It is the picture to edit, and the source for 'Step1X-Edit Decode'.",
                ),
                io.Mask.Output(
                    display_name="mask", tooltip="The same part of the mask, for the stock 'Set Latent Noise Mask'."
                ),
                STITCH.Output(display_name="stitch", tooltip="For 'Step1X-Edit Stitch Crop'."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, context, min_size) -> io.NodeOutput:
        check_widgets(cls, context=context, min_size=min_size)
        cutout = cut_out(image, mask, context, min_size)
        return io.NodeOutput(cutout.part(image), cutout.part(cutout.mask), cutout)


class Step1XEditStitchCrop(io.ComfyNode):
    """Pastes an edited crop back. The stock 'ImageCompositeMasked' does so without a soft edge, at a place given by
    numbers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditStitchCrop",
            display_name="Step1X-Edit Stitch Crop",
            category=MAIN,
            description="Puts an edited crop back into its picture. Every pixel outside the mask stays exactly as it "
                        "was.",
            search_aliases=["inpaint stitch", "crop and stitch", "paste back", "uncrop"],
            inputs=[
                io.Image.Input(
                    "image", tooltip="The edited crop, of any size. Several versions of one crop give several pictures."
                ),
                STITCH.Input("stitch", tooltip="From the 'Step1X-Edit Crop to Mask' that made the crop."),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=512,
                    tooltip="Width of the soft edge in pixels of the whole picture. It lies inside the mask, so paint "
                            "a little beyond what is to change.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image, stitch, feather) -> io.NodeOutput:
        check_widgets(cls, feather=feather)
        return io.NodeOutput(paste(image, stitch, feather))
