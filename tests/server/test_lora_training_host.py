"""Training through the real ComfyUI: the shipped workflow with cancel and resume, stock nodes around it, and the command."""

import json
import subprocess
import sys
import time

import pytest
import tiny_models
import torch
import train_lora
from comfy_server import Client, ExecutionError, find_nodes, to_api
from conftest import PACK
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_edit_pairs import write_folder, write_picture

SMALL = {
    "Step1XEditTrainDataset": {"size_level": 64, "validation": 1},
    "Step1XEditTrainLora": {"steps": 12, "rank": 4, "validate_every": 6, "save_every": 4},
}
STATE, LORA = "state.safetensors", "lora.safetensors"


@pytest.fixture(scope="module")
def base(tiny_server):
    return tiny_server.base


@pytest.fixture(scope="module")
def client(tiny_server):
    return Client(tiny_server.url)


@pytest.fixture
def prompt(client):
    prompt = to_api(json.loads((PACK / "workflows" / "step1x_train_lora.json").read_text(encoding="utf-8")), client.get("/object_info"))
    for class_type, inputs in SMALL.items():
        prompt[find_nodes(prompt, class_type)[0]]["inputs"].update(inputs)
    return prompt


def steps_done(folder):
    return len(load_file(folder / STATE)["losses"])


@pytest.mark.once
def test_the_shipped_workflow_trains_is_cancelled_and_goes_on(client, prompt, base):
    data = write_folder(base / "input" / "my_pairs", 4)
    (trainer,), (reader,) = find_nodes(prompt, "Step1XEditTrainLora"), find_nodes(prompt, "Step1XEditTrainDataset")
    run_folder = base / "output" / "step1x_training" / "my_lora"
    prompt[trainer]["inputs"]["steps"] = 1000  # so many that the cancel comes in time on every machine
    # Reading the pairs counts to 8.
    cancelled = client.run(prompt, interrupt_at=9)
    done = steps_done(run_folder)
    assert cancelled.interrupted and 9 <= done < 1000 and (run_folder / LORA).is_file()

    steps = prompt[trainer]["inputs"]["steps"] = done + 6
    prompt["plot"] = {"class_type": "LossGraphNode", "inputs": {"loss": [trainer, 1], "filename_prefix": "loss"}}
    run = client.run(prompt)
    assert [value for value, _ in run.progress(trainer)][0] > done and run.progress(trainer)[-1] == (steps, steps)
    assert reader not in run.executed
    # The stock plot, and the sheet with the curve and the pair for validation.
    assert len(run.images) == 2 and run.previews > 0
    assert steps_done(run_folder) == steps
    saved, = (base / "output" / "loras").glob(f"step1x_lora_{steps}_steps_*.safetensors")
    ours = load_file(run_folder / LORA)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in load_file(saved).items()) and len(ours) == 3 * 26

    # What was changed on the disk is noticed: the finished LoRA is not given out for one of the new pairs, nor overwritten.
    finished = (run_folder / LORA).read_bytes()
    (data / "target" / "2.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(ExecutionError, match="uses another dataset"):
        client.run(prompt)
    assert (run_folder / LORA).read_bytes() == finished


@pytest.mark.once
def test_the_shipped_distillation_makes_a_lora_that_names_its_steps(client, base):
    folder = base / "input" / "my_sources" / "source"
    for i in range(3):
        write_picture(folder / f"{i}.png", i)
        (folder / f"{i}.txt").write_text(f"edit number {i}\n", encoding="utf-8")
    workflow = json.loads((PACK / "workflows" / "step1x_distill.json").read_text(encoding="utf-8"))
    prompt = to_api(workflow, client.get("/object_info"))
    (reader,), (trainer,) = (find_nodes(prompt, name) for name in ("Step1XEditTrainDataset", "Step1XEditTrainLora"))
    for class_type, inputs in SMALL.items():
        for node in find_nodes(prompt, class_type):
            prompt[node]["inputs"].update(inputs)
    prompt[reader]["inputs"]["validation"] = 0
    prompt[trainer]["inputs"] |= {"steps": 2, "accumulation": 1, "validate_every": 0}
    prompt[trainer]["inputs"] |= {"mode.few_steps": 2, "mode.teacher_steps": 4}
    client.run(prompt)
    with safe_open(base / "output" / "step1x_training" / "my_lightning" / LORA, "pt") as file:
        assert (file.metadata()["step1x_edit.steps"], float(file.metadata()["step1x_edit.cfg"])) == ("2", 1.0)


def test_what_is_trained_fits_the_stock_nodes(client):
    info = client.get("/object_info")
    outputs = dict(zip(info["Step1XEditTrainLora"]["output_name"], info["Step1XEditTrainLora"]["output"]))
    for output, node, name in (("lora", "SaveLoRA", "lora"), ("lora", "LoraModelLoader", "lora"), ("loss", "LossGraphNode", "loss")):
        assert info[node]["input"]["required"][name][0] == outputs[output], node


@pytest.mark.parametrize(
    "dataset, message",
    [
        ("nothing", "There is no dataset"),
        ("../output", "names no dataset"),
        ("", "names no dataset"),
        ("nothing [output]", "There is no dataset"),
        ("../../x [output]", "names no dataset"),
        ("bad.json", "could not be read as JSON"),
    ],
)
def test_bad_datasets_are_one_sentence_in_the_editor(client, prompt, base, dataset, message):
    (base / "input" / "bad.json").write_text("{", encoding="utf-8")
    prompt[find_nodes(prompt, "Step1XEditTrainDataset")[0]]["inputs"]["dataset"] = dataset
    with pytest.raises(ExecutionError, match=message):
        client.run(prompt)


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".."])
def test_a_name_stays_in_its_folder(client, prompt, base, name):
    write_folder(base / "input" / "my_pairs", 4)
    prompt[find_nodes(prompt, "Step1XEditTrainLora")[0]]["inputs"]["name"] = name
    with pytest.raises(ExecutionError, match="cannot be the name of a training"):
        client.run(prompt)


def command(models, data, out, *options):
    files = {"--model": models / "diffusion_models" / tiny_models.V11_FILE, "--mllm": models / "text_encoders" / tiny_models.MLLM_FILE,
             "--vae": models / "vae" / tiny_models.VAE_FILE}
    return [
        sys.executable,
        str(PACK / "scripts" / "train_lora.py"),
        str(data),
        str(out),
        "--cpu",
        "--size-level",
        "64",
        "--rank",
        "4",
        "--learning-rate",
        "0.01",
        *(str(part) for pair in files.items() for part in pair),
        *options,
    ]


@pytest.fixture
def run_here(monkeypatch):
    """Runs the command in this process, which has ComfyUI already -> its exit status."""
    def run(line):
        monkeypatch.setattr(sys, "argv", line[1:])
        return train_lora.main()

    return run


@pytest.mark.once
def test_the_command_goes_on_after_a_kill(models, tmp_path, run_here, capsys):
    data = write_folder(tmp_path / "pairs", 3)
    killed = subprocess.Popen(
        command(models, data, tmp_path / "killed", "--steps", "100000", "--save-every", "1"), stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed" / STATE).is_file():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    steps = str(steps_done(tmp_path / "killed") + 2)
    for name in ("killed", "whole"):
        assert run_here(command(models, data, tmp_path / name, "--steps", steps, "--validation", "0")) == 0
        assert "0 latents and conditionings encoded" in capsys.readouterr().err and (tmp_path / name / "progress.png").is_file()
    killed, whole = (load_file(tmp_path / name / LORA) for name in ("killed", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in killed.items())


@pytest.mark.once
def test_the_command_shows_the_pairs_for_validation_after_the_last_step(models, tmp_path, run_here):
    data = write_folder(tmp_path / "pairs", 3)
    sizes = []
    for options in (["--validation", "0"], ["--validation", "1", "--validate-every", "5", "--weight-dtype", "fp8_scaled"]):
        assert run_here(command(models, data, tmp_path / "out", "--steps", "1", "--restart", *options)) == 0
        sizes.append(Image.open(tmp_path / "out" / "progress.png").size)
    assert sizes[1][1] > sizes[0][1]


@pytest.mark.once
def test_the_command_says_what_is_wrong(models, tmp_path, run_here, capsys):
    assert run_here(command(models, tmp_path / "nothing", tmp_path / "out")) == 1 and "There is no dataset" in capsys.readouterr().err
