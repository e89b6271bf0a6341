"""The judge of GEdit-Bench: two questions about each edit (VIEScore) to a language model behind `ask` (docs/model.md,
GEdit-Bench).

`ask(system, content, max_tokens) -> reply`; `content` holds texts and images, uint8 [H, W, 3], in order. Each edit has
its own `ask`, which samples again if the same question is repeated. A reply that cannot be read is asked for anew up to
`TRIES` times (`Conversation.tries`).
"""

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .conversation import Ask, Asked, Conversation, Rules, answered
from .replies import MAX_SCORE, BadReply, json_block
from .templates import load_templates

# Number of pixels of the images that are judged.
JUDGE_AREA = 512 * 512
QUESTIONS = ("edit_score", "quality_score")
# The official code retries up to 10,000 times.
TRIES = 5
ANSWER_TOKENS = 768
RULES = Rules(dict.fromkeys(QUESTIONS, ANSWER_TOKENS), scored=True, tries=TRIES)
# The first reply takes the most probable tokens; a retry after an unreadable reply samples.
RETRY_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Verdict:
    """The scores of one edit. semantics: edit success and restraint. quality: naturalness and freedom from artifacts.
    0..10 each, None without a valid reply.

    problem: why a score is missing, "" if none is. replies: the last reply to each question.
    """

    semantics: tuple[float, float] | None
    quality: tuple[float, float] | None
    problem: str = ""
    replies: tuple[str, ...] = ()


def judge_size(width: int, height: int) -> tuple[int, int]:
    """Return the width and height at which an image is judged: about 512 * 512 pixels at its aspect ratio."""
    ratio = width / height
    exact = math.sqrt(JUDGE_AREA * ratio)
    return max(1, int(exact)), max(1, int(exact / ratio))


def to_judge_size(picture: Image.Image) -> np.ndarray:
    """Resize an image to uint8 [h, w, 3] for the judge. The official filter is unknown; this uses Lanczos."""
    return np.asarray(picture.convert("RGB").resize(judge_size(*picture.size), Image.Resampling.LANCZOS))


def read_scores(reply: str) -> tuple[float, float]:
    """Read the two scores of a reply: a JSON object with "score", in any text. Raises BadReply unless they are two
    numbers 0..10."""
    scores = json_block(reply).get("score")
    if (
        not isinstance(scores, list)
        or len(scores) != 2
        or not all(type(score) in (int, float) and 0 <= score <= MAX_SCORE for score in scores)
    ):
        raise BadReply(f'"score" is not two numbers from 0 to {MAX_SCORE:g}')
    return float(scores[0]), float(scores[1])


def judging(source: Image.Image, edited: Image.Image, instruction: str) -> Generator[Asked, str, Verdict]:
    """Yield the steps (see `answered`) of judging one edit; returns its verdict, whatever the replies are."""
    pictures = {"source": to_judge_size(source), "edited": to_judge_size(edited)}
    conversation = Conversation(None, RULES, load_templates("english"), pictures)
    scores, problems = [], []
    for name, values in zip(QUESTIONS, ({"instruction": instruction}, {})):
        try:
            scores.append((yield from conversation.tries(name, read_scores, **values)))
        except BadReply as problem:
            scores.append(None)
            problems.append(str(problem))
    replies = tuple(call.replies[-1] if call.replies else "" for call in conversation.calls)
    return Verdict(*scores, " ".join(problems), replies)


def judge_edit(ask: Ask, source: Image.Image, edited: Image.Image, instruction: str) -> Verdict:
    """Judge one edit. Returns a verdict whatever the replies are; exceptions of `ask` other than BadReply pass
    through."""
    return answered(ask, judging(source, edited, instruction))
