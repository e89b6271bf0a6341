"""Chooses the next token from the language model's scores, in the order and by the rules of Hugging Face
transformers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Step1XError


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
        for name, low, high in (("temperature", 0, math.inf), ("top_p", 0, 1), ("min_p", 0, 1), ("seed", -2**63, 2**64 - 1)):
            # NaN fails every comparison.
            if not low <= getattr(self, name) <= high:
                raise Step1XError(
                    f"Setting {name} is {getattr(self, name)}; it must be from {low} to {high}. Correct the value."
                )


def penalise(scores: Tensor, seen: Tensor, replied: Tensor, sampling: Sampling) -> Tensor:
    """Lower the scores [V] of tokens that already occur.

    seen: bool [V], tokens of the prompt or the reply, to which the repetition penalty applies.
    replied: bool [V], tokens of the reply alone, to which the presence penalty applies.
    """
    penalty = sampling.repetition_penalty
    scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    return scores - sampling.presence_penalty * replied


def filter_scores(scores: Tensor, sampling: Sampling) -> Tensor:
    """Divide the scores [V] by the temperature and set tokens that may not be chosen to -inf: top-k, then top-p, then
    min-p."""
    scores = scores / sampling.temperature
    if sampling.top_k > 0:
        smallest = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if sampling.top_p < 1:
        values, order = scores.sort()
        remove = values.softmax(0).cumsum(0) <= 1 - sampling.top_p
        remove[-1] = False
        scores = scores.masked_fill(remove.scatter(0, order, remove), -torch.inf)
    if sampling.min_p > 0:
        chances = scores.softmax(0)
        scores = scores.masked_fill(chances < sampling.min_p * chances.max(), -torch.inf)
    return scores


class TokenChooser:
    """Chooses the tokens of one reply one after another; the same seed chooses the same tokens on every device."""

    def __init__(self, prompt: Tensor, vocabulary: int, sampling: Sampling):
        """prompt: ids [L] of the whole prompt, images included."""
        self.sampling = sampling
        self.replied = torch.zeros(vocabulary, dtype=torch.bool, device=prompt.device)
        self.seen = self.replied.clone()
        self.seen[prompt] = True
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, scores: Tensor) -> int:
        """Choose the next token by its scores [V]; returns its id. Raises Step1XError if a score is NaN."""
        scores = penalise(scores.float(), self.seen, self.replied, self.sampling)
        if scores.isnan().any():
            raise Step1XError(
                "The language model returned NaN values; its file may be damaged. Download the file of 'Load "
                "Step1X-Edit MLLM' again."
            )
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            chances = filter_scores(scores, self.sampling).softmax(0)
            token = int(torch.multinomial(chances.cpu(), 1, generator=self.generator))
        self.seen[token] = self.replied[token] = True
        return token
