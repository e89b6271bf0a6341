"""The calls of thinking and reflection to the language model, with retries (docs/model.md, Replies)."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..prompts.v11 import clean_prompt
from .replies import (
    ERROR_MARK,
    BadReply,
)
from .templates import fill

Ask = Callable[[str, list, int], str]


class Asked(NamedTuple):
    """The arguments of `ask`, and which try of which call it is; the first try is 0."""

    system: str
    content: list
    budget: int
    name: str = ""
    attempt: int = 0


# Answers several questions with one budget as one batch.
AskTogether = Callable[[list[Asked]], list[str]]
# The content of each call's user turn, in order.
LAYOUTS = {
    "rewrite": ("source", "text"),
    "description": ("source", "text"),
    "consistency": ("text", "edited"),
    "reflection": ("source", "edited", "text"),
    "edit_score": ("source", "edited", "text"),
    "quality_score": ("edited", "text"),
}
MAX_TRIES = 20


@dataclass(frozen=True)
class Rules:
    """Settings that differ between the versions.

    budgets: maximum number of tokens in the reply to each call.
    scored: whether edit and quality scores are requested. The best round is then the one with the highest score,
    otherwise the last one.
    tries: how often each call is made until its reply is valid. The rewrite is never retried.
    """

    budgets: dict[str, int]
    scored: bool
    tries: int = MAX_TRIES


_BUDGETS = {
    "rewrite": 512,
    "description": 768,
    "consistency": 1024,
    "reflection": 768,
    "edit_score": 768,
    "quality_score": 768,
}
RULES = {
    "v1.2-preview": Rules({**_BUDGETS, "consistency": 512}, scored=False),
    "v1.2": Rules(_BUDGETS, scored=True),
}


@dataclass
class Call:
    """One call and its tries. replies: all of them, a valid one last. problem: what is wrong with the last one, "" if
    nothing is."""

    name: str
    tries: int = 0
    replies: list[str] = field(default_factory=list)
    problem: str = ""


def answered(ask: Ask, steps: Generator[Asked, str]):
    """Run steps that yield questions and receive replies, or the BadReply that `ask` raises; returns their result."""
    try:
        asked = next(steps)
        while True:
            try:
                reply = ask(*asked[:3])
            except BadReply as problem:
                asked = steps.throw(problem)
            else:
                asked = steps.send(reply)
    except StopIteration as end:
        return end.value


def answered_together(ask: AskTogether, tracks: list[Generator[Asked, str]]) -> list:
    """Run independent steps as for `answered` side by side; returns their results in order.

    What is asked as one batch has one budget. The first unfinished steps, which should be the longest, never wait; the
    others wait until theirs is the same.
    """
    results, waiting = {}, {}

    def go_on(number: int, reply: str | None = None) -> None:
        try:
            waiting[number] = tracks[number].send(reply)
        except StopIteration as end:
            waiting.pop(number, None)
            results[number] = end.value

    for number in range(len(tracks)):
        go_on(number)
    while waiting:
        budget = waiting[min(waiting)].budget
        numbers = [number for number in sorted(waiting) if waiting[number].budget == budget]
        replies = ask([waiting[number] for number in numbers])
        for number, reply in zip(numbers, replies, strict=True):
            go_on(number, reply)
    return [results[number] for number in range(len(tracks))]


class Conversation:
    """Makes the calls about one instruction and records them. pictures: by their names in LAYOUTS.

    ask: None if only `tries` is used, which allows several conversations at a time.
    """

    def __init__(self, ask: Ask | None, rules: Rules, templates: dict[str, str], pictures: dict):
        self.ask, self.rules, self.templates, self.pictures = ask, rules, templates, pictures
        self.calls: list[Call] = []

    def question(self, call: Call, values: dict[str, str]) -> Asked:
        """Return one try of a call."""
        call.tries += 1
        parts = {**self.pictures, "text": fill(self.templates[f"{call.name}.user"], values)}
        content = [parts[part] for part in LAYOUTS[call.name]]
        return Asked(self.templates[f"{call.name}.system"], content, self.rules.budgets[call.name], call.name,
                     call.tries - 1)

    def take(self, call: Call, reply: str) -> str:
        """Record the reply to one try of a call; returns it trimmed, valid or not."""
        call.replies.append(clean_prompt(reply).strip())
        return call.replies[-1]

    def attempt(self, call: Call, values: dict[str, str]) -> str:
        """Make one try of a call; returns the trimmed reply, valid or not."""
        return self.take(call, self.ask(*self.question(call, values)[:3]))

    def tries(self, name: str, read: Callable, **values: str) -> Generator[Asked, str]:
        """Yield the tries of a call as steps for `answered`; returns what `read` makes of the first valid reply.

        Raises BadReply if every try failed.
        """
        call = Call(name)
        self.calls.append(call)
        while call.tries < self.rules.tries:
            try:
                reply = self.take(call, (yield self.question(call, values)))
                if reply.startswith(ERROR_MARK):
                    raise BadReply("an error message")
                result = read(reply)
            except BadReply as problem:
                call.problem = str(problem)
            else:
                call.problem = ""
                return result
        raise BadReply(
            f"The language model gave no usable reply to '{name}' in {call.tries} tries. Last problem: {call.problem}."
        )
