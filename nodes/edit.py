from comfy_api.latest import io

from ..step1x_core.editing.unedited import KEEP, OFF
from ..step1x_core.host.editing.unedited import decode_kept
from ..step1x_core.host.prompts.encoding import add_references, decode_edit, encode_edit
from ..step1x_core.host.prompts.tiling import AUTO, TILING
from ..step1x_core.host.sampling.few_steps import reads_negative
from ..step1x_core.host.sampling.sampler import check_model, with_norm_limiter
from ..step1x_core.host.status import show_status
from .categories import EDIT_ALIASES, MAIN
from .widgets import check_widgets, negative_prompt_input, size_level_input

# More than a few are too much for the model, and for most graphics cards.
MAX_REFERENCES = 8
REFERENCE_SIZE = 512


class Step1XEditEncode(io.ComfyNode):
    """Shows picture and instruction to the language model and the picture to the VAE. No stock node scales the picture
    as the official code does or gives it to both prompts."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditEncode",
            display_name="Step1X-Edit Encode",
            category=MAIN,
            description="Encodes a picture and an editing instruction. The outputs go to 'Step1X-Edit Sampler', "
                        "KSampler or any other sampler.",
            search_aliases=["step1x", *EDIT_ALIASES, "text encode", "reference image", "several images"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from 'Load Step1X-Edit MLLM'."),
                io.Vae.Input(
                    "vae",
                    tooltip="The FLUX VAE: the stock 'Load VAE' with ae.safetensors, or the VAE output of 'Load "
                            "Step1X-Edit Model' for a diffusers folder.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="The picture to edit, of any size. A batch is edited picture by picture with the same "
                            "instruction.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="replace the modern sofa with a vintage leather couch\n把现代沙发换成复古皮沙发",
                    tooltip="What to change, in English or Chinese. Put words that are to appear in the picture in "
                            "double quotes.",
                ),
                negative_prompt_input(),
                size_level_input("The picture is edited at about this many pixels squared, keeping its aspect ratio. 1024 gives the best quality; 512 is much faster."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="To edit a result further without loss: the latent it was decoded from. The picture is "
                            "then read by the language model only.",
                ),
                io.Autogrow.Input(
                    "references",
                    optional=True,
                    template=io.Autogrow.TemplatePrefix(
                        io.Image.Input("reference"), prefix="reference", min=0, max=MAX_REFERENCES
                    ),
                    tooltip="Experimental: further images that only the image model sees, not the language model. No "
                    "version was trained with more than one image, so they may be ignored or blended into the whole "
                    "result. To put an object of one image into another, use the workflow step1x_compose. Each slows "
                    "sampling down.",
                ),
                io.Int.Input(
                    "reference_size",
                    default=REFERENCE_SIZE,
                    min=64,
                    max=2048,
                    step=16,
                    optional=True,
                    advanced=True,
                    tooltip="Each reference is scaled to about this many pixels squared. Larger shows more detail but "
                            "costs time and VRAM.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For few-step LoRAs: the model that will be sampled. If its default CFG is 1, "
                    "the negative prompt is not encoded, which saves time. Leave it unconnected "
                    "to sample at another CFG.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(
                    display_name="latent", tooltip="The picture's latent at working size; the sampler's starting point."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, vae, image, prompt, negative_prompt, size_level, latent=None, references=None,
                reference_size=REFERENCE_SIZE, model=None) -> io.NodeOutput:
        check_widgets(
            cls, prompt=prompt, negative_prompt=negative_prompt, size_level=size_level, reference_size=reference_size
        )
        with_negative = model is None or cls.is_read(model)
        positive, negative, latent = encode_edit(clip, vae, image, prompt, negative_prompt, size_level, latent,
                                                 with_negative=with_negative)
        if references:
            positive, negative = add_references([positive, negative], vae, list(references.values()), reference_size)
        return io.NodeOutput(positive, negative, latent)

    @classmethod
    def is_read(cls, model) -> bool:
        """Return whether sampling with the model's defaults reads the negative prompt; shows it if not."""
        check_model(model)
        if reads_negative(with_norm_limiter(model), 0.0):
            return True
        show_status("negative prompt not encoded (the model's default is CFG 1)")
        return False


class Step1XEditDecode(io.ComfyNode):
    """The stock 'VAE Decode', tiled when memory is short, followed by the official return to the source image's size.
    No stock node finds out what an edit changed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditDecode",
            display_name="Step1X-Edit Decode",
            category=MAIN,
            description="Decodes the result and resizes it to the size of the source image. keep_unedited takes the "
                        "source's own pixels wherever the edit changed nothing.",
            search_aliases=["step1x", *EDIT_ALIASES, "vae decode", "vae decode tiled", "restore size", "keep unedited",
                            "preserve background", "difference mask"],
            inputs=[
                io.Latent.Input("samples", tooltip="The sampled latent."),
                io.Vae.Input("vae", tooltip="The VAE that encoded the picture."),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="The picture you edited: the result gets exactly its size, and with keep_unedited its "
                            "unedited area. Leave it unconnected to keep the working size.",
                ),
                io.Combo.Input(
                    "tiling",
                    options=list(TILING),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="auto decodes in tiles when memory is short, on always does. off decodes in one piece "
                            "unless ComfyUI runs out of memory. "
                    "Tiles need less VRAM but take longer.",
                ),
                io.Combo.Input(
                    "keep_unedited",
                    options=list(KEEP),
                    default=OFF,
                    optional=True,
                    tooltip="on finds what the edit changed and takes the source's pixels everywhere else, unchanged. "
                            "'colours matched' also removes a colour shift of the whole image from the edited area. "
                            "Edits of the whole image are left as they are.",
                ),
            ],
            outputs=[
                io.Image.Output(),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="What keep_unedited took from the edit; black where the source was kept. All white when "
                            "it is off or the whole image was edited.",
                ),
                io.Float.Output(
                    display_name="share", tooltip="The share of the image that the mask covers, 0 to 1."
                ),
            ],
        )

    @classmethod
    def execute(cls, samples, vae, source=None, tiling=AUTO, keep_unedited=OFF) -> io.NodeOutput:
        check_widgets(cls, tiling=tiling, keep_unedited=keep_unedited)
        if keep_unedited == OFF:
            picture = decode_edit(vae, samples, source, tiling)
            return io.NodeOutput(picture, picture.new_ones(picture.shape[:3]), 1.0)
        return io.NodeOutput(*decode_kept(vae, samples, source, tiling, keep_unedited))
