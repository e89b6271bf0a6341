"""What is made of an image for the language model, kept while one task asks about it several times."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class ImageMemory:
    """Made at the start of a task and dropped at its end, so that nothing outlives a run. Images must not be changed in
    between."""

    def __init__(self):
        self.kept: dict[tuple, tuple] = {}

    def once(self, image: Tensor, name, make: Callable[[Tensor], T]) -> T:
        """Return what `make` makes of an image, once for this very tensor or view of it. name: hashable, tells one
        maker from another."""
        key = name, image.data_ptr(), tuple(image.shape), image.stride(), image.dtype
        if key not in self.kept:
            # The image stays, so that its address is not used again.
            self.kept[key] = make(image), image
        return self.kept[key][0]

    def once_by_content(self, image: Tensor, name, make: Callable[[Tensor], T]) -> T:
        """`once` for any image with the same pixels, uint8 [h, w, 3] on the CPU."""
        digest = self.once(
            image,
            hashlib.blake2b,
            lambda image: hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest(),
        )
        key = name, digest, tuple(image.shape)
        if key not in self.kept:
            self.kept[key] = make(image), None
        return self.kept[key][0]
