#!/usr/bin/env python3
"""Lays out the shipped workflows anew, so that they can be read at first sight: `python scripts/dev/layout.py [workflow ...]`.

Groups keep their order and their nodes. Each takes the highest place that is left within WIDEST units, as high as its nodes need in both node
styles; the note lies below the first group. The sizes come from output/browser/sizes.json, which `python scripts/dev/browser_test.py --look` writes. Links and
values are not touched; the new positions are as good as the measured sizes, so look again afterwards.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).absolute().parents[2]
SIZES = PACK / "output" / "browser" / "sizes.json"
# At this width a screen of 1600 pixels shows the whole at a zoom at which the editor still draws text.
WIDEST = 2080
TITLE = 30
# Around the nodes of a group; its own title is above them.
PADDING, HEAD = 20, 85
GAP, BETWEEN_COLUMNS, BETWEEN_GROUPS, BETWEEN_ROWS = 30, 40, 30, 50
# What a node shows below its widgets once it has run, in units: the sampler's settings take two lines.
SHOWN_LATER = {"Step1XEditSampler": 110}
# What the editor shows at first: zoom, and where the upper left corner of the graph lies, in units.
VIEW = {"scale": 0.7, "offset": [130, 130]}


@dataclass
class Block:
    """A group with its nodes, or nodes without one. columns: nodes one below the other, from left to right."""

    group: dict | None
    columns: list[list[dict]]

    def width(self) -> float:
        inner = sum(max(node["size"][0] for node in column) for column in self.columns)
        return inner + BETWEEN_COLUMNS * (len(self.columns) - 1) + 2 * PADDING

    def place(self, x: float, y: float) -> float:
        """Put the block's upper left corner there -> its lower edge."""
        left, lowest = x + PADDING, y
        for column in self.columns:
            top = y + HEAD
            for node in column:
                node["pos"] = [left, top]
                top += node["size"][1] + SHOWN_LATER.get(node["type"], 0) + TITLE + GAP
            left += max(node["size"][0] for node in column) + BETWEEN_COLUMNS
            lowest = max(lowest, top - TITLE - GAP + PADDING)
        if self.group:
            self.group["bounding"] = [x, y, self.width(), lowest - y]
        return lowest


def inside(node: dict, group: dict) -> bool:
    x, y, width, height = group["bounding"]
    return x <= node["pos"][0] < x + width and y <= node["pos"][1] < y + height


def columns_of(nodes: list[dict]) -> list[list[dict]]:
    """Nodes that stand side by side today, in columns from left to right."""
    columns: list[list[dict]] = []
    for node in sorted(nodes, key=lambda node: node["pos"][0]):
        if columns and node["pos"][0] < columns[-1][0]["pos"][0] + columns[-1][0]["size"][0]:
            columns[-1].append(node)
        else:
            columns.append([node])
    return [sorted(column, key=lambda node: node["pos"][1]) for column in columns]


def blocks_of(workflow: dict, notes: list[dict]) -> list[Block]:
    """The groups from left to right and top to bottom, then every node that is in none."""
    rest = [node for node in workflow["nodes"] if node not in notes]
    blocks = []
    for group in sorted(workflow["groups"], key=lambda group: (group["bounding"][1] > 400, group["bounding"][0])):
        members = [node for node in rest if inside(node, group)]
        rest = [node for node in rest if node not in members]
        if members:
            blocks.append(Block(group, columns_of(members)))
    return blocks + [Block(None, [[node]]) for node in rest]


def free_place(placed: list[tuple[float, float, float]], width: float, at_left: bool = False) -> tuple[float, float]:
    """The highest place that is so wide, of equal ones the leftmost."""
    places = []
    for x in [0.0] if at_left else [0.0, *(right + BETWEEN_GROUPS for _, right, _ in placed)]:
        if x == 0 or x + width <= WIDEST:
            below = (bottom for left, right, bottom in placed if left < x + width and x < right)
            places.append((max(below, default=0.0), x))
    y, x = min(places)
    return x, y


def lay_out(workflow: dict, sizes: dict[str, list[float]]) -> None:
    """Give nodes, groups and view of a workflow new places. sizes: of each node by id, as far as measured."""
    for node in workflow["nodes"]:
        node["size"] = list(sizes.get(str(node["id"]), node["size"]))
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    placed: list[tuple[float, float, float]] = []  # left, right and lower edge of what has its place
    for number, block in enumerate(blocks_of(workflow, notes)):
        x, y = free_place(placed, block.width())
        bottom = block.place(x, y)
        placed.append((x, x + block.width(), bottom + BETWEEN_ROWS))
        if number == 0:
            for note in notes:
                x, y = free_place(placed, note["size"][0] + 2 * PADDING, at_left=True)
                note["pos"] = [x + PADDING, y + TITLE]
                bottom = y + TITLE + note["size"][1]
                placed.append((x, x + note["size"][0] + 2 * PADDING, bottom + BETWEEN_ROWS))
    workflow.setdefault("extra", {})["ds"] = {"scale": VIEW["scale"], "offset": list(VIEW["offset"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workflows", nargs="*", type=Path, help="the files; all shipped ones without any")
    options = parser.parse_args()
    sizes = json.loads(SIZES.read_text(encoding="utf-8")) if SIZES.is_file() else {}
    if not sizes:
        print(f"{SIZES} is not there: nodes keep the sizes that they have.", file=sys.stderr)
    for path in options.workflows or sorted((PACK / "workflows").glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        lay_out(workflow, sizes.get(path.stem, {}))
        path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
