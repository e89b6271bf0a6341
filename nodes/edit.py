from comfy_api.latest import io

from ..step1x_core.host.encoding import decode_edit, encode_edit

CATEGORY = "model/conditioning/step1x"


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
                io.Vae.Input("vae", tooltip="The FLUX VAE (ae.safetensors), from the stock 'Load VAE'."),
                io.Image.Input("image", tooltip="The picture to edit, of any size. A batch is edited picture by picture with the same instruction."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, placeholder="replace the modern sofa with a vintage leather couch",
                                tooltip="What to change, in English or Chinese. Put words that are to appear in the picture in double quotes."),
                io.String.Input("negative_prompt", multiline=True, dynamic_prompts=True, default="", advanced=True,
                                tooltip="What guidance steers away from. The model was trained with an empty one for edits."),
                io.Int.Input("size_level", default=1024, min=64, max=2048, step=16,
                             tooltip="The picture is edited at about this many pixels squared, keeping its aspect ratio. 1024 gives the best quality; 512 is much faster."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent", tooltip="The picture's latent at working size; the sampler's starting point."),
            ],
        )

    @classmethod
    def execute(cls, clip, vae, image, prompt, negative_prompt, size_level) -> io.NodeOutput:
        return io.NodeOutput(*encode_edit(clip, vae, image, prompt, negative_prompt, size_level))


class Step1XDecode(io.ComfyNode):
    """The stock 'VAE Decode' followed by the official return to the source picture's size."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XDecode",
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
