"""The few-step mode of the training nodes, from a folder of sources and instructions to a LoRA file."""

import json
import sys
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from loop_host import load_pack, node_classes
from safetensors import safe_open
from test_distillation_runs import write_sources

from step1x_core.errors import Step1XError

FEW = {"mode": "few steps", "few_steps": 2, "teacher_steps": 8, "teacher_cfg": 2.0, "noises": 1, "later": "trajectory", "share": 0.5}
TRAINING = {
    "steps": 2,
    "learning_rate": 0.01,
    "rank": 2,
    "alpha": 1.0,
    "batch_size": 2,
    "accumulation": 1,
    "seed": 1,
    "resume": True,
    "save_every": 0,
    "validate_every": 2,
    "schedule": "constant",
    "warmup": 0,
    "ema": 0.0,
    "gradient_checkpointing": True,
}


@pytest.fixture(scope="module")
def classes():
    return node_classes(load_pack())


@pytest.fixture
def run(classes, monkeypatch, tmp_path):
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))

    def run(name, /, **inputs):
        monkeypatch.setattr(classes[name], "hidden", SimpleNamespace(unique_id="1"), raising=False)
        with torch.inference_mode():
            return classes[name].execute(**inputs).result

    return run


def read(run, clip, vae, **inputs):
    return run("Step1XEditTrainDataset", clip=clip, vae=vae, dataset="sources", size_level=64, validation=1, **inputs)


@pytest.mark.once
def test_sources_and_instructions_become_a_few_step_lora(run, clip, vae, model, tmp_path):
    write_sources(tmp_path / "input" / "sources")
    dataset, report = read(run, clip, vae, sources_only=True)
    assert report.startswith("3 instructions to train on, 1 held out")
    lora, loss, steps, sheet = run("Step1XEditTrainLora", model=model, dataset=dataset, name="fast", vae=vae, mode=FEW, also_save="diffusers", **TRAINING)
    assert (tmp_path / "output" / "step1x_training" / "fast" / "lora_diffusers.safetensors").is_file()
    assert steps == 2 == len(loss["loss"]) and lora
    with safe_open(tmp_path / "output" / "step1x_training" / "fast" / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["step1x_edit.steps"] == "2" and json.loads(metadata["step1x_edit.teacher"]) == {
        "version": "v1.1",
        "steps": 8,
        "cfg": 2.0,
    }
    # Below the curve lie source, student and teacher of the held-out item.
    without, = run("Step1XEditTrainLora", model=model, dataset=dataset, name="other", vae=None, mode=FEW, **TRAINING)[3:]
    assert sheet.shape[1] > without.shape[1]


@pytest.mark.parametrize("mode", [None, {"mode": "edit pairs"}])
def test_pairs_are_trained_on_as_before_and_sources_are_not_taken_for_pairs(run, clip, vae, model, tmp_path, mode):
    write_sources(tmp_path / "input" / "sources")
    dataset, _ = read(run, clip, vae, sources_only=True)
    with pytest.raises(Step1XError, match="Choose the mode 'few steps'"):
        run("Step1XEditTrainLora", model=model, dataset=dataset, name="pairs", mode=mode, **TRAINING)
    with pytest.raises(Step1XError, match="holds no pairs"):
        read(run, clip, vae)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"few_steps": 9}, "mode.few_steps"),
        ({"teacher_steps": 3}, "Raise teacher_steps"),
        ({"later": "gan"}, "mode.later"),
    ],
)
def test_bad_few_step_settings_are_one_sentence(run, clip, vae, model, tmp_path, changes, message):
    write_sources(tmp_path / "input" / "sources")
    dataset, _ = read(run, clip, vae, sources_only=True)
    with pytest.raises(Step1XError, match=message):
        run("Step1XEditTrainLora", model=model, dataset=dataset, name="fast", mode=FEW | changes, **TRAINING)


def test_the_command_has_every_setting_of_the_mode(classes):
    from conftest import PACK

    sys.path.insert(0, str(PACK / "scripts"))
    import train_lora

    mode = next(entry for entry in classes["Step1XEditTrainLora"].define_schema().inputs if entry.id == "mode")
    wanted = {entry.id: entry.default for option in mode.options for entry in option.inputs}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_lora.py", "in", "out", "--model", "m", "--mllm", "l", "--vae", "v", "--few-steps", "8"])
        options = train_lora.arguments()
    assert {name: getattr(options, name) for name in wanted} == wanted
