"""What a shipped workflow brings besides its nodes: notes, groups, links to the files it names, a thumbnail, a line in docs/workflows.md."""

import json

import folder_paths
import pytest
import thumbnails
from conftest import PACK
from PIL import Image

import install

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
TITLE = 30


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def graphs() -> list[tuple[str, list[dict]]]:
    blueprints = sorted((PACK / "subgraphs").glob("*.json"))
    assert blueprints
    return [(path.name, read(path)["nodes"]) for path in WORKFLOWS] + [
        (path.name, graph["nodes"]) for path in blueprints for graph in read(path)["definitions"]["subgraphs"]
    ]


def box(node) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, with the title."""
    return node["pos"][0], node["pos"][1] - TITLE, node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]


@pytest.mark.parametrize("name, nodes", graphs(), ids=lambda value: value if isinstance(value, str) else "")
def test_files_that_a_graph_names_can_be_downloaded(name, nodes):
    for node in nodes:
        files = {value for value in node.get("widgets_values", []) if isinstance(value, str) and value.endswith(".safetensors")}
        models = node["properties"].get("models", [])
        assert {model["name"] for model in models} == files, f"{name}: {node['type']}"
        for model in models:
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(f"/{model['name']}")
            assert model["directory"] in folder_paths.folder_names_and_paths


# What --download gets for a list's entry that no link can bring: a repository's folder, and a LoRA, which everyone chooses for themselves.
COMMANDS = {"Step1X-Edit-v1p2/": "v1.2", "RealRestorer/": "realrestorer", "none": "lora"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_note_has_a_command_for_what_has_no_link(path):
    """The editor's list of missing models offers single files only."""
    nodes = read(path)["nodes"]
    loaders = [node for node in nodes if node["type"] in ("Step1XEditLoader", "Step1XEditMLLM", "Step1XEditLoadLora")]
    without = {node["widgets_values"][0] for node in loaders if not node["properties"].get("models")}
    if path.stem == "step1x_lightning":  # a LoRA of the user's own: nobody offers one
        assert "make one with *step1x_distill*" in next(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
        without.discard("none")
    without.discard("miniature/")  # comes with the pack
    text, = next(node["widgets_values"] for node in nodes if node["type"] == "MarkdownNote")
    for entry in without:
        assert COMMANDS[entry] in install.MODELS and f"`python install.py --download {COMMANDS[entry]}`" in text, entry
    # The plain edit also names the command for its smaller file.
    assert without or "install.py" not in text or path.stem == "step1x_edit"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_note_leads_to_the_chinese_help(path):
    text, = next(node["widgets_values"] for node in read(path)["nodes"] if node["type"] == "MarkdownNote")
    assert text.endswith("\n\n中文说明：选中节点，再点击其工具栏上的 ⓘ。")


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
        inside = [
            x <= left and y <= top and right <= x + width and bottom <= y + height
            for x, y, width, height in (group["bounding"] for group in workflow["groups"])
        ]
        assert sum(inside) == (node is not note)


def test_every_workflow_has_a_thumbnail_that_can_be_made_again():
    assert {path.stem for path in WORKFLOWS} == {path.stem for path in (PACK / "workflows").glob("*.jpg")} == set(thumbnails.MAKERS)
    for path in (PACK / "workflows").glob("*.jpg"):
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and picture.size == (thumbnails.SIDE, thumbnails.SIDE)
        assert path.stat().st_size < 40_000


def test_a_thumbnail_shows_all_its_pictures():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = thumbnails.sheet(
        [Image.new("RGB", size, colour) for size, colour in zip([(128, 128), (64, 128), (384, 128)], colours)],
        3,
        "caption",
    )
    areas = [sum(pixel == colour for pixel in sheet.getdata()) for colour in colours]
    assert min(areas) > 3000 and abs(areas[0] - 2 * areas[1]) < areas[0] / 20 and abs(areas[0] - 3 * areas[2]) < areas[0] / 10


def test_the_workflows_page_lists_every_workflow():
    page = (PACK / "docs" / "workflows.md").read_text(encoding="utf-8")
    assert [path.stem for path in WORKFLOWS if f"| *{path.stem}* |" not in page] == []
