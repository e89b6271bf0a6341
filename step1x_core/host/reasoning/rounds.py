"""What the nodes of a reflection loop pass on: the rounds so far, and errors that must not cost an image
(docs/model.md, Rounds)."""

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

# Without a cache (--cache-none) the host reruns a finished node for everyone who asks for its result later.
HOST_KEEPS_RESULTS = not comfy.cli_args.args.cache_none

# Number of tries before a Failure is cached like any result.
TRIES = 2
# Number of errors that each node has turned into a Failure and will retry, by its id in the graph.
_failures: Counter[str] = Counter()
# Number of consecutive failures of a node at a task, by its id, the task and the kind of error.
_repeats: Counter[tuple] = Counter()


@dataclass(frozen=True)
class Failure:
    """Replaces a result that a node could not make. Nodes that receive one pass it on. reason: for the report."""

    reason: str


def attempt(node_id: str, task: str, function, *args, **kwargs):
    """Return the result of the function, or a Failure. Only the host's cancel passes through.

    task: what distinguishes this piece of the node's work, such as an instruction and a seed. After the same kind of
    error in `TRIES` runs, the Failure says that it is kept. After running out of memory the models are unloaded, as the
    host does if a node fails.
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
    """Return the number of failures so far of a node and of those it was expanded to, without those that are kept.

    Used as part of a fingerprint: a Failure is not cached and the next run tries again, up to `TRIES` times.
    """
    return sum(count for name, count in _failures.items() if name == node_id or name.startswith(f"{node_id}."))


@dataclass(frozen=True)
class Rounds:
    """The rounds so far. pictures: one [1, H, W, 3] for each round of the loop. error: what ended them early, "" if
    nothing did."""

    loop: Loop
    thought: Thought | None = None
    pictures: tuple[Tensor, ...] = ()
    error: str = ""

    def next_step(self) -> Step | None:
        """Return what to edit next, or None to stop."""
        return None if self.error else self.loop.next_step()

    def after(self, picture: Tensor | Failure, reflection: Reflection | Failure | None) -> "Rounds":
        """Return the state after a round with this image and judgement. A Failure as either ends the rounds; if only
        the judgement failed, the image is kept."""
        number = len(self.pictures) + 1
        if isinstance(picture, Failure):
            return replace(self, error=f"Round {number} could not be edited. {picture.reason}")
        judged = unjudged(reflection.reason) if isinstance(reflection, Failure) else reflection
        error = f"Round {number} could not be judged. {reflection.reason}" if isinstance(reflection, Failure) else ""
        return replace(self, loop=self.loop.after(judged), pictures=(*self.pictures, picture), error=error)

    def best(self) -> Tensor:
        """Return the best image [1, H, W, 3]. There must be one."""
        return self.pictures[self.loop.best()]

    def candidates(self) -> Tensor:
        """Return all images [rounds, H, W, 3], in the order of the rounds."""
        return torch.cat(self.pictures)

    def report(self) -> str:
        """Describe all rounds as plain text."""
        text = report(self.loop, self.thought)
        return f"{text}\n\nEnded early: {self.error}" if self.error else text
