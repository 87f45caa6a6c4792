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
from lensmini.nn import LensConfig

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


def batches(bank: FeatureBank, *, seed: int, step: int, batch_size: int, num_slots: int) -> list[Batch]:
    """The micro-batches of a step."""
    planned = bank.plan(batch_size=batch_size, num_slots=num_slots, seed=seed).step(step)
    return [
        bank.collate(
            planned.slot(slot).tolist(),
            repeats=planned.repeats(slot).tolist(),
            seed=seed,
            step=step,
            text_dropout=0.4,
        )
        for slot in range(num_slots)
    ]


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


@given(seed=SEEDS, step=st.integers(0, 10**6), slots=st.integers(1, 5), each=st.integers(1, 8))
def test_a_sample_is_the_same_in_any_company(
    tmp_path_factory: pytest.TempPathFactory, seed: int, step: int, slots: int, each: int
) -> None:
    bank = make_bank(seed, 20, tmp_path_factory.mktemp("bank"))
    parts = batches(bank, seed=seed, step=step, batch_size=slots * each, num_slots=slots)
    together = [row for part in parts for row in samples(part)]
    # All of them in one batch, and each alone.
    counts: Counter[int] = Counter()
    keys = []
    for picture in sorted(picture for part in parts for picture in part.pictures):
        keys.append((picture, counts[picture]))
        counts[picture] += 1
    pictures, repeats = [picture for picture, _ in keys], [repeat for _, repeat in keys]
    options = {"seed": seed, "step": step, "text_dropout": 0.4}
    assert samples(bank.collate(pictures, repeats=repeats, **options)) == set(together)
    assert len(set(together)) == slots * each
    for picture, repeat in keys[:3]:
        assert samples(bank.collate([picture], repeats=[repeat], **options)) <= set(together)


def test_a_batch_depends_on_seed_and_step_and_on_nothing_else(folder: Path) -> None:
    bank = make_bank(0, 30, folder)
    sizes = {"batch_size": 12, "num_slots": 1}
    (first,) = batches(bank, seed=3, step=7, **sizes)
    torch.manual_seed(99)
    batches(bank, seed=3, step=8, **sizes)
    (again,) = batches(FeatureBank.load(folder), seed=3, step=7, **sizes)
    for one, other in zip(first, again, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
    assert first.pictures == again.pictures
    for seed, step in ((4, 7), (3, 8), (7, 3)):
        (other,) = batches(bank, seed=seed, step=step, **sizes)
        assert not samples(first) & samples(other)
        assert not set(first.normal.tolist()) & set(other.normal.tolist())
        assert not set(first.noise.flatten().tolist()) & set(other.noise.flatten().tolist())


@pytest.mark.parametrize("mode", ["packed", "bucket"])
def test_every_picture_comes_once_an_epoch(folder: Path, mode: Any) -> None:
    bank = make_bank(1, 40, folder, num_lengths=6)
    plan = bank.plan(batch_size=4, num_slots=4, mode=mode, seed=5)
    for epoch in range(3):
        steps = [plan.step(k).samples for k in range(10 * epoch, 10 * epoch + 10)]
        assert sorted(number for samples in steps for number in samples.tolist()) == list(range(40))


def test_a_plan_of_the_bank_is_the_plan_that_was_asked_for(folder: Path) -> None:
    bank = make_bank(1, 40, folder)
    grids = [tuple(grid) for grid in bank.grids.tolist()]
    model = LensConfig(num_layers=1)
    orders = []
    for mode, seed in itertools.product(("packed", "bucket", "same_bucket"), (0, 1)):
        plan = bank.plan(batch_size=8, num_slots=2, mode=mode, seed=seed, model=model)  # pyright: ignore
        assert (plan.mode, plan.seed, plan.model, plan.num_slots) == (mode, seed, model, 2)
        assert plan.text_tokens == max(len(bank.text_of(picture)) for picture in range(40))
        steps = [plan.step(k) for k in range(8)]
        orders.append([step.samples.tolist() for step in steps])
        kinds = {len({grids[picture] for picture in step.slot(slot)}) for step in steps for slot in (0, 1)}
        assert kinds == {1} if mode != "packed" else max(kinds) > 1
        assert all(len(step.slot(0)) + len(step.slot(1)) == 8 for step in steps)
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of num_slots = 2, got 7"):
        bank.plan(batch_size=7, num_slots=2)


def test_other_pictures_are_another_bank(folder: Path, tmp_path: Path) -> None:
    digests = set()
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        (tmp_path / name).mkdir()
        digests.add(make_bank(seed, 6, tmp_path / name).digest)
    assert len(digests) == 2


def test_a_bank_smaller_than_a_step_repeats_pictures_with_other_noise(folder: Path) -> None:
    bank = make_bank(3, 2, folder)
    (batch,) = batches(bank, seed=0, step=0, batch_size=8, num_slots=1)
    assert set(batch.pictures) == {0, 1}
    assert len(set(batch.normal.tolist())) == 8


def test_the_plans_buckets_are_the_banks_grids_and_its_lengths_the_banks_texts(folder: Path) -> None:
    texts, pictures = make_parts(4, 30)
    bank = make_bank(4, 30, folder)
    plan = bank.plan(batch_size=6, num_slots=2, seed=0)
    grids = sorted(tuple(latent.shape[1:]) for _, latent in pictures)
    assert [tuple(grid) for grid in bank.grids.tolist()] == grids
    image, text = plan.lengths(torch.arange(30).numpy())
    assert image.tolist() == [height * width for height, width in grids]
    assert text.tolist() == [len(bank.text_of(picture)) for picture in range(30)]
    assert sorted(text.tolist()) == sorted(len(texts[caption]) for caption, _ in pictures)
    for grid, members in bank.by_grid().items():
        assert members == [index for index, other in enumerate(grids) if other == grid]
    step = plan.step(0)
    assert plan.totals(step) == (6, sum(image[step.samples]), sum(text[step.samples]))


@given(seed=SEEDS, num=st.integers(1, 12))
def test_collate_lays_out_each_pictures_own_latents_and_text(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num: int
) -> None:
    texts, pictures = make_parts(seed, num)
    pictures.sort(key=lambda picture: tuple(picture[1].shape[1:]))
    bank = make_bank(seed, num, tmp_path_factory.mktemp("bank"))
    batch = bank.collate(range(num), seed=seed, step=0, text_dropout=0.0)
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
    batch = bank.collate(range(40), seed=0, step=0, text_dropout=0.3)
    grids = [tuple(grid) for grid in batch.layout.grids.tolist()]
    shapes = list(zip(grids, batch.layout.text_lengths, strict=True))
    changes = sum(one != other for one, other in itertools.pairwise(shapes))
    assert changes == len(set(shapes)) - 1


def test_dropped_text_is_no_text_and_changes_nothing_else(folder: Path) -> None:
    bank = make_bank(6, 20, folder)
    kept, dropped = (bank.collate(range(20), seed=1, step=2, text_dropout=share) for share in (0.0, 1.0))
    assert all(length > 0 for length in kept.layout.text_lengths)
    assert dropped.layout.text_lengths == (0,) * 20
    assert dropped.text_tokens.shape == (0, LAYERS, WIDTH)
    assert {row[:4] for row in samples(kept)} == {row[:4] for row in samples(dropped)}


def test_text_is_dropped_as_often_as_asked(folder: Path) -> None:
    bank = make_bank(7, 10, folder)
    pictures, repeats = [index % 10 for index in range(100)], [index // 10 for index in range(100)]
    drawn = [bank.collate(pictures, repeats=repeats, seed=0, step=step, text_dropout=0.1) for step in range(40)]
    num = sum(batch.layout.text_lengths.count(0) for batch in drawn)
    assert abs(num - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5


def test_noise_and_time_numbers_are_standard_normal(folder: Path) -> None:
    bank = make_bank(8, 10, folder)
    pictures, repeats = [index % 10 for index in range(100)], [index // 10 for index in range(100)]
    drawn = [bank.collate(pictures, repeats=repeats, seed=0, step=step, text_dropout=0.5) for step in range(40)]
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
