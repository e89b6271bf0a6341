"""The questions of thinking and reflection to the language model, with retries (docs/model.md, Replies)."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from ..prompts.v11 import clean_prompt
from .replies import (
    ERROR_MARK,
    BadReply,
)
from .templates import fill

Ask = Callable[[str, list, int], str]
# What `ask` is given.
Asked = tuple[str, list, int]
# What the user turn of each call holds, in order.
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
    """What differs between the versions.

    budgets: tokens that the reply to each call may have.
    scored: edit and quality scores are asked for, and the best round is the one with the highest; else the best round is the last.
    tries: how often each call is made until its reply is good. The rewrite is never repeated.
    """

    budgets: dict[str, int]
    scored: bool
    tries: int = MAX_TRIES


_BUDGETS = {"rewrite": 512, "description": 768, "consistency": 1024, "reflection": 768, "edit_score": 768, "quality_score": 768}
RULES = {
    "v1.2-preview": Rules({**_BUDGETS, "consistency": 512}, scored=False),
    "v1.2": Rules(_BUDGETS, scored=True),
}


@dataclass
class Call:
    """One call and its tries. replies: all of them, the good one last; problem: what is wrong with the last one, "" for nothing."""

    name: str
    tries: int = 0
    replies: list[str] = field(default_factory=list)
    problem: str = ""


def answered(ask: Ask, steps: Generator[Asked, str]):
    """The result of steps that yield what is to be asked, and get the reply, or the BadReply that `ask` raises."""
    try:
        asked = next(steps)
        while True:
            try:
                reply = ask(*asked)
            except BadReply as problem:
                asked = steps.throw(problem)
            else:
                asked = steps.send(reply)
    except StopIteration as end:
        return end.value


class Conversation:
    """Makes the calls about one instruction and keeps a record of them. pictures: by their names in LAYOUTS.

    ask: None where `tries` alone is used, by which several conversations can be had at a time.
    """

    def __init__(self, ask: Ask | None, rules: Rules, templates: dict[str, str], pictures: dict):
        self.ask, self.rules, self.templates, self.pictures = ask, rules, templates, pictures
        self.calls: list[Call] = []

    def question(self, call: Call, values: dict[str, str]) -> Asked:
        """What is asked by one try of a call."""
        call.tries += 1
        parts = {**self.pictures, "text": fill(self.templates[f"{call.name}.user"], values)}
        content = [parts[part] for part in LAYOUTS[call.name]]
        return self.templates[f"{call.name}.system"], content, self.rules.budgets[call.name]

    def take(self, call: Call, reply: str) -> str:
        """Keep the reply to one try of a call -> it, trimmed, whatever it is."""
        call.replies.append(clean_prompt(reply).strip())
        return call.replies[-1]

    def attempt(self, call: Call, values: dict[str, str]) -> str:
        """One try of a call -> the reply, trimmed, whatever it is."""
        return self.take(call, self.ask(*self.question(call, values)))

    def tries(self, name: str, read: Callable, **values: str) -> Generator[Asked, str]:
        """The tries of a call, as steps for `answered` -> what `read` makes of the first good reply. Raises BadReply when every try failed."""
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

    def retried(self, name: str, read: Callable, **values: str):
        """What `read` makes of the first good reply to a call. Raises BadReply when every try failed; `ask` may raise it, too."""
        return answered(self.ask, self.tries(name, read, **values))
