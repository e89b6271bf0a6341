"""Training data: pairs drawn by worker processes, and a pool of recent pairs on the training device."""

import mmap
import multiprocessing
import os
import queue
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from step1x_core.prompts.v11 import prompt_ids

from . import photographs
from .autoencoder import DOWNSCALE
from .grounds import SCENES

# Token ids after the picture are padded to this length; the longest instructions have about 30.
AFTER_LENGTH = 40
PAD_ID = 151643
# Conditioning positions in training: the text before the picture that is kept (7), the picture of a square scene (256),
# the text after it, and one padded position that stands for the rest of the 640.
PICTURE = slice(7, 7 + 256)
TEXT_LENGTH = PICTURE.stop + AFTER_LENGTH + 1
# Pairs that a worker hands over at a time.
BLOCK = 64
# Kinds of edits whose region is most of the picture: no part of it deserves more weight.
GLOBAL_KINDS = ("background", "style", "none", *(kind for kind in photographs.KINDS if kind != "recolour"))


class Tokenizer:
    """Instruction -> token ids after the picture. `folder` holds the Qwen2 vocabulary; loaded on first use, for workers to load their own."""

    def __init__(self, folder: str | Path):
        self.folder = str(folder)
        self.piece = lru_cache(maxsize=100_000)(self._piece)
        self.loaded = None

    def _piece(self, text: str) -> tuple[int, ...]:
        if self.loaded is None:
            from transformers import Qwen2Tokenizer

            self.loaded = Qwen2Tokenizer.from_pretrained(self.folder)
        return tuple(self.loaded(text)["input_ids"])

    def __call__(self, instruction: str) -> tuple[np.ndarray, int]:
        """Ids [AFTER_LENGTH], padded on the right, and how many count. Raises ValueError for too long an instruction."""
        ids = prompt_ids(instruction, self.piece)[1]
        if len(ids) > AFTER_LENGTH:
            raise ValueError(
                f"This instruction has {len(ids)} tokens, more than the training's {AFTER_LENGTH}: {instruction}"
            )
        return np.array(ids + [PAD_ID] * (AFTER_LENGTH - len(ids)), np.int32), len(ids)


def find_tokenizer(folder: Path | None) -> Path:
    """The folder of the Qwen2 vocabulary: as given, else in ComfyUI's tree. Raises FileNotFoundError."""
    if folder is None and "STEP1X_COMFYUI" in os.environ:
        folder = Path(os.environ["STEP1X_COMFYUI"]) / "comfy" / "text_encoders" / "qwen25_tokenizer"
    if folder is None or not (folder / "vocab.json").is_file():
        raise FileNotFoundError(
            "The Qwen2 tokenizer is needed: name the folder with its vocab.json and merges.txt with --tokenizer, "
            "for instance comfy/text_encoders/qwen25_tokenizer of a ComfyUI."
        )
    return folder


def record_type(side: int) -> np.dtype:
    """One pair; region: latent cells that the edit touches, 0 or 1."""
    picture, cells = (side, side, 3), (side // DOWNSCALE, side // DOWNSCALE)
    return np.dtype(
        [
            ("source", "u1", picture),
            ("target", "u1", picture),
            ("region", "u1", cells),
            ("ids", "i4", AFTER_LENGTH),
            ("length", "i4"),
        ]
    )


def pool_region(region: np.ndarray) -> np.ndarray:
    """bool [H, W] -> uint8 [H/8, W/8], 1 where any pixel is set."""
    height, width = (length // DOWNSCALE for length in region.shape)
    return region.reshape(height, DOWNSCALE, width, DOWNSCALE).any(axis=(1, 3)).astype(np.uint8)


def fill(
    records: np.ndarray, seed: int, first: int, side: int, tokenizer: Tokenizer, kind: str | None = None, ground=SCENES
) -> None:
    """Writes the pairs `first`, `first` + 1, ... of the ground's training sequence into the records."""
    for i, record in enumerate(records):
        pair = ground.pair_at(seed, first + i, size=(side, side), kind=kind)
        record["source"], record["target"] = pair.source, pair.target
        record["region"] = 0 if pair.kind in GLOBAL_KINDS else pool_region(pair.region)
        record["ids"], record["length"] = tokenizer(pair.instruction)


def _work(
    memory: mmap.mmap,
    dtype: np.dtype,
    tasks,
    done,
    seed: int,
    side: int,
    tokenizer: Tokenizer,
    kind: str | None,
    ground,
) -> None:
    slots = np.frombuffer(memory, dtype).reshape(-1, BLOCK)
    try:
        while True:
            slot, first = tasks.get()
            fill(slots[slot], seed, first, side, tokenizer, kind, ground)
            done.put(slot)
    except KeyboardInterrupt:
        pass


class PairStream:
    """Endless blocks of records, drawn in order of their index by `workers` processes, or here where that is 0.

    To be made before the first use of CUDA: workers are forked, and share anonymous memory with this process (the usual shared-memory
    folder is too small in many containers).
    """

    def __init__(
        self,
        seed: int,
        side: int,
        tokenizer: Tokenizer,
        workers: int = 0,
        position: int = 0,
        kind: str | None = None,
        ground=SCENES,
    ):
        self.seed, self.side, self.tokenizer, self.kind, self.ground = seed, side, tokenizer, kind, ground
        self.position = position
        self.dtype = record_type(side)
        self.workers = []
        if not workers:
            return
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context = multiprocessing.get_context("fork")
        count = 4 * workers
        memory = mmap.mmap(-1, count * BLOCK * self.dtype.itemsize)
        self.slots = np.frombuffer(memory, self.dtype).reshape(count, BLOCK)
        self.tasks, self.done = context.Queue(), context.Queue()
        arguments = (memory, self.dtype, self.tasks, self.done, seed, side, tokenizer, kind, ground)
        self.workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
        for worker in self.workers:
            worker.start()
        for slot in range(count):
            self._order(slot)

    def _order(self, slot: int) -> None:
        self.tasks.put((slot, self.position))
        self.position += BLOCK

    def get(self, wait: bool = True) -> np.ndarray | None:
        """The next block of records, [BLOCK]; None where there is none yet and `wait` is off. Raises RuntimeError when the workers have died."""
        if not self.workers:
            records = np.empty(BLOCK, self.dtype)
            fill(records, self.seed, self.position, self.side, self.tokenizer, self.kind, self.ground)
            self.position += BLOCK
            return records
        while True:
            try:
                slot = self.done.get(timeout=10) if wait else self.done.get_nowait()
            except queue.Empty:
                if not all(worker.is_alive() for worker in self.workers):
                    raise RuntimeError("A process that draws training pairs has ended; its error is above.") from None
                if not wait:
                    return None
                continue
            records = self.slots[slot].copy()
            self._order(slot)
            return records

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()
        self.workers = []


class Pool:
    """The latest `capacity` pairs on the training device, drawn from at random: each serves several times, with other noise and times.

    encode: uint8 pictures [B, H, W, 3] -> latents [B, 16, h, w], called once for each picture; None: latents are not needed.
    """

    def __init__(self, capacity: int, side: int, device: torch.device, encode=None):
        self.capacity = -(-capacity // BLOCK) * BLOCK
        self.encode = encode
        self.device = device
        self.added = 0
        self.tensors = {
            name: torch.zeros(
                (self.capacity, *dtype.shape),
                dtype=torch.int32 if dtype.base == np.int32 else torch.uint8,
                device=device,
            )
            for name, (dtype, _) in record_type(side).fields.items()
        }
        if encode is not None:
            latents = (self.capacity, 16, side // DOWNSCALE, side // DOWNSCALE)
            for name in ("source_latent", "target_latent"):
                self.tensors[name] = torch.zeros(latents, dtype=torch.float16, device=device)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @torch.no_grad()
    def add(self, records: np.ndarray) -> None:
        """Takes in a block of records; the oldest make room."""
        start = self.added % self.capacity
        place = slice(start, start + len(records))
        for name in records.dtype.names:
            self.tensors[name][place] = torch.from_numpy(np.ascontiguousarray(records[name])).to(self.device)
        if self.encode is not None:
            pictures = torch.cat((self.tensors["source"][place], self.tensors["target"][place]))
            source, target = self.encode(pictures).to(torch.float16).chunk(2)
            self.tensors["source_latent"][place], self.tensors["target_latent"][place] = source, target
        self.added += len(records)

    def sample(self, count: int, generator: torch.Generator, names: tuple[str, ...]) -> dict[str, Tensor]:
        """`count` random pairs: the named tensors."""
        index = torch.randint(len(self), (count,), device=self.device, generator=generator)
        return {name: self.tensors[name][index] for name in names}
