"""Questions of many tasks, a few tasks at a time."""

import pytest

from step1x_core.host.reasoning.pool import answer_all
from step1x_core.host.reasoning.thinking import Asker
from step1x_core.reasoning.conversation import Asked

pytestmark = pytest.mark.once


def steps(number: int, questions: int):
    """A task that returns the replies to that many questions."""
    replies = []
    for question in range(questions):
        replies.append((yield Asked("", [f"{number}.{question}"], 5)))
    return replies


@pytest.mark.parametrize("lengths", [
    [1] * 7, [2] * 7, [2] * 6, [3] * 3, [2] * 4, [2, 2, 2, 1, 1, 1, 3, 3], [0, 0, 2, 2, 0, 2, 0], [5, 1, 1, 1, 2, 2, 2], [],
])
def test_every_task_gets_its_result_whenever_the_others_end(lengths):
    """Three at a time. All of them may end at once, with more to come."""
    batches = []

    def ask(clip, questions, budget):
        batches.append(len(questions))
        return [question.content[0].upper() for question in questions]

    tasks = ((Asker(None, f"{number}", 0), steps(number, length)) for number, length in enumerate(lengths))
    found = list(answer_all(None, tasks, 3, ask))
    assert dict(found) == {number: [f"{number}.{question}" for question in range(length)] for number, length in enumerate(lengths)}
    assert len(found) == len(lengths) and all(batch <= 3 for batch in batches)
    # Rows that are free are taken at once: with equal lengths all batches but the last are full.
    if len(set(lengths)) == 1 and lengths:
        assert batches == ([3] * lengths[0]) * (len(lengths) // 3) + [len(lengths) % 3] * (lengths[0] if len(lengths) % 3 else 0)
