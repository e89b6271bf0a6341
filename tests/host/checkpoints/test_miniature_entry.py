"""The pack's own miniature in the loaders' lists: for a first try before anything is downloaded."""

from pathlib import Path

import pytest
import tiny_models

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.folders import MINIATURE, choices, miniature_file, offered, resolve
from step1x_core.host.checkpoints.loading import load_own_vae

KINDS = [("diffusion_models", "transformer"), ("text_encoders", "text_encoder")]


@pytest.mark.parametrize("kind, subfolder", KINDS)
def test_it_is_listed_last_and_resolves_to_a_shipped_file(kind, subfolder):
    assert offered(kind, subfolder) == [*choices(kind, subfolder), MINIATURE]
    path = resolve(MINIATURE, kind, subfolder)
    assert Path(path) == miniature_file(kind) and Path(path).is_file()


def test_it_brings_its_vae_and_no_other_file_does(models):
    assert load_own_vae(miniature_file("diffusion_models")).first_stage_model is not None
    assert load_own_vae(models / "diffusion_models" / tiny_models.V11_FILE) is None


def test_without_its_files_it_is_neither_listed_nor_resolved(monkeypatch, tmp_path):
    monkeypatch.setattr("step1x_core.host.checkpoints.folders.MINIATURE_WEIGHTS", tmp_path)
    assert MINIATURE not in offered("diffusion_models", "transformer")
    with pytest.raises(Step1XError, match="is not in the diffusion_models folder"):
        resolve(MINIATURE, "diffusion_models", "transformer")
