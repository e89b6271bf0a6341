"""Paths that a dataset names stay in its folder, names can be stored on every system, and files are there whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_edit_pairs import write_folder, write_json

from step1x_core import files
from step1x_core.errors import Step1XError
from step1x_core.files import safe_path, write_file
from step1x_core.gedit.dataset import read_dataset
from step1x_core.training import cache
from step1x_core.training.cache import Cache, write_tensors
from step1x_core.training.dataset import CAPTION, REFERENCE, dataset_fingerprint, read_pairs

OUTSIDE = [
    "/etc/hostname",
    "../secret.png",
    "source/../../secret.png",
    r"\\server\share\secret.png",
    "//server/share/secret.png",
    r"\\?\C:\secret.png",
    r"C:\secret.png",
    "C:/secret.png",
    "c:secret.png",
    r"..\secret.png",
    r"source\..\..\secret.png",
    "nul\0.png",
]


@pytest.fixture
def root(tmp_path):
    """The host's input folder with a dataset; beside it a picture that is nobody's business."""
    root = tmp_path / "input"
    write_folder(root / "data", 2)
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    return root


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", ["source", "target"])
def test_names_that_lead_out_of_the_root_are_refused_before_anything_is_looked_at(root, monkeypatch, name, place):
    names = {"source": "source/0.png", "target": "target/0.png", place: name}
    # The dataset's folder may lie as deep as it likes: `..` counts from it.
    path = root / "pairs.json"
    path.write_text(json.dumps({names["target"]: {REFERENCE: names["source"], CAPTION: "x"}}))
    looked = []
    for function in ("stat", "lstat", "open"):
        real = getattr(os, function)
        monkeypatch.setattr(
            os,
            function,
            lambda file, *args, real=real, **kwargs: (looked.append(str(file)), real(file, *args, **kwargs))[1],
        )
    with pytest.raises(Step1XError, match="is not inside"):
        read_pairs(path, root)
    assert "is not inside" in dataset_fingerprint(path, root)
    assert not [file for file in looked if "secret" in file or "server" in file or "hostname" in file]


def test_a_link_out_of_the_root_is_refused_and_the_owners_link_to_a_dataset_is_not(root, tmp_path):
    data = root / "data"
    assert len(read_pairs(data, root)) == 2
    (data / "source" / "0.png").unlink()
    (data / "source" / "0.png").symlink_to(tmp_path / "secret.png")
    for path in (data, write_json(data, {"target/0.png": {REFERENCE: "source/0.png", CAPTION: "x"}})):
        with pytest.raises(Step1XError, match="a link that points outside"):
            read_pairs(path, root)
        assert "a link that points outside" in dataset_fingerprint(path, root)
    elsewhere = write_folder(tmp_path / "elsewhere", 2)
    (root / "linked").symlink_to(elsewhere)
    assert len(read_pairs(root / "linked", root)) == 2
    assert len(read_pairs(data, None)) == 1  # the command line reads what its owner names


def test_an_instruction_and_a_list_that_are_links_are_refused(root, tmp_path):
    data = root / "data"
    (tmp_path / "secret.txt").write_text("secret")
    (data / "target" / "0.txt").unlink()
    (data / "target" / "0.txt").symlink_to(tmp_path / "secret.txt")
    (root / "list.json").symlink_to(tmp_path / "secret.txt")
    for path in (data, root / "list.json"):
        with pytest.raises(Step1XError, match="a link that points outside"):
            read_pairs(path, root)


def test_absolute_names_inside_of_the_root_are_taken(root):
    path = root / "data" / "pairs.json"
    names = [str((root / "data" / side / "0.png").absolute()) for side in ("source", "target")]
    path.write_text(json.dumps({names[1]: {REFERENCE: names[0], CAPTION: "x"}}))
    assert len(read_pairs(path, root)) == 1


def bench(folder, name):
    folder.mkdir(exist_ok=True)
    row = {
        "key": "a",
        "task_type": "color_alter",
        "instruction": "x",
        "instruction_language": "en",
        "Intersection_exist": True,
        "file_name": name,
    }
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return folder


@pytest.mark.parametrize("name", [*OUTSIDE, "link.png"])
def test_the_benchmarks_list_stays_in_its_folder(tmp_path, name):
    folder = bench(tmp_path / "bench", name)
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(Step1XError, match="outside its folder|points outside"):
        read_dataset(folder)


def test_a_safe_path_is_absolute_and_the_same_for_both_ways_to_write_it(tmp_path):
    assert (
        safe_path(tmp_path, "a/./b.png", tmp_path, "x")
        == tmp_path / "a" / "b.png"
        == safe_path(tmp_path / "a", "../a/b.png", tmp_path, "x")
    )


# Two pictures of one name.

@pytest.mark.parametrize("side", ["source", "target"])
def test_two_pictures_of_one_name_are_refused(root, side):
    Image.new("RGB", (64, 64)).save(root / "data" / side / "1.jpg")
    with pytest.raises(Step1XError, match="1.jpg and 1.png in .* have the same name"):
        read_pairs(root / "data", root)


# Names.


# A disk that is full.

class FullDisk:
    """Writes fail after some bytes, as on a full disk."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(files, "_write", self.write)
        monkeypatch.setattr(cache, "save_file", lambda tensors, path, metadata=None: self.write(path, b"12345678"))

    @staticmethod
    def write(path, content):
        Path(path).write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("write", [lambda path: write_file(path, b"new content"), lambda path: write_tensors(path, {"a": torch.zeros(1)})])
def test_a_full_disk_leaves_the_earlier_file_and_nothing_half_written(tmp_path, monkeypatch, write):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    FullDisk(monkeypatch)
    with pytest.raises(Step1XError, match="cannot be written .*No space left.*Free disk space"):
        write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"


# The cache.


def test_the_cache_keeps_what_is_used_and_of_the_rest_the_latest(tmp_path):
    kept = Cache(tmp_path)
    for number in range(6):
        kept.store(f"{number}x", {"a": torch.zeros(100)})
        os.utime(kept.path(f"{number}x"), (number + 1000, number + 1000))
    half = kept.path("0x").with_name("0x.safetensors.1.part")
    half.write_bytes(b"x")
    os.utime(half, (1000, 1000))
    kept.prune({"0x", "1x"}, spare=0)
    assert [number for number in range(6) if f"{number}x" in kept] == [0, 1, 4, 5] and not half.exists()
    kept.prune({"5x"}, spare=10**6)
    assert [number for number in range(6) if f"{number}x" in kept] == [0, 1, 4, 5]
    shutil.rmtree(tmp_path)
    kept.prune({"5x"})
