"""What the host is told about when to run a node again: fingerprints of connected inputs, and failures that come again."""

import asyncio
import copy
import inspect
import os

import comfy.model_management
import execution
import folder_paths
import pytest
import torch
from comfy_execution.graph import DynamicPrompt
from loop_host import load_pack, node_classes

import nodes
from step1x_core.host.gedit.benchmark import RESULTS
from step1x_core.host.pairs.store import DATASETS
from step1x_core.host.reasoning import rounds
from step1x_core.host.reasoning.rounds import TRIES, Failure, attempt, failures
from step1x_core.pairs.store import JOURNAL


@pytest.fixture(scope="module")
def classes():
    return node_classes(load_pack())


@pytest.fixture
def fingerprint(classes, monkeypatch, tmp_path):
    """Fingerprint of a node as the host takes it, with these widgets; every other input is connected."""
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    for name, node in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)

    def taken(name, /, **widgets):
        inputs = {entry.id: widgets.get(entry.id, ["source", 0]) for entry in classes[name].GET_SCHEMA().inputs}
        prompt = {"1": {"class_type": name, "inputs": inputs}, "source": {"class_type": "EmptyImage", "inputs": {}}}
        return asyncio.run(execution.IsChangedCache("id", DynamicPrompt(copy.deepcopy(prompt)), None).get("1"))

    return taken


def fingerprinted(classes) -> list[str]:
    return [name for name, node in classes.items() if "fingerprint_inputs" in vars(node)]


def test_connected_inputs_do_not_make_a_node_run_every_time(classes, fingerprint):
    names = fingerprinted(classes)
    assert {
        "Step1XEditBatchImages",
        "Step1XEditGEditItems",
        "Step1XEditPairSave",
        "Step1XEditTrainDataset",
        "Step1XEditThinkPrompt",
        "Step1XEditReflectionLoop",
    } <= set(names)
    for name in names:
        first = fingerprint(name)
        # NaN, which the host takes where a fingerprint fails, equals nothing.
        assert first == fingerprint(name), f"{name} runs every time"
        for entry in classes[name].GET_SCHEMA().inputs:
            if type(entry).__name__ == "Input" and isinstance(getattr(entry, "default", None), str):
                one = fingerprint(name, **{entry.id: entry.default})
                assert one == fingerprint(name, **{entry.id: entry.default}), f"{name} runs every time with only {entry.id} typed in"


def test_files_of_a_connected_name_are_still_watched(fingerprint, tmp_path):
    output = tmp_path / "output"
    for node, path in (
        ("Step1XEditPairSave", output / DATASETS / "mine" / JOURNAL),
        ("Step1XEditGEditItems", output / RESULTS / "m" / "scores" / "j" / "en.jsonl"),
        ("Step1XEditGEditItems", output / RESULTS / "m" / "fullset" / "a" / "en" / "1.png"),
    ):
        before = fingerprint(node)
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        written = fingerprint(node)
        assert written != before
        os.utime(path, ns=(1, 1))
        assert fingerprint(node) != written


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(rounds, "_failures", rounds.Counter())
    monkeypatch.setattr(rounds, "_repeats", rounds.Counter())


def fail(kind=ValueError, text="too narrow"):
    raise kind(text)


def test_what_always_fails_is_tried_again_a_bounded_number_of_times(counted):
    seen = []
    for run in range(6):
        before = failures("7")
        failure = attempt("7", "edit 1", fail, text=f"too narrow {run}")
        assert isinstance(failure, Failure) and f"ValueError: too narrow {run}" in failure.reason
        assert ("is not retried" in failure.reason) == (failures("7") == before)
        seen.append(failures("7"))
    # The fingerprint is another one after each of the first tries, and then stays.
    assert seen == [*range(1, TRIES), *[TRIES - 1] * (7 - TRIES)]


def test_other_work_other_errors_and_a_success_give_new_tries(counted):
    for task in ("edit 1", "edit 2"):
        for kind in (ValueError, torch.cuda.OutOfMemoryError):
            before = failures("7")
            attempt("7", task, fail, kind)
            assert failures("7") == before + 1
    assert "not retried" not in attempt("7.0.0.round_2", "edit 1", fail).reason and failures("7") == 5
    assert attempt("7", "edit 1", lambda: 3) == 3
    before = failures("7")
    assert "not retried" not in attempt("7", "edit 1", fail).reason and failures("7") == before + 1
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        attempt("7", "edit 1", fail, comfy.model_management.InterruptProcessingException)
    assert failures("7") == before + 1


def test_switches_are_checked_like_every_widget(classes):
    check = classes["Step1XEditTrainLora"].execute.__globals__["check_widgets"]
    for name, node in classes.items():
        for entry in node.GET_SCHEMA().inputs:
            if type(entry).__qualname__ != "Boolean.Input":
                continue
            for value in (True, False, 0, 1):
                check(node, **{entry.id: value})
            for value in ("False", None, 2, 0.5, [True]):
                with pytest.raises(ValueError, match=f"'{entry.id}' is .* but it takes true or false"):
                    check(node, **{entry.id: value})
            # It is among those that the node hands over, too.
            assert f"{entry.id}={entry.id}" in inspect.getsource(node.execute) or f'"{entry.id}"' in inspect.getsource(
                node.execute
            ), f"{name}.{entry.id}"
    with pytest.raises(ValueError, match="'seed' is 'True'"):
        check(classes["Step1XEditSampler"], seed=True)
