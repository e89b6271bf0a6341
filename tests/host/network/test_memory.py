"""What the host is told about the memory that sampling needs."""

import comfy.model_management
import pytest
import torch


@pytest.mark.parametrize("size, measured", [(512, 497), (768, 954), (1024, 1593), (1536, 3419)])
def test_estimate_covers_what_was_measured_and_not_much_more(model, monkeypatch, size, measured):
    """measured: MiB of activations of the full-size model with a reference and CFG, benchmarks/gpu_edit.py's blocks on an H200 in bf16."""
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)
    monkeypatch.setattr(model.model, "get_dtype_inference", lambda: torch.bfloat16)
    side = size // 8
    estimate = model.model.memory_required([2, 16, side, side], {"ref_latents": [[1, 16, side * side]] * 2})
    assert measured <= estimate / 2**20 <= 1.5 * measured
