"""Keys and values of fixed size."""

import pytest
import torch

from step1x_core.reasoning.kv_cache import Cache


@pytest.fixture
def cache():
    made = Cache(2, 3, 8, torch.tensor([4, 60, 7]), torch.tensor([2, 9, 7]), 65, torch.float32)
    for layer in made.layers:
        for part in layer:
            part.normal_()
    return made


def test_capacity_is_a_multiple_of_what_a_kernel_reads_and_grows(cache):
    before = [[part.clone() for part in layer] for layer in cache.layers]
    assert cache.capacity == 128
    cache.grow(5)
    assert cache.capacity == 192
    for layer, old in zip(cache.layers, before):
        for part, was in zip(layer, old):
            assert torch.equal(part[:, :, :128], was) and not part[:, :, 128:].any()
            assert part.transpose(1, 2).is_contiguous()


def test_rows_that_leave_take_their_keys_lengths_and_positions_along(cache):
    before = [[part.clone() for part in layer] for layer in cache.layers]
    cache.keep([2, 0])
    cache.advance()
    assert cache.lengths.tolist() == [8, 5] and cache.positions.tolist() == [8, 3]
    for layer, old in zip(cache.layers, before):
        for part, was in zip(layer, old):
            assert torch.equal(part, was[[2, 0]]) and part.transpose(1, 2).is_contiguous()
