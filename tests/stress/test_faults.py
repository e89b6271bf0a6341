"""Cancelled or out of memory in the middle of every stage, in the host's own executor: nothing of it stays behind, and the next run is right."""

import asyncio
import copy
import gc
import shutil

import comfy.model_management
import execution
import folder_paths
import pytest
import tiny_models
import torch
from diffusers_layout import diffusers_repository, to_diffusers
from loop_host import load_pack, node_classes
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nodes
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder, load_vae
from step1x_core.host.checkpoints.lora import apply_lora, load_lora_file
from step1x_core.host.speed.teacache import apply_teacache

STEPS = 2
# What a node does one after the other, and a cancel must not wait for more than one of: prompts and VAE, steps, tokens, and all that for each picture.
UNITS = {"encode": 3, "sampler": STEPS, "decode": 2, "think": 8, "batch": 2 * (3 + STEPS + 1)}


class Watch(TorchDispatchMode):
    """Sees every tensor operation of the nodes that run under it, and strikes in one of them.

    node: the one to strike in; at: before which of its operations, by number; strike: what is called there, for so many operations in a row.
    only: a part of the names of those operations.
    """

    def __init__(self, host, node=None, at=0, strike=None, times=1, only=""):
        super().__init__()
        self.host, self.node, self.at, self.strike, self.times, self.only = host, node, at, strike, times, only
        self.operations: dict[str, list[str]] = {}
        self.made: list[tuple[StorageWeakRef, str]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        done = self.operations.setdefault(self.host.node, [])
        done.append(operation.name())
        if self.host.node != self.node:
            return operation(*args, **(kwargs or {}))
        if self.at < len(done) <= self.at + self.times and self.only in done[-1]:
            self.strike()
        result = operation(*args, **(kwargs or {}))
        known = {storage(tensor) for tensor in tensors(args, kwargs)}
        self.made += [
            (StorageWeakRef(tensor.untyped_storage()), operation.name())
            for tensor in tensors(result)
            if storage(tensor) not in known
        ]
        return result

    def operations_after(self) -> int:
        return len(self.operations[self.node]) - self.at

    def left(self) -> list[str]:
        """The operations in the node that made memory which is still held."""
        gc.collect()
        return [name for reference, name in self.made if not reference.expired()]


def tensors(*trees) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def run_out_of_memory():
    raise torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)")


cancel = comfy.model_management.interrupt_current_processing


class Host:
    """The host's executor in this process. node: the one that runs; things: what TestThing nodes hand out, by name."""

    def __init__(self, monkeypatch, classes: dict, things: dict):
        self.client_id, self.last_node_id, self.node, self.messages, self.results = "test", None, None, [], {}
        host = self

        class Thing:
            RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "give", "test"

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {"name": ("STRING", {})}}

            def give(self, name):
                return (things[name],)

        class Result:
            RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, INPUT_IS_LIST = (), "take", "test", True, True

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {"value": ("*", {})}, "hidden": {"id": "UNIQUE_ID"}}

            def take(self, value, id):
                host.results[id[0]] = value
                return {}

        for name, node in {**classes, "TestThing": Thing, "TestResult": Result}.items():
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
        self.executor = execution.PromptExecutor(
            self, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 100, "ram": 0.1, "ram_inactive": 1024.0}
        )

    def send_sync(self, event, data, sid=None):
        if event == "executing":
            self.node = data["node"]
        self.messages.append((event, data))

    def run(self, prompt: dict) -> dict[str, list]:
        """What the prompt's TestResult nodes got, by their ids. What the host has kept from an earlier run is not given again."""
        self.messages.clear()
        self.results = {}
        # The host writes fingerprints into the prompt.
        self.executor.execute(
            copy.deepcopy(prompt),
            "id",
            {"client_id": "test"},
            [name for name, node in prompt.items() if node["class_type"] == "TestResult"],
        )
        return self.results

    def event(self, name: str) -> dict:
        """The data of the run's last message of a kind; {} where there is none."""
        return next((data for kind, data in reversed(self.messages) if kind == name), {})


@pytest.fixture(scope="module")
def classes():
    return node_classes(load_pack())


@pytest.fixture(scope="module")
def things(models, photo, tmp_path_factory):
    """Models of both layouts, with a text encoder that ends its replies after some tokens."""
    folder = tmp_path_factory.mktemp("terse")
    path, lora = folder / tiny_models.MLLM_FILE, folder / tiny_models.LORA_FILE
    tiny_models.write_mllm(path, terse=True)
    tiny_models.write_lora(lora)
    model = load_model(models / "diffusion_models" / tiny_models.V11_FILE)
    return {
        "image": photo[:, ::8, ::8].contiguous(), "vae": load_vae(models / "vae" / tiny_models.VAE_FILE),
        "clip v1.1": load_text_encoder(path, "v1.1"), "clip v1.2": load_text_encoder(path, "v1.2"),
        "model v1.1": model, "model v1.2": load_model(models / "diffusion_models" / tiny_models.V12_FILE),
        "model v1.1 teacache": apply_teacache(model, 0.2), "model v1.1 lora": apply_lora(model, load_lora_file(lora), 1.0),
    }


@pytest.fixture
def folders(models, tmp_path, monkeypatch):
    """Model folders of this test alone, with a LoRA and a diffusers repository of three shards."""
    for name in ("diffusion_models", "text_encoders", "vae"):
        shutil.copytree(models / name, tmp_path / name)
    tiny_models.write_lora(tmp_path / "loras" / tiny_models.LORA_FILE)
    weights = load_file(tmp_path / "diffusion_models" / tiny_models.V11_FILE)
    diffusers_repository(tmp_path / "diffusers" / "shards-v1p1", to_diffusers(weights))
    for name in ("diffusion_models", "text_encoders", "vae", "loras", "diffusers"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], {".safetensors"}))
    return tmp_path


@pytest.fixture
def host(monkeypatch, classes, things):
    return Host(monkeypatch, classes, things)


def to_prompt(graph: dict) -> dict:
    return {name: {"class_type": class_type, "inputs": inputs} for name, (class_type, inputs) in graph.items()}


def handed_out(**things: str) -> dict:
    return {name: ("TestThing", {"name": thing}) for name, thing in things.items()}


def edit_prompt(name: str = "v1.1", /, **loaders) -> dict:
    """Encode, sample and decode, with models that are handed out, or with the loaders given in their place."""
    return to_prompt(
        handed_out(model=f"model {name}", clip=f"clip {name.split()[0]}", vae="vae", image="image")
        | loaders
        | {
            "encode": (
                "Step1XEditEncode",
                {
                    "clip": ["clip", 0],
                    "vae": ["vae", 0],
                    "image": ["image", 0],
                    "prompt": "make it red",
                    "negative_prompt": "",
                    "size_level": 64,
                },
            ),
            "sampler": (
                "Step1XEditSampler",
                {
                    "model": ["model", 0],
                    "positive": ["encode", 0],
                    "negative": ["encode", 1],
                    "latent_image": ["encode", 2],
                    "seed": 3,
                    "steps": STEPS,
                    "cfg": 4.0,
                    "sampler_name": "euler",
                    "denoise": 1.0,
                },
            ),
            "decode": ("Step1XEditDecode", {"samples": ["sampler", 0], "vae": ["vae", 0], "source": ["image", 0]}),
            "result": ("TestResult", {"value": ["decode", 0]}),
        }
    )


def think_prompt(layout: str) -> dict:
    return to_prompt(handed_out(clip=f"clip {layout}", image="image") | {
        "think": ("Step1XEditThinkPrompt", {"clip": ["clip", 0], "image": ["image", 0], "prompt": "red", "seed": 1, "temperature": 0.7}),
        "result": ("TestResult", {"value": ["think", 0]}),
    })


def batch_prompt() -> dict:
    return to_prompt(
        handed_out(model="model v1.1", clip="clip v1.1", vae="vae", image="image")
        | {
            "batch": (
                "Step1XEditBatchImages",
                {
                    "model": ["model", 0],
                    "clip": ["clip", 0],
                    "vae": ["vae", 0],
                    "images": ["image", 0],
                    "prompts": "red\ngreen",
                    "combine": "all",
                    "negative_prompt": "",
                    "size_level": 64,
                    "seed": 1,
                    "steps": STEPS,
                    "cfg": 4.0,
                    "sampler_name": "euler",
                },
            ),
            "result": ("TestResult", {"value": ["batch", 0]}),
            "report": ("TestResult", {"value": ["batch", 1]}),
        }
    )


PROMPTS = {model: edit_prompt(model) for model in ("v1.1", "v1.2", "v1.1 teacache", "v1.1 lora")} | {
    "think": think_prompt("v1.1"),
    "batch": batch_prompt(),
}
# Prompts and the nodes of them that are struck.
STAGES = [(model, node) for model in ("v1.1", "v1.2") for node in ("encode", "sampler", "decode")] + [
    ("v1.1 teacache", "sampler"),
    ("think", "think"),
]


@pytest.fixture(scope="module")
def undisturbed(classes, things):
    """By prompt: the operations of its nodes when no model is loaded, those when all are, and what it gives."""
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, prompt in PROMPTS.items():
            comfy.model_management.unload_all_models()
            watches = []
            for _ in range(2):
                host = Host(monkeypatch, classes, things)
                with Watch(host) as watch:
                    results = host.run(prompt)
                watches.append({node: len(operations) for node, operations in watch.operations.items()})
            found[name] = *watches, results
    return found


def same(found: dict, expected: dict) -> bool:
    """Whether the results are equal to the last bit."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return found.keys() == expected.keys() and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("prompt, node", [*STAGES, ("batch", "batch")])
def test_cancel_acts_within_a_step_and_leaves_nothing(monkeypatch, classes, things, undisturbed, prompt, node, share):
    _, operations, expected = undisturbed[prompt]
    Host(monkeypatch, classes, things).run(PROMPTS[prompt])
    host = Host(monkeypatch, classes, things)
    with Watch(host, node, int(share * operations[node]), cancel) as watch:
        assert host.run(PROMPTS[prompt]) == {}
    assert host.event("execution_interrupted")["node_id"] == node
    assert watch.operations_after() <= operations[node] / UNITS[node] and watch.left() == []
    assert same(host.run(PROMPTS[prompt]), expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("prompt, node", [*STAGES, ("v1.1 lora", "sampler")])
def test_out_of_memory_frees_what_it_took(host, undisturbed, prompt, node, share):
    operations, _, expected = undisturbed[prompt]
    comfy.model_management.unload_all_models()
    # 0.6 of an encoding lies in the VAE. After the first time the VAE tries again with tiles, and then our decode with smaller ones; how often differs between hosts.
    with Watch(
        host,
        node,
        int(share * operations[node]),
        run_out_of_memory,
        *((10**6, "conv") if node == "decode" or (node, share) == ("encode", 0.6) else ()),
    ) as watch:
        assert host.run(PROMPTS[prompt]) == {}
    error = host.event("execution_error")
    assert error["node_id"] == node and "out of memory" in error["exception_message"]
    assert comfy.model_management.current_loaded_models == [] and watch.left() == []
    assert same(host.run(PROMPTS[prompt]), expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("operation", range(0, 900, 150))
def test_out_of_memory_while_a_lora_is_merged_spoils_no_weights(monkeypatch, classes, things, undisturbed, operation):
    host = Host(monkeypatch, classes, things)
    comfy.model_management.unload_all_models()
    with Watch(host, "sampler", operation, run_out_of_memory):
        host.run(PROMPTS["v1.1 lora"])
    assert same(host.run(PROMPTS["v1.1"]), undisturbed["v1.1"][2])
    assert same(Host(monkeypatch, classes, things).run(PROMPTS["v1.1 lora"]), undisturbed["v1.1 lora"][2])


def first_convolution(watch: Watch, node: str) -> int:
    return next(i for i, name in enumerate(watch.operations[node]) if "conv" in name)


def test_decoding_out_of_memory_goes_on_in_tiles_that_can_be_cancelled(monkeypatch, classes, things, undisturbed):
    expected, = undisturbed["v1.1"][2]["result"]
    host = Host(monkeypatch, classes, things)
    with Watch(host) as watch:
        host.run(PROMPTS["v1.1"])
    convolution = first_convolution(watch, "decode")

    host = Host(monkeypatch, classes, things)
    with Watch(host, "decode", convolution, run_out_of_memory) as tiled:
        picture, = host.run(PROMPTS["v1.1"])["result"]
    assert torch.allclose(picture, expected, atol=2 / 255)

    strikes = iter((run_out_of_memory, cancel))
    host = Host(monkeypatch, classes, things)
    with Watch(host, "decode", convolution, lambda: next(strikes)(), times=2) as watch:
        assert host.run(PROMPTS["v1.1"]) == {}
    # The host decodes three times, in tiles of three shapes.
    assert (
        host.event("execution_interrupted")["node_id"] == "decode"
        and watch.operations_after() < tiled.operations_after() / 3
        and watch.left() == []
    )
    assert same(host.run(PROMPTS["v1.1"]), undisturbed["v1.1"][2])


def test_an_edit_of_a_batch_that_runs_out_of_memory_costs_itself_alone(host, undisturbed):
    operations, _, expected = undisturbed["batch"]
    comfy.model_management.unload_all_models()
    with Watch(host, "batch", int(0.6 * operations["batch"]), run_out_of_memory):
        results = host.run(PROMPTS["batch"])
    kept = [i for i in range(2) if torch.equal(results["result"][0], expected["result"][i])]
    assert len(results["result"]) == len(kept) == 1 and results["report"][0].count("out of memory") == 1
    # A failure is not kept.
    assert same(host.run(PROMPTS["batch"]), expected)


LOADERS = {
    "model": ("Step1XEditLoader", {"unet_name": tiny_models.V11_FILE, "version": "v1.1", "weight_dtype": "default"}),
    "shards": ("Step1XEditLoader", {"unet_name": "shards-v1p1/", "version": "auto", "weight_dtype": "default"}),
    "clip": ("Step1XEditMLLM", {"clip_name": tiny_models.MLLM_FILE, "device": "default", "version": "v1.1"}),
    "lora": ("Step1XEditLoadLora", {"model": ["plain", 0], "lora_name": tiny_models.LORA_FILE, "strength": 1.0}),
}
# By loader: the node of `edit_prompt` that it takes the place of.
PLACES = {name: name if name == "clip" else "model" for name in LOADERS}


def loading_prompt(loader: str) -> dict:
    return edit_prompt(**{PLACES[loader]: LOADERS[loader]}, **handed_out(plain="model v1.1"))


@pytest.mark.parametrize("loader", LOADERS)
def test_faults_while_loading(monkeypatch, classes, things, folders, loader):
    prompt, node = loading_prompt(loader), PLACES[loader]
    host = Host(monkeypatch, classes, things)
    with Watch(host) as watch:
        expected = host.run(prompt)
    operations = len(watch.operations[node])
    # Past the reading of the files, which takes no memory of its own.
    for share in (0.6, 0.9):
        host = Host(monkeypatch, classes, things)
        with Watch(host, node, int(share * operations), run_out_of_memory) as watch:
            assert host.run(prompt) == {}
        assert host.event("execution_error")["node_id"] == node and watch.left() == []
    with Watch(host, node, 0, cancel) as watch:
        assert host.run(prompt) == {}
    assert host.event("execution_interrupted")["node_id"] == node
    # The three shards are read one by one.
    assert watch.operations_after() < operations * (0.3 if loader == "shards" else 1) and watch.left() == []
    assert same(host.run(prompt), expected)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_deleted_while_its_prompt_waits(host, folders, loader):
    prompt = loading_prompt(loader)
    name = next(
        value
        for key, value in LOADERS[loader][1].items()
        if key in ("unet_name", "clip_name", "lora_name") and isinstance(value, str)
    )
    path = next(folders.glob(f"*/{name}"))
    valid, *_ = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert valid
    path.rename(folders / "elsewhere")
    assert host.run(prompt) == {}
    error = host.event("execution_error")
    assert error["node_id"] == PLACES[loader] and f"'{name}'" in error["exception_message"]
    (folders / "elsewhere").rename(path)
    assert "result" in host.run(prompt)
