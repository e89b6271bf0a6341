"""Replies of the language model: their required form and what is read from them (docs/model.md, Text generation;
Replies).

Every parser accepts any string and runs in linear time. A reply that breaks its contract raises BadReply, and nothing
else does.
"""

import json
import math
import re
from dataclasses import dataclass

from ..prompts.v11 import clean_prompt

THINK = "<#Think>"
SUCCESS, FAILED, REFLECTION, OTHERS = "<#Success>", "<#Failed>", "<#Reflection>", "<#Others>"
OUTCOMES = (REFLECTION, FAILED, SUCCESS, OTHERS)

# A reply with this start ("error:") is a failure of whatever produced it.
ERROR_MARK = "错误:"

# Han characters, U+4E00 to U+9FFF.
_HAN = re.compile("[\u4e00-\u9fff]")

MAX_SCORE = 10.0
# Maximum scores of an image that does not meet its instruction, and of one with conflicts or omissions.
INSTRUCTION_CAPS = {"no": 2.0, "partial": 5.0}
TWO_CONFLICTS_CAP, ONE_CONFLICT_CAP, OMISSION_CAP, FLAW_CAP = 5.0, 8.0, 7.0, 8.99


class BadReply(Exception):
    """A reply that breaks the contract of its call. The text says what is wrong with it."""


@dataclass(frozen=True)
class Consistency:
    """How well an image agrees with its instruction.

    score: 0..10 after the caps, rounded to 4 digits. raw_score: 0..10 before them. caps: the caps that applied.
    """

    score: float
    raw_score: float
    meets_instruction: str
    major_conflicts: int
    minor_conflicts: int
    hallucinations: int
    omissions: int
    reason: str
    caps: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What a reflection reply decides. refine: the next instruction as the reply words it, or None."""

    success: bool
    refine: str | None


def language(text: str) -> str:
    """Return the language to answer in: "chinese" for at least two Han characters (U+4E00 to U+9FFF), else
    "english"."""
    return "chinese" if len(_HAN.findall(text)) > 1 else "english"


def read_json(text: str):
    """Parse a JSON text, NaN and Infinity included."""
    try:
        return json.loads(text)
    # ValueError also covers integers with more digits than Python converts; RecursionError covers deeply nested
    # brackets.
    except (ValueError, RecursionError) as problem:
        raise BadReply(f"not valid JSON ({problem})") from problem


def json_block(reply: str) -> dict:
    """Parse the JSON object from the first "{" to the last "}" of a reply."""
    start, end = reply.find("{"), reply.rfind("}")
    if not 0 <= start < end:
        raise BadReply("no JSON object")
    return read_json(reply[start:end + 1])


def read_consistency(table: dict) -> Consistency:
    """Read score and counts of a consistency reply and apply the caps.

    A raw score of 0..1 is read as a fraction of ten. Exactly 1 is therefore the best score, although it may have been
    meant as 1 of 10.
    """
    try:
        meets = clean_prompt(str(table.get("meets_instruction", ""))).strip().lower()
        major, minor, hallucinations, omissions = (
            int(table.get(name) or 0) for name in ("major_conflicts", "minor_conflicts", "hallucinations", "omissions")
        )
        raw = float(table.get("raw_score", 0.0))
        reason = clean_prompt(str(table.get("reason", ""))).strip()
    # RecursionError: a deeply nested object in place of a text.
    except (TypeError, ValueError, OverflowError, RecursionError) as problem:
        raise BadReply("a count or the raw score is not a number") from problem
    if 0.0 <= raw <= 1.0000001:
        raw *= MAX_SCORE
    # In this order NaN becomes the best score, as in the official code.
    raw = max(0.0, min(MAX_SCORE, raw))

    caps = []
    if meets in INSTRUCTION_CAPS:
        caps.append(INSTRUCTION_CAPS[meets])
    if major > 0:
        caps.append(TWO_CONFLICTS_CAP if major >= 2 else ONE_CONFLICT_CAP)
    if hallucinations > 0 or omissions > 0:
        caps.append(OMISSION_CAP)
    if meets != "yes" or major > 0 or hallucinations > 0 or omissions > 0:
        caps.append(FLAW_CAP)
    return Consistency(
        round(min([raw, *caps]), 4), raw, meets, major, minor, hallucinations, omissions, reason, tuple(caps)
    )


def count_outcomes(text: str) -> int:
    return sum(text.count(tag) for tag in OUTCOMES)


def keep_reflection(reply: str) -> str:
    """Trim a reflection reply to its part from the first think tag on. It must have exactly one outcome tag, after the
    think tag."""
    before, think, after = reply.partition(THINK)
    if not think:
        raise BadReply(f"no {THINK}")
    if count_outcomes(before) or count_outcomes(after) != 1:
        raise BadReply(f"not exactly one of {', '.join(OUTCOMES)}, behind {THINK}")
    return (think + after).strip()


def read_outcome(kept: str) -> Outcome:
    """Read what a kept reflection reply decides. A malformed reply, including a second think tag, is neither a success
    nor a refinement."""
    if not kept.startswith(THINK) or kept.count(THINK) != 1 or count_outcomes(kept) != 1:
        return Outcome(False, None)
    if SUCCESS in kept or OTHERS in kept:
        return Outcome(True, None)
    _, tag, refine = kept.partition(REFLECTION)
    return Outcome(False, refine if tag else None)


def read_thoughts(kept: str) -> str:
    """Return the reasoning in a kept reflection reply, trimmed: the text between the think tag and the outcome."""
    text = kept.removeprefix(THINK)
    for tag in OUTCOMES:
        text = text.partition(tag)[0]
    return text.strip()


def score_table(reply: str) -> dict:
    """Parse an edit or quality reply: a JSON object with a list `score` and any `reasoning`, optionally in a code
    fence, and nothing else."""
    text = reply.strip()
    if text.startswith("```json"):
        text = text[7:-3]
    elif text.startswith("```"):
        text = text[3:-3]
    table = read_json(text)
    if not isinstance(table, dict) or not isinstance(table.get("score"), list) or "reasoning" not in table:
        raise BadReply('no object with a list "score" and a "reasoning"')
    return table


def score_pair(table: dict) -> tuple[float, float]:
    """Return the two scores of an edit or quality reply, clamped to 0..10. Raises BadReply unless they are two finite
    numbers."""
    scores = table["score"]
    if len(scores) != 2 or not all(type(score) in (int, float) and abs(score) < math.inf for score in scores):
        raise BadReply('"score" is not two finite numbers')
    first, second = (float(max(0, min(MAX_SCORE, score))) for score in scores)
    return first, second
