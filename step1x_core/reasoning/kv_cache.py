"""Keys and values of several replies in memory of fixed size: each row is filled from its start, whatever the others
hold."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..rounding import multiple_up

# Capacities are multiples of this: what one program of the attention kernel reads.
STEP = 64


class Cache:
    """The tensors stay where they are until `keep` or `grow`.

    layers: keys and values of each layer, [N, kv_heads, capacity, D], whose memory is [N, capacity, kv_heads, D].
    lengths: int64 [N], tokens of each row so far; the next one goes to that place.
    positions: int64 [N], rope position of the next token.
    """

    def __init__(self, layers: int, kv_heads: int, width: int, lengths: Tensor, positions: Tensor, capacity: int,
                 dtype: torch.dtype):
        shape = (len(lengths), multiple_up(capacity, STEP), kv_heads, width)
        # Zeros, because masked values are still multiplied by 0, and NaN would stay NaN.
        self.layers = [tuple(torch.zeros(shape, dtype=dtype, device=lengths.device).transpose(1, 2) for _ in range(2))
                       for _ in range(layers)]
        self.lengths, self.positions = lengths, positions

    @property
    def capacity(self) -> int:
        return self.layers[0][0].shape[2]

    def advance(self) -> None:
        """Count the token that every row has got."""
        self.lengths += 1
        self.positions += 1

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.lengths, self.positions = self.lengths[rows], self.positions[rows]
        for index, layer in enumerate(self.layers):
            self.layers[index] = tuple(part.transpose(1, 2)[rows].transpose(1, 2) for part in layer)

    def grow(self, tokens: int) -> None:
        """Make room for that many more tokens a row."""
        more = multiple_up(tokens, STEP)
        for index, layer in enumerate(self.layers):
            self.layers[index] = tuple(pad(part.transpose(1, 2), (0, 0, 0, 0, 0, more)).transpose(1, 2)
                                       for part in layer)
