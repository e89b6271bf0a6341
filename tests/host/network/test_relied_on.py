"""What this pack relies on in the host: all of it is there, and each change is noticed and leads to the plain path or to a sentence."""

import ast
import inspect
import logging

import pytest
import tiny_models
import torch
from comfy.ldm.flux import layers
from comfy.ldm.modules import attention as host_attention
from conftest import PACK

from step1x_core.errors import Step1XError
from step1x_core.host import relied_on
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.network import attention
from step1x_core.host.network.blocks import FusedDoubleStreamBlock
from step1x_core.host.relied_on import ATTENTION, BLOCKS, PLAIN_PATH, RELIED_ON, TEXT_ENCODER, TRANSFORMER, Behaviour, Function
from step1x_core.host.sampling.sampler import flow_sigmas, sample

# Which nodes there are and what they call is what differs between releases.
pytestmark = pytest.mark.everywhere


@pytest.fixture(autouse=True)
def looked_at_anew(caplog):
    """Each test starts with nothing known of the host, and so does whatever runs after it."""
    caplog.set_level(logging.WARNING)
    relied_on.changed.cache_clear()
    yield
    relied_on.changed.cache_clear()


FUNCTIONS = [entry for entry in RELIED_ON if isinstance(entry, Function)]


def without_a_parameter(*args, **kwargs):
    """A function with none of the names that are relied on."""


def test_this_host_is_as_relied_on(caplog):
    assert relied_on.changed() == {} and not caplog.records


@pytest.mark.parametrize("entry", FUNCTIONS, ids=str)
def test_a_changed_signature_is_named_once(entry, monkeypatch, caplog):
    monkeypatch.setattr(entry.owner, entry.name, without_a_parameter)
    for _ in range(2):
        assert str(entry) in relied_on.changed()[entry.part]
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING and str(entry) in record.message]
    assert len(lines) == (entry.part in PLAIN_PATH)
    if entry.part in PLAIN_PATH:
        relied_on.check_intact(next(part for part in (TRANSFORMER, TEXT_ENCODER) if part not in relied_on.changed()))
    else:
        with pytest.raises(Step1XError, match="Update the Step1X-Edit pack"):
            relied_on.check_intact(entry.part)


@pytest.mark.parametrize("entry", [entry for entry in FUNCTIONS if entry.whole], ids=str)
def test_a_parameter_more_is_a_change_where_we_override(entry, monkeypatch):
    def forward(*_, **__):
        raise AssertionError("only its signature is read")

    names = (*entry.parameters[:-1], "something_new", entry.parameters[-1])
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    monkeypatch.setattr(entry.owner, entry.name, forward)
    assert not entry.intact()


def test_a_function_that_is_gone_is_a_change(monkeypatch):
    monkeypatch.delattr(relied_on.comfy.ops, "uncast_bias_weight")
    assert "comfy.ops.uncast_bias_weight" in relied_on.changed()[BLOCKS]


def test_blocks_that_compute_something_else_are_noticed(monkeypatch):
    if not hasattr(relied_on.comfy.quant_ops.ck, "rms_rope_"):
        pytest.skip("this ComfyUI's comfy-kitchen has no rms_rope_, so its own blocks run anyway")
    forward = layers.SingleStreamBlock.forward
    monkeypatch.setattr(layers.SingleStreamBlock, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * 1.01)
    entry = next(entry for entry in RELIED_ON if isinstance(entry, Behaviour) and entry.part == BLOCKS)
    assert not entry.intact()


def test_an_attention_that_asks_no_override_is_noticed(monkeypatch, caplog):
    monkeypatch.setattr(attention, "torch_attention_chosen", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert attention.cudnn_is_fastest(torch.device("cuda"))
    relied_on.changed.cache_clear()
    monkeypatch.setattr(host_attention, "optimized_attention", lambda *args, **kwargs: torch.zeros(1, 4, 16))
    assert not attention.cudnn_is_fastest(torch.device("cuda"))
    assert relied_on.changed() == {ATTENTION: ["optimized_attention_override"]} and "optimized_attention_override changed" in caplog.text


def test_with_changed_blocks_the_hosts_own_run_and_the_image_is_right(models, monkeypatch):
    def edited(model):
        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        width = model.model.diffusion_model.connector.S.c_embedder.linear_1.in_features
        states = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))
        return sample(model, [[states, {}]], [[-states, {}]], latent, flow_sigmas(2, latent["samples"]), cfg=2.0, seed=0)["samples"]

    path = models / "diffusion_models" / tiny_models.V11_FILE
    expected = edited(load_model(path))
    entry = next(entry for entry in FUNCTIONS if entry.part == BLOCKS and entry.whole)
    monkeypatch.setattr(relied_on, "RELIED_ON", (entry._replace(parameters=("other",)),))
    relied_on.changed.cache_clear()
    model = load_model(path)
    assert not any(isinstance(block, FusedDoubleStreamBlock) for block in model.model.diffusion_model.double_blocks)
    assert torch.allclose(edited(model), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("part, load, file", [(TRANSFORMER, load_model, ("diffusion_models", tiny_models.V11_FILE)),
                                              (TEXT_ENCODER, load_text_encoder, ("text_encoders", tiny_models.MLLM_FILE))])
def test_what_has_no_plain_path_is_refused_when_it_is_loaded(part, load, file, models, monkeypatch):
    entry = next(entry for entry in FUNCTIONS if entry.part == part)
    monkeypatch.setattr(relied_on, "RELIED_ON", (entry._replace(parameters=("other",)),))
    with pytest.raises(Step1XError, match=f"{entry} changed, which the {part} needs"):
        load(models.joinpath(*file))


def test_the_attention_that_was_chosen_is_told_by_the_hosts_settings(monkeypatch):
    management = attention.comfy.model_management
    monkeypatch.setattr(management, "pytorch_attention_enabled", lambda: True)
    monkeypatch.setattr(management, "xformers_enabled", lambda: False)
    assert attention.torch_attention_chosen()
    for name in ("sage_attention_enabled", "flash_attention_enabled", "comfy_kitchen_attention_enabled", "xformers_enabled"):
        with monkeypatch.context() as chosen:
            chosen.setattr(management, name, lambda: True, raising=False)
            assert not attention.torch_attention_chosen(), name
    monkeypatch.setattr(management, "pytorch_attention_enabled", lambda: False)
    assert not attention.torch_attention_chosen()


def test_nothing_compares_attention_functions():
    """A host may wrap or replace them: `attention is attention_pytorch` says nothing."""
    for path in (PACK / "step1x_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and any(
                isinstance(op, (ast.Is, ast.IsNot, ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for op in node.ops
            ):
                names = {part.id for part in (node.left, *node.comparators) if isinstance(part, ast.Name)}
                assert not any(name.startswith(("attention_", "optimized_attention")) for name in names), f"{path.name}:{node.lineno}"
