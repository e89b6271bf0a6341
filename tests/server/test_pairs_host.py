"""Training pairs through the real ComfyUI: the shipped workflows, and what the training reads of their datasets."""

import io
import json
import re

import pytest
from comfy_server import Client, ExecutionError, find_nodes
from PIL import Image
from shipped import shipped_prompt

from step1x_core.training.dataset import read_pairs

SMALL = {"Step1XEditEncode": {"size_level": 64}, "Step1XEditSampler": {"steps": 1}, "LoadImage": {"image": "coffee.jpg"}}


@pytest.fixture(scope="module")
def server(tiny_server):
    return tiny_server


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url)


@pytest.fixture
def prompt_of(client):
    def load(name, **changes):
        return shipped_prompt(client, name, SMALL, changes)

    return load


def texts(run, prompt) -> list[str]:
    return [
        data["output"]["text"][0]
        for kind, data in run.events
        if kind == "executed" and prompt[data["node"]]["class_type"] == "PreviewAny"
    ]


def test_computed_pairs_become_a_dataset_that_grows(server, client, prompt_of):
    prompt = prompt_of("step1x_make_pairs.json", Step1XEditPairSave={"name": "computed"})
    run = client.run(prompt)
    dataset = server.base / "output" / "edit_pairs" / "computed"
    pairs = read_pairs(dataset / "en-00000.json")
    assert (
        8 <= len(pairs) <= 12
        and {Image.open(pair.target).size for pair in pairs} == {(600, 400)}
        and len(read_pairs(dataset)) == 2 * len(pairs)
    )
    report, = (text for text in texts(run, prompt) if "added to" in text)
    assert report.startswith(f"{len(pairs)} pairs added to") and f"which has {len(pairs)}." in report
    sheet, = (Image.open(io.BytesIO(image)) for image in run.images)
    assert sheet.width == 1260 and all(pair.instruction in "\n".join(texts(run, prompt)) for pair in pairs)
    # The same pairs are not stored again; those of another seed come behind them.
    for path in (dataset / "en-00000.json", dataset / "zh-00000.json"):
        path.unlink()
    prompt[find_nodes(prompt, "Step1XEditPairCompute")[0]]["inputs"]["seed"] = 43
    client.run(prompt)
    assert len(read_pairs(dataset / "en-00000.json")) > len(pairs)


@pytest.mark.once
def test_a_proposed_edit_is_made_judged_and_filtered(server, client, prompt_of):
    """A model of random weights proposes nothing and judges nothing: the edits come from the table, and no pair passes."""
    prompt = prompt_of("step1x_propose_pairs.json", Step1XEditPairSave={"name": "judged"}, Step1XEditPairPropose={"count": 2})
    run = client.run(prompt)
    shown = "\n".join(texts(run, prompt))
    assert "gave no usable list in 3 tries" in shown and "0 of 2 pairs kept." in shown and shown.count("no usable judgement") == 2
    assert not list((server.base / "output" / "edit_pairs" / "judged").glob("*.json"))
    # Without the filter they are a dataset: sources as they were, targets of their size, the proposed instructions.
    prompt = prompt_of(
        "step1x_propose_pairs.json",
        Step1XEditPairSave={"name": "unjudged"},
        Step1XEditPairPropose={"count": 2},
        Step1XEditPairJudge={"unjudged": True},
    )
    client.run(prompt)
    pairs = read_pairs(server.base / "output" / "edit_pairs" / "unjudged" / "en-00000.json")
    assert len(pairs) == 2 and len({pair.source for pair in pairs}) == 1 and all(pair.instruction in shown for pair in pairs)
    assert {Image.open(path).size for pair in pairs for path in (pair.source, pair.target)} == {(600, 400)}
    entry, *_ = json.loads((server.base / "output" / "edit_pairs" / "unjudged" / "zh-00000.json").read_text(encoding="utf-8")).values()
    assert entry["provenance"]["maker"] == "Step1X-Edit v1.1" and entry["provenance"]["verdict"]["problem"]


def test_pairs_of_stock_filters_and_of_two_makers_in_one_dataset(server, client, prompt_of):
    """What any node makes can be a pair: here the stock 'Invert Image'; computed pairs come before it."""
    prompt = prompt_of(
        "step1x_make_pairs.json",
        Step1XEditPairSave={"name": "both"},
        Step1XEditPairCompute={"count": 2, "kinds": "text_change"},
    )
    load, compute = find_nodes(prompt, "LoadImage")[0], find_nodes(prompt, "Step1XEditPairCompute")[0]
    prompt["invert"] = {"class_type": "ImageInvert", "inputs": {"image": [load, 0]}}
    prompt["record"] = {
        "class_type": "Step1XEditPairRecord",
        "inputs": {
            "source": [load, 0],
            "target": ["invert", 0],
            "kind": "tone_transfer",
            "english": "turn it into a negative",
            "chinese": "变成底片",
            "direction": "forward",
            "maker": "Invert Image",
            "pairs": [compute, 0],
        },
    }
    prompt[find_nodes(prompt, "Step1XEditPairSave")[0]]["inputs"]["pairs"] = ["record", 0]
    client.run(prompt)
    pairs = read_pairs(server.base / "output" / "edit_pairs" / "both" / "zh-00000.json")
    assert len(pairs) == 3 and pairs[-1].instruction == "变成底片"


def test_what_is_saved_is_trained_on_where_it_lies(server, client, prompt_of):
    """In one run through the output of the node that saves, and later by its name."""
    prompt = prompt_of(
        "step1x_make_pairs.json",
        Step1XEditPairSave={"name": "trained"},
        Step1XEditPairCompute={"count": 2, "kinds": "text_change"},
    )
    save, = find_nodes(prompt, "Step1XEditPairSave")
    training = prompt_of("step1x_train_lora.json", Step1XEditTrainDataset={"size_level": 64, "validation": 0},
                         Step1XEditTrainLora={"name": "on_made_pairs", "steps": 1, "rank": 2, "validate_every": 0})
    for key, node in training.items():
        inputs = {name: [f"train{value[0]}", value[1]] if isinstance(value, list) else value for name, value in node["inputs"].items()}
        prompt[f"train{key}"] = {**node, "inputs": inputs}
    reader, = find_nodes(prompt, "Step1XEditTrainDataset")
    prompt[reader]["inputs"]["dataset"] = [save, 0]
    prompt["report"] = {"class_type": "PreviewAny", "inputs": {"source": [reader, 1]}}
    made = server.base / "output" / "edit_pairs" / "trained"
    run = client.run(prompt)
    count = len(read_pairs(made))
    assert count >= 2 and any(f"{count} pairs to train on" in text for text in texts(run, prompt))
    assert (server.base / "output" / "step1x_training" / "on_made_pairs" / "lora.safetensors").is_file()

    trainer, = find_nodes(prompt, "Step1XEditTrainLora")
    prompt[reader]["inputs"]["dataset"], prompt[trainer]["inputs"]["name"] = "edit_pairs/trained/zh-00000.json [output]", "on_half_of_them"
    shown = "\n".join(texts(client.run(prompt), prompt))
    assert f"{count // 2} pairs to train on" in shown and "0 latents and conditionings were encoded" in shown


def test_pairs_without_a_name_are_shown_and_not_saved(server, client, prompt_of):
    folder = server.base / "output" / "edit_pairs"
    before = {*folder.rglob("*")}
    prompt = prompt_of("step1x_make_pairs.json", Step1XEditPairSave={"name": "", "limit": 2}, Step1XEditPairCompute={"count": 4, "seed": 7})
    run = client.run(prompt)
    report, = (text for text in texts(run, prompt) if "Nothing was saved" in text)
    sheet, = (Image.open(io.BytesIO(image)) for image in run.images)
    assert {*folder.rglob("*")} == before and "| all |" in report and sheet.width == 1260


def test_pairs_are_filtered_without_a_text_encoder(server, client, prompt_of):
    """Kept and dropped pairs go their own ways: the kept ones into a dataset, the dropped ones to look at."""
    prompt = prompt_of("step1x_make_pairs.json", Step1XEditPairSave={"name": "sifted"}, Step1XEditPairCompute={"count": 8})
    (compute,), (save,) = find_nodes(prompt, "Step1XEditPairCompute"), find_nodes(prompt, "Step1XEditPairSave")
    limits = {"min_semantics": 7.0, "min_quality": 6.0, "min_change": 0.3, "max_change": 1.0, "unjudged": False, "seed": 1}
    prompt["judge"] = {"class_type": "Step1XEditPairJudge", "inputs": {"pairs": [compute, 0], **limits}}
    prompt[save]["inputs"]["pairs"] = ["judge", 0]
    prompt["look"] = {"class_type": "Step1XEditPairSave", "inputs": {"pairs": ["judge", 1], "name": "", "limit": 4}}
    for name, source in (("dropped", ["look", 2]), ("report", ["judge", 2])):
        prompt[name] = {"class_type": "PreviewAny", "inputs": {"source": source}}
    shown = "\n".join(texts(client.run(prompt), prompt))
    kept, made = map(int, re.search(r"(\d+) of (\d+) pairs kept", shown).groups())
    assert 0 < kept < made and f"Preview of {made - kept} pairs" in shown and f"{made} pairs have no scores" in shown
    pairs = read_pairs(server.base / "output" / "edit_pairs" / "sifted" / "en-00000.json")
    assert len(pairs) == kept and shown.count("of the pixels changed") == made - kept


@pytest.mark.parametrize("class_type, values, message", [
    ("Step1XEditPairSave", {"name": "../../escape"}, "cannot be a name of a dataset"),
    ("Step1XEditPairCompute", {"kinds": "painting"}, "'painting' is not a kind that can be made here"),
])
def test_what_the_nodes_refuse(client, prompt_of, class_type, values, message):
    with pytest.raises(ExecutionError, match=message):
        client.run(prompt_of("step1x_make_pairs.json", **{class_type: values}))
