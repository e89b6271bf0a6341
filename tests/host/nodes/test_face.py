"""What the nodes show while they run, and how they are found."""

import json
from functools import cache

import pytest
import torch
from bad_input_host import Given, Host
from conftest import PACK

import locales
from step1x_core.versions import VERSIONS, describe_settings

# Which nodes there are and what they call is what differs between releases.
pytestmark = pytest.mark.everywhere


@cache
def schemas() -> list:
    return locales.node_schemas()


@pytest.fixture(scope="module")
def host(model, clip, vae):
    with pytest.MonkeyPatch.context() as patch:
        yield Host(patch, model, clip, vae)


def test_settings_are_described_with_their_origin():
    assert describe_settings("v1.1", 0, 0.0) == "28 steps, CFG 6 (defaults of v1.1)"
    assert describe_settings("v1.2", 0, 4.5) == "50 steps (default of v1.2), CFG 4.5"
    assert describe_settings("v1.2-preview", 20, 0.0) == "20 steps, CFG 4 (default of v1.2-preview)"
    assert describe_settings("v1.1", 20, 4.0) == "20 steps, CFG 4"
    assert describe_settings("v1.2", 0) == "50 steps (default of v1.2)" and describe_settings("v1.2", 3) == "3 steps"


def test_the_sampler_shows_what_zero_means(host, shown, caplog):
    with caplog.at_level("INFO"):
        host.sample(steps=1, cfg=0.0).made()
    (node, text), = shown
    assert node.isdigit() and text == "1 step, CFG 6 (default of v1.1)" and text in caplog.text


def test_the_scheduler_takes_the_steps_of_the_models_version(host, shown):
    inputs = {"model": Given(host.model), "latent_image": Given({"samples": torch.zeros(1, 16, 8, 8)}), "denoise": 1.0}
    (default,), (given,) = (host.run("Step1XEditScheduler", **inputs, steps=steps).made() for steps in (0, 5))
    assert len(default) == VERSIONS["v1.1"].steps + 1 and len(given) == 6
    assert [text for _, text in shown] == ["28 steps (default of v1.1)", "5 steps"]


def test_the_library_has_one_folder_for_all_nodes():
    categories = {schema.category for schema in schemas()}
    assert {category.split("/")[0] for category in categories} == {"Step1X-Edit"} and len(categories) <= 4


PLAIN_EDIT = {"Step1XEditLoader", "Step1XEditMLLM", "Step1XEditEncode", "Step1XEditSampler", "Step1XEditDecode"}


@pytest.mark.parametrize("words", [{"step1x"}, {"edit image", "edit picture", "edit photo"}])
def test_search_aliases_belong_to_the_nodes_of_a_plain_edit(words):
    """Of names of the same length the editor prefers the one with more matches."""
    assert {schema.node_id for schema in schemas() if words <= {*schema.search_aliases}} == PLAIN_EDIT


def test_the_blueprint_has_the_encoders_aliases():
    blueprint = json.loads((PACK / "subgraphs" / "Step1X-Edit Image.json").read_text(encoding="utf-8"))
    encode, = (schema for schema in schemas() if schema.node_id == "Step1XEditEncode")
    assert {"step1x", "edit image", "edit picture"} <= {*blueprint["extra"]["BlueprintSearchAliases"]} <= {*encode.search_aliases}


def test_the_search_for_step1x_lists_the_plain_edit_first():
    """The editor sorts what begins with the words that are typed by the length of the id or of the shown name, whichever is shorter.

    So the ids and names of all other nodes are longer than the sampler's id, and than the blueprint's name; only 'Step1X-Edit Speed', which is part of
    a plain edit that shall be fast, is as long.
    """
    def rank(schema):
        return min(len(name) for name in (schema.node_id, schema.display_name) if name.startswith("Step1X"))

    nodes = {schema.node_id: rank(schema) for schema in schemas()}
    longest = max(nodes[name] for name in PLAIN_EDIT)
    assert {name for name, length in nodes.items() if length <= longest} == PLAIN_EDIT | {"Step1XEditSpeedPreset"}
    assert len("Step1X-Edit Image") <= longest
