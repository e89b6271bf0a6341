from comfy_api.latest import io

from ..step1x_core.editing.batches import ALL, PAIRS, TURNS, lay_out, turn_shown
from ..step1x_core.errors import Step1XError
from ..step1x_core.host.editing.batch import edit_batch
from ..step1x_core.host.reasoning.rounds import HOST_KEEPS_RESULTS, failures
from ..step1x_core.host.sampling.sampler import SAMPLERS
from .categories import MAIN
from .turns import edit_in_turns
from .widgets import cfg_input, check_widgets, negative_prompt_input, seed_input, size_level_input, steps_input

# What may come as a list; of everything else there is one.
LISTS = ("images", "prompts", "seed")
MAX_TURNS = 1000


class Step1XEditBatchImages(io.ComfyNode):
    """Many edits in one node. The other nodes take lists, too, but there one bad picture ends everything, and the
    models take turns in memory."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditBatchImages",
            display_name="Step1X-Edit Batch Images",
            category=MAIN,
            description="Edits many images of any size, one image in many ways, or one image step by step. A failed "
                        "edit is reported and does not affect the rest.",
            search_aliases=["batch edit", "bulk edit", "image list", "many images", "variants", "turns",
                            "prompt history", "edit history", "multi-turn", "undo"],
            is_input_list=True,
            # For turns.
            enable_expand=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
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
                    options=[PAIRS, ALL, TURNS],
                    default=PAIRS,
                    tooltip="pairs applies the first instruction to the first image and so on; a single one is used "
                            "for all. all applies every instruction to every image. turns edits one image with each "
                            "instruction in order, each on the result of the one before.",
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
                io.Int.Input(
                    "show_turn",
                    default=0,
                    min=0,
                    max=MAX_TURNS,
                    optional=True,
                    tooltip="Only for combine = turns: the turn whose result is returned. 0 returns the last; a "
                            "smaller number goes back, and turns already run are not sampled again.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="The edited images as a list, each at the size of its source. With turns, the image of "
                            "the turn that is shown.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Image, seed and instruction of each edit, and the reason for each failure.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return failures(cls.hidden.unique_id)

    @classmethod
    def execute(cls, images, prompts, seed, combine, show_turn=(0,), **settings) -> io.NodeOutput:
        for name, entries in {"combine": combine, "show_turn": show_turn, **settings}.items():
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
            show_turn=show_turn[0],
            **{name: settings[name][0] for name in ("negative_prompt", "size_level", "steps", "cfg", "sampler_name")},
        )
        items = lay_out(images, prompts, seed, combine[0])
        if combine[0] == TURNS:
            values = {name: entries[0] for name, entries in settings.items()} | {"images": items[0].picture}
            # Links let the host recognise the turns it has run before. Where it keeps no results they would run the
            # loaders again.
            inputs = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"] if HOST_KEEPS_RESULTS else values
            return edit_in_turns(inputs, values, items, turn_shown(show_turn[0], len(items)))
        return io.NodeOutput(
            *edit_batch(cls.hidden.unique_id, items=items, **{name: entries[0] for name, entries in settings.items()})
        )
