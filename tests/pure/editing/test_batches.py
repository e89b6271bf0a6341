"""How pictures and instructions are paired, without ComfyUI."""

import pytest
import torch

from step1x_core.editing.batches import ALL, PAIRS, SEEDS, TURNS, describe_turns, lay_out, turn_shown
from step1x_core.errors import Step1XError


def plan(items):
    return [(item.number, item.prompt, item.seed) for item in items]


def test_one_instruction_on_many_pictures_and_many_on_one():
    three, one = [torch.zeros(2, 8, 8, 3), torch.ones(1, 4, 6, 3)], [torch.zeros(1, 8, 8, 3)]
    assert plan(lay_out(three, ["red"], [7])) == [(1, "red", 7), (2, "red", 8), (3, "red", 9)]
    assert plan(lay_out(one, ["red\n\n  blue \n", "green"], [7])) == [(1, "red", 7), (1, "blue", 8), (1, "green", 9)]
    assert plan(lay_out(three, ["a", "b", "c"], [5, 5, SEEDS - 1], PAIRS)) == [(1, "a", 5), (2, "b", 5), (3, "c", SEEDS - 1)]
    assert plan(lay_out(three[1:] + one, ["a", "b"], [SEEDS - 1], ALL)) == [(1, "a", SEEDS - 1), (1, "b", 0), (2, "a", 1), (2, "b", 2)]
    assert [item.picture.shape for item in lay_out(three, ["red"], [7])] == [(1, 8, 8, 3), (1, 8, 8, 3), (1, 4, 6, 3)]


@pytest.mark.parametrize("images, prompts, seeds, message", [
    ([torch.zeros(0, 8, 8, 3)], ["red"], [1], "is an empty image batch"),
    ([torch.zeros(1, 8, 8, 3)], [" \n", ""], [1], "There is no instruction"),
    ([torch.zeros(3, 8, 8, 3)], ["red", "blue"], [1], "3 pictures and 2 instructions do not make pairs"),
    ([torch.zeros(3, 8, 8, 3)], ["red"], [1, 2], "There are 2 seeds for 3 edits"),
])
def test_what_does_not_go_together_is_refused(images, prompts, seeds, message):
    with pytest.raises(Step1XError, match=message):
        lay_out(images, prompts, seeds)


def test_turns_are_the_lines_in_order_without_comments():
    items = lay_out([torch.zeros(1, 8, 8, 3)], ["red\n# blue\n\n  // green\nmake #1 gold"], [SEEDS - 1], TURNS)
    assert [(item.number, item.prompt, item.seed) for item in items] == [(1, "red", SEEDS - 1), (1, "make #1 gold", 0)]
    assert [turn_shown(number, 2) for number in (0, 1, 2)] == [2, 1, 2]
    assert describe_turns(items, 1).splitlines()[1:] == [
        f'1. seed {SEEDS - 1}, "red"', '2. seed 0, "make #1 gold": not shown',
    ]


def test_turns_need_one_picture_and_a_turn_that_exists():
    with pytest.raises(Step1XError, match="'images' has 2 images, but combine is turns"):
        lay_out([torch.zeros(2, 8, 8, 3)], ["red"], [1], TURNS)
    with pytest.raises(Step1XError, match="There is no instruction"):
        lay_out([torch.zeros(1, 8, 8, 3)], ["# red"], [1], TURNS)
    with pytest.raises(Step1XError, match="'show_turn' is 3, but 'prompts' has 2 turns"):
        turn_shown(3, 2)
