"""Tiles of the products of a step of writing text, on GPUs of all sizes."""

import pytest
import torch

from step1x_core.reasoning import decode_kernels as kernels

# What one program may take: of an H100, an A100, and an RTX 30 or 40.
MEMORIES = (232448, 166912, 101376)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, kernels.FP8])
def test_every_tile_fits_into_the_memory_of_a_multiprocessor(memory, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "shared_memory", lambda device: memory)
    for table, inputs in ((kernels.QKV, 3584), (kernels.OUT, 3584), (kernels.DOWN, 18944), (kernels.HEAD, 3584), (kernels.GATE, 3584)):
        weight = torch.empty(16, inputs, dtype=dtype)
        tile, weights = table[weight.element_size()], 2 if table is kernels.GATE else 1
        found = kernels.fitting(tile, weight, weights)
        stage = tile.inputs * (weights * tile.outputs * weight.element_size() + 2 * kernels.ROWS)
        assert 2 <= found.stages <= tile.stages and found.stages * stage <= memory - 1024
        assert found.stages == tile.stages or (found.stages + 1) * stage > memory - 2048
        assert (found.outputs, found.inputs, found.warps, found.splits) == (tile.outputs, tile.inputs, tile.warps, tile.splits)


def test_an_h100_takes_the_tiles_as_they_are(monkeypatch):
    monkeypatch.setattr(kernels, "shared_memory", lambda device: MEMORIES[0])
    for table in (kernels.QKV, kernels.OUT, kernels.DOWN, kernels.HEAD, kernels.GATE):
        for dtype in (torch.bfloat16, kernels.FP8):
            weight = torch.empty(16, 3584, dtype=dtype)
            assert kernels.fitting(table[weight.element_size()], weight, 2) == table[weight.element_size()]
