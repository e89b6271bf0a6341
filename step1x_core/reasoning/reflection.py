"""Thinking and reflection: the six calls to the language model, and the rounds they control (docs/model.md, Calls;
Rounds).

Images are opaque here. `ask(system, content, max_tokens) -> reply` is the language model; `content` holds texts and
images in order. A retry repeats the same words, so `ask` must sample again each time (count its calls into the seed).

Intended differences from the official code (reasons in docs/thinking.md):
- Tries are limited for the preview, too, and only an invalid reply is retried. Any other exception, such as out of
memory or the host's cancel, passes through at once.
- Each call's token budget is applied: it is passed to `ask`. The official client always stops at 128.
- A refinement is trimmed, and an empty one counts as a failed edit.
- Edit and quality scores must be two finite numbers each and are clamped to 0..10; otherwise the call is retried.
- A round that could not be judged keeps its image, and a best image can be named after any round.
- An empty rewrite falls back to the user's own instruction.
- One set of texts, in the language of the instruction, serves preview and final; it follows the final version's
contracts.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

from .conversation import (
    LAYOUTS,
    RULES,
    Ask,
    Asked,
    Call,
    Conversation,
    Rules,
    answered,
    answered_together,
)
from .replies import (
    FAILED,
    SUCCESS,
    BadReply,
    Consistency,
    json_block,
    keep_reflection,
    language,
    read_consistency,
    read_outcome,
    read_thoughts,
    score_pair,
    score_table,
)
from .templates import load_templates

MAX_ROUNDS = 3
NO_SCORES = (0.0, 0.0)


@dataclass(frozen=True)
class Thought:
    """The result of thinking. prompt: the user's instruction. instruction: the one to edit by."""

    prompt: str
    instruction: str


@dataclass(frozen=True)
class Reflection:
    """The judgement on one edited image.

    verdict: "success", "refine" (edit this image again, by `refined`) or "failed" (start again from the source).
    explanation: the model's reasoning, or why there is none.
    edit_scores: success and restraint. quality_scores: naturalness and freedom from artifacts. 0..10 each, empty if not
    requested.
    reply: the reflection reply from its think tag on. calls: all calls made.
    """

    verdict: str
    refined: str = ""
    explanation: str = ""
    description: str = ""
    consistency: Consistency | None = None
    edit_scores: tuple[float, ...] = ()
    quality_scores: tuple[float, ...] = ()
    reply: str = FAILED
    calls: tuple[Call, ...] = ()

    @property
    def value(self) -> float:
        """Return the lower edit score times the lower quality score, 0..100; 0 without scores."""
        return min(self.edit_scores, default=0.0) * min(self.quality_scores, default=0.0)


def unjudged(reason: str) -> Reflection:
    """Return the judgement for an image that could not be judged."""
    return Reflection("failed", explanation=reason)


def think(ask: Ask, source, prompt: str, rules: Rules = RULES["v1.2"], overrides: Path | None = None) -> Thought:
    """Have the instruction rewritten for the source image.

    Raises Step1XError for faulty template files in `overrides`, and whatever `ask` raises.
    """
    conversation = Conversation(ask, rules, load_templates(language(prompt), overrides), {"source": source})
    return Thought(prompt, conversation.attempt(Call("rewrite"), {"instruction": prompt}) or prompt)


def judging(conversation: Conversation, prompt: str) -> Generator[Asked, str, Reflection]:
    """Yield the steps (see `answered`) to the verdict on the edited image. A call without a valid reply makes it
    "failed"."""
    try:
        description = yield from conversation.tries("description", str, instruction=prompt)
        consistency = yield from conversation.tries("consistency", lambda reply: read_consistency(json_block(reply)),
                                                    instruction=prompt, description=description)
        kept = yield from conversation.tries("reflection", keep_reflection, instruction=prompt,
                                             score=f"{consistency.score:g}", reason=consistency.reason or "N/A")
    except BadReply as problem:
        return Reflection("failed", explanation=str(problem))
    outcome = read_outcome(kept)
    refined = (outcome.refine or "").strip()
    verdict = "success" if outcome.success else "refine" if refined else "failed"
    return Reflection(verdict, refined, read_thoughts(kept), description, consistency, reply=kept)


def judge(conversation: Conversation, prompt: str) -> Reflection:
    """Return the verdict on the edited image, as `judging`."""
    return answered(conversation.ask, judging(conversation, prompt))


def rating(conversation: Conversation, name: str, **values: str) -> Generator[Asked, str, tuple[float, float]]:
    """Yield the steps to the pair of scores that a call requests, zeros without a valid reply."""
    try:
        return (yield from conversation.tries(name, lambda reply: score_pair(score_table(reply)), **values))
    except BadReply:
        return NO_SCORES


def rate(conversation: Conversation, name: str, **values: str) -> tuple[float, float]:
    """Return the pair of scores that a call requests, as `rating`."""
    return answered(conversation.ask, rating(conversation, name, **values))


def reflect(
    ask: Ask, source, edited, prompt: str, rules: Rules = RULES["v1.2"], overrides: Path | None = None
) -> Reflection:
    """Judge an edited image against the source (always that of the first round) and the instruction.

    Returns a verdict whatever the replies are. Raises Step1XError for faulty template files in `overrides`, and
    whatever `ask` raises.

    The scores depend on no other reply. An `ask` with a method `together` (see `AskTogether`) is asked for them beside
    the verdict, any other one after it.
    """
    conversation = Conversation(
        ask, rules, load_templates(language(prompt), overrides), {"source": source, "edited": edited}
    )
    tracks = [judging(conversation, prompt)]
    if rules.scored:
        tracks += [rating(conversation, "edit_score", instruction=prompt), rating(conversation, "quality_score")]
    together = getattr(ask, "together", None)
    result, *scores = answered_together(together, tracks) if together else [answered(ask, track) for track in tracks]
    calls = tuple(sorted(conversation.calls, key=lambda call: list(LAYOUTS).index(call.name)))
    return replace(result, **dict(zip(("edit_scores", "quality_scores"), scores)), calls=calls)


@dataclass(frozen=True)
class Step:
    """What a round edits. base: "source" or "latest" (the image of the previous round)."""

    base: str
    prompt: str


@dataclass(frozen=True)
class Round:
    step: Step
    reflection: Reflection


@dataclass(frozen=True)
class Loop:
    """The rounds of one edit so far. Immutable: `after` returns the next state.

    prompt: the instruction that all rounds are judged by, rewritten or not.
    """

    prompt: str
    rules: Rules = RULES["v1.2"]
    max_rounds: int = MAX_ROUNDS
    rounds: tuple[Round, ...] = ()

    def next_step(self) -> Step | None:
        """Return what to edit next, or None to stop: after a success and after the last round."""
        last = self.rounds[-1].reflection if self.rounds else None
        if len(self.rounds) >= self.max_rounds or (last and last.verdict == "success"):
            return None
        if last and last.verdict == "refine":
            return Step("latest", last.refined)
        return Step("source", self.prompt)

    def after(self, reflection: Reflection) -> "Loop":
        """Return the state after the next step's image has been judged."""
        return replace(self, rounds=(*self.rounds, Round(self.next_step(), reflection)))

    def best(self) -> int | None:
        """Return the index of the best round so far, None before the first.

        With scores, the highest value wins; among equals a reply with the success tag, among those the latest. A failed
        round may win.
        """
        def rank(index):
            reflection = self.rounds[index].reflection
            return (reflection.value, SUCCESS in reflection.reply, index) if self.rules.scored else (index,)

        return max(range(len(self.rounds)), key=rank, default=None)


