"""What a shipped workflow brings besides its nodes: notes, groups, links to the files it names, a thumbnail, a line in docs/workflows.md."""

import json

import folder_paths
import pytest
import thumbnails
from conftest import PACK
from PIL import Image

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
# A person's own choice: there is no file to offer.
OWN_FILES = {"step1x-edit-lora.safetensors", "step1x-edit-lightning.safetensors"}
TITLE = 30


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def graphs() -> list[tuple[str, list[dict]]]:
    blueprints = sorted((PACK / "subgraphs").glob("*.json"))
    assert blueprints
    return [(path.name, read(path)["nodes"]) for path in WORKFLOWS] + [(path.name, graph["nodes"]) for path in blueprints for graph in read(path)["definitions"]["subgraphs"]]


def box(node) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, with the title."""
    return node["pos"][0], node["pos"][1] - TITLE, node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]


@pytest.mark.parametrize("name, nodes", graphs(), ids=lambda value: value if isinstance(value, str) else "")
def test_files_that_a_graph_names_can_be_downloaded(name, nodes):
    for node in nodes:
        files = {value for value in node.get("widgets_values", []) if isinstance(value, str) and value.endswith(".safetensors")}
        models = node["properties"].get("models", [])
        assert {model["name"] for model in models} == files - OWN_FILES, f"{name}: {node['type']}"
        for model in models:
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(f"/{model['name']}")
            assert model["directory"] in folder_paths.folder_names_and_paths


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_graph_is_tidy_and_explains_itself(path):
    workflow = read(path)
    note, = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    text, = note["widgets_values"]
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["name"] in text and f"`models/{model['directory']}`" in text
    boxes = [box(node) for node in workflow["nodes"]]
    for i, (left, top, right, bottom) in enumerate(boxes):
        for left2, top2, right2, bottom2 in boxes[i + 1:]:
            assert left >= right2 or left2 >= right or top >= bottom2 or top2 >= bottom
    for node in workflow["nodes"]:
        left, top, right, bottom = box(node)
        inside = [x <= left and y <= top and right <= x + width and bottom <= y + height for x, y, width, height in (group["bounding"] for group in workflow["groups"])]
        assert sum(inside) == (node is not note)


def test_every_workflow_has_a_thumbnail_that_can_be_made_again():
    assert {path.stem for path in WORKFLOWS} == {path.stem for path in (PACK / "workflows").glob("*.jpg")} == set(thumbnails.MAKERS)
    for path in (PACK / "workflows").glob("*.jpg"):
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and picture.size == (thumbnails.SIDE, thumbnails.SIDE)
        assert path.stat().st_size < 40_000


def test_a_thumbnail_shows_all_its_pictures():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = thumbnails.sheet([Image.new("RGB", size, colour) for size, colour in zip([(128, 128), (64, 128), (384, 128)], colours)], 3, "caption")
    areas = [sum(pixel == colour for pixel in sheet.getdata()) for colour in colours]
    assert min(areas) > 3000 and abs(areas[0] - 2 * areas[1]) < areas[0] / 20 and abs(areas[0] - 3 * areas[2]) < areas[0] / 10


def test_the_workflows_page_lists_every_workflow():
    page = (PACK / "docs" / "workflows.md").read_text(encoding="utf-8")
    assert [path.stem for path in WORKFLOWS if f"| *{path.stem}* |" not in page] == []
