"""What sequence parallelism of another pack needs and does: our family in a bare process, functions for FLUX in place of ours.

raylight itself needs several NVIDIA cards. It puts bound methods into the transformer and its blocks (its distributed_modules/usp.py); those here do in one
process what its methods for FLUX do to the positions: in the double blocks the text's are left out.
"""

import os
import subprocess
import sys
from types import MethodType

import pytest
import tiny_models
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.flux.model import Flux
from conftest import PACK

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.network import model as host_model
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.host.sampling.sampler import flow_sigmas, sample
from step1x_core.host.training.adapted import adapted

IN_A_WORKER = """
import sys

import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.sd
import step1x_edit_register

for path in sys.argv[1:]:
    model = comfy.sd.load_diffusion_model(path).model
    print(type(model).__name__, model.diffusion_model.version)
print(sorted({"nodes", "server", "execution", "folder_paths"} & {*sys.modules}))
"""


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def double_forward(self, img, txt, vec, pe, attn_mask=None, transformer_options={}, **kwargs):
    """FLUX's double block with positions for the picture's tokens alone."""
    unmoved = torch.eye(2).expand(*pe.shape[:2], txt.shape[1], *pe.shape[3:4], 2, 2)
    pe = torch.cat((unmoved, pe[:, :, txt.shape[1]:]), dim=2)
    return DoubleStreamBlock.forward(self, img, txt, vec, pe, attn_mask, transformer_options=transformer_options)


def single_forward(self, x, vec, pe, attn_mask=None, transformer_options={}, **kwargs):
    return SingleStreamBlock.forward(self, x, vec, pe, attn_mask, transformer_options=transformer_options)


def parallel_forward(
    self,
    img,
    img_ids,
    txt,
    txt_ids,
    timesteps,
    y,
    guidance=None,
    control=None,
    timestep_zero_index=None,
    transformer_options={},
    attn_mask=None,
    *args,
    **kwargs,
):
    return Flux.forward_orig(
        self,
        img,
        img_ids,
        txt,
        txt_ids,
        timesteps,
        y,
        guidance,
        control,
        transformer_options=transformer_options,
        attn_mask=attn_mask,
    )


@pytest.fixture
def foreign(models):
    """Loads a version of the tiny model with the other pack's methods in it."""
    def load(file):
        model = load_model(models / "diffusion_models" / file)
        transformer = model.model.diffusion_model
        for blocks, forward in ((transformer.double_blocks, double_forward), (transformer.single_blocks, single_forward)):
            for block in blocks:
                block.forward = MethodType(forward, block)
        transformer.forward_orig = MethodType(parallel_forward, transformer)
        return model
    return load


@pytest.fixture(scope="module")
def edit_v12(models, vae, photo):
    return encode_edit(load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2"), vae, photo, "make the cup red", "", 192)


def run(model, edit):
    positive, negative, latent = edit
    return sample(model, positive, negative, latent, flow_sigmas(2, latent["samples"]), 6.0, 7, callback=lambda *args: None)["samples"]


def test_one_import_registers_the_family_in_a_bare_process(models, tmp_path):
    """From a folder whose name is no Python name, and without the pack in the path."""
    pack = tmp_path / "ComfyUI-Step1X-Edit"
    pack.symlink_to(PACK, target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((os.environ["STEP1X_COMFYUI"], str(pack / "workers")))}
    files = [models / "diffusion_models" / name for name in (tiny_models.V10_FILE, tiny_models.V11_FILE, tiny_models.V12_FILE)]
    done = subprocess.run([sys.executable, "-c", IN_A_WORKER, *files], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Step1XEditModel v1.0", "Step1XEditModel v1.1", "Step1XEditModel v1.2", "[]"]


def test_v11_goes_on_working_with_methods_for_flux(foreign, model, clip, vae, photo):
    edit = encode_edit(clip, vae, photo, "make the cup red", "", 192)
    torch.testing.assert_close(run(foreign(tiny_models.V11_FILE), edit), run(model, edit), rtol=1e-4, atol=1e-4)


def test_v12_would_be_wrong_with_methods_for_flux_and_is_refused(foreign, models, edit_v12, monkeypatch):
    model = foreign(tiny_models.V12_FILE)
    with pytest.raises(Step1XError, match=r"replaced the forward pass of this Step1X-Edit v1\.2 model with FLUX's"):
        run(model, edit_v12)
    expected = run(load_model(models / "diffusion_models" / tiny_models.V12_FILE), edit_v12)
    monkeypatch.setattr(host_model, "check_own_forward", lambda transformer: None)
    assert (run(model, edit_v12) - expected).abs().max() > 0.01


@pytest.mark.parametrize("part", ["the whole", "a block"])
def test_v12_is_refused_whatever_is_replaced(foreign, edit_v12, part):
    model = foreign(tiny_models.V12_FILE)
    transformer = model.model.diffusion_model
    kept = transformer.single_blocks[-1] if part == "a block" else transformer
    for module in (transformer, *transformer.double_blocks, *transformer.single_blocks):
        for name in ("forward", "forward_orig"):
            if module is not kept:
                vars(module).pop(name, None)
    with pytest.raises(Step1XError, match="forward pass"):
        run(model, edit_v12)
    for name in ("forward", "forward_orig"):
        vars(kept).pop(name, None)
    run(model, edit_v12)


def test_functions_around_our_own_are_no_replacement(models, edit_v12):
    """What training puts around the blocks, with checkpoints."""
    model = load_model(models / "diffusion_models" / tiny_models.V12_FILE)
    with adapted(model.model.diffusion_model, {}):
        assert all("forward" in vars(block) for block in model.model.diffusion_model.double_blocks)
        run(model, edit_v12)
