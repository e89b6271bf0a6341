"""Names of datasets, trainings and benchmarks that lead out of their folders or that no file can have, typed in and handed over by another node."""

import folder_paths
import pytest
import torch
from bad_input_host import Given, Host

from step1x_core.training.cache import Cache, EditDataset

NAMES = {"parent": "..", "parents": "../../../x", "through_a_folder": "a/../../../x", "absolute": "/etc", "drive": "C:\\x", "backslashes": "..\\..\\x", "nothing": "", "dot": ".",
         "spaces": "  ", "nul": "a\0b", "line_break": "a\nb", "lone_surrogate": "\ud800", "300_letters": "a" * 300, "5000_letters": "a" * 5000, "5000_folders": "a/" * 5000}
NO_NAME = "cannot be (the|a) name of"
NO_DATASET = "There is no dataset '.*' in |names no dataset|is not in ComfyUI's input folder|There is no GEdit-Bench in .* Put the dataset|holds no pairs"
NODES = {
    "training": ("Step1XEditTrainLora", "name", NO_NAME, {"steps": 1, "learning_rate": 0.1, "rank": 1, "alpha": 1.0, "batch_size": 1, "accumulation": 1, "seed": 1, "resume": True,
                                                      "save_every": 0, "validate_every": 0, "schedule": "constant", "warmup": 0, "ema": 0.0, "gradient_checkpointing": True}),
    "pairs": ("Step1XEditPairSave", "name", NO_NAME, {}),
    "dataset": ("Step1XEditDataset", "dataset", NO_DATASET, {"size_level": 64, "validation": 0}),
    "bench": ("Step1XEditGEditBench", "dataset", NO_DATASET, {"method": "x", "language": "en", "task_types": "", "limit": 0}),
    "method": ("Step1XEditGEditBench", "method", NO_NAME, {"dataset": "", "language": "en", "task_types": "", "limit": 0}),
    "judge": ("Step1XEditGEditReport", "judge", NO_NAME, {}),
    "judge_of_judge": ("Step1XEditGEditJudge", "judge", NO_NAME, {"seed": 1, "again": False}),
}
# A benchmark without a dataset has pictures of its own.
FINE = {("bench", "nothing"), ("bench", "spaces")}


@pytest.fixture(scope="module")
def host(model, clip, vae, tmp_path_factory):
    root = tmp_path_factory.mktemp("host")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("input", "output"):
            (root / name).mkdir()
            patch.setattr(folder_paths, f"{name}_directory", str(root / name))
        yield Host(patch, model, clip, vae)


@pytest.fixture(scope="module")
def links(host, tmp_path_factory):
    bench, = host.run("Step1XEditGEditBench", dataset="", method="x", language="en", task_types="", limit=1).made()
    return {"training": {"model": host.model, "dataset": EditDataset(Cache(tmp_path_factory.mktemp("cache")), [])}, "pairs": {"pairs": ()},
            "dataset": {"clip": host.clip, "vae": host.vae}, "judge": {"bench": bench}, "judge_of_judge": {"bench": bench, "clip": host.clip}}


@pytest.mark.parametrize("case, name", [(case, name) for case in NODES for name in NAMES if (case, name) not in FINE])
def test_names_that_lead_elsewhere_or_are_none(host, links, case, name):
    node, entry, expected, widgets = NODES[case]
    for value in (NAMES[name], Given(NAMES[name], "STRING")):
        host.refuses(host.run(node, **{key: Given(thing) for key, thing in links.get(case, {}).items()}, **widgets, **{entry: value}), expected)


@pytest.mark.parametrize("case", NODES)
@pytest.mark.parametrize("value", [None, 5, ["a"], {"a": 1}, torch.zeros(1)], ids=["nothing", "number", "list", "table", "tensor"])
def test_names_that_are_no_text(host, links, case, value):
    node, entry, _, widgets = NODES[case]
    outcome = host.run(node, **{key: Given(thing) for key, thing in links.get(case, {}).items()}, **widgets, **{entry: Given(value, "STRING")})
    host.refuses(outcome, f"The input '{entry}' brings .* but it takes text")
