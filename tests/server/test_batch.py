"""Many edits in one node, and several reference pictures."""

import io

import comfy.model_management
import numpy as np
import pytest
import torch
from comfy_server import ExecutionError, find_nodes
from demo_host import STEPS, demo_model, demo_prompt, edit, load_demo, to_image, to_pixels
from PIL import Image

from miniature.edits import invert
from miniature.scenes import judge, pair_at
from step1x_core.editing.batches import ALL, PAIRS, lay_out
from step1x_core.errors import Step1XError
from step1x_core.host.editing import batch as host_batch
from step1x_core.host.editing.batch import edit_batch
from step1x_core.host.prompts.encoding import ENCODING_STEPS, add_references, encode_edit
from step1x_core.host.reasoning.rounds import failures

NARROW = torch.zeros(1, 4, 4096, 3)


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def recolouring(index):
    return pair_at(5, index, "heldout", kind="recolour", language="en")


def batch(demo, items, **changes):
    settings = {
        "negative_prompt": "",
        "size_level": demo_model.SIZE_LEVEL,
        "steps": STEPS,
        "cfg": demo_model.CFG,
        "sampler_name": "euler",
        **changes,
    }
    return edit_batch("test", demo.model, demo.clip, demo.vae, items, **settings)


@pytest.mark.once
def test_each_edit_is_the_single_one_with_its_seed_and_a_bad_picture_costs_no_other(demo):
    pairs = [recolouring(index) for index in (0, 1)]
    wide = to_image(np.asarray(Image.fromarray(pairs[0].source).resize((192, 96))))
    before = failures("test")
    items = lay_out(
        [to_image(pairs[0].source), NARROW, wide, to_image(pairs[1].source)],
        [pairs[0].instruction] * 3 + [pairs[1].instruction],
        [20],
    )
    pictures, report = batch(demo, items)
    assert [tuple(picture.shape[1:3]) for picture in pictures] == [(128, 128), (96, 192), (128, 128)]
    for item, picture in zip((items[0], items[2], items[3]), pictures):
        assert torch.equal(picture, edit(demo, item.picture, item.prompt, item.seed)[0])
    assert judge(pairs[0], to_pixels(pictures[0])).success and judge(pairs[1], to_pixels(pictures[2])).success
    lines = report.splitlines()
    assert (
        lines[0] == "3 of 4 edits made."
        and lines[2].startswith("2. picture 2, seed 21")
        and "FAILED" in lines[2]
        and "too narrow" in lines[2]
    )
    assert [line.endswith(": made") for line in lines[1:]] == [True, False, True, True] and failures("test") == before + 1


@pytest.mark.once
def test_a_picture_and_the_negative_prompt_are_encoded_once_and_few_edits_wait(demo, monkeypatch):
    pictures = [to_image(recolouring(index).source) for index in (0, 1)]
    items = lay_out(pictures, ["make it red\nmake it blue\nmake it green"], [1], ALL)
    apart = [batch(demo, [item], steps=1)[0][0] for item in items]
    monkeypatch.setattr(host_batch, "TOGETHER", 2)
    texts, latents = [], []
    tokenize, encode, decode = demo.clip.tokenize, demo.vae.encode, demo.vae.decode
    monkeypatch.setattr(demo.clip, "tokenize", lambda text, **options: (texts.append(text), tokenize(text, **options))[1])
    monkeypatch.setattr(demo.vae, "encode", lambda pixels: (latents.append(1), encode(pixels))[1])
    monkeypatch.setattr(demo.vae, "decode", lambda samples: (latents.append(0), decode(samples))[1])
    together = batch(demo, items, steps=1)[0]
    assert all(torch.equal(*pair) for pair in zip(apart, together, strict=True))
    assert len(texts) == 6 + 2 and sum(latents) == 2
    # The first edits are done before the second picture is encoded.
    assert latents == [1, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.once
def test_running_out_of_memory_is_reported_and_the_models_make_room(demo, monkeypatch):
    decode, loaded = demo.vae.decode, []

    def out_of_memory(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("Tried to allocate 40.00 GiB")

    def hungry(samples):
        loaded.append(len(comfy.model_management.current_loaded_models))
        return out_of_memory() if len(loaded) == 1 else decode(samples)

    monkeypatch.setattr(demo.vae, "decode", hungry)
    # In tiles, too: else the first would come out all the same.
    monkeypatch.setattr(demo.vae, "decode_tiled", out_of_memory)
    pictures, report = batch(demo, lay_out([to_image(recolouring(0).source)], ["make it red\nmake it blue\nmake it green"], [1]), steps=1)
    assert len(pictures) == 2 and '1. picture 1, seed 1, "make it red": FAILED: OutOfMemoryError: Tried to allocate' in report
    # The VAE alone is loaded again.
    assert loaded[0] > 1 and loaded[1] == 1


def test_if_nothing_can_be_made_all_reasons_are_told(demo):
    with pytest.raises(Step1XError, match=r"(?s)None of the edits could be made\. 0 of 2 .*too narrow.*too narrow"):
        batch(demo, lay_out([NARROW], ["red\nblue"], [1]))


def test_foreign_parts_are_refused_before_anything_is_tried(demo, monkeypatch):
    items = lay_out([to_image(recolouring(0).source)], ["red"], [1])
    before = failures("test")
    monkeypatch.setattr(demo.vae, "latent_channels", 4)
    with pytest.raises(Step1XError, match="This VAE's latents have 4 channels"):
        batch(demo, items)
    assert failures("test") == before


def test_cancel_is_the_hosts_cancel(demo):
    class CancellingDemo:
        clip, vae, model = demo.clip, demo.vae, demo.model.clone()

    def cancel(args):
        comfy.model_management.interrupt_current_processing()
        return args["conds_out"]

    CancellingDemo.model.set_model_sampler_pre_cfg_function(cancel)
    before = failures("test")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        batch(CancellingDemo, lay_out([to_image(recolouring(0).source)], ["red\nblue"], [1]))
    assert failures("test") == before


def test_further_references_stand_behind_the_edited_picture(demo):
    pictures = [to_image(recolouring(index).source) for index in (0, 1, 3)]
    positive, negative, latent = encode_edit(demo.clip, demo.vae, pictures[0], "make it red", "", 128)
    extended = add_references([positive, negative], demo.vae, pictures[1:], 128)
    for plain, side in zip((positive, negative), extended):
        references = side[0][1]["reference_latents"]
        assert (
            len(plain[0][1]["reference_latents"]) == 1
            and torch.equal(references[0], latent["samples"])
            and torch.equal(side[0][0], plain[0][0])
        )
        assert all(torch.equal(reference, demo.vae.encode(picture)) for reference, picture in zip(references, pictures))
    # Each stands one step further along the time axis (v1.1).
    places = [
        demo.model.model.diffusion_model.process_reference(reference, index)[1][..., 0].unique().tolist()
        for index, reference in enumerate(references)
    ]
    assert places == [[1], [2], [3]]


@pytest.fixture(scope="module")
def client(demo_server):
    return demo_server


def upload(client, tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    client.upload_image(tmp_path / name, name)


def workflow_prompt(client, names, **changes):
    """The shipped batch workflow with these pictures."""
    prompt = demo_prompt(client, "step1x_edit_batch.json", Step1XEditBatchImages=changes)
    for node, name in zip(find_nodes(prompt, "LoadImage"), names, strict=True):
        prompt[node]["inputs"]["image"] = name
    return prompt


def images_of(run):
    return [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in run.images]


def report_of(run, prompt):
    node, = find_nodes(prompt, "PreviewAny")
    return next(data["output"]["text"][0] for kind, data in run.events if kind == "executed" and data["node"] == node)


def test_batch_workflow_makes_every_instruction_on_every_picture(client, tmp_path):
    pair = recolouring(3)
    wide = np.asarray(Image.fromarray(recolouring(5).source).resize((144, 112)))
    upload(client, tmp_path, "scene.png", pair.source)
    upload(client, tmp_path, "wide.png", wide)
    prompt = workflow_prompt(client, ("scene.png", "wide.png"), prompts=f"{pair.instruction}\ninvert all colors", size_level=128)
    run = client.run(prompt)
    recoloured, inverted, *others = images_of(run)
    assert judge(pair, recoloured).success and np.abs(inverted.astype(int) - invert(pair.source)).mean() < 20
    assert [picture.shape for picture in others] == [wide.shape] * 2 and not np.array_equal(*others)
    report = report_of(run, prompt)
    assert report.startswith("4 of 4 edits made.") and '3. picture 2, seed 44, "' in report
    node, = find_nodes(prompt, "Step1XEditBatchImages")
    values, total = [value for value, _ in run.progress(node)], 4 * (ENCODING_STEPS + STEPS + 1)
    assert (
        values == sorted(values)
        and values[-1] == total
        and {most for _, most in run.progress(node)} == {total}
        and len(set(values)) >= 4 * STEPS
    )
    assert not client.run(prompt).executed


@pytest.mark.once
def test_a_bad_picture_is_reported_and_tried_again_in_the_next_run(client, tmp_path):
    upload(client, tmp_path, "scene.png", recolouring(3).source)
    upload(client, tmp_path, "narrow.png", np.zeros((4, 2048, 3), np.uint8))
    prompt = workflow_prompt(client, ("narrow.png", "scene.png"), prompts="invert all colors", combine=PAIRS)
    run = client.run(prompt)
    inverted, = images_of(run)
    assert np.abs(inverted.astype(int) - invert(recolouring(3).source)).mean() < 20
    report = report_of(run, prompt)
    assert "1 of 2 edits made." in report and "1. picture 1" in report and "too narrow" in report
    node, = find_nodes(prompt, "Step1XEditBatchImages")
    again = client.run(prompt)
    assert (
        node in again.executed
        and "1 of 2 edits made." in report_of(again, prompt)
        and "is not retried until an input changes" in report_of(again, prompt)
    )
    # It always fails: once more is enough, until something changes.
    assert node not in client.run(prompt).executed
    prompt[node]["inputs"]["seed"] += 1
    assert node in client.run(prompt).executed and node in client.run(prompt).executed and node not in client.run(prompt).executed
    prompt = workflow_prompt(client, ("narrow.png", "narrow.png"), prompts="invert all colors")
    with pytest.raises(ExecutionError, match="None of the edits could be made"):
        client.run(prompt)


def test_cancel_in_mid_batch_and_run_again(client, tmp_path):
    upload(client, tmp_path, "scene.png", recolouring(3).source)
    prompt = workflow_prompt(client, ("scene.png", "scene.png"), prompts="make it red", combine=PAIRS, steps=40)
    cancelled = client.run(prompt, interrupt_at=2 * ENCODING_STEPS + 3)
    node, = find_nodes(prompt, "Step1XEditBatchImages")
    assert cancelled.interrupted and not cancelled.images and cancelled.progress(node)[-1][0] < 40
    assert len(client.run(workflow_prompt(client, ("scene.png", "scene.png"), prompts="make it red", combine=PAIRS, steps=1)).images) == 2


def test_only_pictures_prompts_and_seeds_may_be_lists(client, tmp_path):
    upload(client, tmp_path, "scene.png", recolouring(3).source)
    prompt = workflow_prompt(client, ("scene.png", "scene.png"), prompts="make it red", combine=PAIRS)
    prompt["vaes"] = {"class_type": "CreateList", "inputs": {f"inputs.input{i}": [find_nodes(prompt, "VAELoader")[0], 0] for i in range(2)}}
    prompt[find_nodes(prompt, "Step1XEditBatchImages")[0]]["inputs"]["vae"] = ["vaes", 0]
    with pytest.raises(ExecutionError, match="Input 'vae' is a list of 2"):
        client.run(prompt)


@pytest.mark.once
def test_references_node_takes_several_pictures(client, tmp_path):
    for index in (1, 3, 5):
        upload(client, tmp_path, f"{index}.png", recolouring(index).source)
    results = []
    for further in ((), (3,), (3, 5), (5, 3)):
        prompt = demo_prompt(client, "step1x_edit.json", LoadImage={"image": "1.png"}, Step1XEditEncode={"prompt": ""})
        encode, = find_nodes(prompt, "Step1XEditEncode")
        if further:
            loads = {f"load{index}": {"class_type": "LoadImage", "inputs": {"image": f"{index}.png"}} for index in further}
            prompt |= loads
            prompt[encode]["inputs"] |= {"reference_size": 128, **{f"references.reference{i}": [name, 0] for i, name in enumerate(loads)}}
        results.append(images_of(client.run(prompt))[0])
    assert len({result.tobytes() for result in results}) == 4 and {result.shape for result in results} == {(128, 128, 3)}
