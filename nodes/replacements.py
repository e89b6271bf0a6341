"""Offers to replace the nodes of earlier Step1X-Edit packs, so that their workflows can go on with ours.

Their generate nodes become 'Step1X-Edit Reflection Loop' without thinking and reflection: picture and instruction in,
picture out. It needs a text encoder and a VAE beside the model, which the person connects; a replacement cannot add
nodes. Switches for device, precision and offload are dropped: the host sees to that.
"""

from comfy_api.latest import ComfyAPI, io

from .earlier import own_replacements

LOADER, EDIT = "Step1XEditLoader", "Step1XEditReflectionLoop"
# The editor saves widgets by position, and one more behind each seed.
SEED = ["seed", "control_after_generate"]

# Old node id: its widgets in their order, as far as they are read.
LOADERS = {
    "Step1XEditModelLoader": ["diffusion_model"],
    "REDStep1XEditModelLoader": ["diffusion_model"],
    "Step1XEditTeaCacheModelLoader": ["diffusion_model"],
}
# Old node id: its widgets, and the names of its model (None where it loads its own) and picture.
EDITS = {
    "Step-1XEditNode": (["prompt", *SEED, "cfg", "size_level", "num_steps"], None, "image"),
    "RunningHub_Step1XEdit": (["prompt", "num_steps", "cfg_guidance", "size_level", *SEED], None, "ref_image"),
    "Step1XEditGenerate": (
        ["prompt", "negative_prompt", "num_steps", "cfg_guidance", *SEED, "size_level"],
        "model_bundle",
        "input_image",
    ),
    "REDStep1XEditGenerate": (
        ["prompt", "negative_prompt", "num_steps", "cfg_guidance", *SEED, "size_level"],
        "model_bundle",
        "input_image",
    ),
    "Step1XEditTeaCacheGenerate": (
        ["prompt", "negative_prompt", "num_steps", "cfg_guidance", *SEED, "size_level"],
        "model",
        "input_image",
    ),
}
RENAMED = {"num_steps": "steps", "cfg_guidance": "cfg"}


def replace(old: str, new: str, widgets: list[str], mapped: dict[str, str], values: dict) -> io.NodeReplace:
    """mapped: new input by old one. values: what inputs without a counterpart are set to; the others keep what they
    have."""
    inputs = [{"new_id": new_id, "old_id": old_id} for old_id, new_id in mapped.items()]
    inputs += [{"new_id": name, "set_value": value} for name, value in values.items()]
    return io.NodeReplace(
        new_node_id=new,
        old_node_id=old,
        old_widget_ids=widgets,
        input_mapping=inputs,
        output_mapping=[{"old_idx": 0, "new_idx": 0}],
    )


def replacements() -> list[io.NodeReplace]:
    out = [
        replace(old, LOADER, widgets, {"diffusion_model": "unet_name"}, {"version": "auto", "weight_dtype": "default"})
        for old, widgets in LOADERS.items()
    ]
    for old, (widgets, model, image) in EDITS.items():
        mapped = {} if model is None else {model: "model"}
        # The widget behind the seed is none of the node's inputs.
        mapped |= {image: "image"} | {name: RENAMED.get(name, name) for name in widgets if name != SEED[1]}
        values = {"think": False, "reflect": False, "rounds": 1, "sampler_name": "euler"}
        if "negative_prompt" not in widgets:
            values["negative_prompt"] = ""
        out.append(replace(old, EDIT, widgets, mapped, values))
    return out


async def register_replacements() -> None:
    for replacement in (*replacements(), *own_replacements()):
        await ComfyAPI().node_replacement.register(replacement)
