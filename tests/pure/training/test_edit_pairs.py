"""Datasets of edit pairs: the two layouts, what is wrong with them in one sentence, and the cache."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.training.cache import Cache, write_tensors
from step1x_core.training.dataset import dataset_fingerprint, decode_picture, read_pairs, read_sources


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
    absolute = {
        str(folder / target): {**entry, "ref_image_path": str(folder / entry["ref_image_path"])}
        for target, entry in relative.items()
    }
    for entries in (relative, absolute):
        assert read_pairs(write_json(folder, entries)) == from_folder


def test_a_folder_of_json_files_is_one_dataset(folder):
    for i, name in enumerate(("b.json", "a.json")):
        (folder / name).write_text(json.dumps({f"{i}.png": {"ref_image_path": "0.png", "caption": name}}), encoding="utf-8")
        shutil.copy(folder / "source" / "0.png", folder / f"{i}.png")
    assert [pair.instruction for pair in read_pairs(folder)] == ["a.json", "b.json"]


@pytest.mark.parametrize("entries, message", [
    ("{broken", "could not be read as JSON"),
    ("[1, 2]", "is not a table of pairs"),
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
    with pytest.raises(Step1XError, match="0.png has no image of that name"):
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


def test_a_turned_photograph_is_set_upright_and_a_web_page_is_no_picture(tmp_path):
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    turned, page = tmp_path / "turned.jpg", tmp_path / "page.png"
    assert decode_picture(turned.read_bytes(), turned).shape == (40, 20, 3)
    page.write_text("<html>")
    with pytest.raises(Step1XError, match="page.png cannot be read as an image"):
        decode_picture(page.read_bytes(), page)


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


def test_sources_have_one_instruction_a_line_and_need_no_targets(tmp_path):
    for i in range(2):
        write_picture(tmp_path / "source" / f"{i}.png", i)
    (tmp_path / "source" / "0.txt").write_text("make it red\n\n  make it blue \n", encoding="utf-8-sig")
    (tmp_path / "source" / "1.txt").write_text("把它变绿", encoding="utf-8")
    sources = read_sources(tmp_path)
    assert [(pair.source.name, pair.target, pair.instruction) for pair in sources] == [
        ("0.png", None, "make it red"), ("0.png", None, "make it blue"), ("1.png", None, "把它变绿")]
    before = dataset_fingerprint(tmp_path, None, read_sources)
    (tmp_path / "source" / "1.txt").write_text("把它变红", encoding="utf-8")
    assert dataset_fingerprint(tmp_path, None, read_sources) != before
    (tmp_path / "source" / "1.txt").unlink()
    with pytest.raises(Step1XError, match="1.txt could not be read"):
        read_sources(tmp_path)


def test_pairs_give_their_sources_without_reading_targets(folder, tmp_path):
    entries = {f"target/{i}.png": {"ref_image_path": f"source/{i}.png", "caption": f"edit number {i}"} for i in range(3)}
    (folder / "target" / "1.png").unlink()
    texts = read_sources(folder)
    assert [pair.instruction for pair in texts] == ["edit number 0", "edit number 1", "edit number 2"] and texts[
        1
    ].files == (folder / "source" / "1.png",)
    assert read_sources(write_json(folder, entries)) == texts
    (folder / "source" / "2.png").unlink()
    with pytest.raises(Step1XError, match="2.png.*does not exist"):
        read_sources(folder / "metadata.json")
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(Step1XError, match="holds no sources"):
            read_sources(place)
