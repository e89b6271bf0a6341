"""Names of trainings in the host's output folder."""

import pytest
import torch

from step1x_core.errors import Step1XError
from step1x_core.files import check_name, write_file
from step1x_core.host.training.folders import run_folder
from step1x_core.training.cache import write_tensors


@pytest.mark.parametrize(
    "name",
    [
        "CON",
        "nul",
        "nul.",
        "NUL.txt",
        "con.tar.gz",
        "Aux",
        "COM1",
        "lpt9.png",
        "COM¹",
        "CONIN$",
        "aux .x",
        "a.",
        "a ",
        " a",
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        "a:b",
        "a\nb",
        "a\x7f",
        "图" * 150,
        "é" * 101,
        "\U0001f600" * 51,
        "\udcff",
        "x" * 201,
    ],
)
def test_names_that_some_system_cannot_store_are_refused(name):
    with pytest.raises(Step1XError, match="cannot be a name of a dataset"):
        check_name(name, "name of a dataset")
    with pytest.raises(Step1XError, match="cannot be the name of a training"):
        run_folder(name)


@pytest.mark.parametrize("name", ["my_pairs", "图" * 40, "console", "null", "com", "com10", "a.b-c 1", "é" * 60])
def test_names_that_every_system_can_store_are_taken_and_files_of_them_written(tmp_path, name):
    assert check_name(name, "key") == name and run_folder(name).name == name
    write_file(tmp_path / f"{name}.png", b"x")
    write_tensors(tmp_path / name / f"{name}.safetensors", {"a": torch.zeros(1)})
