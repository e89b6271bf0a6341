"""The reflection loop: one node that is expanded to a graph of the pack's own nodes.

All rounds are laid out at once and a round is run only when 'Step1XEditLoopResult' asks for it, through lazy inputs.
Expanding one round out of the other would nest them, and the host's default cache forgets nested nodes between two
runs: a cancelled loop would start from the beginning. From the first picture on an error must not end the prompt, as
the host would throw the picture away. So the later rounds use guarded twins of the public nodes, which hand an error on
as a value.
"""

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..step1x_core.editing.batches import SEEDS
from ..step1x_core.errors import Step1XError
from ..step1x_core.host.prompts.encoding import check_vae
from ..step1x_core.host.reasoning.rounds import HOST_KEEPS_RESULTS, Failure, Rounds, attempt, failures
from ..step1x_core.host.reasoning.templates import template_fingerprint
from ..step1x_core.host.reasoning.thinking import (
    TEMPERATURE,
    check_instruction,
    check_thinking,
    judge,
    rules_version,
    single_picture,
)
from ..step1x_core.host.sampling.few_steps import reads_negative
from ..step1x_core.host.sampling.sampler import SAMPLERS, check_model, show_settings, with_norm_limiter
from ..step1x_core.reasoning.conversation import RULES
from ..step1x_core.reasoning.reflection import MAX_ROUNDS, Loop, Thought
from ..step1x_core.reasoning.report import report
from .categories import MAIN
from .edit import Step1XEditDecode, Step1XEditEncode
from .sampling import Step1XEditSampler
from .widgets import cfg_input, check_widgets, negative_prompt_input, seed_input, size_level_input, steps_input

STATE = io.Custom("STEP1X_ROUNDS")
GUARDED = "Guarded"
# The most that the loop offers.
ROUNDS_LIMIT = 10


def task_of(inputs: dict) -> str:
    """What tells a piece of work from another of the same node: the texts and numbers among its inputs."""
    return repr({name: value for name, value in inputs.items() if isinstance(value, (str, int, float))})


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """A twin of a node with the suffix `GUARDED`: an error, its own or one it is given, comes out of all outputs as a
    Failure."""

    class Guarded(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            schema = node.define_schema()
            schema.node_id += GUARDED
            schema.display_name += " (guarded)"
            schema.is_dev_only = True
            schema.hidden = [io.Hidden.unique_id]
            return schema

        @classmethod
        def fingerprint_inputs(cls, **inputs):
            return failures(cls.hidden.unique_id)

        @classmethod
        def check_lazy_status(cls, **inputs) -> list[str]:
            # The sampler's; the other nodes have no lazy inputs, for which the host's default asks for nothing.
            return node.check_lazy_status(**inputs) if not any(isinstance(x, Failure) for x in inputs.values()) else []

        @classmethod
        def execute(cls, **inputs) -> io.NodeOutput:
            failure = next((value for value in inputs.values() if isinstance(value, Failure)), None)
            output = failure or attempt(cls.hidden.unique_id, task_of(inputs), node.execute, **inputs)
            return (
                io.NodeOutput(*[output] * len(node.define_schema().outputs)) if isinstance(output, Failure) else output
            )

    return Guarded


GUARDED_NODES = [guarded(node) for node in (Step1XEditEncode, Step1XEditSampler, Step1XEditDecode)]


def add_edit(
    graph: GraphBuilder,
    name: str,
    inputs: dict,
    image,
    prompt,
    seed: int,
    suffix: str = "",
    only_positive: bool = False,
    latent=None,
):
    """Add the nodes of one edit to the graph -> the links to the picture, at the size of the source, and to its latent.

    latent: the link to the latent of the picture, where there is one.
    only_positive: whether sampling does not read the negative prompt, so that it need not be encoded.
    """
    encode = graph.node(
        f"Step1XEditEncode{suffix}",
        f"{name}_encode",
        image=image,
        prompt=prompt,
        **({"model": inputs["model"]} if only_positive else {}),
        **({} if latent is None else {"latent": latent}),
        **{key: inputs[key] for key in ("clip", "vae", "negative_prompt", "size_level")},
    )
    sampler = graph.node(
        f"Step1XEditSampler{suffix}",
        f"{name}_sampler",
        positive=encode.out(0),
        negative=encode.out(1),
        latent_image=encode.out(2),
        seed=seed,
        denoise=1.0,
        **{key: inputs[key] for key in ("model", "steps", "cfg", "sampler_name")},
    )
    decode = graph.node(
        f"Step1XEditDecode{suffix}", f"{name}_decode", samples=sampler.out(0), vae=inputs["vae"], source=inputs["image"]
    )
    return decode.out(0), sampler.out(0)


class Step1XEditReflectionLoop(io.ComfyNode):
    """The official editing with thinking and reflection in one node. Built of the pack's own nodes, so each shows its
    progress, is cached and can be cancelled."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditReflectionLoop",
            display_name="Step1X-Edit Reflection Loop",
            category=MAIN,
            description="Edits, has the language model judge the result, and edits again until it is satisfied. "
                        "Returns the best picture and all the others.",
            search_aliases=["thinking", "reflection", "reasonedit", "edit loop", "best of"],
            # One loop belongs to one picture; a list would run a loop within a loop for each of its entries.
            is_input_list=True,
            enable_expand=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model from 'Load Step1X-Edit Model', with any LoRA or model patch."
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder from 'Load Step1X-Edit MLLM'. To think and to reflect its file needs a "
                            "language-model head (lm_head).",
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="The FLUX VAE: the stock 'Load VAE' with ae.safetensors, or the VAE output of 'Load "
                            "Step1X-Edit Model' for a diffusers folder.",
                ),
                io.Image.Input("image", tooltip="The picture to edit, exactly one, of any size."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="this bread stayed in too long\n面包烤过头了",
                    tooltip="What to change, in English or Chinese.",
                ),
                negative_prompt_input(),
                size_level_input("The picture is edited at about this many pixels squared, keeping its aspect ratio."),
                seed_input("The random seed of everything: round 1 samples with it, each later round with the next number, and every answer's seed is made of it."),
                steps_input(),
                cfg_input(),
                io.Int.Input(
                    "rounds",
                    default=MAX_ROUNDS,
                    min=1,
                    max=ROUNDS_LIMIT,
                    tooltip="How often to edit at most. A success ends the loop earlier.",
                ),
                io.Boolean.Input("think", default=True, tooltip="Have the instruction rewritten first, once."),
                io.Boolean.Input(
                    "reflect",
                    default=True,
                    tooltip="Judge each result and go on until it succeeds. Off: one round, nothing is judged.",
                ),
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
                    display_name="image",
                    tooltip="The best picture: for v1.2 that with the highest scores, for v1.2-preview the last.",
                ),
                io.Image.Output(
                    display_name="candidates", tooltip="The pictures of all rounds in their order, as a batch."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was edited, judged and answered in every round, and what ended the loop early, if "
                            "anything did.",
                ),
                io.String.Output(
                    display_name="prompt",
                    tooltip="The instruction that the rounds were judged by, rewritten or your own.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return [template_fingerprint(), failures(cls.hidden.unique_id)]

    @classmethod
    def execute(cls, **lists) -> io.NodeOutput:
        for name, entries in lists.items():
            if len(entries) != 1:
                raise Step1XError(
                    f"Input '{name}' is a list of {len(entries)}; the loop edits one image at a time. Queue them one by one."
                )
        values = {name: entries[0] for name, entries in lists.items()}
        check_widgets(
            cls,
            **{
                name: values[name]
                for name in (
                    "prompt",
                    "negative_prompt",
                    "size_level",
                    "seed",
                    "steps",
                    "cfg",
                    "rounds",
                    "think",
                    "reflect",
                    "sampler_name",
                )
            },
        )
        seed, think, reflect = values["seed"], values["think"], values["reflect"]
        # What would fail later would cost a thought or a picture.
        check_model(values["model"])
        show_settings(values["model"], values["steps"], values["cfg"])
        check_vae(values["vae"])
        single_picture(values["image"], "image")
        if think or reflect:
            check_thinking(values["clip"])
            check_instruction(values["prompt"])

        # Links let the host recognise the nodes it has run before. Where it keeps no results they would run the loaders
        # again.
        inputs = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"] if HOST_KEEPS_RESULTS else values
        graph = GraphBuilder()
        image, prompt, thought, text = inputs["image"], inputs["prompt"], {}, report(Loop(values["prompt"]))
        if think:
            rewritten = graph.node(
                "Step1XEditThinkPrompt",
                "think",
                clip=inputs["clip"],
                image=image,
                prompt=prompt,
                seed=seed,
                temperature=TEMPERATURE,
            )
            thought, prompt, text = {"instruction": prompt}, rewritten.out(0), rewritten.out(1)
        only_positive = not reads_negative(with_norm_limiter(values["model"]), values["cfg"])
        picture, _ = add_edit(graph, "round_1", inputs, image, prompt, seed, only_positive=only_positive)
        if not reflect:
            return io.NodeOutput(picture, picture, text, prompt, expand=graph.finalize())

        state = graph.node(
            "Step1XEditLoopStart", "start", prompt=prompt, version=rules_version(values["model"]), **thought
        ).out(0)
        states = {}
        for number in range(1, values["rounds"] + 1):
            name, round_seed = f"round_{number}", (seed + number - 1) % SEEDS
            if number > 1:
                step = graph.node("Step1XEditLoopStep", f"{name}_step", state=state, source=image, latest=picture)
                picture, _ = add_edit(graph, name, inputs, step.out(0), step.out(1), round_seed, GUARDED, only_positive)
            state = graph.node(
                "Step1XEditLoopJudge",
                f"{name}_judge",
                state=state,
                clip=inputs["clip"],
                source=image,
                edited=picture,
                seed=round_seed,
            ).out(0)
            states[name] = state
        result = graph.node("Step1XEditLoopResult", "result", **states)
        return io.NodeOutput(*(result.out(i) for i in range(4)), expand=graph.finalize())


class Step1XEditLoopStart(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditLoopStart",
            category=MAIN,
            is_dev_only=True,
            description="Part of 'Step1X-Edit Reflection Loop': the state before the first round.",
            inputs=[
                io.String.Input("prompt"),
                io.Combo.Input("version", options=list(RULES)),
                io.String.Input("instruction", optional=True),
            ],
            outputs=[STATE.Output()],
        )

    @classmethod
    def execute(cls, prompt, version, instruction=None) -> io.NodeOutput:
        thought = None if instruction is None else Thought(instruction, prompt)
        # How many rounds are laid out is not part of the state, so that more of them do not make those that have run
        # outdated.
        return io.NodeOutput(Rounds(Loop(prompt, RULES[version], ROUNDS_LIMIT), thought))


class Step1XEditLoopStep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditLoopStep",
            category=MAIN,
            is_dev_only=True,
            description="Part of 'Step1X-Edit Reflection Loop': what the next round edits, and how.",
            inputs=[STATE.Input("state"), io.Image.Input("source"), io.Image.Input("latest")],
            outputs=[io.Image.Output(), io.String.Output()],
        )

    @classmethod
    def execute(cls, state, source, latest) -> io.NodeOutput:
        step = state.next_step()
        if step is None:
            # Only where the host keeps no results: all rounds are run then, and the ones not needed do nothing.
            return io.NodeOutput(*[Failure("")] * 2)
        return io.NodeOutput(source if step.base == "source" else latest, step.prompt)


class Step1XEditLoopJudge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditLoopJudge",
            category=MAIN,
            is_dev_only=True,
            hidden=[io.Hidden.unique_id],
            description="Part of 'Step1X-Edit Reflection Loop': 'Step1X-Edit Reflect' for a round's picture; an error "
                        "is put on record.",
            inputs=[
                STATE.Input("state"),
                io.Clip.Input("clip"),
                io.Image.Input("source"),
                io.Image.Input("edited"),
                io.Int.Input("seed"),
            ],
            outputs=[STATE.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return [template_fingerprint(), failures(cls.hidden.unique_id)]

    @classmethod
    def execute(cls, state, clip, source, edited, seed) -> io.NodeOutput:
        if state.next_step() is None:
            return io.NodeOutput(state)
        if isinstance(edited, Failure):
            return io.NodeOutput(state.after(edited, None))
        prompt = state.loop.prompt
        judgement = attempt(
            cls.hidden.unique_id,
            task_of({"prompt": prompt, "seed": seed}),
            judge,
            clip,
            source,
            edited,
            prompt,
            seed,
            state.loop.rules,
        )
        return io.NodeOutput(state.after(edited, judgement))


class Step1XEditLoopResult(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditLoopResult",
            category=MAIN,
            is_dev_only=True,
            description="Part of 'Step1X-Edit Reflection Loop': asks for round after round and gives the result.",
            # Without kept results each round asked for later would run all rounds before it again.
            inputs=[
                STATE.Input(f"round_{number}", optional=True, lazy=HOST_KEEPS_RESULTS and number > 1)
                for number in range(1, ROUNDS_LIMIT + 1)
            ],
            outputs=[io.Image.Output(), io.Image.Output(), io.String.Output(), io.String.Output()],
        )

    @classmethod
    def check_lazy_status(cls, **states) -> list[str]:
        for name, state in states.items():
            if state is None:
                return [name]
            if state.next_step() is None:
                break
        return []

    @classmethod
    def execute(cls, **states) -> io.NodeOutput:
        state = [state for state in states.values() if state is not None][-1]
        return io.NodeOutput(state.best(), state.candidates(), state.report(), state.loop.prompt)


LOOP_NODES = [
    Step1XEditReflectionLoop,
    *GUARDED_NODES,
    Step1XEditLoopStart,
    Step1XEditLoopStep,
    Step1XEditLoopJudge,
    Step1XEditLoopResult,
]
