"""Which instruction is carried out on which picture of a batch, and what came of it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..checks import check_pictures
from ..errors import Step1XError

# How pictures and instructions are brought together.
PAIRS, ALL = "pairs", "all"
SEEDS = 2**64


@dataclass(frozen=True)
class Item:
    """One edit. picture: [1, H, W, C]; number: which of the pictures it is, from 1."""

    picture: Tensor
    number: int
    prompt: str
    seed: int


def split_pictures(images: list[Tensor]) -> list[Tensor]:
    """A list of batches [B, H, W, C] -> every picture on its own, [1, H, W, C]."""
    return [picture[None] for image in images for picture in image]


def split_prompts(texts: list[str]) -> list[str]:
    """One instruction a line; empty lines do not count."""
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def combine(pictures: list[Tensor], prompts: list[str], mode: str) -> Iterator[tuple[int, str]]:
    """Indices of pictures and the prompts for them. `ALL`: every prompt on every picture. `PAIRS`: one each in turn; a
    single one goes with all others."""
    if mode == ALL:
        yield from ((index, prompt) for index in range(len(pictures)) for prompt in prompts)
        return
    if min(len(pictures), len(prompts)) > 1 and len(pictures) != len(prompts):
        raise Step1XError(
            f"{len(pictures)} pictures and {len(prompts)} instructions do not make pairs. Give one instruction, one for each picture, or set combine to {ALL}."
        )
    for index in range(max(len(pictures), len(prompts))):
        yield index % len(pictures), prompts[index % len(prompts)]


def lay_out(images: list[Tensor], texts: list[str], seeds: list[int], mode: str = PAIRS) -> list[Item]:
    """The edits of a batch, in order. A single seed counts up from edit to edit; else there is one for each.

    images: batches [B, H, W, C] of any sizes. texts: see `split_prompts`. mode: see `combine`.

    Raises Step1XError if there are no pictures or instructions, and for numbers that do not go together.
    """
    for image in images:
        check_pictures(image, "images")
    pictures, prompts = split_pictures(images), split_prompts(texts)
    if not pictures:
        raise Step1XError("There is no picture to edit: the list of images is empty. Connect pictures.")
    if not prompts:
        raise Step1XError("There is no instruction. Write one into prompts, or several, one a line.")
    pairs = list(combine(pictures, prompts, mode))
    if len(seeds) not in (1, len(pairs)):
        raise Step1XError(
            f"There are {len(seeds)} seeds for {len(pairs)} edits. Connect one seed, or one for each edit."
        )
    if len(seeds) == 1:
        seeds = [(seeds[0] + count) % SEEDS for count in range(len(pairs))]
    return [Item(pictures[index], index + 1, prompt, seed) for (index, prompt), seed in zip(pairs, seeds)]


def describe(items: list[Item], problems: list[str | None]) -> str:
    """The report on a batch as plain text. problems: for each edit what went wrong, None for nothing."""
    lines = [f"{problems.count(None)} of {len(items)} edits made."]
    for count, (item, problem) in enumerate(zip(items, problems), 1):
        outcome = "made" if problem is None else f"FAILED: {problem}"
        lines.append(f'{count}. picture {item.number}, seed {item.seed}, "{item.prompt}": {outcome}')
    return "\n".join(lines)
