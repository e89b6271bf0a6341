"""Steps that are run side by side."""

import pytest

from step1x_core.reasoning.conversation import RULES, Asked, answered_together
from step1x_core.reasoning.reflection import reflect
from step1x_core.reasoning.templates import load_templates

GOOD = {
    "description": "A red cup.",
    "consistency": '{"meets_instruction": "yes", "raw_score": 9, "reason": ""}',
    "reflection": "<#Think>Not yet.<#Reflection> Make it darker.",
    "edit_score": '{"score": [8, 7], "reasoning": ""}',
    "quality_score": '{"score": [6, 5], "reasoning": ""}',
}


def steps(name, *budgets):
    """Asks once for each budget; the result is what was replied."""
    replies = []
    for number, budget in enumerate(budgets):
        replies.append((yield Asked("system", [], budget, name, number)))
    return replies


class Model:
    """Answers from lists of replies, their last one over and over; `together` is used only if asked for."""

    def __init__(self, together: bool, **replies):
        self.replies = {name: list(value) for name, value in replies.items()}
        self.rounds = []
        if together:
            self.together = self.answer_together

    def reply(self, name):
        replies = self.replies.get(name, [GOOD[name]])
        return replies.pop(0) if len(replies) > 1 else replies[0]

    def __call__(self, system, content, max_tokens):
        name = next(name for name in GOOD if load_templates("english")[f"{name}.system"] == system)
        self.rounds.append([(name, max_tokens)])
        return self.reply(name)

    def answer_together(self, asked):
        self.rounds.append([(each.name, each.attempt) for each in asked])
        assert len({each.budget for each in asked}) == 1
        return [self.reply(each.name) for each in asked]


def test_results_come_in_the_order_of_the_steps_and_other_budgets_wait():
    rounds = []

    def ask(asked):
        rounds.append([(each.name, each.attempt) for each in asked])
        return [f"{each.name}{each.attempt}" for each in asked]

    tracks = [steps("a", 5, 9, 5), steps("b", 5, 5, 5, 5), steps("c"), steps("d", 9)]
    assert answered_together(ask, tracks) == [["a0", "a1", "a2"], ["b0", "b1", "b2", "b3"], [], ["d0"]]
    assert rounds == [[("a", 0), ("b", 0)], [("a", 1), ("d", 0)], [("a", 2), ("b", 1)], [("b", 2)], [("b", 3)]]


def test_without_steps_nothing_is_asked():
    assert answered_together(lambda asked: 1 / 0, []) == [] and answered_together(lambda asked: 1 / 0, [steps("a")]) == [[]]


def test_an_error_passes_through():
    with pytest.raises(RuntimeError, match="no more luck"):
        answered_together(lambda asked: (_ for _ in ()).throw(RuntimeError("no more luck")), [steps("a", 1)])


@pytest.mark.parametrize("replies", [
    {},
    {"description": ["错误: x", "A cup."], "edit_score": ["hm", GOOD["edit_score"]]},
    {"consistency": ["hm"] * 3 + [GOOD["consistency"]], "quality_score": ["hm"] * 2 + [GOOD["quality_score"]]},
    {"reflection": ["no tag"]},
    {"description": ["错误: x"], "edit_score": ["hm"]},
])
@pytest.mark.parametrize("version", RULES)
def test_a_judgement_is_the_same_side_by_side_and_one_by_one(replies, version):
    one, several = Model(False, **replies), Model(True, **replies)
    expected = reflect(one, 1, 2, "make it red", RULES[version])
    assert reflect(several, 1, 2, "make it red", RULES[version]) == expected
    asked = [name for names in several.rounds for name, _ in names]
    assert sorted(asked) == sorted(name for names in one.rounds for name, _ in names)
    # Every try of every call has a number of its own, which its seed is made of.
    numbers = [each for names in several.rounds for each in names]
    assert len(set(numbers)) == len(numbers)


def test_scores_are_asked_for_beside_the_description_and_again_beside_the_reflection():
    model = Model(True, edit_score=["hm", GOOD["edit_score"]])
    assert reflect(model, 1, 2, "make it red").value == 35
    assert model.rounds == [
        [("description", 0), ("edit_score", 0), ("quality_score", 0)],
        [("consistency", 0)],
        [("reflection", 0), ("edit_score", 1)],
    ]
