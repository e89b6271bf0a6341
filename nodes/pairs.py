"""Training pairs: propose edits, compute pairs or record what other nodes made, judge them, save them."""

from comfy_api.latest import io

from ..step1x_core.checks import check_kind
from ..step1x_core.errors import Step1XError
from ..step1x_core.host.pairs.making import DIRECTIONS, FORWARD, algorithmic_pairs, propose_edits, record_pairs
from ..step1x_core.host.pairs.review import judge_and_sift, sift_as_they_are
from ..step1x_core.host.pairs.store import journal_state, save_or_preview
from ..step1x_core.pairs.orders import ORDER_KINDS
from ..step1x_core.pairs.propose import PROPOSED, Proposal
from ..step1x_core.pairs.record import KINDS
from ..step1x_core.pairs.review import Thresholds
from .categories import TRAINING
from .widgets import NOT_CONNECTED, check_widgets

PAIRS = io.Custom("STEP1X_PAIRS")
PROPOSAL = io.Custom("STEP1X_PROPOSAL")
LIMITS = Thresholds()


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=42, min=0, max=0xffffffffffffffff, control_after_generate=True, tooltip=tooltip)


def kinds_input(known: tuple[str, ...]) -> io.String.Input:
    return io.String.Input("kinds", default="",
                           tooltip=f"Comma-separated kinds of edits. Leave empty for all of them: {', '.join(known)}.")


def pairs_before() -> PAIRS.Input:
    return PAIRS.Input("pairs", optional=True, tooltip="Existing pairs. The new ones are appended to them.")


def pairs_output() -> PAIRS.Output:
    return PAIRS.Output(display_name="pairs",
    tooltip="Pairs for 'Step1X-Edit Judge Pairs' or 'Step1X-Edit Save Pairs'.")


def single(**inputs: list) -> dict:
    """The one value of each input of a node that takes lists. Raises Step1XError for a list of several."""
    for name, values in inputs.items():
        if len(values) != 1:
            raise Step1XError(f"The input '{name}' has a list of {len(values)} values. Connect a single one.")
    return {name: values[0] for name, values in inputs.items()}


def rows_of(**inputs: list) -> list[dict]:
    """The values of each run of a node that takes lists, as the host forms them for one that does not: a shorter list
    goes on with its last value."""
    count = max(map(len, inputs.values()))
    return [{name: values[min(index, len(values) - 1)] for name, values in inputs.items()} for index in range(count)]


def check_pairs(pairs) -> None:
    check_kind(pairs, tuple, "pairs", "'Step1X-Edit Compute Pairs' or 'Step1X-Edit Record Pairs'")


def join(pairs: list[tuple] | None) -> tuple:
    """All pairs of an input that takes lists."""
    for group in pairs or ():
        check_pairs(group)
    return tuple(pair for group in pairs or () for pair in group)


class Step1XEditPairPropose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairPropose",
            display_name="Step1X-Edit Propose Edits",
            category=TRAINING,
            description="Has the language model list what is in an image, and writes edit instructions from that in "
            "English and Chinese. Outputs lists for the nodes that make the edits.",
            search_aliases=["edit pairs", "propose", "instructions", "caption", "training data"],
            is_input_list=True,
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Text encoder from 'Load Step1X-Edit MLLM'. The file must include a "
                    "language-model head (lm_head).",
                ),
                io.Image.Input(
                    "image",
                    tooltip="A single image, or a list of them. Several images of a list are processed at a time.",
                ),
                kinds_input(PROPOSED),
                io.Int.Input(
                    "count", default=4, min=1, max=64, tooltip="Maximum number of proposals. The kinds take turns."
                ),
                seed_input("Random seed for answers and wording. The same seed and image give the same proposals."),
            ],
            outputs=[
                PROPOSAL.Output(
                    display_name="proposals", is_output_list=True, tooltip="For 'Step1X-Edit Record Pairs'."
                ),
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="The image, repeated for each proposal."
                ),
                io.String.Output(display_name="prompts", is_output_list=True, tooltip="English instructions."),
                io.String.Output(
                    display_name="objects",
                    is_output_list=True,
                    tooltip="What to segment, in English. Empty for edits of the whole image.",
                ),
                io.String.Output(
                    display_name="contents",
                    is_output_list=True,
                    tooltip="What to paint in its place, in English. Empty when something is removed.",
                ),
                io.String.Output(display_name="report", tooltip="All instructions in both languages."),
            ],
        )

    @classmethod
    def execute(cls, clip, image, kinds, count, seed) -> io.NodeOutput:
        rows = rows_of(image=image, kinds=kinds, count=count, seed=seed)
        for row in rows:
            check_widgets(cls, **{name: row[name] for name in ("kinds", "count", "seed")})
        found = propose_edits(single(clip=clip)["clip"], rows)
        proposals = [proposal for some, _ in found for proposal in some]
        images = [row["image"] for row, (some, _) in zip(rows, found) for _ in some]
        texts = ([getattr(proposal, name) for proposal in proposals] for name in ("english", "thing", "content"))
        return io.NodeOutput(proposals, images, *texts, "\n\n".join(report for _, report in found))


class Step1XEditPairCompute(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairCompute",
            display_name="Step1X-Edit Compute Pairs",
            category=TRAINING,
            description="Makes pairs without any model: weather, light, restoration, style, colour and text, with "
                        "instructions in English and Chinese.",
            search_aliases=["edit pairs", "algorithmic", "synthetic", "training data", "augmentation"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="An image, a batch, or a list of images of different sizes."),
                kinds_input(ORDER_KINDS),
                io.Int.Input("count", default=8, min=1, max=256,
                             tooltip="Number of edits per image. The kinds take turns."),
                seed_input("Random seed. The same seed and image give the same pairs."),
                io.Int.Input("max_side", default=1024, min=0, max=8192,
                             tooltip="Larger images are first scaled down to this many pixels on the longer side. "
                                     "0 keeps their size."),
                pairs_before(),
            ],
            outputs=[
                pairs_output(),
                io.String.Output(display_name="report", tooltip="Every new pair with its instructions."),
            ],
        )

    @classmethod
    def execute(cls, images, kinds, count, seed, max_side, pairs=None) -> io.NodeOutput:
        values = single(kinds=kinds, count=count, seed=seed, max_side=max_side)
        check_widgets(cls, **values)
        before = join(pairs)
        made, report = algorithmic_pairs(images, **values)
        return io.NodeOutput(before + made, report)


class Step1XEditPairRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairRecord",
            display_name="Step1X-Edit Record Pairs",
            category=TRAINING,
            description="Turns what any other nodes made of an image (inpainting, filters, an edit model) into pairs "
                        "with an instruction, a kind and an origin.",
            search_aliases=["edit pairs", "record pair", "inpainting pair", "training data"],
            # As many targets as proposals: the host itself would repeat the last one.
            is_input_list=True,
            inputs=[
                io.Image.Input("source", tooltip="Images before the edit: one for each target, or one for all."),
                io.Image.Input("target",
                               tooltip="Images after the edit. They must have the aspect ratio of the source and are"
                                       " resized to it."),
                io.Combo.Input("kind", options=list(KINDS), default=KINDS[-1],
                               tooltip="Kind of edit. Ignored when proposals are connected."),
                io.String.Input("english", multiline=True, default="",
                                tooltip="English instruction. May be empty if there is a Chinese one. Ignored when "
                                        "proposals are connected."),
                io.String.Input("chinese", multiline=True, default="",
                                tooltip="Chinese instruction. May be empty if there is an English one. Ignored when "
                                        "proposals are connected."),
                io.Combo.Input("direction", options=list(DIRECTIONS), default=FORWARD,
                               tooltip="backward swaps source and target, so that 'remove' becomes 'add' and the "
                                       "target is a real image. both makes two pairs. backward and both need "
                                       "proposals."),
                io.String.Input("maker", default="", placeholder="SAM 2 and FLUX Fill",
                                tooltip="What made the target. It is stored in the dataset."),
                PROPOSAL.Input("proposals", optional=True,
                               tooltip="Kinds and instructions from 'Step1X-Edit Propose Edits', one for each target."),
                pairs_before(),
            ],
            outputs=[
                pairs_output(),
                io.String.Output(display_name="report", tooltip="Every new pair with its instructions."),
            ],
        )

    @classmethod
    def execute(cls, source, target, kind, english, chinese, direction, maker, proposals=None,
                pairs=None) -> io.NodeOutput:
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
            description="Has the language model score every pair, and keeps those that reach the minimum scores and "
                        "change neither too little nor too much of the image. Without a text encoder it filters only.",
            search_aliases=["edit pairs", "judge", "score", "quality", "viescore", "filter", "threshold"],
            inputs=[
                PAIRS.Input("pairs", tooltip="Pairs to judge. Scores they already have are kept."),
                io.Float.Input("min_semantics", default=LIMITS.semantics, min=0.0, max=10.0, step=0.5,
                               tooltip="Minimum score, from 0 to 10, for following the instruction and for leaving "
                                       "the unedited area alone. The lower of the two counts."),
                io.Float.Input("min_quality", default=LIMITS.quality, min=0.0, max=10.0, step=0.5,
                               tooltip="Minimum score, from 0 to 10, for looking natural and for being free of "
                                       "artifacts. The lower of the two counts."),
                io.Float.Input("min_change", default=LIMITS.min_change, min=0.0, max=1.0, step=0.001, round=False,
                               tooltip="Minimum share of the pixels that the edit changes. 0.002 is about one small "
                                       "word."),
                io.Float.Input("max_change", default=LIMITS.max_change, min=0.0, max=1.0, step=0.01,
                               tooltip="Maximum share of the pixels that the edit changes. 1 sets no limit; 0.5 "
                                       "suits edits of single objects."),
                io.Boolean.Input("unjudged", default=LIMITS.unjudged, advanced=True,
                                 tooltip="Also keep pairs that the language model could not score."),
                seed_input("Random seed for repeated questions. The first answer is always the most likely one."),
                io.Clip.Input("clip", optional=True,
                              tooltip="Text encoder from 'Load Step1X-Edit MLLM', to score the pairs that have no "
                                      "scores. The file must include a language-model head (lm_head). Not connected:"
                                      " pairs without scores are filtered by change only."),
            ],
            outputs=[
                PAIRS.Output(display_name="kept", tooltip="Pairs that passed, with their scores."),
                PAIRS.Output(display_name="dropped",
                tooltip="Pairs that did not pass, to inspect or to save elsewhere."),
                io.String.Output(display_name="report", tooltip="All scores, and why each dropped pair was dropped."),
            ],
        )

    @classmethod
    def execute(cls, pairs, min_semantics, min_quality, min_change, max_change, unjudged, seed,
                clip=NOT_CONNECTED) -> io.NodeOutput:
        check_widgets(cls, min_semantics=min_semantics, min_quality=min_quality, min_change=min_change,
                      max_change=max_change, unjudged=unjudged, seed=seed)
        check_pairs(pairs)
        limits = Thresholds(min_semantics, min_quality, min_change, max_change, unjudged)
        if clip is NOT_CONNECTED:
            return io.NodeOutput(*sift_as_they_are(pairs, limits))
        return io.NodeOutput(*judge_and_sift(clip, pairs, seed, limits))


class Step1XEditPairSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditPairSave",
            display_name="Step1X-Edit Save Pairs",
            category=TRAINING,
            description="Adds pairs to a dataset in output/edit_pairs, in the JSON layout of the official training "
                        "code, and shows them on a contact sheet. Pairs that look the same are stored once.",
            search_aliases=["edit pairs", "save dataset", "training data", "json", "contact sheet", "statistics",
                            "preview"],
            is_output_node=True,
            inputs=[
                PAIRS.Input("pairs", tooltip="Pairs to save or preview."),
                io.String.Input("name", default="my_pairs",
                                tooltip="Name of the dataset's folder in output/edit_pairs. An existing dataset is "
                                        "extended. Leave empty to preview the pairs without saving them."),
                io.Int.Input("limit", default=24, min=1, max=200, advanced=True,
                             tooltip="Maximum number of pairs on the contact sheet. The kinds take turns."),
            ],
            outputs=[
                io.String.Output(display_name="folder",
                                 tooltip="The dataset's folder, for 'Step1X-Edit Dataset'. Empty for a preview."),
                io.Image.Output(display_name="contact_sheet",
                                tooltip="Source and target of each pair side by side, with kind, scores and "
                                        "instruction."),
                io.String.Output(display_name="report",
                                 tooltip="What was added and what was left out, and a table of the dataset by kind. "
                                         "For a preview, a table of the pairs."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name, **inputs):
        return journal_state(name)

    @classmethod
    def execute(cls, pairs, name, limit) -> io.NodeOutput:
        check_widgets(cls, name=name, limit=limit)
        check_pairs(pairs)
        return io.NodeOutput(*save_or_preview(pairs, name, limit))


PAIR_NODES = [Step1XEditPairPropose, Step1XEditPairCompute, Step1XEditPairRecord, Step1XEditPairJudge,
              Step1XEditPairSave]
