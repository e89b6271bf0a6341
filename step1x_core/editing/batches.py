"""Which instruction is carried out on which picture of a batch, and what came of it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..checks import check_pictures
from ..errors import Step1XError

# How pictures and instructions are brought together.
PAIRS, ALL, TURNS = "pairs", "all", "turns"
# How a line begins that is no turn.
COMMENTS = ("#", "//")
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
    single one goes with all others. `TURNS`: every prompt on the one picture, each on the result of the one before."""
    if mode == TURNS:
        if len(pictures) != 1:
            raise Step1XError(
                f"Input 'images' has {len(pictures)} images, but combine is {TURNS}, which edits one image step by "
                f"step. Connect one image, or set combine to {PAIRS} or {ALL}."
            )
        yield from ((0, prompt) for prompt in prompts)
        return
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

    images: batches [B, H, W, C] of any sizes. texts: see `split_prompts`. mode: see `combine`; with `TURNS` lines that
    begin with one of `COMMENTS` do not count, so that a turn can be left out without losing its words.

    Raises Step1XError if there are no pictures or instructions, and for numbers that do not go together.
    """
    for image in images:
        check_pictures(image, "images")
    pictures, prompts = split_pictures(images), split_prompts(texts)
    if mode == TURNS:
        prompts = [prompt for prompt in prompts if not prompt.startswith(COMMENTS)]
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


def turn_shown(show_turn: int, turns: int) -> int:
    """The number of the turn to show, from 1. show_turn: 0 for the last.

    Raises Step1XError if there is no such turn.
    """
    if show_turn > turns:
        raise Step1XError(
            f"Input 'show_turn' is {show_turn}, but 'prompts' has {turns} turn{'s' * (turns > 1)}. Choose a number up to "
            f"{turns}, or 0 for the last turn."
        )
    return show_turn or turns


def describe_turns(items: list[Item], shown: int) -> str:
    """The report on turns as plain text; the turns after the one shown are marked."""
    lines = [f"Turn {shown} of {len(items)} shown."]
    for count, item in enumerate(items, 1):
        lines.append(f'{count}. seed {item.seed}, "{item.prompt}"' + (": not shown" if count > shown else ""))
    return "\n".join(lines)
