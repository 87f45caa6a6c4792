"""Laws of the sampler: a DataLoader with it goes on at any step, on any number of ranks, as if nothing had happened."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lensmini.data.plan import BatchPlan
from lensmini.data.sampler import BucketBatchSampler

STEPS = 7


class Numbers(Dataset):
    """Each sample is its own number."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


def as_list(batch):
    return list(batch)


def make_plan(mode, seed=0):
    images = 3 if mode == "packed" else [4, 2, 1, 1]
    return BatchPlan([50, 37, 1, 0], [4, 9, 16, 25], num_slots=16, mode=mode, images_per_slot=images, seed=seed)


def global_batches(plan, world_size, start, stop, loader=None):
    """The slots of each step, in order, as that many ranks see them."""
    ranks = []
    for rank in range(world_size):
        sampler = BucketBatchSampler(plan, rank, world_size, start, num_steps=stop - start)
        ranks.append(list(sampler if loader is None else loader(sampler)))
    assert {len(batches) for batches in ranks} == {(stop - start) * plan.num_slots // world_size}
    slots = [batch for micro in zip(*ranks, strict=True) for batch in micro]
    return [slots[index : index + plan.num_slots] for index in range(0, len(slots), plan.num_slots)]


def planned(plan, start, stop):
    return [[plan.step(k).slot(index).tolist() for index in range(plan.num_slots)] for k in range(start, stop)]


@given(
    st.sampled_from(["bucket", "packed", "same_bucket"]),
    st.lists(st.tuples(st.integers(1, STEPS - 1), st.sampled_from([1, 2, 4, 8, 16])), max_size=4),
    st.integers(0, 99),
)
def test_any_resumes_on_any_number_of_ranks_are_the_uninterrupted_run(mode, resumes, seed):
    plan = make_plan(mode, seed)
    stops = sorted(dict(resumes).items())
    run, start, world_size = [], 0, 8
    for stop, next_world_size in [*stops, (STEPS, 1)]:
        # A fresh plan, as a restarted process makes it.
        run += global_batches(make_plan(mode, seed), world_size, start, stop)
        start, world_size = stop, next_world_size
    assert run == planned(plan, 0, STEPS)


def loader_of(plan, num_workers, prefetch):
    def make(sampler):
        options = {"prefetch_factor": prefetch} if num_workers else {}
        dataset = Numbers(int(plan.sizes.sum()))
        return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=as_list, **options)

    return make


@pytest.mark.parametrize("mode", ["bucket", "packed", "same_bucket"])
def test_a_loader_resumes_from_8_to_4_to_16_ranks(mode):
    plan = make_plan(mode)
    loader = loader_of(plan, 0, None)
    run = [
        batch
        for world_size, start, stop in ((8, 0, 2), (4, 2, 5), (16, 5, STEPS))
        for batch in global_batches(plan, world_size, start, stop, loader)
    ]
    assert run == planned(plan, 0, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [2, 4])
def test_a_loader_with_workers_resumes_from_8_to_4_to_16_ranks(prefetch):
    plan = make_plan("packed")
    loader = loader_of(plan, 2, prefetch)
    run = [
        batch
        for world_size, start, stop in ((8, 0, 2), (4, 2, 5), (16, 5, STEPS))
        for batch in global_batches(plan, world_size, start, stop, loader)
    ]
    assert run == planned(plan, 0, STEPS)


@pytest.mark.parametrize("prefetch", [2, 4])
def test_batches_that_workers_fetched_and_nobody_used_do_not_matter(prefetch):
    plan = make_plan("bucket")
    loader = loader_of(plan, 2, prefetch)
    # Two ranks of 16 slots: eight micro-batches a step. The first run is cut inside the loader, without end.
    run, used = [], 0
    for taken in (3, 2, 4):
        iterator = iter(loader(BucketBatchSampler(plan, 1, 2, used)))
        run += [next(iterator) for _ in range(8 * taken)]
        used += taken
        del iterator
    assert run == [batch for k in range(9) for batch in map(np.ndarray.tolist, plan.step(k).share(1, 2))]


def test_a_sampler_starts_over_every_time_and_may_have_a_length():
    sampler = BucketBatchSampler(make_plan("bucket"), 1, 4, 3, num_steps=2)
    assert list(sampler) == list(sampler)
    assert len(sampler) == len(list(sampler)) == 8
    assert len(loader_of(sampler.plan, 0, None)(sampler)) == 8
    assert list(BucketBatchSampler(make_plan("bucket"), 1, 4, 3, num_steps=0)) == []
    with pytest.raises(TypeError, match="no length"):
        len(BucketBatchSampler(make_plan("bucket"), 0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 0), "divisor of num_slots = 16, got 3"),
        ((0, 0, 0), "divisor"),
        ((2, 2, 0), "rank: expected 0 <= rank < world_size = 2, got 2"),
        ((-1, 2, 0), "rank"),
        ((0, 2, -1), "start_step"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(make_plan("bucket"), *arguments)
