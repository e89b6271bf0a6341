"""Single nodes in the host's own executor, in this process: what becomes of bad input, and whether the next edit suffers."""

import asyncio
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import execution
import folder_paths
import psutil
import pytest
import tiny_models
import torch
from loop_host import load_pack, node_classes
from node_inputs import FILE, classes, entries, socket, widgets

import nodes
from step1x_core.training.cache import Cache, EditDataset

STEP1X_ERROR = "step1x_core.errors.Step1XError"
# What the host's own check of a prompt calls an input that it refuses, before anything runs.
TOO_SMALL, TOO_LARGE, NOT_IN_LIST, NOT_CONVERTED = (
    "value_smaller_than_min",
    "value_bigger_than_max",
    "value_not_in_list",
    "invalid_input_type",
)
MISMATCH, BAD_LINK, MISSING, NO_SUCH_NODE = (
    "return_type_mismatch",
    "bad_linked_input",
    "required_input_missing",
    "exception_during_inner_validation",
)
HOST_REFUSALS = (TOO_SMALL, TOO_LARGE, NOT_IN_LIST, NOT_CONVERTED, MISMATCH, BAD_LINK, MISSING, NO_SUCH_NODE)
# After so many refusals the good edit is made again, and at the end of every file. 1 finds the one that spoils it.
CHECK_EVERY = int(os.environ.get("STEP1X_CHECK_EVERY", 8))
# No case may take more memory than this beyond the most that was needed before it.
MEMORY_GROWTH = 2**30
# What is edited of the good picture where a part of it is.
MASK = torch.zeros(1, 64, 64)
MASK[:, 20:30, 20:30] = 1
FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras", "diffusers")

# While the first is true, what is written or removed is put into the second. An audit hook cannot be taken off again.
watching, written = [False], []


def audit(event: str, args: tuple) -> None:
    if not watching[0]:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate")
    # Modules that are imported for the first time are compiled.
    if (writes or changes) and "__pycache__" not in str(args[0]) and str(args[0]) != os.devnull:
        written.append(f"{event} {args[0]}")


sys.addaudithook(audit)


def peak_memory() -> int:
    """The most bytes of memory that this process has had so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Given:
    """A value that another node hands out, so the host does not look at it. kind: the type of that node's output; "*" fits everywhere."""

    value: Any
    kind: str = "*"


@dataclass(frozen=True)
class Outcome:
    """refused: the host's check of the prompt, "" if it passed; error: type and text of the exception; outputs: of the node, each as a list."""

    refused: str = ""
    error: tuple[str, str] | None = None
    outputs: tuple = ()

    def says(self, pattern: str) -> None:
        """The run failed with one or two sentences that contain this."""
        assert not self.refused, self.refused
        assert self.error is not None, "nothing was wrong"
        kind, text = self.error
        assert kind == STEP1X_ERROR, f"{kind}: {text}"
        assert re.search(pattern, text), text
        assert text.rstrip().endswith(".") and "\n" not in text.rstrip() and len(text) < 800, text

    def made(self) -> tuple:
        """The outputs of a run in which all went well."""
        assert not self.refused and self.error is None, self.refused or self.error
        return tuple(values[0] for values in self.outputs)


class Host:
    """One host process with one set of models: every run goes through the check of the prompt and the executor, as the server does it."""

    def __init__(self, monkeypatch, model, clip, vae):
        self.names, self.things, self.outputs, self.messages = itertools.count(), {}, {}, []
        self.made_things, self.refusals = {}, 0
        self.client_id, self.last_node_id = "test", None
        self.monkeypatch = monkeypatch
        host = self

        class Sink:
            RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, INPUT_IS_LIST = (), "take", "test", True, True

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {"index": ("INT", {}), "value": ("*", {})}}

            def take(self, index, value):
                host.outputs[index[0]] = value
                return {}

        for name, node in {**node_classes(load_pack()), "TestSink": Sink}.items():
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
        self.executor = execution.PromptExecutor(
            self, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 100, "ram": 0.1, "ram_inactive": 1024.0}
        )
        self.model, self.clip, self.vae = model, clip, vae
        self.picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        self.encoded = self.encode().made()
        # The quick edit reads only the start of the instruction and draws only a corner of the picture.
        self.quick = [
            [[cond[:, :64], {**extra, "attention_mask": extra["attention_mask"][:, :64]}] for cond, extra in c]
            for c in self.encoded[:2]
        ]
        self.quick.append({"samples": self.encoded[2]["samples"][..., :4, :4]})
        self.expected, self.expected_quick = self.sampled_and_decoded(*self.encoded), self.sampled_and_decoded(*self.quick)

    def fitting(self, kind: str):
        """A fitting thing for a type of socket. What only a node of ours makes is made by that node."""
        if kind not in self.made_things:
            simple = {
                "MODEL": self.model,
                "CLIP": self.clip,
                "VAE": self.vae,
                "IMAGE": self.picture,
                "MASK": MASK,
                "STEP1X_PAIRS": (),
                "STEP1X_PROPOSAL": None,
            }
            if kind in ("CONDITIONING", "LATENT"):
                self.made_things[kind] = self.encoded[0 if kind == "CONDITIONING" else 2]
            elif kind == "STEP1X_EDIT_DATASET":
                self.made_things[kind] = EditDataset(Cache(Path(folder_paths.get_temp_directory(), "no_cache")), [])
            else:
                self.made_things[kind] = simple[kind] if kind in simple else self.produced(kind)
        return self.made_things[kind]

    def produced(self, kind: str):
        """What the node with the fewest sockets makes of that type."""
        makers = []
        for name, node in classes().items():
            sockets = [entry for entry in entries(name) if not entry.is_widget]
            kinds = [output.get_io_type() for output in node.GET_SCHEMA().outputs]
            if kind in kinds and all(entry.kind != kind for entry in sockets):
                makers.append((len(sockets), name, kinds.index(kind)))
        assert makers, f"No node makes a {kind}: Host.fitting needs an example of it"
        _, name, index = min(makers)
        return self.call(name).made()[index]

    def call(self, node: str, *left_out: str, writes: Path | None = None, **changes) -> Outcome:
        """Run a node with small values and fitting things in all inputs but the optional sockets, with anything replaced."""
        things = {entry.name: Given(self.fitting(entry.kind), entry.kind) for entry in entries(node)
                  if not entry.is_widget and not entry.is_optional and entry.name not in changes}
        values = widgets(node, **changes)
        files = {entry.name: Given(FILE) for entry in entries(node) if entry.is_file}
        inputs = things | values | files | changes
        return self.run(node, writes, **{name: value for name, value in inputs.items() if name not in left_out})

    def encode(self, **changes) -> Outcome:
        """What 'Step1X-Edit Encode' makes of the good picture, with anything replaced."""
        return self.call("Step1XEditEncode", **{"prompt": "make it red", **changes})

    def sample(self, **changes) -> Outcome:
        """One step of 'Step1X-Edit Sampler' on the good edit, with anything replaced. latent: whatever the node calls it."""
        latent = socket("Step1XEditSampler", "LATENT")
        inputs = {name: Given(value) for name, value in zip(("positive", "negative", latent), self.encoded)}
        changes = {latent if name == "latent" else name: value for name, value in changes.items()}
        return self.call("Step1XEditSampler", **inputs | {"cfg": 6.0} | changes)

    def decode(self, latent: dict, **changes) -> Outcome:
        return self.call("Step1XEditDecode", **{"samples": Given(latent), "source": Given(self.picture)} | changes)

    def sampled_and_decoded(self, positive, negative, latent) -> torch.Tensor:
        (sampled,) = self.sample(positive=Given(positive), negative=Given(negative), latent=Given(latent)).made()
        return self.decode(sampled).made()[0]

    def still_edits(self, from_the_start: bool = False) -> None:
        """The good edit comes out as ever, to the last bit. from_the_start: the whole one, with its encoding."""
        if from_the_start:
            assert torch.equal(self.sampled_and_decoded(*self.encode().made()), self.expected)
        else:
            assert torch.equal(self.sampled_and_decoded(*self.quick), self.expected_quick)

    def refuses(self, outcome: Outcome, expected: str, from_the_start: bool = False) -> None:
        """The outcome is the host's refusal of that kind, or a sentence with that pattern; the next edit does not suffer (`CHECK_EVERY`)."""
        if expected in HOST_REFUSALS:
            assert outcome.refused.startswith(expected), outcome
        else:
            outcome.says(expected)
        self.refusals += 1
        if self.refusals % CHECK_EVERY == 0:
            self.still_edits(from_the_start)

    def send_sync(self, event, data, sid=None):
        self.messages.append((event, data))

    def giver(self, kind: str) -> str:
        """The class name of a node that hands out a thing as this type."""
        name, things = f"TestGive {kind}", self.things

        class Give:
            RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = (kind,), "give", "test", (True,)

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {"name": ("STRING", {})}}

            def give(self, name):
                thing = things[name]
                return (thing if isinstance(thing, Many) else [thing],)

        self.monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, Give)
        return name

    def run(self, node: str, writes: Path | None = None, **inputs) -> Outcome:
        """Queue a node with these inputs: widgets as they are, everything else as Given. writes: the one folder that it may write into."""
        # The host must not answer with what it remembers.
        self.executor.reset()
        run = str(next(self.names))
        prompt, given = {}, {}
        for key, value in inputs.items():
            if isinstance(value, Given):
                name = f"{run}.{key}"
                self.things[name] = value.value
                prompt[name] = {"class_type": self.giver(value.kind), "inputs": {"name": name}}
                value = [name, 0]
            given[key] = value
        prompt[run] = {"class_type": node, "inputs": given}
        outputs = len(nodes.NODE_CLASS_MAPPINGS[node].RETURN_TYPES)
        for index in range(outputs):
            prompt[f"{run}.out{index}"] = {"class_type": "TestSink", "inputs": {"index": index, "value": [run, index]}}
        self.messages.clear()
        self.outputs.clear()
        folder_paths.filename_list_cache.clear()
        written.clear()
        watching[0] = True
        try:
            return self.execute(run, prompt, [f"{run}.out{index}" for index in range(outputs)])
        finally:
            watching[0] = False
            self.things.clear()
            assert not [entry for entry in written if writes is None or f" {writes}{os.sep}" not in entry], written

    def execute(self, run: str, prompt: dict, sinks: list[str]) -> Outcome:
        valid, error, _, problems = asyncio.run(execution.validate_prompt(run, prompt, None))
        if not valid:
            found = [f"{entry['type']}: {entry['message']} ({entry['details']})" for node in problems.values() for entry in node["errors"]]
            return Outcome(refused="; ".join(found) or str(error))
        self.executor.execute(prompt, run, {"client_id": "test"}, sinks)
        failed = next((data for event, data in self.messages if event == "execution_error"), None)
        if failed is not None:
            return Outcome(error=(failed["exception_type"], failed["exception_message"]))
        return Outcome(outputs=tuple(self.outputs[index] for index in range(len(sinks))))


class Many(list):
    """A list that a node hands out as a list of single things."""


@contextmanager
def running_host(model, clip, vae, prepare=lambda patch: None) -> Iterator[Host]:
    """A host that must still make the good edit, with its encoding, when the tests have done with it. prepare: what is patched before it starts."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        host = Host(patch, model, clip, vae)
        yield host
        host.still_edits(from_the_start=True)


def use_folders(monkeypatch, root: Path) -> None:
    """Make input/ and output/ below `root` the host's own."""
    for name in ("input", "output"):
        (root / name).mkdir(exist_ok=True)
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(root / name))


def use_models(monkeypatch, root: Path, models: Path) -> None:
    """Make the folders below `root` the host's model folders; a good model from the folder `models` is in them."""
    for name in FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
        _, suffixes = folder_paths.folder_names_and_paths[name]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(root / name)], suffixes))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    shutil.copy(models / "diffusion_models" / tiny_models.V11_FILE, root / "diffusion_models")
