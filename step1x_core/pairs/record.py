"""A pair of pictures for training: before and after an edit, with its instruction in two languages and where it comes
from (docs/model.md, Training pairs)."""

import json
import math
import random
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import Step1XError
from ..files import content_key
from ..prompts.v11 import clean_prompt
from ..reasoning.judge import Verdict
from ..tasks import TASK_TYPES

# The kinds of edits are those of the benchmark.
KINDS = TASK_TYPES
# A pixel counts as changed from this difference on, in 8-bit levels of its most different channel; recompression stays
# below it.
CHANGED = 12
# The shape of source and target may differ by this share, which rounding to whole pixels can do.
ASPECT_TOLERANCE = 0.03
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, eq=False)
class Pair:
    """source, target: uint8 [H, W, 3] of one size. english, chinese: the instruction, "" where there is none in that
    language.

    maker: what made the pair, a word or a sentence. details: how, as JSON takes it. verdict: the judge's, None before
    it was asked.
    """

    source: np.ndarray
    target: np.ndarray
    kind: str
    english: str
    chinese: str
    maker: str
    details: dict = field(default_factory=dict)
    verdict: Verdict | None = None

    @property
    def instruction(self) -> str:
        return self.english or self.chinese

    def with_verdict(self, verdict: Verdict) -> "Pair":
        return replace(self, verdict=verdict)


def make_pair(
    source: np.ndarray, target: np.ndarray, kind: str, english: str, chinese: str, maker: str, details: dict = {}
) -> Pair:
    """A pair of pictures, uint8 [H, W, 3]; the target is brought to the source's size.

    Raises Step1XError for an unknown kind, for no instruction, and for pictures of different shapes.
    """
    if kind not in KINDS:
        raise Step1XError(f"{kind!r} is not a kind of edit. Use one of {', '.join(KINDS)}.")
    english, chinese, maker = (" ".join(clean_prompt(text).split()) for text in (english, chinese, maker))
    if not english and not chinese:
        raise Step1XError("A pair has no instruction. Write one, in English or Chinese, or connect proposals.")
    if abs(math.log(source.shape[1] * target.shape[0] / (source.shape[0] * target.shape[1]))) > ASPECT_TOLERANCE:
        raise Step1XError(
            f"The edited image has {target.shape[1]}x{target.shape[0]} pixels and its source "
            f"{source.shape[1]}x{source.shape[0]}, but they must have the same aspect ratio. Crop one of them."
        )
    if target.shape != source.shape:
        target = np.asarray(Image.fromarray(target).resize(source.shape[1::-1], Image.Resampling.LANCZOS))
    return Pair(source, target, kind, english, chinese, maker, details)


def changed_pixels(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where an edit changed something, bool [H, W]. Both pictures uint8 [H, W, 3]."""
    # Without a sum or a sign: this runs on every pixel of every pair.
    return ((np.maximum(source, target) - np.minimum(source, target)) >= CHANGED).any(axis=2)


def digest(*parts: bytes | str) -> str:
    """A name of 20 characters that changes with any of the parts."""
    return content_key(*parts)[:20]


@cache
def words() -> dict:
    """The wordings of instructions, and what they are about: `data/pair_words.json`."""
    return json.loads((Path(__file__).parent.parent / "data" / "pair_words.json").read_text(encoding="utf-8"))


def fill(wording: str, values: dict[str, str]) -> str:
    return _FIELD.sub(lambda name: values[name[1]], wording)


def instructions(
    wordings: dict[str, list[str]], english: dict[str, str], chinese: dict[str, str], rng: random.Random
) -> tuple[str, str]:
    """One wording in each language, with the values of its fields."""
    return fill(rng.choice(wordings["en"]), english), fill(rng.choice(wordings["zh"]), chinese)
