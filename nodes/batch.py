from comfy_api.latest import io

from ..step1x_core.editing.batches import ALL, PAIRS, lay_out
from ..step1x_core.errors import Step1XError
from ..step1x_core.host.editing.batch import edit_batch
from ..step1x_core.host.reasoning.rounds import failures
from ..step1x_core.host.sampling.sampler import SAMPLERS
from .categories import MAIN
from .widgets import cfg_input, check_widgets, negative_prompt_input, seed_input, size_level_input, steps_input

# What may come as a list; of everything else there is one.
LISTS = ("images", "prompts", "seed")


class Step1XEditBatchImages(io.ComfyNode):
    """Many edits in one node. The other nodes take lists, too, but there one bad picture ends everything, and the
    models take turns in memory."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditBatchImages",
            display_name="Step1X-Edit Batch Images",
            category=MAIN,
            description="Edits many pictures of any sizes, or one picture in many ways. An edit that fails is reported "
                        "and the others come out.",
            search_aliases=["batch edit", "bulk edit", "image list", "many images", "variants"],
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model from 'Load Step1X-Edit Model', with any LoRA or model patch."
                ),
                io.Clip.Input("clip", tooltip="The text encoder from 'Load Step1X-Edit MLLM'."),
                io.Vae.Input(
                    "vae",
                    tooltip="The FLUX VAE: the stock 'Load VAE' with ae.safetensors, or the VAE output of 'Load "
                            "Step1X-Edit Model' for a diffusers folder.",
                ),
                io.Image.Input(
                    "images",
                    tooltip="The pictures: one, a batch, or a list with pictures of different sizes, as the stock "
                            "'Create List' makes it.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="make the jacket red\n把外套换成绿色",
                    tooltip="What to change: one instruction a line. Lists can be connected, too.",
                ),
                io.Combo.Input(
                    "combine",
                    options=[PAIRS, ALL],
                    default=PAIRS,
                    tooltip="pairs: the first instruction on the first picture and so on; a single one goes with all. "
                            "all: every instruction on every picture.",
                ),
                negative_prompt_input(),
                size_level_input("Each picture is edited at about this many pixels squared, keeping its aspect ratio, and comes out at its own size."),
                seed_input("The seed of the first edit; each further one takes the next number. Connect a list to choose them all."),
                steps_input(),
                cfg_input(),
                io.Combo.Input(
                    "sampler_name",
                    options=SAMPLERS,
                    default="euler",
                    advanced=True,
                    tooltip="The official code uses euler.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="The edited pictures as a list, each at the size of its source.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Each edit with picture, seed and instruction, and for those that failed the reason.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return failures(cls.hidden.unique_id)

    @classmethod
    def execute(cls, images, prompts, seed, combine, **settings) -> io.NodeOutput:
        for name, entries in {"combine": combine, **settings}.items():
            if len(entries) != 1:
                raise Step1XError(
                    f"Input '{name}' is a list of {len(entries)}. Only {', '.join(LISTS)} may be lists; connect a single one."
                )
        for text in prompts:
            check_widgets(cls, prompts=text)
        for number in seed:
            check_widgets(cls, seed=number)
        check_widgets(
            cls,
            combine=combine[0],
            **{name: settings[name][0] for name in ("negative_prompt", "size_level", "steps", "cfg", "sampler_name")},
        )
        items = lay_out(images, prompts, seed, combine[0])
        return io.NodeOutput(
            *edit_batch(cls.hidden.unique_id, items=items, **{name: entries[0] for name, entries in settings.items()})
        )
