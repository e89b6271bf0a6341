"""What the fp8 attention says where it cannot run. Its blocks run in kernel_checks.py; cuDNN itself needs a GPU (docs/performance.md)."""

import importlib.util

import pytest

from step1x_core.errors import Step1XError
from step1x_core.host.network.blocks import FP8_ATTENTION
from step1x_core.host.speed import fp8_attention
from step1x_core.host.speed.fp8_attention import attend_fp8, set_fp8_attention


def test_a_device_without_it_is_refused(model):
    with pytest.raises(Step1XError, match="needs an NVIDIA data-centre GPU .* Set attention to exact"):
        set_fp8_attention(model)


def test_a_missing_package_is_named_and_a_present_one_is_used(model, monkeypatch):
    monkeypatch.setattr(fp8_attention, "cudnn_is_fastest", lambda device: True)
    monkeypatch.setattr(fp8_attention, "kernels_on", lambda device: object())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Step1XError, match="python -m pip install nvidia-cudnn-frontend"):
        set_fp8_attention(model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    changed = set_fp8_attention(model)
    assert changed.model_options["transformer_options"][FP8_ATTENTION] is attend_fp8
    assert FP8_ATTENTION not in model.model_options["transformer_options"]
