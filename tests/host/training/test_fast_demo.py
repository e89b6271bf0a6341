"""The few-step LoRA that is shipped with the miniature model: what its file says, and that it edits right in so few steps."""

import itertools

import demo_host
import demo_model
import pytest
import torch
from safetensors import safe_open

from miniature.scenes import judge, pair_at
from step1x_core.host.checkpoints.lora import apply_lora_file
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.sampling.few_steps import version_defaults
from step1x_core.host.sampling.sampler import model_sigmas, sample, with_norm_limiter
from step1x_core.images import truncate_uint8
from step1x_core.sampling.few_steps import few_steps_of

EDITS, LEAST_RIGHT = 8, 7
MAX_BYTES = 2_000_000
pytestmark = pytest.mark.skipif(
    not demo_model.FAST_FILE.is_file(),
    reason=f"the miniature's few-step LoRA {demo_model.FAST_FILE.name} is not in the checkout",
)


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return demo_host.load_demo()


def test_the_file_is_small_and_names_its_steps_and_teacher():
    assert demo_model.FAST_FILE.stat().st_size <= MAX_BYTES
    with safe_open(demo_model.FAST_FILE, "pt") as file:
        settings = few_steps_of(file.metadata(), demo_model.FAST_FILE.name)
    assert (settings.steps, settings.cfg) == (demo_model.FAST_STEPS, 1.0)
    assert settings.teacher == {"version": "v1.1", "steps": demo_model.STEPS, "cfg": demo_model.CFG}


@pytest.mark.once
@torch.inference_mode()
def test_it_edits_held_out_scenes_in_its_steps_with_one_pass_each(demo):
    model = with_norm_limiter(apply_lora_file(demo.model, demo_model.FAST_FILE, 1.0))
    steps, cfg = version_defaults(model, 0, 0.0)
    passes = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda *args: passes.append(1))
    drawn = ((index, pair_at(1, index, "heldout")) for index in itertools.count())
    wrong = []
    try:
        for index, pair in itertools.islice(((index, pair) for index, pair in drawn if pair.kind != "none"), EDITS):
            image = demo_host.to_image(pair.source)
            positive, negative, start = encode_edit(demo.clip, demo.vae, image, pair.instruction, "", demo_model.SIZE_LEVEL)
            sigmas = model_sigmas(model, steps, start["samples"])
            out = sample(model, positive, negative, start, sigmas, cfg, index, callback=lambda *args: None)
            if not judge(pair, truncate_uint8(decode_edit(demo.vae, out, image)[0]).numpy()).success:
                wrong.append((pair.kind, pair.instruction))
    finally:
        hook.remove()
    assert EDITS - len(wrong) >= LEAST_RIGHT, wrong
    assert len(passes) == EDITS * demo_model.FAST_STEPS
