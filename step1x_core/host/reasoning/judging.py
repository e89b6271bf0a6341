"""The text encoder as the judge of edits, several at a time."""

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from torch import Tensor

from ...images import from_uint8
from ...reasoning.judge import RETRY_TEMPERATURE, Verdict, judging
from .generation import Question, generate_texts
from .pool import answer_all, tasks_at_a_time
from .thinking import Asker


class LocalJudge(Asker):
    """The text encoder as judge.py wants it, for one edit."""

    def __init__(self, clip, task: str, seed: int):
        super().__init__(clip, task, seed)
        self.images: dict[int, tuple[Tensor, np.ndarray]] = {}

    def image(self, pixels: np.ndarray) -> Tensor:
        """The host's IMAGE of uint8 [h, w, 3], one for all questions about it."""
        if id(pixels) not in self.images:
            self.images[id(pixels)] = from_uint8(pixels), pixels  # kept, so that its id is not used again
        return self.images[id(pixels)][0]

    def question(self, system: str, content: list, number: str = "") -> Question:
        repeated = any(asked == system for asked, _, _ in self.exchanges)
        self.temperature = RETRY_TEMPERATURE if repeated else 0.0
        return super().question(
            system, [part if isinstance(part, str) else self.image(part) for part in content], number
        )


def judge_edits(
    clip, edits: Iterable[tuple[str, Image.Image, Image.Image, str]], seed: int
) -> Iterator[tuple[int, Verdict]]:
    """The verdicts on edits, with their numbers, in the order in which they are reached; a few edits are asked about at
    a time.

    edits: name, source, edited picture and instruction; the name and the seed decide what is drawn for an answer that
    is asked for anew.
    """
    tasks = ((LocalJudge(clip, name, seed), judging(*edit)) for name, *edit in edits)
    return answer_all(clip, tasks, tasks_at_a_time(clip), generate_texts)
