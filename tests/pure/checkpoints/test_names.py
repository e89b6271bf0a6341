"""Names of tensors in checkpoints, without ComfyUI."""

import pytest

from step1x_core.checkpoints.detection import named_layout
from step1x_core.checkpoints.prefixes import LANGUAGE_PARTS, LANGUAGE_WRAPPERS, language_name


def test_names_in_no_table_stay():
    for name in ("visual.blocks.0.attn.qkv.weight", "model.layers.0.x", "vision_tower.blocks.0.weight", "thinker.model.layers.0.x"):
        assert language_name(name) == name
    assert all(language_name(wrapper + theirs + "x") == ours + "x" for wrapper in LANGUAGE_WRAPPERS for theirs, ours in LANGUAGE_PARTS)


@pytest.mark.parametrize(
    "name, layout",
    [
        ("step1x-edit-v1-1.safetensors", "v1.1"),
        ("step1x_edit_1.1_fp8.safetensors", "v1.1"),
        ("Step1X-Edit-v1p1-official.safetensors", "v1.1"),
        ("step1x_edit_v1_1", "v1.1"),
        ("step1x-edit-v11", "v1.1"),
        ("Step1X-Edit-1p2", "v1.2"),
        ("Step1X-Edit 1.2.safetensors", "v1.2"),
        ("edit-v1-2-bf16", "v1.2"),
        ("x_V1.2_y", "v1.2"),
        ("step1x-edit-preview", "v1.2"),
        ("step1x-v1-1024px", None),
        ("step1x-v1.10", None),
        ("step1x-11.1", None),
        ("step1x-2.1.1", None),
        ("step1x-1.12", None),
        ("model-1.1B", None),
        ("2026-1-1-step1x", None),
        ("step1x-edit-i1258", None),
        ("step1x_1_1", None),
        ("step1x-fp8-12GB", None),
        ("step1x-v1p1-preview", None),
        ("step1x-edit-v1.1-distilled-from-v1.2", None),
    ],
)
def test_versions_are_told_by_names(name, layout):
    found = named_layout([name])
    assert (found and found.name) == layout


def test_a_file_that_names_two_versions_is_not_told_by_its_folder():
    assert named_layout(["step1x-v1.1-to-v1.2.safetensors", "Step1X-Edit-v1p1"]) is None
    assert named_layout(["model.safetensors", "Step1X-Edit-v1p1"]).name == "v1.1"
