"""Edits in turns: 'Step1X-Edit Batch Images' expanded to the pack's own nodes, one edit on the result of the other.

All turns are laid out at once and only those up to the one that is shown run. The host recognises the turns that it has
run before by their inputs, so a further line costs one edit, and showing an earlier turn costs none. The turns after it
stay in the graph: the host forgets the results of nodes that are no longer there.
"""

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..step1x_core.editing.batches import Item, describe_turns
from ..step1x_core.host.editing.batch import check_parts
from ..step1x_core.host.sampling.few_steps import reads_negative
from ..step1x_core.host.sampling.sampler import with_norm_limiter
from .categories import MAIN
from .loop import add_edit


def edit_in_turns(inputs: dict, values: dict, items: list[Item], shown: int) -> io.NodeOutput:
    """The outputs of the node: the picture of turn `shown` (from 1) as a list of one, and the report.

    inputs: the node's inputs as the graph's nodes take them, links or values. values: the same as values.
    """
    # What would fail later would cost a picture.
    check_parts(*(values[name] for name in ("model", "clip", "vae", "steps", "cfg")))
    only_positive = not reads_negative(with_norm_limiter(values["model"]), values["cfg"])
    graph = GraphBuilder()
    inputs = {**inputs, "image": inputs["images"]}
    picture, latent, pictures = inputs["image"], None, []
    for number, item in enumerate(items, 1):
        picture, latent = add_edit(graph, f"turn_{number}", inputs, picture, item.prompt, item.seed,
                                   only_positive=only_positive, latent=latent)
        pictures.append(picture)
    result = graph.node("Step1XEditTurnResult", "result", image=pictures[shown - 1])
    return io.NodeOutput(result.out(0), describe_turns(items, shown), expand=graph.finalize())


class Step1XEditTurnResult(io.ComfyNode):
    """The host takes what a link of an expanded node brings for the whole list of a list output."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditTurnResult",
            category=MAIN,
            is_dev_only=True,
            description="Part of 'Step1X-Edit Batch Images': the image of one turn as a list.",
            inputs=[io.Image.Input("image")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image) -> io.NodeOutput:
        return io.NodeOutput([image])
