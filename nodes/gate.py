from comfy_api.latest import io

from ..step1x_core.gate.policy import ACTIONS, OFF
from ..step1x_core.host.gate.gate import NONE, classifier_folders, gate
from ..step1x_core.host.status import show_status
from .categories import MAIN
from .widgets import check_widgets


class Step1XEditContentGate(io.ComfyNode):
    """Keeps unsafe pictures from being saved. There is no stock node for it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditContentGate",
            display_name="Step1X-Edit Content Gate",
            category=MAIN,
            description="Between decode and save: checks pictures with a classifier of yours and the instruction by "
                        "words or a question. All on this machine.",
            search_aliases=["content filter", "safety checker", "nsfw", "moderation"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures to check, one or a batch; each is treated by itself."),
                io.Combo.Input(
                    "action",
                    options=list(ACTIONS),
                    default=OFF,
                    tooltip="What happens to a picture that is found unsafe. off: nothing is checked. report: it "
                            "passes and the report tells. "
                    "label: it passes with a label drawn on it. blur: only blurred colours are left. block: a notice "
                    "takes its place.",
                ),
                io.Combo.Input(
                    "classifier",
                    options=[NONE, *sorted(classifier_folders())],
                    default=NONE,
                    tooltip="A picture classifier of the transformers library, as a folder in "
                            "models/image_classification. none: only the instruction is checked.",
                ),
                io.String.Input(
                    "unsafe_labels",
                    default="nsfw",
                    tooltip="The classifier's labels that count as unsafe, with commas between them.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which probability on a picture counts as unsafe. Lower is stricter.",
                ),
                io.String.Input(
                    "message",
                    default="This picture was withheld by the content gate.",
                    tooltip="What the notice of 'block' says, in Latin letters.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="The instruction to check: connect what goes to the encoder.",
                ),
                io.String.Input(
                    "words",
                    multiline=True,
                    default="",
                    tooltip="Words and phrases that an instruction must not have, one a line or with commas between "
                            "them.",
                ),
                io.String.Input(
                    "question",
                    multiline=True,
                    default="",
                    advanced=True,
                    tooltip="A question about the instruction that the language model answers with yes or no; yes "
                            "makes it unsafe. Empty: nothing is asked.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For the question: the text encoder from 'Load Step1X-Edit MLLM'. Its file needs a "
                            "language-model head (lm_head).",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="The pictures that may go on, as many and as large as before."
                ),
                io.Int.Output(display_name="found", tooltip="How many pictures were found unsafe."),
                io.String.Output(
                    display_name="report", tooltip="What was found in each picture, and what became of it."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, images, action, classifier, unsafe_labels, threshold, message, prompt, words, question, clip=None
    ) -> io.NodeOutput:
        check_widgets(
            cls,
            action=action,
            unsafe_labels=unsafe_labels,
            threshold=threshold,
            message=message,
            prompt=prompt,
            words=words,
            question=question,
        )
        images, found, report = gate(
            images, action, classifier, unsafe_labels, threshold, message, prompt, words, question, clip
        )
        # On the node itself, so that nobody overlooks whether the gate is on.
        show_status(report.splitlines()[0])
        return io.NodeOutput(images, found, report)
