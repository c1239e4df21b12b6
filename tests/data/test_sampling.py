"""Order and random choices are functions of (seed, epoch, position)."""

import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from mambascope.data import DataError, ScopeDigits
from mambascope.data.sampling import EpochBatchSampler
from mambascope.data.seeding import seeded


def keys(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return [key for batch in sampler for key in batch]


def test_an_epoch_is_a_permutation_and_epochs_differ():
    sampler = EpochBatchSampler(23, 4, seed=5, drop_last=False)
    first, second = keys(sampler, 0), keys(sampler, 1)
    assert sorted(k.row for k in first) == sorted(k.row for k in second) == list(range(23))
    assert [k.row for k in first] != [k.row for k in second]
    assert [k.position for k in first] == list(range(23))
    assert {k.epoch for k in second} == {1}
    assert keys(EpochBatchSampler(23, 4, seed=5, drop_last=False), 0) == first
    assert keys(EpochBatchSampler(23, 4, seed=6, drop_last=False), 0) != first
    assert [len(b) for b in sampler] == [4, 4, 4, 4, 4, 3]


def test_start_in_the_middle():
    sampler = EpochBatchSampler(23, 4, drop_last=False)
    whole = list(sampler)
    sampler.start_batch = 4
    assert list(sampler) == whole[4:]
    assert len(sampler) == 6


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_divide_the_same_global_order(world_size, repeats):
    whole = {k.position: k for k in keys(EpochBatchSampler(24, 4, seed=1, drop_last=False, repeats=repeats), 2)}
    parts = [
        EpochBatchSampler(24, 4, seed=1, rank=rank, world_size=world_size, drop_last=False, repeats=repeats)
        for rank in range(world_size)
    ]
    seen = [k for part in parts for k in keys(part, 2)]
    assert sorted(k.position for k in seen) == list(range(24))
    assert all(whole[k.position] == k for k in seen)
    if repeats == world_size == 3:
        for a, b, c in zip(*(keys(part, 2) for part in parts), strict=True):
            assert a.row == b.row == c.row, "the copies of an image go to different processes"


def test_repeats_show_fewer_images_several_times():
    rows = [k.row for k in keys(EpochBatchSampler(24, 4, repeats=3))]
    assert len(rows) == 24
    assert sorted(np.unique(rows, return_counts=True)[1]) == [3] * 8
    assert rows[0] == rows[1] == rows[2]


def test_sizes_with_processes():
    for length in (16, 17, 23):
        train = [EpochBatchSampler(length, 4, rank=r, world_size=2) for r in range(2)]
        assert {len(t) for t in train} == {2}
        kept = [EpochBatchSampler(length, 4, rank=r, world_size=2, drop_last=False) for r in range(2)]
        assert len({len(keys(t)) for t in kept}) == 1
        assert {k.row for t in kept for k in keys(t)} == set(range(length))
        evaluation = [
            EpochBatchSampler(length, 4, shuffle=False, drop_last=False, even=False, rank=r, world_size=2)
            for r in range(2)
        ]
        assert sorted(k.row for t in evaluation for k in keys(t)) == list(range(length)), "each image counts once"


def test_bad_sampler_arguments():
    with pytest.raises(DataError, match="7 images are fewer than one batch on each process"):
        EpochBatchSampler(7, 4, world_size=2)
    for options, message in (({"batch_size": 0}, "batch_size"), ({"repeats": 0}, "repeats"), ({"rank": 1}, "rank")):
        with pytest.raises(ValueError, match=message):
            EpochBatchSampler(**{"length": 10, "batch_size": 2, **options})


def test_seeded_draws_depend_on_the_key_only_and_leave_no_trace():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    with seeded(1, 2, 3):
        first = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    expected = draw(), draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    before = draw()
    with seeded(1, 2, 3):
        assert draw() == first
    with suppress(ZeroDivisionError), seeded(1, 2, 4):
        assert draw() != first
        _ = 1 / 0  # generators come back after an exception too
    assert (before, draw()) == expected


def test_digits_do_not_touch_the_global_generators():
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    ScopeDigits("seg").sample(3)
    ScopeDigits().sample(3)
    assert random.getstate() == state[0]
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[2])
