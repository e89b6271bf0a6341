"""The shipped miniature model edits right: held-out edits through the real host's API, judged on the pixels."""

import io

import demo
import demo_model
import numpy as np
import pytest
from comfy_server import find_nodes
from PIL import Image
from shipped import shipped_prompt

from miniature.scenes import judge, pair_at

EDITS = 12
# Fewer than the miniature's own; an edit is right or wrong after them, too.
STEPS = 6
# Of the 12; benchmarks/demo_quality.py measures the rate on more edits.
LEAST_RIGHT = 11


@pytest.fixture(scope="module")
def client(demo_server):
    return demo_server


def edit(client, folder, pixels, instruction, seed=42, lora=None) -> np.ndarray:
    """uint8 [H, W, 3] through the shipped edit workflow with the demo model; with a few-step LoRA in its steps and CFG."""
    picture = folder / "source.png"
    Image.fromarray(pixels).save(picture)
    name = f"{abs(hash((instruction, pixels.tobytes())))}.png"
    client.upload_image(picture, name)
    prompt = shipped_prompt(
        client,
        "step1x_edit.json",
        {
            "Step1XEditLoader": {"unet_name": demo_model.MODEL_FILE},
            "Step1XEditMLLM": {"clip_name": demo_model.MLLM_FILE},
            "VAELoader": {"vae_name": demo_model.VAE_FILE},
            "LoadImage": {"image": name},
            "Step1XEditEncode": {"prompt": instruction, "size_level": demo_model.SIZE_LEVEL},
            "Step1XEditSampler": {"steps": STEPS, "cfg": demo_model.CFG, "seed": seed},
        },
    )
    if lora is not None:
        demo.with_lora(prompt, lora)
        prompt[find_nodes(prompt, "Step1XEditSampler")[0]]["inputs"].update(steps=0, cfg=0.0)
    run = client.run(prompt)
    return np.asarray(Image.open(io.BytesIO(run.images[0])).convert("RGB"))


@pytest.mark.once
def test_held_out_edits_are_right(client, tmp_path):
    verdicts = []
    for index in range(EDITS):
        pair = pair_at(1, index, "heldout")
        verdicts.append(
            (pair.kind, pair.instruction, judge(pair, edit(client, tmp_path, pair.source, pair.instruction)).success)
        )
    wrong = [verdict[:2] for verdict in verdicts if not verdict[2]]
    assert EDITS - len(wrong) >= LEAST_RIGHT, wrong


@pytest.mark.once
def test_the_few_step_lora_edits_right_too(client, tmp_path):
    pairs = [pair_at(1, index, "heldout") for index in range(4)]
    results = [edit(client, tmp_path, pair.source, pair.instruction, lora=demo_model.FAST_FILE.name) for pair in pairs]
    wrong = [(pair.kind, pair.instruction) for pair, result in zip(pairs, results) if not judge(pair, result).success]
    assert len(wrong) <= 1, wrong


@pytest.mark.once
def test_an_empty_instruction_changes_nothing(client, tmp_path):
    for index in range(3):
        pair = pair_at(2, index, "heldout", kind="none")
        assert judge(pair, edit(client, tmp_path, pair.source, "")).success


def test_the_instruction_decides_which_object_changes(client, tmp_path):
    source = np.asarray(Image.open(demo_model.SAMPLE_IMAGE).convert("RGB"))
    green, blue = (slice(20, 42), slice(14, 36)), (slice(14, 30), slice(98, 114))
    changed = edit(client, tmp_path, source, demo_model.SAMPLE_PROMPT)

    def difference(area):
        return np.abs(changed[area].astype(int) - source[area]).mean()

    assert difference(green) > 60 and difference(blue) < 15


def test_the_demo_model_is_small_enough_for_a_clone():
    files = [path for path in demo_model.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32e6  # two of them the few-step LoRA
    assert (demo_model.FOLDER / "README.md").is_file()
