"""The text encoder as the judge of edits, several at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice

from PIL import Image

from ...images import from_uint8
from ...reasoning.judge import ANSWER_TOKENS, RETRY_TEMPERATURE, Verdict, judging
from .generation import Question, generate_texts
from .thinking import Asker

# Edits judged at a time. Their keys and values take about 1 GB beside the 7B model's 15 GB in bfloat16.
TOGETHER = 8


class LocalJudge(Asker):
    """The text encoder as judge.py wants it, for one edit."""

    def question(self, system: str, content: list) -> Question:
        repeated = any(asked == system for asked, _, _ in self.exchanges)
        self.temperature = RETRY_TEMPERATURE if repeated else 0.0
        return super().question(system, [part if isinstance(part, str) else from_uint8(part) for part in content])


def judge_edits(clip, edits: Iterable[tuple[str, Image.Image, Image.Image, str]], seed: int) -> Iterator[tuple[int, Verdict]]:
    """The verdicts on edits, with their numbers, in the order in which they are reached; a few edits are asked about at a time.

    edits: name, source, edited picture and instruction; the name and the seed decide what is drawn for an answer that is asked for anew.
    """
    waiting = enumerate(edits)
    running = {}
    while True:
        for number, (name, *edit) in islice(waiting, TOGETHER - len(running)):
            steps = judging(*edit)
            running[number] = LocalJudge(clip, name, seed), steps, next(steps)
        if not running:
            return
        questions = [judge.question(system, content) for judge, _, (system, content, _) in running.values()]
        replies = generate_texts(clip, questions, ANSWER_TOKENS)
        for (number, (judge, steps, _)), question, reply in zip(list(running.items()), questions, replies):
            judge.note(question, reply)
            try:
                running[number] = judge, steps, steps.send(reply)
            except StopIteration as end:
                del running[number]
                yield number, end.value
