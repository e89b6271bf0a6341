"""Chooses the next tokens of several replies from the language model's scores, in the order and by the rules of
Hugging Face transformers.

Every call has the same shapes and waits for nothing, so it can be captured in a CUDA graph.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import Step1XError

# Candidates kept beyond the largest top-k. Scores often come from bf16 and tie; a tie with the last of the top-k stays.
TIES = 64
# Bits for the number of a token in a sort key.
TOKEN_BITS = 20


@dataclass(frozen=True)
class Sampling:
    """Settings of token sampling. The defaults disable every filter; temperature 0 takes the most probable token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not self.repetition_penalty > 0:
            raise Step1XError(
                f"Setting repetition_penalty is {self.repetition_penalty}; it must be above 0. Set it to 1 to disable "
                "it."
            )
        for name, low, high in (
            ("temperature", 0, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("seed", -(2**63), 2**64 - 1),
        ):
            # NaN fails every comparison.
            if not low <= getattr(self, name) <= high:
                raise Step1XError(
                    f"Setting {name} is {getattr(self, name)}; it must be from {low} to {high}. Correct the value."
                )


class Settings:
    """The settings of all rows as tensors [N, 1], and what any row uses. Made once for each batch."""

    def __init__(self, samplings: list[Sampling], device):
        def column(name, dtype=torch.float32):
            return torch.tensor([[getattr(row, name)] for row in samplings], dtype=dtype, device=device)

        self.repetition_penalty, self.presence_penalty = column("repetition_penalty"), column("presence_penalty")
        self.top_p, self.min_p, self.top_k = column("top_p"), column("min_p"), column("top_k", torch.long)
        self.sampled = column("temperature") > 0
        # Greedy rows are divided by 1; their draw is not used.
        self.temperature = torch.where(self.sampled, column("temperature"), 1.0)
        self.penalises = any(row.repetition_penalty != 1 or row.presence_penalty != 0 for row in samplings)
        self.samples = any(row.temperature > 0 for row in samplings)
        self.widest = 0 if any(row.top_k <= 0 for row in samplings) else max(row.top_k for row in samplings)
        self.uses_top_k = any(row.top_k > 0 for row in samplings)
        self.uses_top_p, self.uses_min_p = (
            any(row.top_p < 1 for row in samplings),
            any(row.min_p > 0 for row in samplings),
        )


def penalise(scores: Tensor, seen: Tensor, replied: Tensor, settings: Settings) -> Tensor:
    """Lower the scores [N, V] of tokens that already occur.

    seen: bool [N, V], tokens of the prompt or the reply, to which the repetition penalty applies.
    replied: bool [N, V], tokens of the reply alone, to which the presence penalty applies.
    """
    penalty = settings.repetition_penalty
    scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    return scores - settings.presence_penalty * replied


def best_first(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest `count` scores of [N, V] in falling order and their tokens, both [N, count].

    Of equal scores the lower token comes first on every device and in every batch size, which torch's topk leaves open.
    The sort key has the score in its upper bits, as an integer of the same order, and the token in its lower ones.
    """
    values, tokens = (
        scores.topk(count) if count < scores.shape[1] else (scores, torch.arange(count, device=scores.device))
    )
    bits = values.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = 2**TOKEN_BITS - 1
    keys = ((ordered << TOKEN_BITS) + (last - tokens)).sort(descending=True).values
    tokens = last - (keys & last)
    return scores.gather(1, tokens), tokens


def candidates(scores: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the tokens that may be chosen, most probable first, as probabilities float32 [N, K] and ids [N, K].

    scores: [N, V] float32 after `penalise`. Divides by the temperature, then applies top-k, top-p and min-p; what they
    remove has probability 0.
    """
    vocabulary = scores.shape[1]
    count = min(settings.widest + TIES, vocabulary) if settings.widest else vocabulary
    values, tokens = best_first(scores / settings.temperature, count)
    if settings.uses_top_k:
        smallest = values.gather(1, (settings.top_k - 1).clamp(0, count - 1))
        values = values.masked_fill((values < smallest) & (settings.top_k > 0), -torch.inf)
    if settings.uses_top_p:
        # The sum of a token and all less probable ones; in float64, so that the order of adding does not matter.
        tail = values.softmax(-1).double().flip(-1).cumsum(-1).flip(-1)
        remove = (tail <= 1 - settings.top_p) & (settings.top_p < 1)
        values = values.masked_fill(pad(remove[:, 1:], (1, 0)), -torch.inf)
    if settings.uses_min_p:
        chances = values.softmax(-1)
        values = values.masked_fill(chances < settings.min_p * chances[:, :1], -torch.inf)
    return values.softmax(-1), tokens


def draws(seed: int, tokens: int) -> Tensor:
    """Return the random numbers float64 [tokens] in 0..1 that choose the tokens of a reply. They depend on the seed and
    on the place in the reply only."""
    return torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TokenSampler:
    """Chooses the tokens of several replies step by step. A seed chooses the same tokens on every device, alone and in
    a batch."""

    def __init__(self, prompts: list[Tensor], vocabulary: int, samplings: list[Sampling], tokens: int):
        """prompts: ids [L] of each whole prompt, images included. tokens: how many are chosen at most."""
        device, rows = prompts[0].device, len(prompts)
        self.samplings, self.settings = samplings, Settings(samplings, device)
        self.replied = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self.seen = self.replied.clone()
        for row, ids in enumerate(prompts):
            self.seen[row, ids] = True
        self.draws = torch.stack([draws(sampling.seed, tokens) for sampling in samplings]).to(device)
        self.replies = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.count = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)

    def choose(self, scores: Tensor) -> Tensor:
        """Choose the next token of each row by its scores [N, V]; returns ids [N] and notes them in `replies`."""
        scores, settings = scores.float(), self.settings
        self.broken |= scores.isnan().any()
        if settings.penalises:
            scores = penalise(scores, self.seen, self.replied, settings)
        tokens = scores.argmax(-1, keepdim=True)
        place = self.count.expand(len(tokens), 1)
        if settings.samples:
            chances, ids = candidates(scores, settings)
            sums = chances.double().cumsum(-1)
            drawn = (
                (sums <= self.draws.gather(1, place) * sums[:, -1:]).sum(-1, keepdim=True).clamp_(max=ids.shape[1] - 1)
            )
            tokens = torch.where(settings.sampled, ids.gather(1, drawn), tokens)
        if settings.penalises:
            self.seen.scatter_(1, tokens, True)
            self.replied.scatter_(1, tokens, True)
        self.replies.scatter_(1, place, tokens)
        self.count += 1
        return tokens[:, 0]

    def check(self) -> None:
        """Raise Step1XError if any score so far was NaN. Waits for the device."""
        if self.broken:
            raise Step1XError(
                "The language model returned NaN values; its file may be damaged. Download the file of 'Load "
                "Step1X-Edit MLLM' again."
            )

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.samplings = [self.samplings[row] for row in rows]
        self.settings = Settings(self.samplings, self.seen.device)
        for name in ("seen", "replied", "draws", "replies"):
            setattr(self, name, getattr(self, name)[rows])
