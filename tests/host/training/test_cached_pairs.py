"""What the host keeps of a dataset: latents and conditionings of every pair."""

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import tiny_models
import torch
from test_edit_pairs import write_folder, write_picture

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_text_encoder
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.host.training.cache import cache_pairs
from step1x_core.host.training.folders import dataset_path
from step1x_core.training.cache import pack_conditioning
from step1x_core.training.dataset import dataset_fingerprint, decode_picture, read_pairs

LEVEL = 64


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pairs")


def test_a_name_reaches_the_hosts_input_and_output_folders_only(tmp_path, monkeypatch):
    roots = {name: tmp_path / name for name in ("input", "output", "temp")}
    for name, root in roots.items():
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda root=root: str(root))
    inside, made = roots["input"] / "pairs", roots["output"] / "edit_pairs" / "pairs"
    inside.mkdir(parents=True)
    made.mkdir(parents=True)
    for name in ("pairs", " pairs ", "pairs [input]", str(inside)):
        assert dataset_path(name) == (inside, roots["input"])
    for name in ("edit_pairs/pairs [output]", str(made), f"{made} [output]"):
        assert dataset_path(name) == (made, roots["output"])
    for name in (
        "",
        " ",
        "[output]",
        " [output]",
        "..",
        "../output/edit_pairs/pairs",
        "../input/pairs [output]",
        "../../x [output]",
        "x [temp]",
        str(tmp_path),
        str(roots["temp"] / "x"),
        f"{inside}/../../temp",
        f"{tmp_path}/inputs/x",
    ):
        with pytest.raises(Step1XError, match="names no dataset"):
            dataset_path(name)


def cached(clip, vae, folder, level=LEVEL, **options):
    return cache_pairs(clip, vae, read_pairs(folder), folder, level, **options)


def test_only_what_changed_is_encoded_again(clip, vae, folder):
    before = dataset_fingerprint(folder)
    assert cached(clip, vae, folder)[1] == 9
    assert cached(clip, vae, folder)[1] == 0
    (folder / "target" / "1.txt").write_text("something else", encoding="utf-8")
    assert dataset_fingerprint(folder) != before
    # The instruction; then the target's latent; then the source's latent, and the instruction, which is read with the source in sight.
    assert cached(clip, vae, folder)[1] == 1
    write_picture(folder / "target" / "1.png", 500)
    assert cached(clip, vae, folder)[1] == 1
    write_picture(folder / "source" / "1.png", 501)
    assert cached(clip, vae, folder)[1] == 2
    # A moved pair is known by its content, and an old text is still there.
    (folder / "target" / "1.txt").write_text("edit number 1", encoding="utf-8")
    for part in ("source", "target"):
        for path in sorted((folder / part).glob("0.*")):
            path.rename(path.with_stem("9"))
    assert cached(clip, vae, folder)[1] == 1
    # Of another size: everything.
    assert cached(clip, vae, folder, level=80)[1] == 9


def test_cached_tensors_are_those_of_an_edit(clip, vae, folder):
    dataset, _ = cached(clip, vae, folder, validation=1)
    assert len(dataset.pairs) == 2 and len(dataset.validation) == 1
    for item, negative_prompt in ((dataset.pairs[0], None), (dataset.validation[0], "")):
        picture = decode_picture(item.pair.source.read_bytes(), item.pair.source)[None]
        positive, negative, latent = encode_edit(clip, vae, picture, item.pair.instruction, "", LEVEL)
        cond, extra = dataset.conditioning(item)
        assert torch.equal(cond, positive[0][0].bfloat16()) and torch.equal(extra["attention_mask"], positive[0][1]["attention_mask"].cpu())
        assert torch.equal(extra["reference_latents"][0], latent["samples"])
        target, source = dataset.latents(item)
        assert torch.equal(source, latent["samples"]) and torch.equal(
            target, vae.encode(decode_picture(item.pair.target.read_bytes(), item.pair.target)[None])
        )
        assert item.size == target.shape[-2:]
        if negative_prompt is not None:
            assert torch.equal(dataset.conditioning(item, negative=True)[0], negative[0][0].bfloat16())


def test_positions_of_v12_keep_their_precision(models, folder):
    clip = load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")
    pair = read_pairs(folder)[0]
    conditioning = clip.encode_from_tokens_scheduled(
        clip.tokenize(
            'write "A"', images=[decode_picture(pair.source.read_bytes(), pair.source)[None]], size_level=LEVEL
        )
    )
    packed = pack_conditioning(conditioning)
    assert torch.equal(packed["text_ids"], conditioning[0][1]["text_ids"].cpu()) and packed["cond"].dtype == torch.bfloat16
    assert {"text_embeds", "text_mask"} < set(packed)


def test_a_target_of_other_pixels_is_brought_to_the_sources_size(clip, vae, tmp_path):
    folder = write_folder(tmp_path / "pairs", 1, (96, 64))
    write_picture(folder / "target" / "0.png", 7, (193, 128))
    dataset, _ = cached(clip, vae, folder)
    assert dataset.latents(dataset.pairs[0])[0].shape == dataset.latents(dataset.pairs[0])[1].shape
    write_picture(folder / "target" / "0.png", 7, (128, 128))
    with pytest.raises(Step1XError, match="0.png has 128x128 pixels and its source 0.png 96x64"):
        cached(clip, vae, folder)


def test_caching_goes_on_after_a_cancel(clip, vae, folder, monkeypatch):
    done = []
    encode = clip.encode_from_tokens_scheduled

    def stop_after_two(tokens):
        done.append(tokens)
        if len(done) == 2:
            comfy.model_management.interrupt_current_processing()
        return encode(tokens)

    monkeypatch.setattr(clip, "encode_from_tokens_scheduled", stop_after_two)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        cached(clip, vae, folder)
    assert len(done) == 2
    monkeypatch.undo()
    # All but the first, which was complete.
    assert cached(clip, vae, folder)[1] == 8


@pytest.mark.once
def test_other_weights_are_encoded_anew(clip, vae, models, folder, tmp_path):
    cached(clip, vae, folder)
    sd = comfy.utils.load_torch_file(str(models / "vae" / tiny_models.VAE_FILE))
    sd["taesd_encoder.14.bias"] = sd["taesd_encoder.14.bias"] + 1
    assert cached(clip, comfy.sd.VAE(sd=sd), folder)[1] == 6
    tiny_models.write_mllm(tmp_path / "other.safetensors", seed=99)
    assert cached(load_text_encoder(tmp_path / "other.safetensors"), vae, folder)[1] == 3
    # The same weights, loaded once more.
    assert cached(load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE), vae, folder)[1] == 0


def test_validation_leaves_something_to_train_on(clip, vae, folder):
    with pytest.raises(Step1XError, match="3 pairs for validation leave none of the 3"):
        cached(clip, vae, folder, validation=3)
