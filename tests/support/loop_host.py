"""The host's own executor in this process, with the pack's nodes and a language model that answers from a script."""

import asyncio
import importlib
import importlib.util
import pkgutil
import sys

import comfy.model_management
import execution
from environment import PACK

import nodes
import step1x_core
from step1x_core.reasoning.conversation import LAYOUTS
from step1x_core.reasoning.templates import LANGUAGES, load_templates

NAME = "pack_in_process"

GOOD = {
    "rewrite": "Make the cup red.",
    "description": "A red cup.",
    "consistency": '{"meets_instruction": "yes", "raw_score": 9, "reason": ""}',
    "reflection": "<#Think>Well done.<#Success>",
    "edit_score": '{"score": [8, 8], "reasoning": ""}',
    "quality_score": '{"score": [8, 8], "reasoning": ""}',
}


def load_pack():
    """The pack as a package whose core is the `step1x_core` that the tests import, so that both know the same classes."""
    for module in pkgutil.walk_packages(step1x_core.__path__, "step1x_core."):
        if not module.name.endswith(".triton_kernels"):  # It needs Triton, which not every system has.
            importlib.import_module(module.name)
    sys.modules.update({f"{NAME}.{name}": module for name, module in sys.modules.items() if name.split(".")[0] == "step1x_core"})
    spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


def node_classes(pack) -> dict:
    async def load():
        return await (await pack.comfy_entrypoint()).get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(load())}


class Script:
    """Stands for `generate_text`, `together` for `generate_texts`: answers each call from a list of replies, over and over its last one; exceptions in it are raised.

    asked: what was asked, as (call, pictures and texts, most tokens, seed, temperature).
    """

    def __init__(self, **replies):
        self.replies = {name: list(value) if isinstance(value, list) else [value] for name, value in {**GOOD, **replies}.items()}
        self.systems = {load_templates(language)[f"{name}.system"]: name for language in LANGUAGES for name in LAYOUTS}
        self.asked = []

    def __call__(self, clip, system, content, max_tokens, seed, temperature):
        name = self.systems[system]
        self.asked.append((name, content, max_tokens, seed, temperature))
        replies = self.replies[name]
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def together(self, clip, questions, max_tokens):
        return [self(clip, question.system, question.content, max_tokens, question.seed, question.temperature) for question in questions]

    def contents(self, name) -> list[list]:
        return [content for asked, content, *_ in self.asked if asked == name]


class Result:
    """executed: ids of the nodes that ran, in order; values: what the loop gave, None if it was cached or failed; error: the host's message."""

    def __init__(self, messages, values):
        self.executed = [data["node"] for event, data in messages if event == "executing" and data["node"]]
        self.error = next((data["exception_message"] for event, data in messages if event == "execution_error"), "")
        self.interrupted = any(event == "execution_interrupted" for event, _ in messages)
        self.values = values
        self.image, self.candidates, self.report, self.prompt = values or (None,) * 4

    def rounds(self) -> list[str]:
        """The nodes that ran inside the loop; one with lazy inputs starts again for each that it asks for, and counts where it ends."""
        names = [node.removeprefix("loop.0.0.") for node in reversed(self.executed) if node.startswith("loop.")]
        return [*dict.fromkeys(names)][::-1]


class InProcessHost:
    """Runs prompts one after the other; results are kept between them as the host does.

    things: what the source nodes hand out, by name. interrupt_at: id of the node at whose start the run is cancelled.
    """

    def __init__(self, monkeypatch, classes: dict, things: dict, cache: str = "CLASSIC"):
        self.messages, self.values, self.interrupt_at, self.client_id, self.last_node_id = [], None, None, "test", None
        host = self

        class Source:
            RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("*",), "give", "test", (True,)

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {"name": ("STRING", {})}}

            def give(self, name):
                return (things[name] if isinstance(things[name], list) else [things[name]],)

        class Sink:
            RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "test", True

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {name: ("*", {}) for name in ("image", "candidates", "report", "prompt")}}

            def take(self, image, candidates, report, prompt):
                host.values = image, candidates, report, prompt
                return {}

        for name, node in {**classes, "TestSource": Source, "TestSink": Sink}.items():
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
        self.executor = execution.PromptExecutor(
            self, cache_type=execution.CacheType[cache], cache_args={"lru": 100, "ram": 0.1, "ram_inactive": 1024.0}
        )

    def send_sync(self, event, data, sid=None):
        self.messages.append((event, data))
        if event == "executing" and self.interrupt_at and data["node"] == self.interrupt_at:
            self.interrupt_at = None
            comfy.model_management.interrupt_current_processing()

    def run(self, **changes) -> Result:
        """Queue a loop; `changes` are its inputs."""
        self.messages.clear()
        self.values = None
        prompt = {name: {"class_type": "TestSource", "inputs": {"name": name}} for name in ("model", "clip", "vae", "image")}
        loop = {
            "prompt": "red cup pls",
            "negative_prompt": "",
            "size_level": 64,
            "seed": 5,
            "steps": 1,
            "cfg": 2.0,
            "rounds": 3,
            "think": True,
            "reflect": True,
            "sampler_name": "euler",
        }
        prompt["loop"] = {"class_type": "Step1XEditReflectionLoop", "inputs": {**{name: [name, 0] for name in prompt}, **loop, **changes}}
        prompt["sink"] = {
            "class_type": "TestSink",
            "inputs": {name: ["loop", i] for i, name in enumerate(("image", "candidates", "report", "prompt"))},
        }
        self.executor.execute(prompt, "id", {"client_id": "test"}, ["sink"])
        return Result(self.messages, self.values)
