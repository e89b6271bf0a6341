"""The pack in a real ComfyUI server: shipped workflows over the HTTP API, previews, cancel, reload."""

import hashlib
import io
import json
import os
from pathlib import Path

import demo
import folder_paths
import numpy as np
import pytest
import tiny_models
import torch
from comfy_server import AFTER_GENERATE, Client, ExecutionError, find_nodes, to_api
from conftest import PACK
from diffusers_layout import diffusers_repository, to_diffusers
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from shipped import shipped_prompt

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.folders import resolve

WORKFLOWS = PACK / "workflows"
PHOTO = PACK / "assets" / "coffee.jpg"
# Of edits on a CPU, and the photograph's working size at that level, as [height, width, channels].
LEVEL, WORKING = 128, (96, 144, 3)


@pytest.fixture(scope="module")
def server(tiny_server):
    with Image.open(PHOTO) as photo:
        # A mask as the mask editor saves it: what is painted is transparent.
        photo.putalpha(ImageOps.invert(Image.linear_gradient("L").resize(photo.size).point(lambda value: 255 if 64 < value < 160 else 0)))
        photo.save(tiny_server.base / "masked.png")
    Client(tiny_server.url).upload_image(tiny_server.base / "masked.png", "masked.png")
    return tiny_server


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url)


@pytest.fixture(scope="module")
def object_info(client):
    return client.get("/object_info")


@pytest.fixture
def prompt_of(client):
    """A shipped workflow in API form, at a size and step count for a CPU."""
    def load(name, **changes):
        small = {
            "LoadImage": {"image": "coffee.jpg"},
            "Step1XEditEncode": {"size_level": LEVEL},
            "Step1XEditSampler": {"steps": 4},
            "Step1XEditScheduler": {"steps": 4},
            "EmptySD3LatentImage": {"width": 128, "height": 96},
            "Step1XEditReflectionLoop": {"size_level": LEVEL, "steps": 4, "rounds": 2},
            "Step1XEditBatchImages": {"size_level": LEVEL, "steps": 2},
        }
        return shipped_prompt(client, name, small, changes)

    return load


def pixels(run) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(run.images[0])).convert("RGB"))


def sampler_of(prompt) -> str:
    return (find_nodes(prompt, "Step1XEditSampler") + find_nodes(prompt, "SamplerCustomAdvanced"))[0]


def test_pack_is_loaded_without_complaint(server, object_info, client):
    complaints = [
        line
        for line in server.log_text().splitlines()
        if "ComfyUI-Step1X-Edit" in line and ("FAILED" in line or "Cannot import" in line)
    ]
    assert not complaints
    ours = {name: info for name, info in object_info.items() if name.startswith("Step1X") and not info.get("dev_only")}
    assert len(ours) == len(list((PACK / "web" / "docs").glob("*.md"))) and all(
        info["python_module"].startswith("custom_nodes.") for info in ours.values()
    )
    # The nodes that the loop and the turns are expanded to are kept out of the menu.
    assert {name for name, info in object_info.items() if name.startswith("Step1X") and info.get("dev_only")} == {
        "Step1XEditEncodeGuarded",
        "Step1XEditSamplerGuarded",
        "Step1XEditDecodeGuarded",
        "Step1XEditLoopStart",
        "Step1XEditLoopStep",
        "Step1XEditLoopJudge",
        "Step1XEditLoopResult",
        "Step1XEditTurnResult",
    }
    for name in ours:
        assert f"# {ours[name]['display_name']}" in client.get_text(f"/extensions/ComfyUI-Step1X-Edit/docs/{name}.md")


def test_workflows_are_offered_as_templates(client):
    templates = client.get("/workflow_templates")["ComfyUI-Step1X-Edit"]
    assert sorted(templates) == sorted(p.stem for p in WORKFLOWS.glob("*.json"))
    for name in templates:
        assert client.get(f"/api/workflow_templates/ComfyUI-Step1X-Edit/{name}.json")["nodes"]


EDITED = (600, 400)
SHIPPED = [
    ("step1x_edit.json", EDITED),
    ("step1x_edit_custom_sampler.json", EDITED),
    ("step1x_text_to_image.json", (128, 96)),
    ("step1x_edit_v12.json", EDITED),
    ("step1x_edit_v12_thinking.json", EDITED),
    ("step1x_masked_edit.json", EDITED),
    ("step1x_local_edit.json", EDITED),
    ("step1x_interior_material.json", EDITED),
    ("step1x_lora.json", EDITED),
    ("step1x_lightning.json", EDITED),
    ("step1x_low_vram.json", EDITED),
    ("step1x_fast.json", EDITED),
    ("step1x_region.json", EDITED),
    ("step1x_restore.json", EDITED),
    ("step1x_compose.json", EDITED),
    ("step1x_first_try.json", (128, 128)),
    # Not after step1x_local_edit, whose edit is the same and would come from the cache.
    ("step1x_local_edit_upscale.json", (1200, 800)),
]
# Sizes in the order of the Save Image nodes.
SHIPPED_BATCHES = {
    "step1x_product_variants.json": [EDITED] * 4,
    "step1x_social_media_set.json": [(1080, 1080)] * 3 + [(1080, 1350)] * 3 + [(1080, 1920)] * 3,
}
LOOP = "step1x_edit_v12_loop.json"
KEEP = "step1x_keep_unedited.json"
# Run in test_batch.py.
BATCH = "step1x_edit_batch.json"
# Run in test_edit_turns.py.
TURNS = "step1x_edit_in_turns.json"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name, size", SHIPPED)
def test_shipped_workflow_makes_a_picture(client, prompt_of, name, size):
    prompt = prompt_of(name, LoadImage={"image": "masked.png"})
    run = client.run(prompt)
    picture = pixels(run)
    assert picture.shape == (size[1], size[0], 3) and picture.std() > 10
    progress = run.progress(sampler_of(prompt))
    assert progress[-1] == (4, 4) and [value for value, _ in progress] == sorted(value for value, _ in progress)
    assert run.previews > 0


@pytest.mark.parametrize("name", SHIPPED_BATCHES)
def test_shipped_batch_makes_its_pictures(client, prompt_of, name):
    prompt = prompt_of(name)
    run = client.run(prompt)
    # The history lists the nodes in the order in which they ended.
    saved = {data["node"]: len(data["output"]["images"]) for kind, data in run.events if kind == "executed" and "images" in data["output"]}
    assert saved == {node: len(SHIPPED_BATCHES[name]) // len(saved) for node in find_nodes(prompt, "SaveImage")}
    assert sorted(Image.open(io.BytesIO(image)).size for image in run.images) == SHIPPED_BATCHES[name]
    assert len({hash(image) for image in run.images}) == len(run.images)
    edits = len(run.images) // len(saved)
    assert text_of(run, prompt).startswith(f"{edits} of {edits} edits made.")


@pytest.mark.once
def test_keep_unedited_shows_before_after_and_mask(client, prompt_of):
    """The tiny model's edit is noise all over: it is left whole, and the node says so."""
    prompt = prompt_of(KEEP)
    run = client.run(prompt)
    shown = {node: data["output"] for kind, data in run.events if kind == "executed" for node in [data["node"]]}
    images = [node for name in ("PreviewImage", "SaveImage", "MaskPreview") for node in find_nodes(prompt, name)]
    assert len(run.images) == 3 and all(len(shown[node]["images"]) == 1 for node in images)
    assert {Image.open(io.BytesIO(image)).size for image in run.images} == {EDITED}
    share, = find_nodes(prompt, "PreviewAny")
    assert shown[share]["text"] == ["1.0"]


def test_every_shipped_workflow_is_tested():
    here = {*(name for name, _ in SHIPPED), *SHIPPED_BATCHES, LOOP, KEEP, BATCH, TURNS}
    others = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*_host.py")] + [
        Path(__file__).with_name("test_gate.py").read_text(encoding="utf-8")
    ]
    missing = [p.stem for p in WORKFLOWS.glob("*.json") if p.name not in here and not any(p.stem in text for text in others)]
    assert not missing and here <= {p.name for p in WORKFLOWS.glob("*.json")}


def test_materials_are_two_edits_of_one_picture_inside_the_mask(client, prompt_of):
    run = client.run(prompt_of("step1x_interior_material.json", LoadImage={"image": "masked.png"}))
    first, second = (np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in run.images)
    with Image.open(PHOTO) as photo:
        source = np.asarray(photo.convert("RGB"))
    kept = np.asarray(Image.linear_gradient("L").resize((600, 400)).point(lambda value: 255 if 64 < value < 160 else 0)) == 0
    assert not np.array_equal(first, second)
    assert np.array_equal(first[kept], source[kept]) and np.array_equal(second[kept], source[kept])


def test_lora_workflow_is_the_edit_with_a_changed_model(client, prompt_of):
    def edit(strength):
        prompt, lora = {"prompt": "make it red"}, {"lora_name": tiny_models.LORA_FILE, "strength": strength}
        return pixels(client.run(prompt_of("step1x_lora.json", Step1XEditLoadLora=lora, Step1XEditEncode=prompt)))

    plain = pixels(client.run(prompt_of("step1x_edit.json", Step1XEditEncode={"prompt": "make it red"}, Step1XEditSampler={"cfg": 0})))
    assert np.array_equal(edit(0.0), plain) and not np.array_equal(edit(1.0), plain)


def test_blueprint_is_offered_and_is_the_plain_edit(client, prompt_of, object_info):
    entry, = (entry for entry in client.get("/global_subgraphs").items() if entry[1]["info"]["node_pack"].endswith("ComfyUI-Step1X-Edit"))
    assert entry[1]["name"] == "Step1X-Edit Image"
    blueprint = json.loads(client.get(f"/global_subgraphs/{entry[0]}")["data"])
    graph, = blueprint["definitions"]["subgraphs"]
    (outer,), ends = blueprint["nodes"], {link["id"]: (link["target_id"], link["target_slot"]) for link in graph["links"]}
    assert outer["type"] == graph["id"] and graph["name"] == entry[1]["name"]
    inner = {node["id"]: node for node in graph["nodes"]}
    outside = {link["id"] for link in graph["links"] if link["origin_id"] < 0}
    # Inside, an input that comes from the outside has its default; what is given there is the picture.
    for node in graph["nodes"]:
        node["inputs"] = [{**slot, "link": None if slot["link"] in outside else slot["link"]} for slot in node["inputs"]]
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    prompt = to_api(
        {
            "nodes": graph["nodes"],
            "links": [[link[key] for key in keys] for link in graph["links"] if link["id"] not in outside],
        },
        object_info,
    )
    prompt["load"] = {"class_type": "LoadImage", "inputs": {"image": "coffee.jpg"}}
    for port, slot in zip(graph["inputs"], outer["inputs"], strict=True):
        assert port["name"] == slot["name"] and ("widget" in slot) == (port["name"] != "image")
        for node, index in (ends[link] for link in port["linkIds"]):
            assert inner[node]["inputs"][index]["name"] == port["name"] or port["name"] == "image"
            if port["name"] == "image":
                prompt[str(node)]["inputs"][inner[node]["inputs"][index]["name"]] = ["load", 0]
    prompt[find_nodes(prompt, "Step1XEditEncode")[0]]["inputs"] |= {"prompt": "make it red", "size_level": LEVEL}
    prompt[find_nodes(prompt, "Step1XEditSampler")[0]]["inputs"]["steps"] = 4
    prompt["save"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [find_nodes(prompt, "Step1XEditDecode")[0], 0], "filename_prefix": "blueprint"},
    }
    plain = prompt_of("step1x_edit.json", Step1XEditEncode={"prompt": "make it red"})
    assert np.array_equal(pixels(client.run(prompt)), pixels(client.run(plain)))


def text_of(run, prompt) -> str:
    """What 'Preview as Text' showed."""
    preview, = find_nodes(prompt, "PreviewAny")
    return next(data["output"]["text"][0] for kind, data in run.events if kind == "executed" and data["node"] == preview)


def test_thinking_workflow_edits_by_what_it_shows(client, prompt_of):
    prompt = prompt_of("step1x_edit_v12_thinking.json", Step1XEditThinkPrompt={"seed": 1}, Step1XEditSampler={"seed": 1})
    run = client.run(prompt)
    rewritten = text_of(run, prompt).split("Rewritten: ")[1].split("\n\nAsked, system:")[0]
    assert rewritten != prompt[find_nodes(prompt, "Step1XEditThinkPrompt")[0]]["inputs"]["prompt"]
    plain = prompt_of("step1x_edit_v12.json", Step1XEditSampler={"seed": 1}, Step1XEditEncode={"prompt": rewritten})
    assert np.array_equal(pixels(client.run(plain)), pixels(run))


@pytest.mark.once
def test_loop_workflow_with_a_model_that_babbles(client, prompt_of):
    """Nothing is scripted here: random weights never keep a contract, and still there are pictures, a report, and one graph per round."""
    # The preview asks for no scores, which would take most of the time.
    prompt = prompt_of(LOOP, Step1XEditLoader={"version": "v1.2-preview"})
    loop, = find_nodes(prompt, "Step1XEditReflectionLoop")
    run = client.run(prompt)
    nodes = [*dict.fromkeys(node.removeprefix(f"{loop}.0.0.") for node in run.executed if node.startswith(f"{loop}."))]
    assert {f"round_{number}_{part}" for number in (1, 2) for part in ("encode", "sampler", "decode", "judge")} | {
        "round_2_step",
        "think",
        "start",
        "result",
    } == set(nodes)
    assert all(run.progress(f"{loop}.0.0.round_{number}_sampler")[-1] == (4, 4) for number in (1, 2)) and run.previews > 0
    assert run.progress(f"{loop}.0.0.think") and run.progress(f"{loop}.0.0.round_1_judge")
    assert len(run.images) == 3 and all(Image.open(io.BytesIO(image)).size == (600, 400) for image in run.images)
    report = text_of(run, prompt)
    assert report.count("Verdict: failed") == 2 and "in 20 tries" in report and "Best: round 2" in report
    assert not client.run(prompt).executed


def test_loop_without_thinking_and_reflection_is_the_plain_edit(client, prompt_of):
    prompt = prompt_of(LOOP, Step1XEditReflectionLoop={"think": False, "reflect": False, "prompt": "turn the coffee into tea", "seed": 3})
    run = client.run(prompt)
    assert {node.rsplit(".")[-1] for node in run.executed if "." in node} == {"round_1_encode", "round_1_sampler", "round_1_decode"}
    plain = prompt_of("step1x_edit_v12.json", Step1XEditSampler={"seed": 3}, Step1XEditEncode={"prompt": "turn the coffee into tea"})
    assert np.array_equal(pixels(client.run(plain)), pixels(run))


@pytest.mark.once
def test_cancel_in_a_loop_and_go_on(client, prompt_of):
    prompt = prompt_of(LOOP, Step1XEditReflectionLoop={"reflect": False, "steps": 60, "seed": 9})
    # The rewrite ends before its thirtieth token.
    cancelled = client.run(prompt, interrupt_at=30)
    loop, = find_nodes(prompt, "Step1XEditReflectionLoop")
    sampler = f"{loop}.0.0.round_1_sampler"
    assert (
        cancelled.interrupted
        and not cancelled.images
        and cancelled.executed[-1] == sampler
        and 30 <= cancelled.progress(sampler)[-1][0] < 60
    )
    resumed = client.run(prompt)
    assert len(resumed.images) == 2 and [node for node in resumed.executed if "." in node] == [sampler, f"{loop}.0.0.round_1_decode"]


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_nodes_of_a_shipped_workflow_exist_with_all_their_inputs(object_info, path):
    """Every input is linked to an output that exists, or has a value in the list of widget values; no value is left over."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    prompt = to_api(workflow, object_info)
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        info, inputs = object_info[node["type"]], prompt[str(node["id"])]["inputs"]
        definitions = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        # The slots of a growing input are named after it: "images.image0".
        assert set(info["input"].get("required", {})) <= {name.split(".")[0] for name in inputs} <= set(definitions), node["type"]
        values = [value for value in node.get("widgets_values", []) if value not in (*AFTER_GENERATE, "image")]
        if node["type"] == "CustomCombo":  # the server knows only the choice; the editor adds its entries
            assert values[0] in values[2:]
            values = values[:1]
        unlinked = to_api({"nodes": [{**node, "inputs": []}], "links": []}, object_info)[str(node["id"])]["inputs"]
        assert values == list(unlinked.values()), node["type"]
        for name, value in inputs.items():
            if isinstance(value, list):
                outputs = object_info[prompt[value[0]]["class_type"]]["output"]
                given, taken = outputs[value[1]], definitions[name.split(".")[0]][0]
                # 'Create List' takes and gives whatever is connected.
                assert given == taken or taken in ("*", "COMFY_AUTOGROW_V3") or given == "COMFY_MATCHTYPE_V3", f"{node['type']}.{name}"


def test_custom_sampler_workflow_equals_the_one_stop_sampler(client, prompt_of):
    one_stop, custom = (pixels(client.run(prompt_of(name))) for name in ("step1x_edit.json", "step1x_edit_custom_sampler.json"))
    assert np.array_equal(one_stop, custom)


def test_prompt_picture_and_seed_matter_and_equal_inputs_give_equal_pictures(client, prompt_of):
    def edit(**changes):
        return pixels(client.run(prompt_of("step1x_edit.json", **changes)))

    base = edit(Step1XEditSampler={"seed": 1})
    assert not np.array_equal(base, edit(Step1XEditSampler={"seed": 2}))
    assert not np.array_equal(base, edit(Step1XEditSampler={"seed": 1}, Step1XEditEncode={"prompt": "turn the coffee into tea"}))
    assert not np.array_equal(base, edit(Step1XEditSampler={"seed": 1}, Step1XEditEncode={"negative_prompt": "blurry"}))
    client.free()
    again = client.run(prompt_of("step1x_edit.json", Step1XEditSampler={"seed": 1}))
    assert np.array_equal(base, pixels(again)) and len(again.executed) == 8


def test_the_source_picture_matters(client, prompt_of, tmp_path):
    ImageOps.mirror(Image.open(PHOTO)).save(tmp_path / "mirrored.png")
    client.upload_image(tmp_path / "mirrored.png", "mirrored.png")
    straight, mirrored = (
        pixels(client.run(prompt_of("step1x_edit.json", LoadImage={"image": name})))
        for name in ("coffee.jpg", "mirrored.png")
    )
    assert straight.shape == mirrored.shape and np.abs(straight.astype(int) - mirrored).mean() > 1


def test_a_new_seed_encodes_nothing_again(client, prompt_of):
    client.run(prompt_of("step1x_edit.json", Step1XEditSampler={"seed": 11}))
    prompt = prompt_of("step1x_edit.json", Step1XEditSampler={"seed": 12})
    executed = {prompt[node]["class_type"] for node in client.run(prompt).executed}
    assert executed == {"Step1XEditSampler", "Step1XEditDecode", "SaveImage"}


def test_cancel_in_mid_sampling_and_run_again(client, prompt_of):
    prompt = prompt_of("step1x_edit.json", Step1XEditSampler={"seed": 21, "steps": 60})
    cancelled = client.run(prompt, interrupt_at=2)
    assert cancelled.interrupted and cancelled.progress(sampler_of(prompt))[-1][0] < 60 and not cancelled.images
    assert pixels(client.run(prompt_of("step1x_edit.json", Step1XEditSampler={"seed": 21}))).std() > 10


def test_output_stays_at_working_size_without_a_source(client, prompt_of):
    prompt = prompt_of("step1x_edit.json")
    del prompt[find_nodes(prompt, "Step1XEditDecode")[0]]["inputs"]["source"]
    assert pixels(client.run(prompt)).shape == WORKING


def test_ksampler_and_stock_model_loader(client, prompt_of):
    """The stock nodes in place of ours: Load Diffusion Model, ModelSamplingFlux, KSampler, VAE Decode."""
    prompt = prompt_of("step1x_edit.json")
    encode = find_nodes(prompt, "Step1XEditEncode")[0]
    loader = find_nodes(prompt, "Step1XEditLoader")[0]
    sampler, decode = find_nodes(prompt, "Step1XEditSampler")[0], find_nodes(prompt, "Step1XEditDecode")[0]
    ours = pixels(client.run(prompt_of("step1x_edit.json", Step1XEditSampler={"seed": 5})))
    prompt[loader] = {"class_type": "UNETLoader", "inputs": {"unet_name": tiny_models.V11_FILE, "weight_dtype": "default"}}
    prompt["guidance"] = {"class_type": "Step1XEditGuidance", "inputs": {"model": [loader, 0], "truncate": 0.93, "power": 0.4}}
    prompt["shift"] = {
        "class_type": "ModelSamplingFlux",
        "inputs": {
            "model": ["guidance", 0],
            "max_shift": 1.15,
            "base_shift": 0.5,
            "width": WORKING[1],
            "height": WORKING[0],
        },
    }
    prompt[sampler] = {
        "class_type": "KSampler",
        "inputs": {
            "model": ["shift", 0],
            "positive": [encode, 0],
            "negative": [encode, 1],
            "latent_image": [encode, 2],
            "seed": 5,
            "steps": 4,
            "cfg": 6.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        },
    }
    assert np.abs(pixels(client.run(prompt)).astype(int) - ours).mean() < 1.5
    prompt[decode] = {"class_type": "VAEDecode", "inputs": {"samples": [sampler, 0], "vae": prompt[encode]["inputs"]["vae"]}}
    assert pixels(client.run(prompt)).shape == WORKING


def test_reference_latent_node_and_text_only_encoder(client, prompt_of):
    """Text to image plus the stock ReferenceLatent is a different picture: the reference is really read."""
    prompt = prompt_of("step1x_text_to_image.json")
    without = pixels(client.run(prompt))
    vae = find_nodes(prompt, "VAELoader")[0]
    prompt["image"] = {"class_type": "LoadImage", "inputs": {"image": "coffee.jpg"}}
    prompt["scaled"] = {
        "class_type": "ImageScale",
        "inputs": {"image": ["image", 0], "upscale_method": "lanczos", "width": 128, "height": 96, "crop": "disabled"},
    }
    prompt["latent"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["scaled", 0], "vae": [vae, 0]}}
    sampler = prompt[sampler_of(prompt)]["inputs"]
    for side in ("positive", "negative"):
        prompt[f"reference_{side}"] = {"class_type": "ReferenceLatent", "inputs": {"conditioning": sampler[side], "latent": ["latent", 0]}}
        sampler[side] = [f"reference_{side}", 0]
    assert not np.array_equal(pixels(client.run(prompt)), without)


@pytest.mark.once
def test_unload_and_load_another_version(client, prompt_of):
    first = pixels(client.run(prompt_of("step1x_edit.json")))
    client.free()
    other = pixels(client.run(prompt_of("step1x_edit.json", Step1XEditLoader={"unet_name": tiny_models.V10_FILE})))
    assert not np.array_equal(first, other)
    forced = pixels(client.run(prompt_of("step1x_edit.json", Step1XEditLoader={"unet_name": tiny_models.V10_FILE, "version": "v1.1"})))
    assert not np.array_equal(other, forced)
    assert np.array_equal(first, pixels(client.run(prompt_of("step1x_edit.json"))))


def test_weight_dtypes_and_model_patches_run(client, prompt_of):
    exact = pixels(client.run(prompt_of("step1x_edit.json")))
    fp8 = pixels(client.run(prompt_of("step1x_edit.json", Step1XEditLoader={"weight_dtype": "fp8_e4m3fn"})))
    assert not np.array_equal(exact, fp8)
    prompt = prompt_of("step1x_edit.json")
    loader = find_nodes(prompt, "Step1XEditLoader")[0]
    prompt["cache"] = {"class_type": "Step1XEditSpeedPreset", "inputs": {
        "model": [loader, 0], "mode": "custom: TeaCache", "mode.threshold": 2.0, "mode.attention": "exact",
        "mode.start_percent": 0.0, "mode.end_percent": 1.0}}
    prompt[sampler_of(prompt)]["inputs"]["model"] = ["cache", 0]
    assert not np.array_equal(exact, pixels(client.run(prompt)))


def test_errors_are_sentences_and_the_next_run_works(server, client, prompt_of):
    folder = server.base / "models" / "diffusion_models"
    (folder / "page.safetensors").write_bytes(b"<html>404</html>")
    with pytest.raises(ExecutionError, match="page.safetensors is damaged, incomplete or not a safetensors file") as error:
        client.run(prompt_of("step1x_edit.json", Step1XEditLoader={"unet_name": "page.safetensors"}))
    assert error.value.details["node_type"] == "Step1XEditLoader"
    # The host compares the name with the list the node offers; our own check is behind that (test_only_offered_names_are_resolved).
    with pytest.raises(ExecutionError, match="not in"):
        client.run(prompt_of("step1x_edit.json", Step1XEditLoader={"unet_name": "../../secret.safetensors"}))
    with pytest.raises(ExecutionError, match="formats prompts for another model"):
        prompt = prompt_of("step1x_edit.json")
        loader = find_nodes(prompt, "Step1XEditMLLM")[0]
        clip = server.base / "models" / "text_encoders" / "clip_l.safetensors"
        write_clip_l(clip)
        prompt[loader] = {"class_type": "CLIPLoader", "inputs": {"clip_name": clip.name, "type": "stable_diffusion"}}
        client.run(prompt)
    with pytest.raises(ExecutionError, match="too narrow"):
        prompt = prompt_of("step1x_edit.json")
        prompt[find_nodes(prompt, "LoadImage")[0]] = {
            "class_type": "EmptyImage",
            "inputs": {"width": 4096, "height": 4, "batch_size": 1, "color": 0},
        }
        client.run(prompt)
    assert (
        pixels(
            client.run(
                prompt_of("step1x_edit.json", Step1XEditEncode={"prompt": "say <|image_pad|> twice <|image_pad|>"})
            )
        ).std()
        > 10
    )


def write_clip_l(path):
    """A CLIP-L text encoder of the real sizes but one layer, as a file of another model."""
    sd = {
        "text_model.embeddings.token_embedding.weight": torch.zeros(49408, 768),
        "text_model.embeddings.position_embedding.weight": torch.zeros(77, 768),
        "text_model.final_layer_norm.weight": torch.ones(768),
        "text_model.final_layer_norm.bias": torch.zeros(768),
    }
    for i in (0, 1, 10, 11):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sd[f"{layer}.self_attn.{name}.weight"], sd[f"{layer}.self_attn.{name}.bias"] = torch.zeros(768, 768), torch.zeros(768)
        sd[f"{layer}.mlp.fc1.weight"], sd[f"{layer}.mlp.fc1.bias"] = torch.zeros(3072, 768), torch.zeros(3072)
        sd[f"{layer}.mlp.fc2.weight"], sd[f"{layer}.mlp.fc2.bias"] = torch.zeros(768, 3072), torch.zeros(768)
        for norm in ("layer_norm1", "layer_norm2"):
            sd[f"{layer}.{norm}.weight"], sd[f"{layer}.{norm}.bias"] = torch.ones(768), torch.zeros(768)
    save_file(sd, path)


def test_diffusers_folder_is_offered_and_loads(server, client, prompt_of):
    source = server.base / "models" / "diffusion_models" / tiny_models.V11_FILE
    diffusers_repository(server.base / "models" / "diffusers" / "Step1X-Edit-v1p1-diffusers", to_diffusers(load_file(source)))
    info = client.get("/object_info/Step1XEditLoader")["Step1XEditLoader"]["input"]["required"]["unet_name"]
    offered = info[0] if isinstance(info[0], list) else info[1]["options"]
    assert "Step1X-Edit-v1p1-diffusers/" in offered and not any("00001-of-00003" in name for name in offered)
    expected = pixels(client.run(prompt_of("step1x_edit.json")))
    assert np.array_equal(
        pixels(
            client.run(prompt_of("step1x_edit.json", Step1XEditLoader={"unet_name": "Step1X-Edit-v1p1-diffusers/"}))
        ),
        expected,
    )


def test_only_offered_names_are_resolved(models, tmp_path, monkeypatch):
    """The pack's own check, for names that come past the host's: a file that exists outside the model folders is not reached."""
    folder = models / "diffusion_models"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))
    assert Path(resolve(tiny_models.V11_FILE, "diffusion_models", "transformer")) == folder / tiny_models.V11_FILE
    secret = tmp_path / "secret.safetensors"
    secret.touch()
    for name in (os.path.relpath(secret, folder), str(secret), f"../vae/{tiny_models.VAE_FILE}", ""):
        assert (folder / name).exists()
        with pytest.raises(Step1XError, match="is not in the diffusion_models folder"):
            resolve(name, "diffusion_models", "transformer")


@pytest.mark.once
def test_the_flux_vae_of_full_size(server, client, prompt_of):
    """The published layout of ae.safetensors (with random weights, in half precision) through the stock VAE loader."""
    shapes = tiny_models.flux_vae_shapes()
    entries = [entry for key, shape in shapes.items() for entry in (f"{key}:{'_'.join(map(str, shape))}", key)]
    assert len(shapes) == 244 and hashlib.md5(",".join(sorted(entries)).encode()).hexdigest() == "21ea55f476dfc4fd135587abb59dfe5d"
    save_file(tiny_models.random_weights(shapes, seed=4, dtype=torch.bfloat16), server.base / "models" / "vae" / "full_size.safetensors")
    picture = pixels(
        client.run(
            prompt_of(
                "step1x_edit.json", VAELoader={"vae_name": "full_size.safetensors"}, Step1XEditSampler={"steps": 2}
            )
        )
    )
    assert picture.shape == (400, 600, 3) and picture.std() > 1


def test_the_demo_takes_no_vae_of_another_model():
    others = ["qwen_image_vae.safetensors", "wan_2.1_vae.safetensors", "other/vae.safetensors", "taef1", "vae.safetensors"]
    assert demo.pick_vae(others) is None
    assert demo.pick_vae([*others, "FLUX/ae.safetensors"]) == "FLUX/ae.safetensors"
    assert demo.pick_vae([*others, "Step1X-Edit\\vae.safetensors"]) == "Step1X-Edit\\vae.safetensors"
