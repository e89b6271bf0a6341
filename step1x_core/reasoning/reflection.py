"""Thinking and reflection: the six calls to the language model, and the rounds they control
(docs/model.md, Calls; Rounds).

Pictures are opaque here. `ask(system, content, max_tokens) -> reply` is the language model; `content` holds texts and pictures in
their order. A retry repeats the same words, so `ask` must sample anew each time (count its calls into the seed).

Where this differs from the official code, on purpose (reasons in docs/thinking.md):
- Tries are limited for the preview, too, and only a bad reply is tried again. Any other exception, such as out of memory or the
  host's cancel, passes through at once.
- Each call's token budget is meant: it is passed on to `ask`. The official client always stops at 128.
- A refinement is trimmed, and an empty one counts as a failed edit.
- Edit and quality scores must be two finite numbers each and are clamped to 0..10; else the call is tried again.
- A round that could not be judged still has its picture, and a best picture can be named after any round.
- An empty rewrite falls back to the person's own instruction.
- One set of texts, in the language of the instruction, serves preview and final; it follows the final version's contracts.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..prompts.v11 import clean_prompt
from .replies import (
    ERROR_MARK,
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
from .templates import fill, load_templates

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
MAX_ROUNDS = 3
NO_SCORES = (0.0, 0.0)


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


@dataclass(frozen=True)
class Thought:
    """prompt: the person's instruction; instruction: the one to edit by."""

    prompt: str
    instruction: str


@dataclass(frozen=True)
class Reflection:
    """The judgement on one edited picture.

    verdict: "success", "refine" (edit this picture again, by `refined`) or "failed" (start again from the source).
    explanation: the model's reasoning, or why there is none.
    edit_scores: success and restraint; quality_scores: naturalness and freedom from artifacts; 0..10 each, empty if not asked for.
    reply: the reflection reply from its think tag on. calls: everything that was asked.
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
        """0..100: the lower edit score times the lower quality score. 0 without scores."""
        return min(self.edit_scores, default=0.0) * min(self.quality_scores, default=0.0)


def unjudged(reason: str) -> Reflection:
    """Stands for the judgement on a picture that could not be judged."""
    return Reflection("failed", explanation=reason)


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
        raise BadReply(f"The language model gave no usable answer to the call '{name}' in {call.tries} tries. Last problem: {call.problem}.")

    def retried(self, name: str, read: Callable, **values: str):
        """What `read` makes of the first good reply to a call. Raises BadReply when every try failed; `ask` may raise it, too."""
        return answered(self.ask, self.tries(name, read, **values))


def think(ask: Ask, source, prompt: str, rules: Rules = RULES["v1.2"], overrides: Path | None = None) -> Thought:
    """Have the instruction rewritten for the source picture.

    Raises Step1XError for faulty template files in `overrides`, and whatever `ask` raises.
    """
    conversation = Conversation(ask, rules, load_templates(language(prompt), overrides), {"source": source})
    return Thought(prompt, conversation.attempt(Call("rewrite"), {"instruction": prompt}) or prompt)


def judge(conversation: Conversation, prompt: str) -> Reflection:
    """The verdict on the edited picture. A call without a good reply makes it "failed"."""
    try:
        description = conversation.retried("description", str, instruction=prompt)
        consistency = conversation.retried("consistency", lambda reply: read_consistency(json_block(reply)), instruction=prompt, description=description)
        kept = conversation.retried("reflection", keep_reflection, instruction=prompt,
                                    score=f"{consistency.score:g}", reason=consistency.reason or "N/A")
    except BadReply as problem:
        return Reflection("failed", explanation=str(problem))
    outcome = read_outcome(kept)
    refined = (outcome.refine or "").strip()
    verdict = "success" if outcome.success else "refine" if refined else "failed"
    return Reflection(verdict, refined, read_thoughts(kept), description, consistency, reply=kept)


def rate(conversation: Conversation, name: str, **values: str) -> tuple[float, float]:
    """The pair of scores that a call asks for, zeros without a good reply."""
    try:
        return conversation.retried(name, lambda reply: score_pair(score_table(reply)), **values)
    except BadReply:
        return NO_SCORES


def reflect(ask: Ask, source, edited, prompt: str, rules: Rules = RULES["v1.2"], overrides: Path | None = None) -> Reflection:
    """Judge an edited picture by the source (of the first round, always) and the instruction.

    Whatever the replies are, this returns a verdict. Raises Step1XError for faulty template files in `overrides`, and whatever
    `ask` raises.
    """
    conversation = Conversation(ask, rules, load_templates(language(prompt), overrides), {"source": source, "edited": edited})
    result = judge(conversation, prompt)
    if rules.scored:
        result = replace(result, edit_scores=rate(conversation, "edit_score", instruction=prompt),
                         quality_scores=rate(conversation, "quality_score"))
    return replace(result, calls=tuple(conversation.calls))


@dataclass(frozen=True)
class Step:
    """What a round edits. base: "source" or "latest" (the picture of the round before)."""

    base: str
    prompt: str


@dataclass(frozen=True)
class Round:
    step: Step
    reflection: Reflection


@dataclass(frozen=True)
class Loop:
    """The rounds of one edit so far. Immutable: `after` gives the next state.

    prompt: the instruction that all rounds are judged by, rewritten or not.
    """

    prompt: str
    rules: Rules = RULES["v1.2"]
    max_rounds: int = MAX_ROUNDS
    rounds: tuple[Round, ...] = ()

    def next_step(self) -> Step | None:
        """What to edit next, None to stop: after a success and after the last round."""
        last = self.rounds[-1].reflection if self.rounds else None
        if len(self.rounds) >= self.max_rounds or (last and last.verdict == "success"):
            return None
        if last and last.verdict == "refine":
            return Step("latest", last.refined)
        return Step("source", self.prompt)

    def after(self, reflection: Reflection) -> "Loop":
        """The state when the picture of the next step has been judged."""
        return replace(self, rounds=(*self.rounds, Round(self.next_step(), reflection)))

    def best(self) -> int | None:
        """Index of the best round so far, None before the first.

        With scores the highest value wins, among equals a reply with the success tag, among those the latest. A failed round may win.
        """
        def rank(index):
            reflection = self.rounds[index].reflection
            return (reflection.value, SUCCESS in reflection.reply, index) if self.rules.scored else (index,)

        return max(range(len(self.rounds)), key=rank, default=None)


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def describe_call(call: Call) -> str:
    """A call for the report: its tries, and the last reply in full."""
    tries = f"{call.tries} {'try' if call.tries == 1 else 'tries'}"
    problem = f", no usable answer: {call.problem}" if call.problem else ""
    return f"  {call.name} ({tries}{problem})\n{indent(call.replies[-1] if call.replies else '')}"


def describe_reflection(reflection: Reflection) -> str:
    """The judgement on one picture as plain text."""
    lines = [f"  Verdict: {reflection.verdict}"]
    if reflection.explanation:
        lines.append(f"  Explanation: {reflection.explanation}")
    if reflection.refined:
        lines.append(f"  Next instruction: {reflection.refined}")
    if reflection.consistency:
        lines.append(f"  Consistency: {reflection.consistency.score:g} of 10")
    if reflection.edit_scores:
        (success, restraint), (naturalness, artifacts) = reflection.edit_scores, reflection.quality_scores
        lines.append(f"  Scores of 10: success {success:g}, restraint {restraint:g}, naturalness {naturalness:g}, freedom from artifacts {artifacts:g}; "
                     f"value {reflection.value:g} of 100")
    return clean_prompt("\n".join([*lines, *map(describe_call, reflection.calls)]))


def report(loop: Loop, thought: Thought | None = None) -> str:
    """All rounds as plain text for a person."""
    lines = [f"Instruction: {thought.prompt if thought else loop.prompt}"]
    if thought:
        lines.append(f"Rewritten: {loop.prompt}")
    for number, entry in enumerate(loop.rounds, 1):
        base = "the source" if entry.step.base == "source" else f"round {number - 1}"
        lines.append(f"\nRound {number} edits {base}: {entry.step.prompt}\n{describe_reflection(entry.reflection)}")
    if loop.rounds:
        lines.append(f"\nBest: round {loop.best() + 1}")
    return clean_prompt("\n".join(lines))
