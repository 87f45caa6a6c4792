"""The speed benchmarks of the plan: documented rules do what their documents say, and both commands print a result."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import plan_assign, plan_seek
from benchmarks.size_rules import (
    kohya_rule,
    nemo_rule,
    nemo_sizes,
    novelai_rule,
    novelai_sizes,
    pixart_rule,
    sdxl_sizes,
    stepped_sizes,
)

# The resolutions that the README of novelai-aspect-ratio-bucketing prints.
NOVELAI = [
    (256, 1024), (320, 1024), (384, 1024), (384, 960), (384, 896), (448, 832), (512, 768), (512, 704), (512, 512), (576, 640),
    (640, 576), (704, 512), (768, 512), (832, 448), (896, 384), (960, 384), (1024, 384), (1024, 320), (1024, 256),
]  # fmt: skip


def test_novelais_sizes_are_those_its_readme_prints():
    assert sorted(novelai_sizes()) == sorted(NOVELAI)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((1000, 1000), (512, 512)),
        ((3000, 2000), (768, 512)),
        ((100, 5000), (256, 1024)),
        # Nearer to 3.2 than to 4, though not in log.
        ((3590, 1000), (1024, 320)),
    ],
)
def test_novelais_rule_takes_the_nearest_aspect(image, size):
    assert novelai_rule()(*image) == size


def test_kohyas_sizes_fill_the_area_in_steps():
    sizes = stepped_sizes(512 * 512, 256, 1024, 64)
    # The two that the training guide names for 512 x 512.
    assert {(256, 1024), (384, 640), (512, 512)} <= set(sizes)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0 and width * height <= 512 * 512 and min(width, height) >= 256
        grown = [(width + 64, height), (width, height + 64)]
        assert any(max(size) > 1024 or size[0] * size[1] > 512 * 512 for size in grown)
    assert len(set(sizes)) == len(sizes) and {(height, width) for width, height in sizes} == set(sizes)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((4000, 4000), (1024, 1024)),
        ((832, 1216), (832, 1216)),
        ((6000, 1000), (2048, 320)),
        ((1920, 1080), (1344, 768)),
    ],
)
def test_kohyas_rule_takes_the_nearest_aspect(image, size):
    assert kohya_rule()(*image) == size


def test_pixarts_sizes_are_the_forty_of_sdxl():
    sizes = sdxl_sizes()
    assert len(set(sizes)) == len(sizes) == 40
    assert (1344, 704) in sizes and (704, 1344) not in sizes
    assert all(width % 64 == height % 64 == 0 and 0.88 < width * height / 1024**2 < 1.02 for width, height in sizes)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((1000, 1000), (1024, 1024)),
        ((1920, 1080), (1344, 768)),
        ((1080, 1920), (768, 1344)),
        ((1000, 1910), (704, 1408)),
    ],
)
def test_pixarts_rule_takes_the_nearest_height_over_width(image, size):
    assert pixart_rule()(*image) == size


def test_nemos_sizes_stay_within_the_budget():
    sizes = nemo_sizes()
    assert all(width % 64 == height % 64 == 0 and width * height <= 1024**2 for width, height in sizes)
    # By hand: 724.1 x 1448.2, 1254.1 x 836.1 (which rounds beyond the budget) and both 3:4 and 4:5.
    assert {(704, 1472), (832, 1216), (896, 1152), (1024, 1024)} <= set(sizes)
    assert len(set(sizes)) == len(sizes) < 14


@pytest.mark.parametrize(
    ("image", "size"), [((500, 500), (1024, 1024)), ((1920, 1080), (1344, 768)), ((205, 400), (704, 1472))]
)
def test_nemos_rule_takes_the_nearest_aspect(image, size):
    assert nemo_rule()(*image) == size


def test_lists_are_emitted_in_order_when_full():
    bucket = [0, 1, 0, 1, 1, 0]
    assert list(plan_assign.fill_lists(range(6), bucket.__getitem__, [2, 3])) == [[0, 2], [1, 3, 4]]


def test_nemos_sampler_finishes_a_bucket_before_the_next_and_ranks_share_nothing():
    buckets = [range(300), range(300, 1300)]
    ranks = [list(plan_seek.nemo_batches(buckets, [1, 2], seed=3, rank=rank)) for rank in range(plan_seek.SLOTS)]
    # 300 // 128 samples in batches of one, 1000 // 128 in batches of two, the odd one dropped.
    assert {len(batches) for batches in ranks} == {2 + 3}
    order = [batch[0] >= 300 for batch in ranks[0]]
    assert len(list(itertools.groupby(order))) == 2
    for batches in ranks:
        assert [batch[0] >= 300 for batch in batches] == order
        assert all(len(batch) == (2 if batch[0] >= 300 else 1) for batch in batches)
    seen = [sample for batches in ranks for batch in batches for sample in batch]
    assert len(set(seen)) == len(seen) == 128 * (2 + 6)
    assert ranks[0] == list(plan_seek.nemo_batches(buckets, [1, 2], seed=3, rank=0))
    assert ranks[0] != list(plan_seek.nemo_batches(buckets, [1, 2], seed=4, rank=0))


def test_torchs_batch_is_the_one_after_those_skipped():
    mine = torch.randperm(12_800, generator=torch.Generator().manual_seed(0)).tolist()[::128]
    assert plan_seek.distributed_batch(12_800, 0.5) == mine[50:56]


def test_extrapolation_is_in_proportion_to_the_samples():
    assert plan_seek.extrapolated({"a 1.0, 2 million": {"0 %": 9.0, "90 %": 3.0}}, 10**8) == {"a 1.0, 2 million": 150.0}


@pytest.mark.parametrize(
    ("python", "reason"), [("/no/such/python", "not installed: make peers"), ("/bin/false", "failed: ")]
)
def test_a_peer_that_cannot_run_says_why(python, reason):
    rows, missing = plan_seek.measure_installed(Path(python), samples=10, tar_samples=10)
    assert rows == {} and all(text.startswith(reason) for text in missing.values()) and len(missing) == 2


def last_line(capsys):
    printed = capsys.readouterr().out.strip().splitlines()
    result = json.loads(printed[-1])
    assert len(printed) > 5 and set(result) == {"name", "ratio", "goal", "better", "holds", "details"}
    return result


def test_plan_assign_prints_a_result(capsys):
    plan_assign.main(20_000, 1)
    result = last_line(capsys)
    assert (result["name"], result["goal"], result["better"]) == ("plan_assign", 20.0, "higher")
    slower = min(result["details"]["order"][f"plan, {mix}, blocks of 256"] for mix in ("even", "web"))
    assert result["ratio"] == pytest.approx(slower, rel=1e-3) and result["holds"] == (result["ratio"] >= 20)
    cells = [rate for table in ("buckets", "order", "packed") for rate in result["details"][table].values()]
    assert len(cells) == 6 + 12 + 6 and min(cells) > 0


def test_plan_seek_prints_a_result(capsys):
    plan_seek.main(20_000, 1, peer_samples=20_000, python=Path(sys.prefix) / "no-python")
    result = last_line(capsys)
    assert (result["name"], result["goal"], result["better"]) == ("plan_seek", 5.0, "lower")
    found = result["details"]["milliseconds"]
    slower = max(found[f"plan and batch, {mix}"]["90 %"] for mix in ("even", "web"))
    assert result["ratio"] == pytest.approx(slower, rel=1e-3)
    assert len(found) == 6 + 2 and all(set(found[f"{way}, even"]) == set(plan_seek.PLACES) for way in plan_seek.WAYS)
    assert result["details"]["missing"] == dict.fromkeys(
        ("mosaicml-streaming", "webdataset"), "not installed: make peers"
    )
