"""What the editor asks the server for: replacements for the nodes of earlier Step1X-Edit packs, translations, node pages."""

import importlib.util
import io
import sys

import demo_model
import numpy as np
import pytest
from comfy_server import ExecutionError
from conftest import PACK
from PIL import Image

import locales

spec = importlib.util.spec_from_file_location("earlier_nodes", PACK / "nodes" / "earlier.py")
earlier_nodes = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = earlier_nodes  # a dataclass looks its module up
spec.loader.exec_module(earlier_nodes)
EARLIER = earlier_nodes.EARLIER

PROMPT = demo_model.SAMPLE_PROMPT
# As the packs' workflows hold them: the widgets in order, behind a seed what happens to it after a run.
OLD_EDITS = {
    "Step-1XEditNode": ("image", [PROMPT, 7, "randomize", 1.5, 128, 6, "step1x-edit.safetensors", "vae.safetensors", "Qwen", False, False]),
    "RunningHub_Step1XEdit": ("ref_image", [PROMPT, 6, 1.5, 128, 7, "fixed", True]),
    "Step1XEditGenerate": ("input_image", [PROMPT, "", 6, 1.5, 7, "randomize", 128]),
    "REDStep1XEditGenerate": ("input_image", [PROMPT, "", 6, 1.5, 7, "randomize", 128]),
    "Step1XEditTeaCacheGenerate": ("input_image", [PROMPT, "", 6, 1.5, 7, "randomize", 128]),
}
OLD_LOADERS = {
    "Step1XEditModelLoader": [demo_model.MODEL_FILE, "vae.safetensors", "Qwen", "bfloat16", "torch-sdpa", True, False],
    "REDStep1XEditModelLoader": [demo_model.MODEL_FILE, "vae.safetensors", "Qwen", "bfloat16", "torch-sdpa", True, False],
    "Step1XEditTeaCacheModelLoader": [demo_model.MODEL_FILE, "vae.safetensors", "Qwen", "bfloat16", True, False, "0.6", False],
}


@pytest.fixture(scope="module")
def client(demo_server):
    demo_server.upload_image(PACK / "assets" / "scene.png", "scene.png")
    return demo_server


@pytest.fixture(scope="module")
def offers(client):
    return client.get("/node_replacements")


@pytest.fixture(scope="module")
def object_info(client):
    return client.get("/object_info")


def required(object_info, node) -> dict:
    return object_info[node]["input"]["required"]


def replaced(offer, object_info, widgets_values, links) -> dict:
    """A node of an old workflow as the editor replaces it, in API form. links: by old input."""
    inputs = {}
    for name, (_, *options) in required(object_info, offer["new_node_id"]).items():
        if options and "default" in options[0] and not options[0].get("forceInput"):
            inputs[name] = options[0]["default"]
    for entry in offer["input_mapping"]:
        if "set_value" in entry:
            inputs[entry["new_id"]] = entry["set_value"]
        elif entry["old_id"] in links:
            inputs[entry["new_id"]] = links[entry["old_id"]]
        elif entry["old_id"] in offer["old_widget_ids"]:
            inputs[entry["new_id"]] = widgets_values[offer["old_widget_ids"].index(entry["old_id"])]
    return {"class_type": offer["new_node_id"], "inputs": inputs, "_meta": {"title": "replaced"}}


def test_every_node_of_the_earlier_packs_is_offered_one_of_ours(offers, object_info):
    ours = {old for old, (first, *_) in offers.items() if "Step1X" in first["new_node_id"] + old}
    assert ours == {*OLD_EDITS, *OLD_LOADERS, *EARLIER}
    for old in {*OLD_EDITS, *OLD_LOADERS}:
        (offer,) = offers[old]
        assert old not in object_info and offer["new_node_id"] in object_info
        known = required(object_info, offer["new_node_id"])
        for entry in offer["input_mapping"]:
            assert entry["new_id"] in known
            if isinstance(known[entry["new_id"]][0], list) and "set_value" in entry:
                assert entry["set_value"] in known[entry["new_id"]][0]


@pytest.mark.parametrize("old", EARLIER)
def test_a_node_of_our_own_earlier_version_gives_its_inputs_to_the_one_in_its_place(offers, object_info, old):
    (offer,) = offers[old]
    known = object_info[offer["new_node_id"]]["input"]
    names = {*known.get("required", {}), *known.get("optional", {})}
    assert old not in object_info
    for entry in offer["input_mapping"]:
        # Inputs that grow and those behind a choice are addressed below the name of the whole.
        assert entry["new_id"].split(".")[0] in names
    places = [entry["new_idx"] for entry in offer["output_mapping"]]
    assert len(set(places)) == len(places) and set(places) <= set(range(len(object_info[offer["new_node_id"]]["output"])))


# Outputs of the pair nodes of 0.1.0, by the names of those that take their place.
PAIR_OUTPUTS = {
    "Step1XPairJudge": ["kept", "report"],
    "Step1XPairFilter": ["kept", "dropped", "report"],
    "Step1XPairSheet": ["contact_sheet", "report"],
    "Step1XPairSave": ["folder", "report"],
}


@pytest.mark.parametrize("old", PAIR_OUTPUTS)
def test_pair_nodes_that_became_one_keep_what_they_did(offers, object_info, old):
    (offer,) = offers[old]
    names = object_info[offer["new_node_id"]]["output_name"]
    assert [names[entry["new_idx"]] for entry in offer["output_mapping"]] == PAIR_OUTPUTS[old]
    old_values = {
        "Step1XPairJudge": [7, "fixed"],
        "Step1XPairFilter": [5.0, 4.0, 0.1, 0.9, True],
        "Step1XPairSheet": [9],
        "Step1XPairSave": ["mine"],
    }[old]
    inputs = replaced(offer, object_info, old_values, {"pairs": ["1", 0]})["inputs"]
    expected = {
        # It let all pass.
        "Step1XPairJudge": {"seed": 7, "min_semantics": 0.0, "min_quality": 0.0, "min_change": 0.0, "max_change": 1.0, "unjudged": True},
        "Step1XPairFilter": {"min_semantics": 5.0, "min_quality": 4.0, "min_change": 0.1, "max_change": 0.9, "unjudged": True, "seed": 42},
        # It saved nothing.
        "Step1XPairSheet": {"name": "", "limit": 9},
        "Step1XPairSave": {"name": "mine", "limit": 24},
    }[old]
    assert inputs == {"pairs": ["1", 0], **expected}


@pytest.mark.parametrize("old", OLD_EDITS)
def test_widgets_reach_the_inputs_that_they_belong_to(offers, object_info, old):
    image, values = OLD_EDITS[old]
    inputs = replaced(offers[old][0], object_info, values, {image: ["1", 0]})["inputs"]
    expected = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": 7,
        "steps": 6,
        "cfg": 1.5,
        "size_level": 128,
        "image": ["1", 0],
        "think": False,
        "reflect": False,
    }
    assert {name: inputs[name] for name in expected} == expected
    # What is left is to be connected by the person.
    assert set(required(object_info, "Step1XEditReflectionLoop")) - set(inputs) == {"model", "clip", "vae"}


def parts() -> dict:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "scene.png"}},
        "2": {
            "class_type": "Step1XEditMLLM",
            "inputs": {"clip_name": demo_model.MLLM_FILE, "device": "default", "version": "auto"},
        },
        "3": {"class_type": "VAELoader", "inputs": {"vae_name": demo_model.VAE_FILE}},
    }


@pytest.mark.parametrize("loader, generate, bundle", [("REDStep1XEditModelLoader", "REDStep1XEditGenerate", "model_bundle"),
                                                      ("Step1XEditTeaCacheModelLoader", "Step1XEditTeaCacheGenerate", "model")])
def test_a_replaced_workflow_edits(client, offers, object_info, loader, generate, bundle):
    prompt = parts()
    prompt["4"] = replaced(offers[loader][0], object_info, OLD_LOADERS[loader], {})
    image, values = OLD_EDITS[generate]
    prompt["5"] = replaced(offers[generate][0], object_info, values, {bundle: ["4", 0], image: ["1", 0]})
    prompt["5"]["inputs"] |= {"clip": ["2", 0], "vae": ["3", 0]}
    (output,) = {entry["new_idx"] for entry in offers[generate][0]["output_mapping"]}
    prompt["6"] = {"class_type": "SaveImage", "inputs": {"images": ["5", output], "filename_prefix": "replaced"}}
    picture = np.asarray(Image.open(io.BytesIO(client.run(prompt).images[0])).convert("RGB"))
    red, green, blue = picture[24:40, 18:34].mean(axis=(0, 1))
    assert blue > red > green


def test_an_old_prompt_sent_to_the_server_names_what_is_to_be_connected(client):
    prompt = {
        "1": parts()["1"],
        "5": {
            "class_type": "RunningHub_Step1XEdit",
            "_meta": {"title": ""},
            "inputs": {
                "ref_image": ["1", 0],
                "prompt": PROMPT,
                "num_steps": 6,
                "cfg_guidance": 1.5,
                "size_level": 128,
                "seed": 7,
                "use_fp8": True,
            },
        },
        "6": {
            "class_type": "SaveImage",
            "inputs": {"images": ["5", 0], "filename_prefix": "replaced"},
            "_meta": {"title": ""},
        },
    }
    with pytest.raises(ExecutionError) as refusal:
        client.run(prompt)
    errors = refusal.value.details["node_errors"]
    assert list(errors) == ["5"] and errors["5"]["class_type"] == "Step1XEditReflectionLoop"
    missing = {(error["type"], error["extra_info"]["input_name"]) for error in errors["5"]["errors"]}
    assert missing == {("required_input_missing", name) for name in ("model", "clip", "vae")}


def test_translations_are_served(client):
    served = client.get("/i18n")
    for language in (locales.SOURCE, *locales.TRANSLATIONS):
        assert served[language]["nodeDefs"].items() >= locales.read(language).items() and served[language]["nodeCategories"]["Step1X-Edit"]


def test_pages_are_served_where_the_editor_looks(client, object_info):
    ours = [name for name, info in object_info.items() if name.startswith("Step1X") and not info.get("dev_only")]
    chinese = locales.read("zh")
    assert set(ours) == set(chinese)
    for name in ours:
        assert client.get_text(f"/extensions/ComfyUI-Step1X-Edit/docs/{name}/zh.md").startswith(f"# {chinese[name]['display_name']}\n")
