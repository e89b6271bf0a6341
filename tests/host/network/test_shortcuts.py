"""What is computed once for many tokens, or not at all: the same result, and given up where anything else runs between text and picture."""

import functools

import pytest
import torch
from all_blocks import AllBlocks
from comfy.ldm.flux.layers import SingleStreamBlock
from comfy_api.torch_helpers import set_torch_compile_wrapper

from step1x_core.host.network import blocks
from step1x_core.host.network import transformer as transformer_module
from step1x_core.host.network.blocks import TOKENS_READ
from step1x_core.host.network.model import Step1XEditModel
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.host.sampling.sampler import flow_sigmas, sample
from step1x_core.host.speed.teacache import apply_teacache

# Tokens of the picture, 304x208 pixels, and its reference.
IMAGE = 13 * 19


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def edit(clip, vae, photo):
    return encode_edit(clip, vae, photo, "make the cup red", "", 256)


def run(model, edit):
    positive, negative, latent = edit
    return sample(model, positive, negative, latent, flow_sigmas(2, latent["samples"]), 6.0, 7, callback=lambda *args: None)["samples"]


def run_plainly(model, edit, monkeypatch):
    """With the host's blocks and all tokens."""
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "plain_needed", lambda options: True)
        patch.setattr(transformer_module, "plain_needed", lambda options: True)
        return run(model, edit)


def test_padding_is_computed_once_and_the_last_block_only_where_it_is_read(model, edit, monkeypatch):
    rows, sizes = [], []
    transformer, extra_conds = model.model.diffusion_model, Step1XEditModel.extra_conds
    hooks = [transformer.single_blocks[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1])),
             transformer.single_blocks[-1].linear2.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-2]))]
    got = run(model, edit)
    monkeypatch.setattr(
        Step1XEditModel,
        "extra_conds",
        lambda self, **kwargs: {k: v for k, v in extra_conds(self, **kwargs).items() if k != "text_tokens"},
    )
    whole = model.clone()
    whole.model_options["transformer_options"][TOKENS_READ] = None
    expected = run(whole, edit)
    for hook in hooks:
        hook.remove()
    longest = max(int(cond[0][1]["attention_mask"].sum()) for cond in edit[:2])
    text = rows[0] - 2 * IMAGE
    assert text % 16 == 0 and longest < text <= longest + 16
    assert edit[0][0][0].shape[1] == 640 and rows == [text + 2 * IMAGE] * 2 + [640 + 2 * IMAGE] * 2
    assert sizes == [IMAGE] * 2 + [640 + 2 * IMAGE] * 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, run_plainly(model, edit, monkeypatch), rtol=1e-4, atol=1e-4)


@pytest.mark.once
def test_with_a_block_that_is_compiled_or_replaced_every_token_is_computed(model, edit, monkeypatch):
    expected = run_plainly(model, edit, monkeypatch)
    block = model.model.diffusion_model.single_blocks[0]

    compiled = model.clone()
    set_torch_compile_wrapper(compiled, "eager", keys=["diffusion_model.single_blocks.0"])
    torch.testing.assert_close(run(compiled, edit), expected, rtol=1e-4, atol=1e-4)

    block.compile(backend="eager")
    got = run(model, edit)
    block._compiled_call_impl = None
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    block.forward = functools.partial(SingleStreamBlock.forward, block)
    got = run(model, edit)
    del block.forward
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_one_module_for_all_blocks_computes_every_token(model, edit, monkeypatch):
    expected = run_plainly(model, edit, monkeypatch)
    transformer = model.model.diffusion_model
    own = transformer.double_blocks, transformer.single_blocks
    transformer.double_blocks, transformer.single_blocks = torch.nn.ModuleList([AllBlocks(*own)]), torch.nn.ModuleList()
    got = run(model, edit)
    transformer.double_blocks, transformer.single_blocks = own
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_patch_that_adds_text_tokens_sees_all_of_them_and_teacache_does_not_matter(model, edit, monkeypatch):
    seen = []

    def add_tokens(args):
        """What the stock USOStyleReference does."""
        seen.append(args["txt"].shape[1])
        added = torch.ones(args["txt"].shape[0], 5, args["txt"].shape[2])
        return args | {
            "txt": torch.cat((added, args["txt"]), dim=1),
            "txt_ids": torch.cat((torch.zeros(len(added), 5, 3), args["txt_ids"]), dim=1),
        }

    patched = model.clone()
    patched.set_model_post_input_patch(add_tokens)
    torch.testing.assert_close(run(patched, edit), run_plainly(patched, edit, monkeypatch), rtol=1e-4, atol=1e-4)
    assert set(seen) == {640}

    rows = []
    hook = model.model.diffusion_model.double_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["txt"].shape[1]), with_kwargs=True
    )
    run(apply_teacache(model, 0.0), edit)
    hook.remove()
    assert max(rows) < 640
