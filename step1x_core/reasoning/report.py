"""Text reports of thinking and reflection for the user."""

from ..prompts.v11 import clean_prompt
from .conversation import Call
from .reflection import Loop, Reflection, Thought


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def describe_call(call: Call) -> str:
    """Describe a call for the report: its tries, and the last reply in full."""
    tries = f"{call.tries} {'try' if call.tries == 1 else 'tries'}"
    problem = f", no usable answer: {call.problem}" if call.problem else ""
    return f"  {call.name} ({tries}{problem})\n{indent(call.replies[-1] if call.replies else '')}"


def describe_reflection(reflection: Reflection) -> str:
    """Describe the judgement on one image as plain text."""
    lines = [f"  Verdict: {reflection.verdict}"]
    if reflection.explanation:
        lines.append(f"  Explanation: {reflection.explanation}")
    if reflection.refined:
        lines.append(f"  Next instruction: {reflection.refined}")
    if reflection.consistency:
        lines.append(f"  Consistency: {reflection.consistency.score:g} of 10")
    if reflection.edit_scores:
        (success, restraint), (naturalness, artifacts) = reflection.edit_scores, reflection.quality_scores
        lines.append(
            f"  Scores of 10: success {success:g}, restraint {restraint:g}, naturalness {naturalness:g}, freedom from artifacts {artifacts:g}; "
            f"value {reflection.value:g} of 100"
        )
    return clean_prompt("\n".join([*lines, *map(describe_call, reflection.calls)]))


def report(loop: Loop, thought: Thought | None = None) -> str:
    """Describe all rounds as plain text for the user."""
    lines = [f"Instruction: {thought.prompt if thought else loop.prompt}"]
    if thought:
        lines.append(f"Rewritten: {loop.prompt}")
    for number, entry in enumerate(loop.rounds, 1):
        base = "the source" if entry.step.base == "source" else f"round {number - 1}"
        lines.append(f"\nRound {number} edits {base}: {entry.step.prompt}\n{describe_reflection(entry.reflection)}")
    if loop.rounds:
        lines.append(f"\nBest: round {loop.best() + 1}")
    return clean_prompt("\n".join(lines))
