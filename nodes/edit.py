from comfy_api.latest import io

from ..step1x_core.host.prompts.encoding import add_references, decode_edit, encode_edit
from .widgets import check_widgets

CATEGORY = "model/conditioning/step1x"
# More than a few are too much for the model, and for most graphics cards.
MAX_REFERENCES = 8


class Step1XEditEncode(io.ComfyNode):
    """Shows picture and instruction to the language model and the picture to the VAE. No stock node scales the picture
    as the official code does or gives it to both prompts."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditEncode",
            display_name="Step1X-Edit Encode",
            category=CATEGORY,
            description="Encodes a picture and an editing instruction. The outputs go to 'Step1X-Edit Sampler', KSampler or any other sampler.",
            search_aliases=["step1x", "image edit", "edit instruction", "text encode", "reference image"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from 'Load Step1X-Edit MLLM'."),
                io.Vae.Input("vae", tooltip="The FLUX VAE: the stock 'Load VAE' with ae.safetensors, or the VAE output of 'Load Step1X-Edit Model' for a diffusers folder."),
                io.Image.Input("image", tooltip="The picture to edit, of any size. A batch is edited picture by picture with the same instruction."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, placeholder="replace the modern sofa with a vintage leather couch",
                                tooltip="What to change, in English or Chinese. Put words that are to appear in the picture in double quotes."),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default="", advanced=True,
                                tooltip="What guidance steers away from. The model was trained with an empty one for edits."),
                io.Int.Input("size_level", default=1024, min=64, max=2048, step=16,
                             tooltip="The picture is edited at about this many pixels squared, keeping its aspect ratio. 1024 gives the best quality; 512 is much faster."),
                io.Latent.Input("latent", optional=True,
                                tooltip="To edit a result further without loss: the latent it was decoded from. The picture is then read by the language model only."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent", tooltip="The picture's latent at working size; the sampler's starting point."),
            ],
        )

    @classmethod
    def execute(cls, clip, vae, image, prompt, negative_prompt, size_level, latent=None) -> io.NodeOutput:
        check_widgets(cls, prompt=prompt, negative_prompt=negative_prompt, size_level=size_level)
        return io.NodeOutput(*encode_edit(clip, vae, image, prompt, negative_prompt, size_level, latent))


class Step1XEditReferences(io.ComfyNode):
    """Further reference pictures. The stock 'ReferenceLatent' adds one to one conditioning; it needs two for each picture, and scaling and encoding before them."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditReferences",
            display_name="Step1X-Edit References",
            category=CATEGORY,
            description="Experimental: shows the model further pictures beside the one that is edited. It was trained with a single picture.",
            search_aliases=["step1x", "reference image", "several images", "multiple references"],
            is_experimental=True,
            inputs=[
                io.Conditioning.Input("positive", tooltip="The instruction, from 'Step1X-Edit Encode'."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, from 'Step1X-Edit Encode'."),
                io.Vae.Input("vae", tooltip="The VAE that encoded the picture."),
                io.Autogrow.Input("images", template=io.Autogrow.TemplatePrefix(io.Image.Input("image"), prefix="image", min=1, max=MAX_REFERENCES),
                                  tooltip="Further pictures, of any size. Each makes sampling slower, about as much as the first."),
                io.Int.Input("size_level", default=512, min=64, max=2048, step=16, tooltip="Each further picture is shown at about this many pixels squared."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, vae, images, size_level) -> io.NodeOutput:
        check_widgets(cls, size_level=size_level)
        return io.NodeOutput(*add_references([positive, negative], vae, list(images.values()), size_level))


class Step1XEditDecode(io.ComfyNode):
    """The stock 'VAE Decode' followed by the official return to the source picture's size."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditDecode",
            display_name="Step1X-Edit Decode",
            category=CATEGORY,
            description="Decodes the result and brings it to the size of the source picture.",
            search_aliases=["step1x", "vae decode", "restore size"],
            inputs=[
                io.Latent.Input("samples", tooltip="The sampled latent."),
                io.Vae.Input("vae", tooltip="The VAE that encoded the picture."),
                io.Image.Input("source", optional=True,
                               tooltip="The picture you edited: the result gets exactly its size. Leave it unconnected to keep the working size."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, vae, source=None) -> io.NodeOutput:
        return io.NodeOutput(decode_edit(vae, samples, source))
