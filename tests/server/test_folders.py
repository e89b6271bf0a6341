"""Where the loaders look for models: every folder that a person reasonably has, read from a real extra_model_paths.yaml by the host itself."""

import logging
import os
import shutil
from pathlib import Path

import folder_paths
import pytest
import tiny_models
from comfy_server import Client, ComfyServer, install_pack
from diffusers_layout import diffusers_repository, to_diffusers
from safetensors.torch import load_file
from utils.extra_config import load_extra_path_config

from step1x_core.checkpoints.files import is_model_folder
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints import folders
from step1x_core.host.checkpoints.folders import choices, model_folders, resolve
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder, load_vae

KINDS = (("diffusion_models", "transformer"), ("text_encoders", "text_encoder"), ("vae", "vae"))

EXTRA_MODEL_PATHS = """
shared:
  base_path: shared
  unet: a
  diffusion_models: |
    b
    c
  clip: d
  text_encoders: e
  vae: f
  Step1x-Edit: g
  MLLM: h
  diffusers: i
"""


@pytest.fixture
def host_folders(tmp_path, monkeypatch):
    """The host as it starts with an empty models folder; what a test changes is undone."""
    models = tmp_path / "models"
    fresh = {
        name: ([str(models / folder) for folder in folders], set(folder_paths.supported_pt_extensions))
        for name, folders in {
            "diffusion_models": ("unet", "diffusion_models"),
            "text_encoders": ("text_encoders", "clip"),
            "vae": ("vae",),
            "diffusers": ("diffusers",),
        }.items()
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", fresh)
    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return models


def put(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return target


def test_files_are_found_in_every_folder_and_load(host_folders, models, tmp_path):
    """One file in each folder: its name in the loader, its path, and that the path loads."""
    sources = {"diffusion_models": tiny_models.V11_FILE, "text_encoders": tiny_models.MLLM_FILE, "vae": tiny_models.VAE_FILE}
    model = models / "diffusion_models" / tiny_models.V11_FILE
    shared = tmp_path / "shared"
    (tmp_path / "extra_model_paths.yaml").write_text(EXTRA_MODEL_PATHS)
    load_extra_path_config(str(tmp_path / "extra_model_paths.yaml"))
    places = {
        "diffusion_models": {
            "1.safetensors": host_folders / "unet",
            "2.safetensors": host_folders / "diffusion_models",
            "3.safetensors": shared / "a",
            "4.safetensors": shared / "b",
            os.path.join("deep", "er", "5.safetensors"): shared / "c",
            os.path.join("Step1x-Edit", "6.safetensors"): host_folders,
            os.path.join("Step1x-Edit", "deep", "7.safetensors"): host_folders,
        },
        "text_encoders": {
            "1.safetensors": host_folders / "clip",
            "2.safetensors": host_folders / "text_encoders",
            "3.safetensors": shared / "d",
            "4.safetensors": shared / "e",
            os.path.join("MLLM", "5.safetensors"): host_folders,
        },
        "vae": {"1.safetensors": host_folders / "vae", "2.safetensors": shared / "f"},
    }
    for kind, files in places.items():
        for name, folder in files.items():
            put(models / kind / sources[kind], folder / name)
    put(model, shared / "g" / "8.safetensors")
    put(model, shared / "h" / "9.safetensors")
    put(model, host_folders / "MLLM" / "Qwen2.5-VL-7B-Instruct" / "model.safetensors")
    (host_folders / "MLLM" / "Qwen2.5-VL-7B-Instruct" / "config.json").write_text("{}")
    v12 = shared / "i" / "Step1X-Edit-v1p2"
    diffusers_repository(v12, to_diffusers(load_file(models / "diffusion_models" / tiny_models.V12_FILE)), "Step1XEditPipelineV1P2")

    expected = {kind: {name: str(folder / name) for name, folder in files.items()} for kind, files in places.items()}
    expected["diffusion_models"] |= {
        os.path.join("Step1x-Edit", "8.safetensors"): str(shared / "g" / "8.safetensors"),
        "Step1X-Edit-v1p2/": str(v12),
    }
    expected["text_encoders"] |= {os.path.join("MLLM", "9.safetensors"): str(shared / "h" / "9.safetensors"),
                                  "MLLM/Qwen2.5-VL-7B-Instruct/": str(host_folders / "MLLM" / "Qwen2.5-VL-7B-Instruct")}
    found = {kind: choices(kind, subfolder) for kind, subfolder in KINDS}
    assert found == expected

    for name, version in ((os.path.join("Step1x-Edit", "8.safetensors"), "v1.1"), ("Step1X-Edit-v1p2/", "v1.2")):
        assert load_model(resolve(name, "diffusion_models", "transformer"), version).model.diffusion_model.version == version
    load_text_encoder(resolve(os.path.join("MLLM", "5.safetensors"), "text_encoders", "text_encoder"))
    load_vae(resolve("2.safetensors", "vae", "vae"))


def test_of_equal_names_the_hosts_first_folder_is_taken_and_told(host_folders, models, tmp_path, caplog):
    """is_default puts a folder of extra_model_paths.yaml in front, as in the host."""
    source = models / "diffusion_models" / tiny_models.V11_FILE
    own = put(source, host_folders / "diffusion_models" / "same.safetensors")
    other = put(source, tmp_path / "shared" / "same.safetensors")
    config = tmp_path / "extra_model_paths.yaml"
    with caplog.at_level(logging.INFO):
        config.write_text("shared:\n  base_path: shared\n  diffusion_models: .\n")
        load_extra_path_config(str(config))
        assert resolve("same.safetensors", "diffusion_models", "transformer") == str(own)
        assert f"'same.safetensors' resolves to {own}" in caplog.text
        config.write_text("shared:\n  base_path: shared\n  is_default: true\n  diffusion_models: .\n")
        load_extra_path_config(str(config))
        assert resolve("same.safetensors", "diffusion_models", "transformer") == str(other)
        assert f"'same.safetensors' resolves to {other}" in caplog.text


def test_of_equal_folders_the_first_is_taken(host_folders, models):
    weights = to_diffusers(load_file(models / "diffusion_models" / tiny_models.V12_FILE))
    folders = [diffusers_repository(host_folders / name / "same", weights) for name in ("unet", "diffusers")]
    assert choices("diffusion_models", "transformer") == {"same/": str(folders[0])}


def test_folders_are_read_once_until_something_in_them_changes(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(folders, "is_model_folder", lambda folder: looked.append(folder) or is_model_folder(folder))
    repository = tmp_path / "models" / "group" / "repository"
    (repository / "transformer").mkdir(parents=True)
    (tmp_path / "models" / "other").mkdir()

    def found():
        looked.clear()
        return [folder.name for folder in model_folders(tmp_path / "models", "transformer")]

    def settle():
        for folder, _, _ in os.walk(tmp_path):
            os.utime(folder, (1, 1))

    assert found() == [] and looked
    # Just changed, so that it could change again unseen.
    assert found() == [] and looked
    settle()
    assert found() == [] and looked
    assert [found(), found(), looked] == [[], [], []]
    (repository / "transformer" / "config.json").write_text("{}")
    (repository / "transformer" / "a.safetensors").write_bytes(b"")
    assert found() == ["repository"] and looked
    settle()
    assert found() == ["repository"] and found() == ["repository"] and not looked
    shutil.rmtree(repository)
    assert found() == [] and looked
    settle()
    found()
    shutil.rmtree(tmp_path / "models")
    assert found() == [] and found() == [] and not looked
    shutil.copytree(Path(__file__).parent, tmp_path / "models" / "new", ignore=lambda folder, names: names)
    assert found() == [] and looked


def test_a_file_that_is_gone_is_named_with_the_folders_that_were_searched(host_folders):
    for kind, subfolder in KINDS:
        with pytest.raises(Step1XError) as error:
            resolve("gone.safetensors", kind, subfolder)
        earlier = {"diffusion_models": "Step1x-Edit", "text_encoders": "MLLM"}
        for folder in (*folder_paths.get_folder_paths(kind), *(str(host_folders / earlier[kind]) for _ in range(kind in earlier))):
            assert folder in str(error.value)


def test_names_cannot_leave_an_earlier_packs_folder(host_folders, models):
    put(models / "vae" / tiny_models.VAE_FILE, host_folders / "Step1x-Edit" / "model.safetensors")
    put(models / "vae" / tiny_models.VAE_FILE, host_folders / "secret.safetensors")
    for name in ("Step1x-Edit/../secret.safetensors", "../secret.safetensors", str(host_folders / "secret.safetensors")):
        with pytest.raises(Step1XError, match="is not in the diffusion_models folder"):
            resolve(name, "diffusion_models", "transformer")


def test_a_running_host_offers_and_logs_them(models, tmp_path):
    """The whole host with --extra-model-paths-config, over HTTP: the file of an earlier pack's folder is offered, loaded and named in the log."""
    install_pack(tmp_path)
    path = put(models / "diffusion_models" / tiny_models.V11_FILE, tmp_path / "models" / "Step1x-Edit" / tiny_models.V11_FILE)
    name = os.path.join("Step1x-Edit", tiny_models.V11_FILE)
    with ComfyServer(Path(os.environ["STEP1X_COMFYUI"]), tmp_path, models) as server:
        client = Client(server.url)
        options = client.get("/object_info/Step1XEditLoader")["Step1XEditLoader"]["input"]["required"]["unet_name"]
        offered = options[0] if isinstance(options[0], list) else options[1]["options"]
        assert name in offered and tiny_models.V12_FILE in offered
        prompt = {"1": {"class_type": "Step1XEditLoader", "inputs": {"unet_name": name, "version": "auto", "weight_dtype": "default"}},
                  "2": {"class_type": "ModelSave", "inputs": {"model": ["1", 0], "filename_prefix": "saved"}}}
        client.run(prompt)
        assert f"'{name}' resolves to {path}" in server.log_text() and f"Step1X-Edit v1.1 from {path}" in server.log_text()
