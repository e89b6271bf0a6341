"""The rules of the house: which room may import which, and what needs ComfyUI, Triton or the network."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import PACK

CORE = PACK / "step1x_core"
MODULES = {".".join(path.relative_to(CORE).with_suffix("").parts): path for path in sorted(CORE.rglob("*.py")) if path.stem != "__init__"}
GROUND, HOST = "the ground floor", "host"
# What a room may import besides the ground floor. A room in host/ may also import the plain room of its name and those it may import.
PLAIN = {
    GROUND: (),
    "checkpoints": (),
    "prompts": (),
    "network": ("prompts",),
    "sampling": (),
    "speed": ("sampling",),
    "reasoning": ("prompts",),
    "editing": (),
    "training": ("sampling",),
    "gate": (),
    "gedit": ("reasoning",),
    "pairs": ("prompts", "reasoning", "training"),
}
IN_HOST = {
    HOST: (),
    "host.prompts": ("host", "checkpoints", "network", "reasoning"),
    "host.network": ("host", "host.prompts", "checkpoints"),
    "host.sampling": ("host", "host.network"),
    "host.speed": ("host.network", "host.sampling"),
    "host.checkpoints": ("host.network", "host.prompts", "host.sampling"),
    "host.reasoning": ("host.checkpoints", "host.prompts", "prompts"),
    "host.editing": ("host", "host.prompts", "host.reasoning", "host.sampling"),
    "host.training": ("host.network", "host.prompts", "host.sampling", "checkpoints"),
    "host.gate": ("host.reasoning",),
    "host.gedit": ("host.reasoning", "reasoning"),
    "host.pairs": ("host.reasoning",),
}
# The guard of the host compares its blocks with ours, and is asked by them: it imports them when it is called.
LATER = {("host.relied_on", "host.network.blocks")}
# Nobody imports these when the pack is loaded.
HOSTS_PACKAGES = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "latent_preview", "nodes", "node_helpers", "server", "execution"}


def room(module: str) -> str:
    parts = module.split(".")
    if parts[0] == HOST:
        return ".".join(parts[:2]) if len(parts) > 2 else HOST
    return parts[0] if len(parts) > 1 else GROUND


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules of the core that one of them imports, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.split(".")[:-node.level] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                found = [name for name in (".".join([*base, alias.name]), ".".join(base)) if name in MODULES]
                assert found, f"{module} imports {alias.name} from {'.'.join(base)}: a package's face hands nothing on"
                yield found[0]


def packages(tree: ast.AST) -> set[str]:
    """The packages outside of this one that a file imports anywhere."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
ARROWS = {(module, target) for module, tree in TREES.items() for target in imported(module, tree)} - LATER


def allowed(name: str) -> set[str]:
    if name in PLAIN:
        return {GROUND, name, *PLAIN[name]}
    plain = name.removeprefix("host.")
    return {GROUND, name, *IN_HOST[name], *((plain, *PLAIN[plain]) if plain in PLAIN else ())}


def test_every_room_is_in_the_table():
    assert {room(module) for module in MODULES} == {*PLAIN, *IN_HOST}


@pytest.mark.parametrize("name", [*PLAIN, *IN_HOST])
def test_a_room_imports_only_what_it_may(name):
    wrong = sorted(f"{module} -> {target}" for module, target in ARROWS if room(module) == name and room(target) not in allowed(name))
    assert not wrong


def test_neither_rooms_nor_files_import_each_other_in_a_circle():
    for edges in (ARROWS, {(room(a), room(b)) for a, b in ARROWS if room(a) != room(b)}):
        graph = {}
        for source, target in edges:
            graph.setdefault(source, set()).add(target)
        TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_host_touches_comfyui_and_host_names_its_rooms_as_the_core_does():
    for module, tree in TREES.items():
        if not module.startswith("host."):
            assert not packages(tree) & HOSTS_PACKAGES, module
    assert {name.removeprefix("host.") for name in IN_HOST if name != HOST} <= {*PLAIN}


def test_triton_is_needed_by_two_files_and_the_network_by_none():
    assert [module for module, tree in TREES.items() if "triton" in packages(tree)] == [
        "network.triton_kernels",
        "reasoning.triton_kernels",
    ]
    for module, tree in TREES.items():
        assert not packages(tree) & {"requests", "huggingface_hub", "socket", "http", "aiohttp"}, module


def test_the_ground_floor_of_files_and_names_needs_no_torch():
    for module in ("errors", "files", "languages", "rounding", "sheets", "tasks", "versions"):
        assert "torch" not in packages(TREES[module])


def test_every_package_says_what_it_is_for():
    for path in CORE.rglob("__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, f"{path.relative_to(PACK)}: a docstring and nothing else"


def test_faces_and_commands_do_not_reach_past_their_room():
    """nodes/ is schemas and wiring: no torch maths of its own modules' making, no import of the other way round."""
    for path in (PACK / "step1x_core").rglob("*.py"):
        names = {
            node.module or ""
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert not any(Path(name.replace(".", "/")).parts[:1] in (("nodes",), ("scripts",), ("miniature",)) for name in names), path.name


def test_the_table_of_rooms_in_the_architecture_page_is_this_one():
    """Rows: | `room` | what is in it | plain rooms it may import | what its room in host/ may import |."""
    page = (PACK / "docs" / "architecture.md").read_text(encoding="utf-8")
    cells = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", page, re.MULTILINE)}
    # host/relied_on.py is the only file of host/ that is in no room.
    names = {room: [{HOST if name.endswith(".py") else name.replace("/", ".") for name in re.findall(r"`([^`]+)`", cell)} for cell in row]
             for room, row in cells.items()}
    assert names == {
        room: [{*PLAIN[room]}, {*IN_HOST[f"host.{room}"]} if f"host.{room}" in IN_HOST else set()]
        for room in PLAIN
        if room != GROUND
    }
    ground = re.search(r"The ground floor is (.*?)\. ", page, re.DOTALL)[1]
    assert {*re.findall(r"`(\w+)\.py`", ground)} == {module for module in MODULES if room(module) == GROUND}
