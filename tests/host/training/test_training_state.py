"""What a training leaves on the disk: nothing finished is overwritten by less, and another training's state is not taken for this one's."""

import json
import shutil
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cached_pairs import cached
from test_edit_pairs import write_folder, write_picture

from step1x_core.errors import Step1XError
from step1x_core.host.training import train as training
from step1x_core.host.training.run import RUN_KEY
from step1x_core.host.training.train import LORA_FILE, STATE_FILE, train
from step1x_core.training.objective import Settings

SETTINGS = Settings(steps=2, learning_rate=1e-2, rank=4, alpha=8.0, seed=7)


@pytest.fixture(scope="module")
def dataset(clip, vae, tmp_path_factory):
    """Not to be changed by tests."""
    return cached(clip, vae, write_folder(tmp_path_factory.mktemp("data"), 2))[0]


@pytest.fixture(scope="module")
def finished(model, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(model, dataset, SETTINGS, folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def cancel():
    raise comfy.model_management.InterruptProcessingException


def run_out():
    raise torch.OutOfMemoryError("out of memory")


# 14: what is finished stays.

@pytest.mark.parametrize("fail", [cancel, run_out, lambda: 1 / 0])
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("stage", ["train_step", "load_for_training"])
def test_what_fails_before_the_first_step_leaves_the_finished_lora(model, dataset, folder, monkeypatch, fail, resume, stage):
    before = contents(folder)
    monkeypatch.setattr(training, stage, lambda *args: fail())
    with pytest.raises((comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError, ZeroDivisionError)):
        train(model, dataset, replace(SETTINGS, steps=5), folder, resume=resume, save_every=1)
    assert contents(folder) == before and [path.name for path in folder.parent.iterdir()] == ["run"]


def test_a_new_training_that_fails_before_its_first_step_leaves_no_zeros(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_step", lambda *args: cancel())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, dataset, SETTINGS, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_restart_moves_the_earlier_training_aside_to_the_next_free_number(model, dataset, folder):
    before = contents(folder)
    (folder / "notes.txt").write_text("mine")
    train(model, dataset, replace(SETTINGS, steps=1), folder, resume=False)
    assert contents(folder.with_name("run.1")) == before and (folder / "notes.txt").is_file()
    assert metadata(folder / LORA_FILE)["ss_steps"] == "1"
    train(model, dataset, replace(SETTINGS, steps=1), folder, resume=False)
    assert contents(folder.with_name("run.1")) == before and (folder.with_name("run.2") / LORA_FILE).is_file()


def test_a_lora_without_its_state_is_not_overwritten_either(model, dataset, folder):
    (folder / STATE_FILE).unlink()
    before = contents(folder)
    train(model, dataset, replace(SETTINGS, steps=1), folder)
    assert contents(folder.with_name("run.1")) == before


def test_a_lora_that_is_ahead_of_the_state_is_kept(model, dataset, folder, tmp_path):
    longer = shutil.copytree(folder, tmp_path / "longer")
    train(model, dataset, replace(SETTINGS, steps=6), longer)
    shutil.copy(longer / LORA_FILE, folder / LORA_FILE)
    before = (folder / LORA_FILE).read_bytes()
    train(model, dataset, replace(SETTINGS, steps=3), folder)
    assert (folder.with_name("run.1") / LORA_FILE).read_bytes() == before
    assert metadata(folder / LORA_FILE)["ss_steps"] == "3"


def test_a_lora_that_a_kill_kept_behind_its_state_is_brought_up_to_date(model, dataset, folder, tmp_path):
    # Copies: what was loaded is the file itself in memory.
    whole = {name: tensor.clone() for name, tensor in load_file(folder / LORA_FILE).items()}
    train(model, dataset, replace(SETTINGS, steps=1), tmp_path / "behind")
    for damage in (lambda: shutil.copy(tmp_path / "behind" / LORA_FILE, folder / LORA_FILE), lambda: (folder / LORA_FILE).unlink()):
        damage()
        train(model, dataset, SETTINGS, folder)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(folder / LORA_FILE).items())
        assert metadata(folder / LORA_FILE)["ss_steps"] == "2"
    assert not folder.with_name("run.1").exists()


# 15: whose state it is.

def test_another_dataset_under_the_same_name_is_refused(model, clip, vae, dataset, folder, tmp_path):
    before = contents(folder)
    data = write_folder(tmp_path / "data", 2)
    same = cached(clip, vae, data)[0]
    assert same.fingerprint() == dataset.fingerprint()  # the same pictures elsewhere
    assert train(model, same, SETTINGS, folder).step == 2
    others = [cached(clip, vae, data, validation=1)[0], cached(clip, vae, data, level=128)[0]]
    (data / "target" / "0.txt").write_text("something else", encoding="utf-8")
    others.append(cached(clip, vae, data)[0])
    (data / "target" / "0.txt").write_text("make it 0", encoding="utf-8")
    write_picture(data / "target" / "1.png", 99)
    others.append(cached(clip, vae, data)[0])
    for other in others:
        with pytest.raises(Step1XError, match="uses another dataset.*Choose another name, or turn resume off"):
            train(model, other, replace(SETTINGS, steps=4), folder)
    assert contents(folder) == before


def restate(path, change):
    tensors, stored = load_file(path), json.loads(metadata(path)[RUN_KEY])
    save_file(tensors, path, {RUN_KEY: json.dumps(change(stored))})


def test_another_version_under_the_same_name_is_refused(model, dataset, folder):
    restate(folder / STATE_FILE, lambda stored: stored | {"version": "v1.0"})
    with pytest.raises(Step1XError, match="is for Step1X-Edit v1.0, but the model is v1.1"):
        train(model, dataset, replace(SETTINGS, steps=4), folder)


def test_a_state_of_an_earlier_release_goes_on_with_a_line_in_the_log(model, dataset, folder, caplog):
    def old(stored):
        return {name: value for name, value in stored.items() if name not in ("dataset", "version")}

    restate(folder / STATE_FILE, old)
    with caplog.at_level("WARNING"):
        assert train(model, dataset, replace(SETTINGS, steps=3), folder).step == 3
    assert "from an earlier release" in caplog.text
    assert json.loads(metadata(folder / STATE_FILE)[RUN_KEY])["dataset"] == dataset.fingerprint()
    # Its LoRA has always named the version.
    restate(folder / STATE_FILE, old)
    save_file(
        load_file(folder / LORA_FILE),
        folder / LORA_FILE,
        metadata(folder / LORA_FILE) | {"ss_base_model_version": "step1x-edit-v1.0"},
    )
    with pytest.raises(Step1XError, match="is for Step1X-Edit v1.0"):
        train(model, dataset, replace(SETTINGS, steps=4), folder)


# 21: a state that is damaged is one sentence.

def dropped(name):
    return lambda tensors, entries: (tensors.pop(name), entries)[1]


LAYER = "single_blocks.0.linear1.up"


@pytest.mark.parametrize("damage", [
    lambda tensors, entries: None,
    lambda tensors, entries: {RUN_KEY: "{"},
    lambda tensors, entries: {RUN_KEY: ""},
    lambda tensors, entries: {RUN_KEY: "[]"},
    lambda tensors, entries: {RUN_KEY: "null"},
    lambda tensors, entries: {RUN_KEY: "[" * 100000},
    dropped("losses"),
    dropped(f"exp_avg.{LAYER}"),
    dropped(f"exp_avg_sq.{LAYER}"),
    lambda tensors, entries: (tensors.update({f"exp_avg.{LAYER}": torch.zeros(1)}), entries)[1],
    lambda tensors, entries: (tensors.update(losses=torch.tensor(1.0)), entries)[1],
])
def test_a_damaged_state_is_one_sentence(model, dataset, folder, damage):
    tensors, entries = load_file(folder / STATE_FILE), metadata(folder / STATE_FILE)
    entries = damage(tensors, entries)
    save_file(tensors, folder / STATE_FILE, entries)
    before = contents(folder)
    with pytest.raises(Step1XError, match="damaged or not a training state"):
        train(model, dataset, replace(SETTINGS, steps=4), folder)
    assert contents(folder) == before


def test_a_running_mean_that_is_missing_is_one_sentence(model, dataset, tmp_path):
    settings = replace(SETTINGS, ema=0.5)
    train(model, dataset, settings, tmp_path / "mean")
    path = tmp_path / "mean" / STATE_FILE
    tensors, entries = load_file(path), metadata(path)
    del tensors[f"average.{LAYER}"]
    save_file(tensors, path, entries)
    with pytest.raises(Step1XError, match="damaged or not a training state"):
        train(model, dataset, settings, tmp_path / "mean")
