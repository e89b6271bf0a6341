import folder_paths
import torch
from comfy_api.latest import io

from ..step1x_core.host.checkpoints.folders import offered, resolve
from ..step1x_core.host.checkpoints.loading import load_model, load_own_vae, load_text_encoder
from ..step1x_core.host.checkpoints.lora import apply_lora_file
from ..step1x_core.host.sampling.sampler import check_model
from ..step1x_core.versions import LAYOUTS, VERSIONS
from .categories import EDIT_ALIASES, MAIN
from .widgets import check_widgets

WEIGHT_DTYPES = {
    "default": {},
    "fp8_scaled": {"quantise": "fp8"},
    "fp8_paired": {"quantise": "fp8", "paired": True},
    "int8": {"quantise": "int8"},
    "int4": {"quantise": "int4"},
    "fp8_e4m3fn": {"model_options": {"dtype": torch.float8_e4m3fn}},
    "fp8_e4m3fn_fast": {"model_options": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}},
    "fp8_e5m2": {"model_options": {"dtype": torch.float8_e5m2}},
}


class Step1XEditLoader(io.ComfyNode):
    """Loads a Step1X-Edit model. Unlike the stock 'Load Diffusion Model' it also opens diffusers folders, lets you set
    the version, checks that the file is complete, and switches on the official guidance."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditLoader",
            display_name="Load Step1X-Edit Model",
            category=MAIN,
            description="Loads a Step1X-Edit model: a single file (original, fp8 or scaled fp8) or a diffusers folder.",
            search_aliases=["step1x", *EDIT_ALIASES, "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=offered("diffusion_models", "transformer"),
                    tooltip="A safetensors or GGUF file in models/diffusion_models, or a diffusers folder there or in "
                            "models/diffusers, up to three levels deep (shown with a slash). miniature/ is this pack's own "
                            "tiny model of drawn shapes, for a first try.",
                ),
                io.Combo.Input(
                    "version",
                    options=["auto", *VERSIONS],
                    default="auto",
                    tooltip="auto reads the version off the tensors, the repository's class or the file's name. Choose "
                            "one for a renamed or converted file "
                    "that tells none of it: v1.1, v1.2-preview and RealRestorer can be alike to the last tensor.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Precision the weights are kept in. default keeps the file's. fp8_scaled needs 16 GB in "
                    "place of 25 and is the fastest on GPUs with fp8 tensor cores (RTX 40 series and later), at a "
                    "small loss of quality. fp8_paired rounds both prompts' inputs together, which loses less; it was "
                    "not timed. int8 needs the same memory, has less error and is for the RTX 20 and 30 "
                    "series too. int4 needs 9 GB and has more error. Both need a recent ComfyUI. The others are "
                    "ComfyUI's own fp8 without scales.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, with norm-limited guidance switched on."),
                io.Vae.Output(
                    tooltip="The VAE of a diffusers folder that has one. Empty for a single file: use the stock 'Load "
                            "VAE'."
                ),
            ],
        )

    @classmethod
    def execute(cls, unet_name, version, weight_dtype) -> io.NodeOutput:
        check_widgets(cls, version=version, weight_dtype=weight_dtype)
        path = resolve(unet_name, "diffusion_models", "transformer")
        loaded = load_model(path, None if version == "auto" else version, **WEIGHT_DTYPES[weight_dtype])
        return io.NodeOutput(loaded, load_own_vae(path))


class Step1XEditMLLM(io.ComfyNode):
    """Loads Qwen2.5-VL-7B as Step1X-Edit's text encoder. The stock 'Load CLIP' knows the file but not this model's
    prompt layout."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditMLLM",
            display_name="Load Step1X-Edit MLLM",
            category=MAIN,
            description="Loads Qwen2.5-VL-7B-Instruct, which reads the instruction and looks at the picture. The file "
                        "that Qwen-Image uses fits, bf16 or scaled fp8.",
            search_aliases=["step1x", *EDIT_ALIASES, "qwen2.5-vl", "qwen_2.5_vl_7b", "text encoder", "load clip"],
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=offered("text_encoders", "text_encoder"),
                    tooltip="A file in models/text_encoders such as qwen_2.5_vl_7b.safetensors, a GGUF file with its "
                            "mmproj file beside it, or a Hugging Face folder (shown with a slash). miniature/ belongs to the "
                            "model of that name.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    advanced=True,
                    tooltip="cpu keeps the text encoder off the graphics card: slower, but it needs no VRAM.",
                ),
                io.Combo.Input(
                    "version",
                    options=["auto", *LAYOUTS],
                    default="auto",
                    optional=True,
                    tooltip="How the instruction is laid out: v1.1 for Step1X-Edit v1.0 and v1.1, v1.2 for v1.2 and "
                            "its preview. "
                    "auto follows the repository a folder belongs to and takes v1.1 for a single file.",
                ),
            ],
            outputs=[
                io.Clip.Output(
                    tooltip="Text encoder for 'Step1X-Edit Encode'. For text to image it also works with the stock "
                            "'CLIP Text Encode'."
                )
            ],
        )

    @classmethod
    def execute(cls, clip_name, device, version="auto") -> io.NodeOutput:
        check_widgets(cls, device=device, version=version)
        path = resolve(clip_name, "text_encoders", "text_encoder")
        options = {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")} if device == "cpu" else {}
        return io.NodeOutput(load_text_encoder(path, None if version == "auto" else version, options))


# The first entry of the list of LoRAs: a workflow that is opened without a LoRA then names no file that is missing.
NO_LORA = "none"


class Step1XEditLoadLora(io.ComfyNode):
    """The stock 'Load LoRA (Model)' works, too. This one knows more names of layers, follows the official merging rule
    for an alpha of 0, and refuses a file in which nothing fits the model, where the stock node goes on without it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditLoadLora",
            display_name="Load Step1X-Edit LoRA",
            category=MAIN,
            description="Applies a LoRA to a Step1X-Edit model. Several can be chained. The steps and CFG of a "
                        "few-step "
            "LoRA become the sampler's defaults.",
            search_aliases=["lora", "load lora", "lightning", "few steps"],
            inputs=[
                io.Model.Input("model", tooltip="A Step1X-Edit model."),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    tooltip="A file in models/loras, in the layout of kohya, PEFT, diffusers, DiffSynth, LyCORIS or "
                            "SimpleTuner. "
                    "none leaves the model as it is. The stock 'Load LoRA' does not read the steps and CFG of a "
                    "few-step LoRA; set them in the sampler there.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly the LoRA acts. The official code uses 1.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, lora_name, strength) -> io.NodeOutput:
        check_widgets(cls, strength=strength)
        check_model(model)
        check_widgets(cls, lora_name=lora_name)
        if lora_name == NO_LORA:
            return io.NodeOutput(model)
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        return io.NodeOutput(apply_lora_file(model, path, strength))
