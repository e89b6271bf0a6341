"""GEdit-Bench through the real ComfyUI: the nodes and their workflows, and the command from the dataset to the report."""

import importlib.util
import io
import json
import re
import shutil

import numpy as np
import pytest
import tiny_models
from chat_server import SCORES, chat_server, send, stall
from comfy_server import Client, ExecutionError, find_nodes
from conftest import PACK
from PIL import Image
from safetensors.torch import load_file, save_file
from shipped import shipped_prompt

from step1x_core.gedit.dataset import read_dataset, result_path, select
from step1x_core.gedit.miniature import miniature
from step1x_core.gedit.scores import read_records, records_path

# By path: `import gedit` could be any module.
spec = importlib.util.spec_from_file_location("gedit_command", PACK / "scripts" / "gedit.py")
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)

FAST = ["--set", "Step1XEditEncode.size_level=64", "--set", "Step1XEditSampler.steps=1"]
BATCH = [
    "--workflow",
    str(PACK / "workflows" / "step1x_edit_batch.json"),
    "--set",
    "Step1XEditBatchImages.size_level=64",
    "--set",
    "Step1XEditBatchImages.steps=1",
]

# A judge of few words: its most probable answer ends, too, and not only one drawn by chance.
JUDGE_FILE = "few_words.safetensors"
SMALL = {"Step1XEditMLLM": {"clip_name": JUDGE_FILE}, "Step1XEditEncode": {"size_level": 64}, "Step1XEditSampler": {"steps": 1}}


@pytest.fixture(scope="module")
def server(tiny_server):
    folder = tiny_server.base / "models" / "text_encoders"
    weights = load_file(folder / tiny_models.MLLM_FILE)
    weights["lm_head.weight"][tiny_models.TURN_END_ID] *= 100
    save_file(weights, folder / JUDGE_FILE, metadata={"step1x_edit_config": json.dumps(tiny_models.TINY_MLLM)})
    return tiny_server


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url)


@pytest.fixture
def prompt_of(client):
    def load(name, **changes):
        return shipped_prompt(client, name, SMALL, changes)

    return load


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "mini"
    assert command.main(["miniature", str(folder)]) == 0
    return folder


def texts(run, prompt) -> list[str]:
    return [
        data["output"]["text"][0]
        for kind, data in run.events
        if kind == "executed" and prompt[data["node"]]["class_type"] == "PreviewAny"
    ]


@pytest.mark.once
def test_the_shipped_workflows_edit_and_judge_the_miniature(server, client, prompt_of):
    method = {"Step1XEditGEditItems": {"method": "shipped", "language": "cn", "task_types": "subject-add, text_change", "limit": 1}}
    prompt = prompt_of("step1x_gedit_edit.json", **method)
    results = server.base / "output" / "gedit_bench"
    items = select(miniature(), ["cn"], ["subject-add", "text_change"])
    for item in items:
        # Nothing in the prompt changes: queued again, it takes the next item.
        run = client.run(prompt)
        path = result_path(results, "shipped", item)
        assert Image.open(path).size == (160, 120) and texts(run, prompt) == [f"{item.name}: shipped/fullset/{item.name}.png"]
    with pytest.raises(ExecutionError, match="All 2 items have a result of the method 'shipped'"):
        client.run(prompt)

    # One is taken away again.
    result_path(results, "shipped", items[0]).unlink()
    judging = prompt_of("step1x_gedit_judge.json", **{"Step1XEditGEditItems": {**method["Step1XEditGEditItems"], "task_types": ""}})
    run = client.run(judging)
    (report,) = texts(run, judging)
    assert (
        "0 of 11 items judged; 10 missing, 1 unparsable, 0 not judged yet." in report
        and "| **average** | 0 | - | - | - | 11 | 0.000 |" in report
    )
    assert len(run.images) == 3 and (results / "shipped" / "scores" / "qwen2.5-vl-7b" / "summary.csv").is_file()
    records = records_path(results, "shipped", "qwen2.5-vl-7b")
    before = records.read_bytes()
    client.run(judging)
    assert records.read_bytes() == before


def test_several_items_in_one_run_and_a_bench_in_the_input_folder(server, client, prompt_of, data):
    shutil.copytree(data, server.base / "input" / "mini")
    prompt = prompt_of(
        "step1x_gedit_edit.json",
        Step1XEditGEditItems={"dataset": "mini", "method": "three", "language": "en", "limit": 1, "count": 3},
    )
    client.run(prompt)
    found = sorted(path.stem for path in (server.base / "output" / "gedit_bench" / "three").rglob("*.png"))
    assert found == ["en00", "en01", "en02"]


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "../output"}, "is not in ComfyUI's input folder"),
    ({"dataset": "/etc"}, "is not in ComfyUI's input folder"),
    ({"dataset": "nothing"}, "There is no GEdit-Bench in"),
    ({"method": "../../escape"}, "cannot be a name of a method"),
    ({"task_types": "painting"}, "has no task type 'painting'; it has background_change"),
])
def test_what_the_nodes_refuse(client, prompt_of, changes, message):
    with pytest.raises(ExecutionError, match=message):
        client.run(prompt_of("step1x_gedit_edit.json", Step1XEditGEditItems=changes))


def test_pictures_that_went_missing_are_not_stored_under_other_items(client, prompt_of):
    prompt = prompt_of("step1x_gedit_edit.json", Step1XEditGEditItems={"method": "mixed", "count": 2})
    save, = find_nodes(prompt, "Step1XEditGEditSave")
    prompt["one"] = {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": 0}}
    prompt[save]["inputs"]["images"] = ["one", 0]
    with pytest.raises(ExecutionError, match="'images' and 'items' have 1 and 2 entries"):
        client.run(prompt)


@pytest.mark.once
def test_the_command_from_dataset_to_report_with_a_judge_that_fails(server, data, tmp_path, capsys, monkeypatch):
    results = tmp_path / "results"
    choice = [
        "--data",
        str(data),
        "--results",
        str(results),
        "--method",
        "tiny",
        "--tasks",
        "subject-add",
        "text_change",
        "style_change",
        "--languages",
        "en",
        "cn",
    ]
    edit = ["edit", *choice, "--server", server.url, *FAST]
    items = [item for item in read_dataset(data) if item.task_type in ("subject-add", "text_change", "style_change")]
    assert command.main([*edit, "--limit", "1"]) == 0
    paths = [result_path(results, "tiny", item) for item in items]
    assert all(path.is_file() for path in paths) and {Image.open(path).size for path in paths} == {(160, 120)}
    # Resumed: only what is missing, and a cut file, is made again, to the same pixels.
    kept, made = paths[0].stat().st_mtime_ns, paths[1].read_bytes()
    paths[1].write_bytes(made[:50])
    assert command.main(edit) == 0 and paths[0].stat().st_mtime_ns == kept
    assert np.array_equal(np.asarray(Image.open(paths[1])), np.asarray(Image.open(io.BytesIO(made))))
    paths[2].unlink()
    assert command.main([*edit, "--seed", "1"]) == 1 and "another workflow or other settings" in capsys.readouterr().err

    # One answer after the other: good, an outage, an unreadable one, and good again.
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = ["judge", *choice, "--model", "org/judge:72b", "--timeout", "0.4", "--tries", "2", "--pause", "0.01"]
    answers = [
        SCORES,
        '{"score": [4, 9]}',
        send(429, b"busy"),
        stall,
        *["no idea"] * 5,
        '{"score": [5, 5]}',
        '{"score": [10, 9]}',
        '{"score": [9, 10]}',
        SCORES,
    ]
    with chat_server(*answers) as (url, requests):
        assert command.main([*judge, "--endpoint", url]) == 1
        records = read_records(records_path(results, "tiny", "org_judge_72b"))
        assert [records.get(item.name, {}).get("semantics") for item in items] == [[6, 9], None, None, None, [10, 9], [6, 9]]
        assert items[1].name not in records and items[3].name in records and "gave no answer in 2 tries" in capsys.readouterr().err
        asked = len(requests)
        # The rest is asked about, and nothing else.
        assert command.main([*judge, "--endpoint", url]) == 0 and len(requests) == asked + 2
    assert command.main(["report", *choice, "--judge", "org_judge_72b"]) == 0
    assert "4 of 6 items judged; 1 missing, 1 unparsable, 0 not judged yet." in capsys.readouterr().out
    assert "secret" not in "".join(path.read_text(encoding="utf-8") for path in results.rglob("*.json*"))


def test_the_command_runs_batches_and_falls_back_to_single_items(server, data, tmp_path, monkeypatch):
    singles, batches = tmp_path / "singles", tmp_path / "batches"
    choice = [
        "--data",
        str(data),
        "--method",
        "m",
        "--tasks",
        "motion_change",
        "ps_human",
        "--languages",
        "en",
        "cn",
        "--server",
        server.url,
    ]
    assert command.main(["edit", *choice, "--results", str(singles), *BATCH]) == 0
    groups = []
    run_items = command.run_items

    def one_lost(client, workflow, items, folder):
        groups.append(len(items))
        return run_items(client, workflow, items, folder)[:-1 if len(groups) == 1 else None]

    monkeypatch.setattr(command, "run_items", one_lost)
    assert command.main(["edit", *choice, "--results", str(batches), "--batch", "2", *BATCH]) == 0
    assert groups == [2, 1, 1, 2]
    names = [path.relative_to(singles) for path in sorted(singles.rglob("*.png"))]
    assert len(names) == 4 and names == [path.relative_to(batches) for path in sorted(batches.rglob("*.png"))]
    # The first of a batch has the seed of a single one, so has each that was tried alone.
    assert sum(np.array_equal(Image.open(singles / name), Image.open(batches / name)) for name in names) == 3


@pytest.mark.once
def test_the_command_starts_a_comfyui_of_its_own_and_a_local_judge_answers(server, data, tmp_path, capsys):
    choice = ["--data", str(data), "--results", str(tmp_path), "--method", "own", "--tasks", "ps_human", "--languages", "en"]
    assert command.main(["edit", *choice, "--models", str(server.base / "models"), *FAST]) == 0
    assert command.main(["judge", *choice, "--mllm", str(server.base / "models" / "text_encoders" / JUDGE_FILE)]) == 0
    assert "0 of 1 items judged; 0 missing, 1 unparsable" in capsys.readouterr().err
    assert (
        command.main(["report", *choice, "--judge", "few_words"]) == 0
        and (tmp_path / "own" / "scores" / "few_words" / "radar.png").is_file()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--set", "Step1XEditSampler.speed=9"], "has no such node or input"),
        (
            ["--workflow", str(PACK / "workflows" / "step1x_interior_material.json")],
            "not clear which node of the workflow saves the result; found: .*--output-node",
        ),
        (["--workflow", "nothing.json"], "The workflow nothing.json cannot be read"),
        (["--batch", "2"], "--batch needs a workflow with Step1X-Edit Batch Images"),
        (["--set", "Step1XEditLoader.unet_name=nothing.safetensors"], "ComfyUI refuses the workflow"),
        (
            [
                "--set",
                "Step1XEditEncode.size_level=1024",
                "--set",
                "Step1XEditSampler.sampler_name=euler",
                "--method",
                "a/b",
            ],
            "cannot be a name of a method",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_told_before_anything_runs(server, data, tmp_path, capsys, options, message):
    method = [] if "--method" in options else ["--method", "m"]
    assert command.main(["edit", "--data", str(data), "--results", str(tmp_path), "--server", server.url, *method, *options]) == 1
    assert re.search(message, capsys.readouterr().err) and not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    "name",
    [
        "step1x_edit.json",
        "step1x_edit_v12_thinking.json",
        "step1x_edit_v12_loop.json",
        "step1x_masked_edit.json",
        "step1x_edit_batch.json",
    ],
)
def test_shipped_workflows_are_understood(client, name):
    """Which nodes get picture and instruction, without running them."""
    options = command.arguments(["edit", "--data", "d", "--method", "m", "--workflow", str(PACK / "workflows" / name)])
    workflow = command.load_workflow(options.workflow, client, options)
    prompt = workflow.filled(["x.png"], ["do it"])
    assert [node["inputs"]["image"] for node in prompt.values() if node["class_type"] == "LoadImage"] == ["x.png"]
    instructed = [node for node in prompt.values() if "do it" in (node["inputs"].get("prompt"), node["inputs"].get("prompts"))]
    assert instructed == [prompt[workflow.prompt_node]]
    assert [node["class_type"] for node in prompt.values() if node["class_type"] in ("SaveImage", "PreviewImage")] == ["PreviewImage"]
