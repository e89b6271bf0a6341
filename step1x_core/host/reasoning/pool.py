"""Questions of many independent tasks to the language model, a few tasks at a time as one batch."""

from collections.abc import Generator, Iterable, Iterator
from itertools import islice

import comfy.model_management

from ...reasoning.conversation import Asked
from .generation import generate_texts
from .thinking import Asker

# Tasks at a time. The keys and values of 16 take about 2.5 GB beside the 7B model's 16, in bfloat16. A step of 16
# replies reads the weights once, as one of 8 does.
FEW, MANY = 8, 16
# Memory beside the text encoder's weights from which on many are asked.
ROOM = 16 * 2**30


def tasks_at_a_time(clip) -> int:
    """How many tasks this text encoder's device has room for. The answers do not depend on it, up to rounding."""
    device = clip.patcher.load_device
    if comfy.model_management.is_device_cpu(device):
        return FEW
    room = comfy.model_management.get_total_memory(device) - clip.patcher.model_size()
    return MANY if room >= ROOM else FEW


def answer_all(
    clip, tasks: Iterable[tuple[Asker, Generator[Asked, str]]], together: int, ask=None
) -> Iterator[tuple[int, object]]:
    """Run steps as for `conversation.answered`, all with one budget, `together` tasks at a time; yields the number of a
    task with its result, in the order in which they are reached.

    A finished task makes room for the next at once, and its images are forgotten. ask: in place of `generate_texts`.
    """
    ask = ask or generate_texts
    waiting = enumerate(tasks)
    running: dict[int, tuple[Asker, Generator, Asked]] = {}

    def go_on(number: int, asker: Asker, steps: Generator, reply: str | None = None) -> Iterator[tuple[int, object]]:
        try:
            running[number] = asker, steps, steps.send(reply)
        except StopIteration as end:
            running.pop(number, None)
            yield number, end.value

    more = True
    while running or more:
        room = together - len(running)
        taken = list(islice(waiting, room))
        more = len(taken) == room  # also where there is no room, for all that run may finish at once
        for number, (asker, steps) in taken:
            yield from go_on(number, asker, steps)
        if not running:
            continue
        asked = [(number, *entry) for number, entry in running.items()]
        questions = [asker.question(each.system, each.content) for _, asker, _, each in asked]
        replies = ask(clip, questions, asked[0][3].budget)
        for (number, asker, steps, _), question, reply in zip(asked, questions, replies, strict=True):
            asker.note(question, reply)
            yield from go_on(number, asker, steps, reply)
