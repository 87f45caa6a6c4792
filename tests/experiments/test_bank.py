"""A batch of the bank depends on seed and step alone, holds what was put in, and favours no picture."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments.bank import Batch, FeatureBank, random_stream, save_bank

LAYERS, WIDTH, CHANNELS = 2, 3, 4
SEEDS = st.integers(0, 2**40)


def make_parts(seed: int, num_pictures: int, *, num_lengths: int = 3) -> tuple[list[Tensor], list[tuple[int, Tensor]]]:
    """Texts and pictures of a few shapes, all numbers exact in bfloat16 and float16."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-100, 100, shape, generator=generator).float()

    def choose(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    texts = [integers(1 + choose(num_lengths), LAYERS, WIDTH) for _ in range(max(1, num_pictures // 2))]
    grids = [(1, 2), (2, 2), (3, 1)]
    pictures = [(choose(len(texts)), integers(CHANNELS, *grids[choose(3)])) for _ in range(num_pictures)]
    return texts, pictures


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bank")


def make_bank(seed: int, num_pictures: int, folder: Path, *, num_lengths: int = 3) -> FeatureBank:
    texts, pictures = make_parts(seed, num_pictures, num_lengths=num_lengths)
    save_bank(folder, texts, pictures, [f"caption {index}" for index in range(len(texts))])
    return FeatureBank.load(folder)


def batches(bank: FeatureBank, world_size: int, *, seed: int, step: int, batch_size: int, group_size: int) -> list[Any]:
    """What each process gets."""
    drawn = [
        bank.draw(
            bank.groups(),
            seed=seed,
            step=step,
            batch_size=batch_size,
            group_size=group_size,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    return [(slots, bank.collate(slots, seed=seed, step=step, text_dropout=0.4)) for slots in drawn if slots]


def samples(batch: Batch) -> set[tuple[Any, ...]]:
    """A batch as a set: of every sample its picture, latents, noise, normal number and text."""
    rows, image, text = set(), 0, 0
    for index, picture in enumerate(batch.pictures):
        pixels, words = batch.layout.image_lengths[index], batch.layout.text_lengths[index]
        parts = (
            batch.image_tokens[image : image + pixels],
            batch.noise[image : image + pixels],
            batch.text_tokens[text : text + words],
        )
        rows.add((picture, batch.normal[index].item(), *(tuple(part.flatten().tolist()) for part in parts)))
        image, text = image + pixels, text + words
    return rows


@given(seed=SEEDS, step=st.integers(0, 10**6), groups=st.integers(1, 5), group_size=st.integers(1, 4))
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes(
    tmp_path_factory: pytest.TempPathFactory, seed: int, step: int, groups: int, group_size: int
) -> None:
    bank = make_bank(seed, 20, tmp_path_factory.mktemp("bank"))
    sizes = {"seed": seed, "step": step, "batch_size": groups * group_size, "group_size": group_size}
    ((slots, batch),) = batches(bank, 1, **sizes)
    assert sorted(slot for slot, _ in slots) == list(range(groups * group_size))
    whole = samples(batch)
    assert len(whole) == groups * group_size
    for world_size in (2, 3):
        parts = batches(bank, world_size, **sizes)
        assert sorted(slot for slots, _ in parts for slot, _ in slots) == list(range(groups * group_size))
        assert set().union(*(samples(batch) for _, batch in parts)) == whole


def test_a_batch_depends_on_seed_and_step_and_on_nothing_else(folder: Path) -> None:
    bank = make_bank(0, 30, folder)
    sizes = {"batch_size": 12, "group_size": 3}
    ((_, first),) = batches(bank, 1, seed=3, step=7, **sizes)
    torch.manual_seed(99)
    batches(bank, 1, seed=3, step=8, **sizes)
    ((_, again),) = batches(FeatureBank.load(folder), 1, seed=3, step=7, **sizes)
    for one, other in zip(first, again, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
    assert first.pictures == again.pictures
    for seed, step in ((4, 7), (3, 8), (7, 3)):
        ((_, other),) = batches(bank, 1, seed=seed, step=step, **sizes)
        assert not samples(first) & samples(other)
        assert not set(first.normal.tolist()) & set(other.normal.tolist())
        assert not set(first.noise.flatten().tolist()) & set(other.noise.flatten().tolist())


@pytest.mark.parametrize(("num_lengths", "group_size"), [(1, 4), (6, 4), (12, 4), (3, 1)])
def test_every_picture_is_drawn_equally_often(folder: Path, num_lengths: int, group_size: int) -> None:
    bank = make_bank(1, 40, folder, num_lengths=num_lengths)
    groups, counts, steps = bank.groups(), Counter(), 4000
    if num_lengths > 3:
        sizes = [len(members) for members in groups.values()]
        assert min(sizes) < group_size, "some shapes are rare"
    for step in range(steps):
        for _, picture in bank.draw(
            groups, seed=5, step=step, batch_size=group_size, group_size=group_size, rank=0, world_size=1
        ):
            counts[picture] += 1
    expected = steps * group_size / 40
    # Pictures of a group come together: the statistic is spread at most group_size times as far as for single draws.
    statistic = sum((counts[picture] - expected) ** 2 / expected for picture in range(40)) / group_size
    assert statistic < 39 + 5 * (2 * 39) ** 0.5
    assert sum(counts.values()) == steps * group_size


def test_a_group_holds_one_shape_and_no_picture_twice_among_the_filled_up(folder: Path) -> None:
    bank = make_bank(2, 60, folder, num_lengths=1)
    groups = bank.groups()
    assert min(len(members) for members in groups.values()) >= 4
    shape_of = {picture: shape for shape, members in groups.items() for picture in members}
    for step in range(50):
        slots = bank.draw(groups, seed=0, step=step, batch_size=16, group_size=4, rank=0, world_size=1)
        for start in range(0, 16, 4):
            pictures = [picture for _, picture in slots[start : start + 4]]
            assert len({shape_of[picture] for picture in pictures}) == 1
            assert len(set(pictures[1:])) == 3


def test_a_bank_smaller_than_a_group_still_fills_the_batch(folder: Path) -> None:
    bank = make_bank(3, 2, folder)
    slots = bank.draw(bank.groups(), seed=0, step=0, batch_size=8, group_size=4, rank=0, world_size=1)
    assert [slot for slot, _ in slots] == list(range(8))
    assert {picture for _, picture in slots} <= {0, 1}


def test_groups_are_the_pictures_of_one_grid_and_text_length(folder: Path) -> None:
    texts, pictures = make_parts(4, 30)
    groups = make_bank(4, 30, folder).groups()
    assert sorted(index for members in groups.values() for index in members) == list(range(30))
    for (height, width, length), members in groups.items():
        for index in members:
            caption, latent = pictures[index]
            assert (latent.shape[1], latent.shape[2], len(texts[caption])) == (height, width, length)


@given(seed=SEEDS, num=st.integers(1, 12))
def test_collate_lays_out_each_pictures_own_latents_and_text(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num: int
) -> None:
    texts, pictures = make_parts(seed, num)
    bank = make_bank(seed, num, tmp_path_factory.mktemp("bank"))
    batch = bank.collate([(index, index) for index in range(num)], seed=seed, step=0, text_dropout=0.0)
    assert bank.num_pictures == num
    assert sorted(batch.pictures) == list(range(num))
    assert batch.image_tokens.dtype == batch.noise.dtype == batch.normal.dtype == torch.float32
    image = text = 0
    for sample, picture in enumerate(batch.pictures):
        caption, latent = pictures[picture]
        assert batch.layout.grids[sample].tolist() == list(latent.shape[1:])
        for row in range(latent.shape[1]):
            for column in range(latent.shape[2]):
                assert batch.image_tokens[image].tolist() == latent[:, row, column].tolist()
                image += 1
        assert batch.layout.text_lengths[sample] == len(texts[caption])
        for position in range(len(texts[caption])):
            assert batch.text_tokens[text].float().tolist() == texts[caption][position].tolist()
            text += 1
        assert torch.equal(bank.text_of(picture).float(), texts[caption])
    assert (image, text) == (len(batch.image_tokens), len(batch.text_tokens))
    assert batch.noise.shape == batch.image_tokens.shape


def test_equal_shapes_are_neighbours_in_a_batch(folder: Path) -> None:
    bank = make_bank(5, 40, folder)
    batch = bank.collate([(index, index) for index in range(40)], seed=0, step=0, text_dropout=0.3)
    grids = [tuple(grid) for grid in batch.layout.grids.tolist()]
    shapes = list(zip(grids, batch.layout.text_lengths, strict=True))
    changes = sum(one != other for one, other in itertools.pairwise(shapes))
    assert changes == len(set(shapes)) - 1


def test_dropped_text_is_no_text_and_changes_nothing_else(folder: Path) -> None:
    bank = make_bank(6, 20, folder)
    slots = [(index, index) for index in range(20)]
    kept, dropped = (bank.collate(slots, seed=1, step=2, text_dropout=share) for share in (0.0, 1.0))
    assert all(length > 0 for length in kept.layout.text_lengths)
    assert dropped.layout.text_lengths == (0,) * 20
    assert dropped.text_tokens.shape == (0, LAYERS, WIDTH)
    assert {row[:4] for row in samples(kept)} == {row[:4] for row in samples(dropped)}


def test_text_is_dropped_as_often_as_asked(folder: Path) -> None:
    bank = make_bank(7, 10, folder)
    slots = [(slot, slot % 10) for slot in range(100)]
    num = sum(
        bank.collate(slots, seed=0, step=step, text_dropout=0.1).layout.text_lengths.count(0) for step in range(40)
    )
    assert abs(num - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5


def test_noise_and_time_numbers_are_standard_normal(folder: Path) -> None:
    bank = make_bank(8, 10, folder)
    drawn = [
        bank.collate([(slot, slot % 10) for slot in range(100)], seed=0, step=step, text_dropout=0.5)
        for step in range(40)
    ]
    for numbers in (torch.cat([batch.normal for batch in drawn]), torch.cat([batch.noise for batch in drawn])):
        values = numbers.flatten().double()
        assert values.mean().abs() < 5 / len(values) ** 0.5
        assert (values.var() - 1).abs() < 5 * (2 / len(values)) ** 0.5
    # The time does not tell whether the text is dropped.
    normal = torch.cat([batch.normal for batch in drawn])
    without = torch.tensor([length == 0 for batch in drawn for length in batch.layout.text_lengths])
    assert (normal[without].mean() - normal[~without].mean()).abs() < 5 * (4 / len(normal)) ** 0.5


@given(key=st.lists(st.integers(-(2**63), 2**63), min_size=1, max_size=4))
def test_a_stream_depends_on_its_key_alone(key: list[int]) -> None:
    torch.manual_seed(0)
    first = torch.rand(4, generator=random_stream(*key))
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(4, generator=random_stream(*key)))
    for other in ([*key, 0], [0, *key], [key[0] + 1, *key[1:]]):
        assert not torch.equal(first, torch.rand(4, generator=random_stream(*other)))


def test_streams_of_neighbouring_keys_are_independent() -> None:
    keys = [(seed, step, slot) for seed in range(4) for step in range(20) for slot in range(25)]
    assert torch.rand(1, generator=random_stream(0, 1)).item() != torch.rand(1, generator=random_stream(1, 0)).item()
    numbers = torch.stack([torch.randn(4, generator=random_stream(*key), dtype=torch.float64) for key in keys])
    table = numbers.view(4, 20, 25, 4)
    assert len(set(numbers[:, 0].tolist())) == len(keys)
    assert numbers.mean().abs() < 5 / numbers.numel() ** 0.5
    for one, other in (
        (table[1:], table[:-1]),
        (table[:, 1:], table[:, :-1]),
        (table[:, :, 1:], table[:, :, :-1]),
        (table[..., 1:], table[..., :-1]),
    ):
        assert (one * other).mean().abs() < 5 / one.numel() ** 0.5
