from comfy_api.latest import io

from ..step1x_core.host.reasoning.templates import template_fingerprint
from ..step1x_core.host.reasoning.thinking import TEMPERATURE, judge, rewrite
from ..step1x_core.reasoning.conversation import RULES
from ..step1x_core.reasoning.report import describe_reflection
from .categories import MAIN
from .widgets import check_widgets, seed_input


class Step1XEditThinkPrompt(io.ComfyNode):
    """The official rewriting of an instruction. The stock 'Generate Text' works with this text encoder, too, but takes
    its texts from you."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditThinkPrompt",
            display_name="Step1X-Edit Rewrite Prompt",
            category=MAIN,
            description="Has the language model look at the picture and rewrite the instruction as a clear edit. The "
                        "prompt goes to 'Step1X-Edit Encode'.",
            search_aliases=["thinking", "reasonedit", "rewrite prompt", "prompt enhance"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder from 'Load Step1X-Edit MLLM'. Its file needs a language-model head "
                            "(lm_head).",
                ),
                io.Image.Input("image", tooltip="The picture to edit, exactly one."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="this bread stayed in too long\n面包烤过头了",
                    tooltip="What to change, in your own words. The answer is in Chinese if this has at least two "
                            "Chinese characters, else in English.",
                ),
                seed_input("The random seed: same seed and inputs, same answer."),
                io.Float.Input(
                    "temperature",
                    default=TEMPERATURE,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How freely words are chosen. 0 always takes the likeliest; the official code uses 0.7.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The rewritten instruction."),
                io.String.Output(display_name="report", tooltip="What was asked and what came back."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return template_fingerprint()

    @classmethod
    def execute(cls, clip, image, prompt, seed, temperature) -> io.NodeOutput:
        check_widgets(cls, prompt=prompt, seed=seed, temperature=temperature)
        return io.NodeOutput(*rewrite(clip, image, prompt, seed, temperature))


class Step1XEditReflectOnEdit(io.ComfyNode):
    """The official judgement on an edit, for graphs of your own. 'Step1X-Edit Reflection Loop' does the rounds by
    itself."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditReflectOnEdit",
            display_name="Step1X-Edit Reflect",
            category=MAIN,
            description="Has the language model compare source and edited picture: did the edit succeed, should it be "
                        "refined, or done again?",
            search_aliases=["reflection", "reasonedit", "judge edit", "score image"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder from 'Load Step1X-Edit MLLM'. Its file needs a language-model head "
                            "(lm_head).",
                ),
                io.Image.Input("source", tooltip="The picture before any edit, exactly one."),
                io.Image.Input("edited", tooltip="The edited picture, exactly one."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The instruction to judge by: the one from 'Step1X-Edit Rewrite Prompt' if you use it.",
                ),
                seed_input("The random seed: same seed and inputs, same judgement."),
                io.Combo.Input(
                    "version",
                    options=list(RULES),
                    default="v1.2",
                    advanced=True,
                    tooltip="v1.2 also asks for scores; v1.2-preview leaves them out, which saves two calls of five.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="verdict",
                    tooltip="success, refine or failed. It is failed, too, if no usable answer came in 20 tries.",
                ),
                io.String.Output(
                    display_name="refined",
                    tooltip="For refine: the instruction for a further edit of the edited picture. Else empty.",
                ),
                io.Float.Output(
                    display_name="score",
                    tooltip="0 to 100: the lower edit score times the lower quality score. 0 without scores.",
                ),
                io.String.Output(display_name="report", tooltip="Verdict, explanation, scores, and all answers."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return template_fingerprint()

    @classmethod
    def execute(cls, clip, source, edited, prompt, seed, version) -> io.NodeOutput:
        check_widgets(cls, prompt=prompt, seed=seed, version=version)
        reflection = judge(clip, source, edited, prompt, seed, RULES[version])
        return io.NodeOutput(reflection.verdict, reflection.refined, reflection.value, describe_reflection(reflection))
