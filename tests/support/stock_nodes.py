"""The host's own nodes, called as the host does, and edits of the shipped miniature model made with them."""

import importlib
import inspect

import comfy.sd
import comfy.utils
import demo_model
import numpy as np
from comfy_api.latest import io

from miniature.scenes import judge, pair_at
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.images import from_uint8, truncate_uint8

STEPS = 8
# Enough for the edit, too; for comparisons that do not depend on the number.
FEW = 4
SEED = 42
SIZE = demo_model.SIZE_LEVEL
# Latents that differ less are the same: whether the two prompts run as one batch changes the last bits.
SAME = 1e-4
# Edits of one picture that the training never saw: a pink square at the left, nothing else.
PAIRS = {kind: pair_at(3, 3, "heldout", kind=kind, language="en") for kind in ("recolour", "add", "background")}
SOURCE = PAIRS["recolour"].source
# Another picture with the very words of the background edit.
SAME_WORDS = pair_at(3, 111, "heldout", kind="background", language="en")

# In an order in which they import one another without a circle.
MODULES = (
    "nodes",
    *(
        f"comfy_extras.nodes_{name}"
        for name in (
            "post_processing",
            "apg",
            "cfg",
            "custom_sampler",
            "differential_diffusion",
            "easycache",
            "edit_model",
            "flux",
            "freelunch",
            "image_compare",
            "latent",
            "mask",
            "model_advanced",
            "model_merging",
            "model_merging_model_specific",
            "multigpu",
            "nag",
            "perpneg",
            "qwen",
            "sag",
            "sd3",
            "slg",
            "tcfg",
            "tomesd",
            "torch_compile",
            "train",
            "upscale_model",
        )
    ),
)
# Modules that came after the oldest host.
NEWER_MODULES = ("comfy_extras.nodes_multigpu",)


def node_classes() -> dict[str, type]:
    classes = {}
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            if name not in NEWER_MODULES:
                raise
            continue
        classes |= getattr(module, "NODE_CLASS_MAPPINGS", {})
        for value in list(vars(module).values()):
            if inspect.isclass(value) and issubclass(value, io.ComfyNode) and value.__module__ == name:
                classes[value.define_schema().node_id] = value
    return classes


NODES = node_classes()


def run(name: str, **inputs) -> tuple:
    """The outputs of a stock node."""
    node = NODES[name]
    if issubclass(node, io.ComfyNode):
        defaults = {entry.id: entry.default for entry in node.define_schema().inputs if getattr(entry, "default", None) is not None}
        return node.execute(**(defaults | inputs)).result
    groups = node.INPUT_TYPES()
    specs = {**groups["required"], **groups.get("optional", {})}
    defaults = {key: spec[1]["default"] for key, spec in specs.items() if len(spec) > 1 and "default" in spec[1]}
    return getattr(node(), node.FUNCTION)(**(defaults | inputs))


def right(kind: str, pixels) -> bool:
    """Whether the edit was made and the rest kept."""
    return judge(PAIRS[kind], pixels).success


def made(kind: str, pixels) -> bool:
    """Whether the edit was made where it belongs, whatever the rest of the picture shows."""
    pair = PAIRS[kind]
    return judge(pair, np.where(pair.region[..., None], pixels, pair.target)).success


def distance(a, b, area=(slice(None), slice(None))) -> float:
    """Mean absolute difference of two uint8 pictures in an area, 0..1."""
    return np.abs(a[area].astype(int) - b[area]).mean().item() / 255


def difference(a: dict, b: dict) -> float:
    """Largest difference of two latents."""
    return (a["samples"] - b["samples"]).abs().max().item()


class Demo:
    def __init__(self):
        self.model = load_model(demo_model.FOLDER / "diffusion_models" / demo_model.MODEL_FILE)
        self.clip = load_text_encoder(demo_model.FOLDER / "text_encoders" / demo_model.MLLM_FILE)
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(demo_model.FOLDER / "vae" / demo_model.VAE_FILE)))
        self.encoded, self.results = {}, {}

    def encode(self, image, instruction: str) -> tuple[list, list, dict]:
        return encode_edit(self.clip, self.vae, image, instruction, "", SIZE)

    def edit(self, kind: str = "recolour") -> tuple[list, list, dict]:
        """positive, negative and latent of one of the `PAIRS`."""
        if kind not in self.encoded:
            self.encoded[kind] = self.encode(from_uint8(SOURCE)[None], PAIRS[kind].instruction)
        return self.encoded[kind]

    def shifted(self, model=None):
        """The model with the schedule of the picture's size, by the stock node."""
        return run("ModelSamplingFlux", model=model or self.model, width=SIZE, height=SIZE)[0]

    def ksampler(self, model=None, positive=None, negative=None, latent=None, kind="recolour", **options) -> dict:
        """The latent that the stock KSampler makes of one of the edits, with anything replaced."""
        encoded = self.edit(kind)
        options = {
            "seed": SEED,
            "steps": STEPS,
            "cfg": demo_model.CFG,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        } | options
        return run(
            "KSampler",
            model=self.shifted(model),
            positive=positive or encoded[0],
            negative=negative or encoded[1],
            latent_image=latent or encoded[2],
            **options,
        )[0]

    def custom(self, guider, sigmas, latent=None, noise=None) -> tuple[dict, dict]:
        """Both outputs of SamplerCustomAdvanced, by default with the noise of `ksampler`."""
        return run(
            "SamplerCustomAdvanced",
            noise=noise or run("RandomNoise", noise_seed=SEED)[0],
            guider=guider,
            sampler=run("KSamplerSelect", sampler_name="euler")[0],
            sigmas=sigmas,
            latent_image=latent or self.edit()[2],
        )

    def sigmas(self, steps: int = STEPS):
        return run("BasicScheduler", model=self.shifted(), scheduler="simple", steps=steps)[0]

    def plain(self, kind: str = "recolour", steps: int = STEPS) -> dict:
        """What KSampler makes of an edit with nothing else in between."""
        if (kind, steps) not in self.results:
            self.results[kind, steps] = self.ksampler(kind=kind, steps=steps)
        return self.results[kind, steps]

    def picture(self, latent: dict, index: int = 0) -> np.ndarray:
        return truncate_uint8(self.vae.decode(latent["samples"][index:index + 1])[0]).numpy()
