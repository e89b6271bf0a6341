"""Names of datasets, trainings and benchmarks that lead out of their folders or that no file can have, typed in and handed over by another node."""

import pytest
import torch
from bad_input_host import Given, running_host, use_folders
from comfy_api.latest import io
from node_inputs import entries

# Nodes and their checks are the same in every host. A sample of the cases shows what a further host makes of them.
pytestmark = pytest.mark.sampled(11)

NAMES = {
    "parent": "..",
    "parents": "../../../x",
    "through_a_folder": "a/../../../x",
    "absolute": "/etc",
    "drive": "C:\\x",
    "backslashes": "..\\..\\x",
    "nothing": "",
    "dot": ".",
    "spaces": "  ",
    "nul": "a\0b",
    "line_break": "a\nb",
    "lone_surrogate": "\ud800",
    "300_letters": "a" * 300,
    "5000_letters": "a" * 5000,
    "5000_folders": "a/" * 5000,
}
NO_NAME = "cannot be (the|a) name of"
NO_DATASET = "There is no dataset '.*' in |names no dataset|is not in ComfyUI's input folder|There is no GEdit-Bench in .* Put the dataset|holds no pairs"
# Every text that names a folder, by the input's name, with what is said to one that cannot.
SENTENCES = {"name": NO_NAME, "method": NO_NAME, "judge": NO_NAME, "dataset": NO_DATASET}
TEXTS = [entry for entry in entries() if isinstance(entry.input, io.String.Input) and entry.name in SENTENCES]
# A benchmark without a dataset has pictures of its own; pairs without a name are only shown.
FINE = {"Step1XEditGEditItems.dataset": ("", "  "), "Step1XEditPairSave.name": ("",)}


@pytest.fixture(scope="module")
def host(model, clip, vae, tmp_path_factory):
    root = tmp_path_factory.mktemp("host")
    with running_host(model, clip, vae, lambda patch: use_folders(patch, root)) as host:
        yield host


def test_every_kind_of_name_is_there():
    assert {entry.name for entry in TEXTS} == set(SENTENCES)


def is_fine(entry, name: str) -> bool:
    return name in FINE.get(f"{entry.node}.{entry.name}", ())


@pytest.mark.parametrize(
    "entry, name",
    [
        pytest.param(entry, name, id=f"{entry}-{label}")
        for entry in TEXTS
        for label, name in NAMES.items()
        if not is_fine(entry, name)
    ],
)
def test_names_that_lead_elsewhere_or_are_none(host, entry, name):
    for value in (name, Given(name, "STRING")):
        host.refuses(host.call(entry.node, **{entry.name: value}), SENTENCES[entry.name])


@pytest.mark.parametrize("entry", TEXTS, ids=str)
@pytest.mark.parametrize("value", [None, 5, ["a"], {"a": 1}, torch.zeros(1)], ids=["nothing", "number", "list", "table", "tensor"])
def test_names_that_are_no_text(host, entry, value):
    host.refuses(host.call(entry.node, **{entry.name: Given(value, "STRING")}), f"Input '{entry.name}' is .* but it takes text")
