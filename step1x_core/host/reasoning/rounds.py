"""What the nodes of a reflection loop hand on: the rounds so far, and errors that must not cost an image (docs/model.md, Rounds)."""

import logging
from collections import Counter
from dataclasses import dataclass, replace

import comfy.cli_args
import comfy.model_management
import torch
from torch import Tensor

from ...reasoning.reflection import Loop, Reflection, Step, Thought, unjudged
from ...reasoning.report import report

log = logging.getLogger(__name__)

# Without a cache (--cache-none) the host runs a finished node again for everyone who asks for its result later.
HOST_KEEPS_RESULTS = not comfy.cli_args.args.cache_none

# How often the same thing is tried before its Failure is kept like any result.
TRIES = 2
# How many errors each node has turned into a Failure that is tried again, by its id in the graph.
_failures: Counter[str] = Counter()
# How often in a row a node failed at a task, by its id, the task and the kind of error.
_repeats: Counter[tuple] = Counter()


@dataclass(frozen=True)
class Failure:
    """Takes the place of what a node could not make. Nodes that get one pass it on. reason: for the report."""

    reason: str


def attempt(node_id: str, task: str, function, *args, **kwargs):
    """What the function returns, or a Failure. Only the host's cancel gets through.

    task: what tells this piece of the node's work from others, such as an instruction and a seed. After the same kind of error in `TRIES`
    runs the Failure says that it is kept. After running out of memory the models are unloaded, as the host does when a node fails.
    """
    try:
        result = function(*args, **kwargs)
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as problem:
        log.warning("Part of the run failed; the other results are kept.", exc_info=True)
        if comfy.model_management.is_oom(problem):
            comfy.model_management.unload_all_models()
        reason, key = f"{type(problem).__name__}: {problem}", (node_id, task, type(problem))
        _repeats[key] += 1
        if _repeats[key] < TRIES:
            _failures[node_id] += 1
            return Failure(reason)
        return Failure(f"{reason} (This failed {_repeats[key]} times and is not retried until an input changes.)")
    for key in [key for key in _repeats if key[:2] == (node_id, task)]:
        del _repeats[key]
    return result


def failures(node_id: str) -> int:
    """Failures so far of a node and of those it was expanded to, without those that are kept.

    As part of a fingerprint: a Failure is not kept, the next run tries again, until it has been tried `TRIES` times.
    """
    return sum(count for name, count in _failures.items() if name == node_id or name.startswith(f"{node_id}."))


@dataclass(frozen=True)
class Rounds:
    """The rounds so far. pictures: one [1, H, W, 3] for each of the loop's; error: what ended them early, "" for nothing."""

    loop: Loop
    thought: Thought | None = None
    pictures: tuple[Tensor, ...] = ()
    error: str = ""

    def next_step(self) -> Step | None:
        """What to edit next, None to stop."""
        return None if self.error else self.loop.next_step()

    def after(self, picture: Tensor | Failure, reflection: Reflection | Failure | None) -> "Rounds":
        """The state after a round with this image and judgement. A Failure as either ends the rounds; one as the judgement keeps the image."""
        number = len(self.pictures) + 1
        if isinstance(picture, Failure):
            return replace(self, error=f"Round {number} could not be edited. {picture.reason}")
        judged = unjudged(reflection.reason) if isinstance(reflection, Failure) else reflection
        error = f"Round {number} could not be judged. {reflection.reason}" if isinstance(reflection, Failure) else ""
        return replace(self, loop=self.loop.after(judged), pictures=(*self.pictures, picture), error=error)

    def best(self) -> Tensor:
        """The best image [1, H, W, 3]. There must be one."""
        return self.pictures[self.loop.best()]

    def candidates(self) -> Tensor:
        """All images [rounds, H, W, 3], in the order of the rounds."""
        return torch.cat(self.pictures)

    def report(self) -> str:
        """All rounds as plain text."""
        text = report(self.loop, self.thought)
        return f"{text}\n\nEnded early: {self.error}" if self.error else text
