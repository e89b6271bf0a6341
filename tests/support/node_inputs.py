"""Every input of every node in the menu, read from the schemas, and small values to run the nodes with.

A node that is added, merged or renamed needs nothing here, unless its defaults are too slow for a test (`TINY`) or a new type of socket
has no example (`Host.fitting` in bad_input_host).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from comfy_api.latest import io
from loop_host import load_pack, node_classes

# In place of the schemas' defaults, by the input's name, or by node and input where one node differs.
TINY = {
    "size_level": 64, "reference_size": 64, "steps": 1, "cfg": 2.0, "seed": 1, "rounds": 1, "think": False, "reflect": False,
    "min_size": 16, "feather": 2, "max_side": 64, "count": 1, "limit": 1, "validation": 0,
    "rank": 1, "alpha": 1.0, "learning_rate": 0.1, "save_every": 0, "validate_every": 0,
    "name": "x", "method": "x", "judge": "x", "maker": "x", "prompts": "red", "prompt": "red", "english": "red",
    "action": "block", "question": "Is it bad?", "Step1XEditTrainDataset.dataset": "pairs",
}
FILE = "x"


@dataclass(frozen=True)
class Entry:
    """An input of a node. name: as prompts call it, "mode.threshold" below a choice; opened: the choices (name, key) that show it;
    needed: whether it is among the fewest inputs of a growing list."""

    node: str
    name: str
    input: io.Input
    opened: tuple[tuple[str, str], ...] = ()
    needed: bool = True

    def __str__(self):
        return "-".join([self.node.removeprefix("Step1XEdit"), *(key for _, key in self.opened), self.name])

    @property
    def kind(self) -> str:
        """The type of its socket."""
        return self.input.get_io_type()

    @property
    def is_optional(self) -> bool:
        return self.input.optional or not self.needed

    @property
    def is_widget(self) -> bool:
        return isinstance(self.input, (io.WidgetInput, io.DynamicCombo.Input)) and not getattr(self.input, "force_input", False)

    @property
    def is_number(self) -> bool:
        return isinstance(self.input, (io.Int.Input, io.Float.Input))

    @property
    def is_file(self) -> bool:
        """A list of what lies in a folder: it has no default, since nobody knows what is there."""
        return isinstance(self.input, io.Combo.Input) and self.input.default is None

    def small(self):
        """A fitting value that costs little; FILE for a file."""
        own = f"{self.node}.{self.name}"
        if own in TINY or self.name in TINY:
            return TINY[own if own in TINY else self.name]
        if self.is_file:
            return FILE
        if isinstance(self.input, io.DynamicCombo.Input):
            return self.input.options[0].key
        if self.input.default is not None:
            return self.input.default
        return self.input.min if self.is_number else ""


@cache
def classes() -> dict[str, type[io.ComfyNode]]:
    """The nodes of the menu by their ids."""
    return {name: node for name, node in node_classes(load_pack()).items() if not node.GET_SCHEMA().is_dev_only}


def walk(node: str, inputs: list[io.Input], prefix: str = "", opened: tuple = ()) -> Iterator[Entry]:
    for entry in inputs:
        name = prefix + entry.id
        if isinstance(entry, io.Autogrow.Input):
            least = 0 if entry.optional else entry.template.min
            for number, slot in enumerate([*entry.template.cached_inputs.values()][:max(1, least)]):
                yield Entry(node, f"{name}.{slot.id}", slot, opened, number < least)
            continue
        yield Entry(node, name, entry, opened)
        if isinstance(entry, io.DynamicCombo.Input):
            for option in entry.options:
                yield from walk(node, option.inputs, f"{name}.", (*opened, (name, option.key)))


@cache
def entries(node: str | None = None) -> tuple[Entry, ...]:
    """All inputs of a node, of all nodes by default; those below a choice once for each key that shows them."""
    if node is None:
        return tuple(entry for name in classes() for entry in entries(name))
    return tuple(walk(node, classes()[node].GET_SCHEMA().inputs))


def links(kind: str | None = None) -> list[Entry]:
    """The sockets of all nodes, of one type by default all; optional ones, too."""
    return [entry for entry in entries() if not entry.is_widget and kind in (None, entry.kind)]


def numbers() -> list[Entry]:
    return [entry for entry in entries() if entry.is_number]


def socket(node: str, kind: str) -> str:
    """The name of the node's first input of that type."""
    return next(entry.name for entry in entries(node) if entry.kind == kind)


def file_input(node: str) -> str:
    """The name of the list of files that a loader has."""
    return next(entry.name for entry in entries(node) if entry.is_file)


def widgets(node: str, **chosen) -> dict:
    """Small values for the widgets of a node that are shown where `chosen` is, by their names in a prompt. Files are FILE."""
    values = {}
    for entry in entries(node):
        if entry.is_widget and all(values.get(name) == key for name, key in entry.opened):
            values[entry.name] = chosen.get(entry.name, entry.small())
    return values


def called(node: str, values: dict) -> tuple:
    """The node's outputs for inputs as a prompt names them, without the host's executor in between."""
    together = {}
    for name, value in values.items():
        *above, last = name.split(".")
        place = together
        for part in above:
            inner = place.get(part)
            place[part] = inner if isinstance(inner, dict) else {} if inner is None else {part: inner}
            place = place[part]
        place[last] = [value] if classes()[node].INPUT_IS_LIST else value
    for entry in entries(node):
        # The host hands a choice over as a dict of its own key and what that opens.
        if isinstance(entry.input, io.DynamicCombo.Input) and entry.name in together and not isinstance(together[entry.name], dict):
            together[entry.name] = {entry.name: together[entry.name]}
    return classes()[node].execute(**together).result
