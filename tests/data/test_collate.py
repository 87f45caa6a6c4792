"""Laws of collation: a batch is its samples end to end, and a step's loss does not know how it was split."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lensmini.data.assign import PlannedStep, StepTotals
from lensmini.data.collate import Sample, collate_samples, loss_weights
from lensmini.data.plan import BatchPlan
from lensmini.data.sampler import BucketBatchSampler
from lensmini.packed import Layout, unpack
from tests.strategies import grids, seeds

CHANNELS, LAYERS, WIDTH = 3, 2, 4
GRIDS = ((1, 1), (2, 3), (3, 2), (4, 4))


def make_sample(number, grid, length):
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(CHANNELS, *grid, generator=generator)
    return Sample(number, latents, torch.randn(length, LAYERS, WIDTH, generator=generator))


@given(grids(max_size=6), seeds(), st.data())
def test_a_batch_holds_each_sample_unchanged(pairs, seed, data):
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=len(pairs), max_size=len(pairs)))
    samples = [make_sample(seed + i, grid, length) for i, (grid, length) in enumerate(zip(pairs, lengths, strict=True))]
    batch = collate_samples(samples)
    assert batch.samples.tolist() == [sample.number for sample in samples]
    texts = batch.text_tokens.split(batch.layout.text_lengths)
    for sample, latents, text in zip(samples, unpack(batch.image_tokens, batch.layout), texts, strict=True):
        assert torch.equal(sample.latents, latents) and torch.equal(sample.text_tokens, text)
    assert batch.layout.text_lengths == tuple(lengths)


class Pictures(Dataset):
    """Pictures of the sizes of a plan's buckets."""

    def __init__(self, plan):
        self.plan = plan

    def __getitem__(self, number):
        bucket = int(self.plan.bucket_of([number])[0])
        return make_sample(number, GRIDS[bucket], number % 4)


@pytest.mark.parametrize(("mode", "workers"), [("packed", 2), ("bucket", 0), ("same_bucket", 0)])
@pytest.mark.parametrize("weighting", ["per_image", "per_token"])
def test_the_weights_of_a_step_sum_to_one_however_many_ranks_load_it(mode, workers, weighting):
    tokens = [height * width for height, width in GRIDS]
    plan = BatchPlan([9, 7, 1, 5], tokens, num_slots=4, mode=mode, images_per_slot=3, seed=0)
    expected = [plan.step(k).samples.tolist() for k in range(3)]
    means = []
    for world_size in (1, 2, 4):
        found, weights, sums = [[] for _ in range(3)], np.zeros(3), torch.zeros(3, dtype=torch.float64)
        for rank in range(world_size):
            sampler = BucketBatchSampler(plan, rank, world_size, num_steps=3)
            loader = DataLoader(Pictures(plan), batch_sampler=sampler, num_workers=workers, collate_fn=collate_samples)
            for index, batch in enumerate(loader):
                k = index // plan.micro_steps(world_size)
                weight = loss_weights(batch.layout, plan.totals(plan.step(k)), weighting)
                found[k] += batch.samples.tolist()
                weights[k] += weight.sum()
                # A loss of a sample: the mean of its first channel.
                sums[k] += (weight * batch.layout.mean(batch.image_tokens[:, 0])).double().sum()
        assert [sorted(numbers) for numbers in found] == [sorted(numbers) for numbers in expected]
        assert weights == pytest.approx(1, abs=1e-6)
        means.append(sums)
    for mean in means:
        assert torch.allclose(mean, means[0], atol=1e-6)
    # The closed forms: the mean over all images, and over all image tokens.
    for k, numbers in enumerate(expected):
        pictures = [Pictures(plan)[number].latents[0] for number in numbers]
        if weighting == "per_image":
            mean = torch.stack([picture.mean() for picture in pictures]).mean()
        else:
            mean = torch.cat([picture.flatten() for picture in pictures]).mean()
        assert means[0][k].item() == pytest.approx(mean.item(), abs=1e-6)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_repeats_count_what_came_before(numbers, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(numbers)), max_size=4)))
    step = PlannedStep(0, np.array(numbers), np.array([0, *cuts, len(numbers)]))
    slow = [numbers[:index].count(number) for index, number in enumerate(numbers)]
    assert [count for slot in range(len(cuts) + 1) for count in step.repeats(slot).tolist()] == slow


def test_a_batch_moves_and_pins_as_one(monkeypatch):
    batch = collate_samples([make_sample(4, (2, 3), 2), make_sample(5, (1, 1), 0)])
    # Pinning needs a device; here it is a copy to tell apart.
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    pinned = batch.pin_memory()
    for name in ("samples", "image_tokens", "text_tokens"):
        assert getattr(pinned, name) is not getattr(batch, name)
        assert torch.equal(getattr(pinned, name), getattr(batch, name))
    assert pinned.layout is not batch.layout and pinned.layout.image_offsets is not batch.layout.image_offsets
    moved = batch.to("meta")
    assert {moved.samples.device, moved.image_tokens.device, moved.text_tokens.device} == {torch.device("meta")}
    assert moved.layout.image_offsets.device == torch.device("meta")
    assert moved.layout.image_lengths == batch.layout.image_lengths
    assert loss_weights(moved.layout, StepTotals(2, 7, 2)).device == torch.device("meta")


ONE = make_sample(0, (2, 3), 2)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples: expected at least one, got none"),
        ([ONE, ONE._replace(latents=torch.zeros(2, 2, 3))], r"samples\[1\].latents"),
        ([ONE, ONE._replace(latents=torch.zeros(3, 6))], r"samples\[1\].latents"),
        ([ONE, ONE._replace(text_tokens=torch.zeros(2, 3, 4))], r"samples\[1\].text_tokens"),
        ([ONE, ONE._replace(text_tokens=torch.zeros(2, 2, 5))], r"samples\[1\].text_tokens"),
        ([ONE._replace(number=16777217.0)], r"samples\[0\].number: expected an integer, got 16777217.0"),
        ([ONE, ONE._replace(latents=ONE.latents.double())], r"samples\[1\].latents: expected torch.float32 as in"),
        ([ONE, ONE._replace(text_tokens=ONE.text_tokens.half())], r"samples\[1\].text_tokens: expected torch.float32"),
    ],
)
def test_samples_that_do_not_fit_together_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        collate_samples(samples)


def test_bad_weights_are_named():
    weigh = partial(loss_weights, Layout.build([(1, 2), (2, 2)]))
    with pytest.raises(ValueError, match='weighting: expected "per_image" or "per_token", got \'mean\''):
        weigh(StepTotals(2, 6, 0), "mean")
    for totals in (StepTotals(1, 6, 0), StepTotals(2, 5, 0)):
        with pytest.raises(
            ValueError, match="totals: expected at least this micro-batch's 2 images and 6 image tokens"
        ):
            weigh(totals)
