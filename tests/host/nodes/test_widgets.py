"""What the widgets' own check takes and refuses; tests/stress/test_bad_input_numbers.py shows that every node asks it."""

import sys
from fractions import Fraction

import numpy as np
import pytest
from comfy_api.latest import io
from loop_host import NAME, load_pack

from step1x_core.errors import Step1XError

load_pack()
widgets = sys.modules[f"{NAME}.nodes.widgets"]
NAN, INF = float("nan"), float("inf")
INT, FLOAT = io.Int.Input("x", min=-2, max=2**64 - 1), io.Float.Input("x", min=0.5, max=2.0)
CHOICE, SWITCH, TEXT = io.Combo.Input("x", options=["a", "b"]), io.Boolean.Input("x"), io.String.Input("x")
# What is refused, and the words of the sentence that name what is taken.
TAKEN = {
    "int": (
        INT,
        [-2, 0, 2**64 - 1, np.int64(5)],
        [-3, 2**64, 1.0, 1.5, NAN, INF, None, "1", True, False, [1], np.float64(1)],
        f"a whole number from -2 to {2**64 - 1}",
    ),
    "float": (
        FLOAT,
        [0.5, 1, 2.0, np.float32(0.75), Fraction(3, 2)],
        [0.49, 2.01, -INF, INF, NAN, 10**30, None, "1", True, [1.0], 1j],
        r"a number from 0\.5 to 2\.0",
    ),
    "choice": (CHOICE, ["a", "b"], ["", "c", "A", None, 0, True, ["a"], {"a": 1}], "one of the entries of its list"),
    "switch": (SWITCH, [True, False, 0, 1, np.int64(1)], [2, -1, 0.0, 1.0, "true", "", None, [True]], "true or false"),
    "text": (TEXT, ["", "x", "\ud800"], [None, 1, 1.5, True, b"x", ["x"]], "text"),
}


class Node(io.ComfyNode):
    entries = []

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestWidgets", inputs=[io.Model.Input("model"), *cls.entries])


@pytest.mark.parametrize("entry, good, bad, wanted", TAKEN.values(), ids=TAKEN)
def test_values_that_a_widget_offers_and_others(monkeypatch, entry, good, bad, wanted):
    monkeypatch.setattr(Node, "entries", [entry, io.Int.Input("y", min=0, max=1)])
    for value in good:
        widgets.check_widgets(Node, x=value, y=1)
    for value in bad:
        with pytest.raises(Step1XError, match=f"Input 'x' .*{wanted}"):
            widgets.check_widgets(Node, x=value)
    # The wrong one is named, wherever it stands.
    with pytest.raises(Step1XError, match="Input 'y' .*2"):
        widgets.check_widgets(Node, x=good[0], y=2)
