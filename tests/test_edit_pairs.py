"""Datasets of edit pairs: the two layouts, what is wrong with them in one sentence, and the cache."""

import json
import shutil

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_text_encoder
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.host.training.cache import cache_pairs
from step1x_core.host.training.folders import dataset_path
from step1x_core.training.cache import Cache, pack_conditioning, write_tensors
from step1x_core.training.dataset import dataset_fingerprint, read_pairs, read_picture

LEVEL = 64


def write_picture(path, seed, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_folder(folder, count=3, size=(64, 64)):
    for i in range(count):
        write_picture(folder / "source" / f"{i}.png", i, size)
        write_picture(folder / "target" / f"{i}.png", 100 + i, size)
        (folder / "target" / f"{i}.txt").write_text(f"edit number {i}\n", encoding="utf-8")
    return folder


def write_json(folder, entries):
    path = folder / "metadata.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pairs")


def test_both_layouts_give_the_same_pairs(folder):
    from_folder = read_pairs(folder)
    assert [pair.instruction for pair in from_folder] == ["edit number 0", "edit number 1", "edit number 2"]
    relative = {f"target/{i}.png": {"ref_image_path": f"source/{i}.png", "caption": f"edit number {i}", "score": 9} for i in range(3)}
    absolute = {str(folder / target): {**entry, "ref_image_path": str(folder / entry["ref_image_path"])} for target, entry in relative.items()}
    for entries in (relative, absolute):
        assert read_pairs(write_json(folder, entries)) == from_folder


def test_a_folder_of_json_files_is_one_dataset(folder):
    for i, name in enumerate(("b.json", "a.json")):
        (folder / name).write_text(json.dumps({f"{i}.png": {"ref_image_path": "0.png", "caption": name}}), encoding="utf-8")
        shutil.copy(folder / "source" / "0.png", folder / f"{i}.png")
    assert [pair.instruction for pair in read_pairs(folder)] == ["a.json", "b.json"]


@pytest.mark.parametrize("entries, message", [
    ("{broken", "could not be read as JSON"),
    ("[1, 2]", "is not a list of pairs"),
    ({"target/0.png": {"caption": "x"}}, 'has no "ref_image_path"'),
    ({"target/0.png": {"ref_image_path": "source/0.png", "caption": 3}}, 'no "caption"'),
    ({"target/0.png": "source/0.png"}, 'has no "ref_image_path"'),
    ({"target/9.png": {"ref_image_path": "source/0.png", "caption": "x"}}, "9.png.*does not exist"),
    ({"target/0.png": {"ref_image_path": "source/9.png", "caption": "x"}}, "9.png.*does not exist"),
    ({}, "holds no pairs"),
])
def test_bad_json_is_one_sentence(folder, entries, message):
    with pytest.raises(Step1XError, match=message):
        read_pairs(write_json(folder, entries))


def test_bad_folders_are_one_sentence(folder, tmp_path):
    (folder / "target" / "1.txt").unlink()
    with pytest.raises(Step1XError, match="1.txt could not be read"):
        read_pairs(folder)
    (folder / "source" / "0.png").unlink()
    with pytest.raises(Step1XError, match="0.png has no picture of that name"):
        read_pairs(folder)
    with pytest.raises(Step1XError, match="There is no dataset"):
        read_pairs(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Step1XError, match="holds no pairs"):
        read_pairs(tmp_path / "empty")


def test_pictures_outside_of_the_root_are_refused(folder):
    assert len(read_pairs(folder, folder)) == 3
    path = write_json(folder / "source", {"0.png": {"ref_image_path": "../target/0.png", "caption": "x"}})
    with pytest.raises(Step1XError, match="is not inside"):
        read_pairs(path, folder / "source")


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
    for name in ("", " ", "[output]", " [output]", "..", "../output/edit_pairs/pairs", "../input/pairs [output]", "../../x [output]", "x [temp]", str(tmp_path),
                 str(roots["temp"] / "x"), f"{inside}/../../temp", f"{tmp_path}/inputs/x"):
        with pytest.raises(Step1XError, match="names no dataset"):
            dataset_path(name)


def test_a_turned_photograph_is_set_upright_and_a_web_page_is_no_picture(tmp_path):
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (40, 20, 3)
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(Step1XError, match="page.png could not be read"):
        read_picture(tmp_path / "page.png")


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
        picture = read_picture(item.pair.source)[None]
        positive, negative, latent = encode_edit(clip, vae, picture, item.pair.instruction, "", LEVEL)
        cond, extra = dataset.conditioning(item)
        assert torch.equal(cond, positive[0][0].bfloat16()) and torch.equal(extra["attention_mask"], positive[0][1]["attention_mask"].cpu())
        assert torch.equal(extra["reference_latents"][0], latent["samples"])
        target, source = dataset.latents(item)
        assert torch.equal(source, latent["samples"]) and torch.equal(target, vae.encode(read_picture(item.pair.target)[None]))
        assert item.size == target.shape[-2:]
        if negative_prompt is not None:
            assert torch.equal(dataset.conditioning(item, negative=True)[0], negative[0][0].bfloat16())


def test_positions_of_v12_keep_their_precision(models, folder):
    clip = load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")
    pair = read_pairs(folder)[0]
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize('write "A"', images=[read_picture(pair.source)[None]], size_level=LEVEL))
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


def test_cache_files_are_whole_and_faults_are_named(tmp_path):
    cache = Cache(tmp_path)
    cache.store("ab12", {"latent": torch.arange(6.0).view(2, 3).T})
    assert "ab12" in cache and torch.equal(cache.load("ab12")["latent"], torch.arange(6.0).view(2, 3).T)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["ab12.safetensors"]
    cache.path("ab12").write_bytes(b"half")
    with pytest.raises(Step1XError, match="Delete it"):
        cache.load("ab12")
    (tmp_path / "file").write_text("")
    with pytest.raises(Step1XError, match="cannot be written"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.zeros(1)})
