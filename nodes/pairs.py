"""Training pairs: propose edits, make pairs or take in what other nodes made, judge, filter, look through, save."""

from comfy_api.latest import io

from ..step1x_core.checks import check_kind
from ..step1x_core.errors import Step1XError
from ..step1x_core.host.pairs.making import DIRECTIONS, FORWARD, algorithmic_pairs, journal_state, judge_pairs, propose_edits, record_pairs, save_pairs, show_pairs
from ..step1x_core.pairs.makers import ORDER_KINDS
from ..step1x_core.pairs.propose import PROPOSED, Proposal
from ..step1x_core.pairs.record import KINDS
from ..step1x_core.pairs.review import Thresholds, sift
from .categories import TRAINING
from .widgets import check_widgets

PAIRS = io.Custom("STEP1X_PAIRS")
PROPOSAL = io.Custom("STEP1X_PROPOSAL")
LIMITS = Thresholds()


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=42, min=0, max=0xffffffffffffffff, control_after_generate=True, tooltip=tooltip)


def kinds_input(known: tuple[str, ...]) -> io.String.Input:
    return io.String.Input("kinds", default="", tooltip=f"Only these kinds, with commas between them: {', '.join(known)}. Empty takes all.")


class Step1XEditPairPropose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairPropose",
            display_name="Step1X-Edit Propose Edits",
            category=TRAINING,
            description="Has the language model list what is in a picture, and makes instructions of it in English and Chinese, as lists for the nodes that make the edits.",
            search_aliases=["edit pairs", "propose", "instructions", "caption", "training data"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from 'Load Step1X-Edit MLLM'. Its file needs a language-model head (lm_head)."),
                io.Image.Input("image", tooltip="The picture, exactly one; of a list each in turn."),
                kinds_input(PROPOSED),
                io.Int.Input("count", default=4, min=1, max=64, tooltip="At most so many proposals; the kinds take turns."),
                seed_input("The random seed of answers and wordings: same seed and picture, same proposals."),
            ],
            outputs=[
                PROPOSAL.Output(display_name="proposals", is_output_list=True, tooltip="For 'Step1X-Edit Record Pairs'."),
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The picture, once for each proposal."),
                io.String.Output(display_name="prompts", is_output_list=True, tooltip="The English instructions."),
                io.String.Output(display_name="objects", is_output_list=True, tooltip="What to segment, in English; empty for edits of the whole picture."),
                io.String.Output(display_name="contents", is_output_list=True, tooltip="What to paint there, in English; empty where something is taken away."),
                io.String.Output(display_name="report", tooltip="All instructions in both languages."),
            ],
        )

    @classmethod
    def execute(cls, clip, image, kinds, count, seed) -> io.NodeOutput:
        check_widgets(cls, kinds=kinds, count=count, seed=seed)
        proposals, report = propose_edits(clip, image, kinds, count, seed)
        texts = ([getattr(proposal, name) for proposal in proposals] for name in ("english", "thing", "content"))
        return io.NodeOutput(proposals, [image] * len(proposals), *texts, report)


class Step1XEditPairCompute(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairCompute",
            display_name="Step1X-Edit Computed Pairs",
            category=TRAINING,
            description="Makes pairs that need no model: weather, light, restoration, style, colour and text, with instructions in English and Chinese.",
            search_aliases=["edit pairs", "algorithmic", "synthetic", "training data", "augmentation"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures: one, a batch, or a list with pictures of different sizes."),
                kinds_input(ORDER_KINDS),
                io.Int.Input("count", default=8, min=1, max=256, tooltip="So many edits of each picture; the kinds take turns."),
                seed_input("The random seed: same seed and picture, same pairs."),
                io.Int.Input("max_side", default=1024, min=0, max=8192, tooltip="Larger pictures are first shrunk to so many pixels on the longer side. 0: never."),
                PAIRS.Input("pairs", optional=True, tooltip="Pairs that were made before; the new ones come behind them."),
            ],
            outputs=[
                PAIRS.Output(display_name="pairs", tooltip="For the other nodes for pairs."),
                io.String.Output(display_name="report", tooltip="Every pair with its instructions."),
            ],
        )

    @classmethod
    def execute(cls, images, kinds, count, seed, max_side, pairs=None) -> io.NodeOutput:
        values = single(kinds=kinds, count=count, seed=seed, max_side=max_side)
        check_widgets(cls, **values)
        before = join(pairs)
        made, report = algorithmic_pairs(images, **values)
        return io.NodeOutput(before + made, report)


def single(**inputs: list) -> dict:
    """The one value of each input of a node that takes lists. Raises Step1XError for a list of several."""
    for name, values in inputs.items():
        if len(values) != 1:
            raise Step1XError(f"The input '{name}' brings a list of {len(values)}. Connect a single one.")
    return {name: values[0] for name, values in inputs.items()}


def check_pairs(pairs) -> None:
    check_kind(pairs, tuple, "pairs", "'Step1X-Edit Computed Pairs' or 'Step1X-Edit Record Pairs'")


def join(pairs: list[tuple] | None) -> tuple:
    """All pairs of an input that takes lists."""
    for group in pairs or ():
        check_pairs(group)
    return tuple(pair for group in pairs or () for pair in group)


class Step1XEditPairRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairRecord",
            display_name="Step1X-Edit Record Pairs",
            category=TRAINING,
            description="Takes in what any other nodes made of a picture (segmentation, inpainting, filters, an edit model) as pairs with instruction, kind and origin.",
            search_aliases=["edit pairs", "record pair", "inpainting pair", "training data"],
            # As many targets as proposals: the host itself would repeat the last one.
            is_input_list=True,
            inputs=[
                io.Image.Input("source", tooltip="The pictures before the edit: one for each target, or one for all."),
                io.Image.Input("target", tooltip="The pictures after the edit. Their shape must be that of the source; their size is adapted."),
                io.Combo.Input("kind", options=list(KINDS), default=KINDS[-1], tooltip="The kind of edit. Not used with proposals."),
                io.String.Input("english", multiline=True, default="", tooltip="The instruction in English. Not used with proposals."),
                io.String.Input("chinese", multiline=True, default="", tooltip="The instruction in Chinese. Not used with proposals; may be empty."),
                io.Combo.Input("direction", options=list(DIRECTIONS), default=FORWARD,
                               tooltip="backward: target and source change places, and 'remove' becomes 'add'. Then the real picture is the target. Only with proposals."),
                io.String.Input("maker", default="", placeholder="SAM 2 and FLUX Fill", tooltip="What made the target, for the dataset."),
                PROPOSAL.Input("proposals", optional=True, tooltip="From 'Step1X-Edit Propose Edits': kind and instructions, one for each target."),
                PAIRS.Input("pairs", optional=True, tooltip="Pairs that were made before; the new ones come behind them."),
            ],
            outputs=[
                PAIRS.Output(display_name="pairs", tooltip="For the other nodes for pairs."),
                io.String.Output(display_name="report", tooltip="Every pair with its instructions."),
            ],
        )

    @classmethod
    def execute(cls, source, target, kind, english, chinese, direction, maker, proposals=None, pairs=None) -> io.NodeOutput:
        for name, values in (("kind", kind), ("english", english), ("chinese", chinese), ("maker", maker)):
            for value in values:
                check_widgets(cls, **{name: value})
        values = single(direction=direction)
        check_widgets(cls, **values)
        for proposal in proposals or ():
            check_kind(proposal, Proposal, "proposals", "'Step1X-Edit Propose Edits'")
        before = join(pairs)
        made, report = record_pairs(source, target, proposals or [], kind, english, chinese, maker, **values)
        return io.NodeOutput(before + made, report)


class Step1XEditPairJudge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairJudge",
            display_name="Step1X-Edit Judge Pairs",
            category=TRAINING,
            description="Has the language model score every pair: is the instruction followed and the rest kept, and is the target natural and clean?",
            search_aliases=["edit pairs", "judge", "score", "quality", "viescore"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from 'Load Step1X-Edit MLLM'. Its file needs a language-model head (lm_head)."),
                PAIRS.Input("pairs", tooltip="The pairs. Those that have scores keep them."),
                seed_input("The random seed of answers that are asked for anew. First answers are the most probable ones."),
            ],
            outputs=[
                PAIRS.Output(display_name="pairs", tooltip="The same pairs with their scores, for 'Step1X-Edit Filter Pairs'."),
                io.String.Output(display_name="report", tooltip="The scores of every pair, or why there are none."),
            ],
        )

    @classmethod
    def execute(cls, clip, pairs, seed) -> io.NodeOutput:
        check_widgets(cls, seed=seed)
        check_pairs(pairs)
        return io.NodeOutput(*judge_pairs(clip, pairs, seed))


class Step1XEditPairFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairFilter",
            display_name="Step1X-Edit Filter Pairs",
            category=TRAINING,
            description="Keeps the pairs that reach the scores and change neither too little nor too much of the picture.",
            search_aliases=["edit pairs", "filter", "threshold", "quality"],
            inputs=[
                PAIRS.Input("pairs", tooltip="The pairs, from 'Step1X-Edit Judge Pairs' where scores shall count."),
                io.Float.Input("min_semantics", default=LIMITS.semantics, min=0.0, max=10.0, step=0.5,
                               tooltip="Least score for following the instruction and keeping the rest; the lower of the two counts."),
                io.Float.Input("min_quality", default=LIMITS.quality, min=0.0, max=10.0, step=0.5,
                               tooltip="Least score for looking natural and clean; the lower of the two counts."),
                io.Float.Input("min_change", default=LIMITS.min_change, min=0.0, max=1.0, step=0.001, round=False,
                               tooltip="Least share of the pixels that the edit changes. 0.002 is a small word."),
                io.Float.Input("max_change", default=LIMITS.max_change, min=0.0, max=1.0, step=0.01,
                               tooltip="Greatest share of the pixels that the edit changes: 0.5, say, where only objects are edited."),
                io.Boolean.Input("unjudged", default=LIMITS.unjudged, tooltip="Keep pairs without scores, too."),
            ],
            outputs=[
                PAIRS.Output(display_name="kept", tooltip="The pairs that passed."),
                PAIRS.Output(display_name="dropped", tooltip="The others, to look at or to save elsewhere."),
                io.String.Output(display_name="report", tooltip="How many were kept, and for each other one the reason."),
            ],
        )

    @classmethod
    def execute(cls, pairs, min_semantics, min_quality, min_change, max_change, unjudged) -> io.NodeOutput:
        check_widgets(cls, min_semantics=min_semantics, min_quality=min_quality, min_change=min_change, max_change=max_change,
                      unjudged=unjudged)
        check_pairs(pairs)
        return io.NodeOutput(*sift(pairs, Thresholds(min_semantics, min_quality, min_change, max_change, unjudged)))


class Step1XEditPairSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairSheet",
            display_name="Step1X-Edit Pairs Contact Sheet",
            category=TRAINING,
            description="Shows pairs on one picture, source and target side by side, and counts them by kind.",
            search_aliases=["edit pairs", "contact sheet", "statistics", "overview"],
            inputs=[
                PAIRS.Input("pairs", tooltip="The pairs, at any point of the way."),
                io.Int.Input("limit", default=24, min=1, max=200, tooltip="At most so many pairs on the sheet; the kinds take turns."),
            ],
            outputs=[
                io.Image.Output(display_name="contact_sheet", tooltip="Source and target of each pair with kind, scores and instruction."),
                io.String.Output(display_name="report", tooltip="A table by kind: pairs, languages, mean scores, makers."),
            ],
        )

    @classmethod
    def execute(cls, pairs, limit) -> io.NodeOutput:
        check_widgets(cls, limit=limit)
        check_pairs(pairs)
        return io.NodeOutput(*show_pairs(pairs, limit))


class Step1XEditPairSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairSave",
            display_name="Step1X-Edit Save Pairs",
            category=TRAINING,
            description="Adds pairs to a dataset in output/edit_pairs, in the JSON layout of the official training code. Pairs that look the same are stored once.",
            search_aliases=["edit pairs", "save dataset", "training data", "json"],
            is_output_node=True,
            inputs=[
                PAIRS.Input("pairs", tooltip="The pairs to add."),
                io.String.Input("name", default="my_pairs", tooltip="The dataset's folder in output/edit_pairs. One that is there is added to."),
            ],
            outputs=[
                io.String.Output(display_name="folder", tooltip="Where the dataset lies. It can be connected to 'Step1X-Edit Dataset'."),
                io.String.Output(display_name="report", tooltip="What was added and left out, and a table of all that the dataset holds."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name, **inputs):
        return journal_state(name)

    @classmethod
    def execute(cls, pairs, name) -> io.NodeOutput:
        check_widgets(cls, name=name)
        check_pairs(pairs)
        return io.NodeOutput(*save_pairs(pairs, name))


PAIR_NODES = [Step1XEditPairPropose, Step1XEditPairCompute, Step1XEditPairRecord, Step1XEditPairJudge, Step1XEditPairFilter, Step1XEditPairSheet, Step1XEditPairSave]
