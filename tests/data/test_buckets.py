"""Laws of the bucket tables and of the assignment, against the published tables and a slow reference."""

import json
import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.data import LENS_1440_BUCKETS, LENS_BUCKETS, LENS_RATIOS, Bucket, assign_buckets, make_buckets

# Copied from the paper's table: width x height, column by column.
PAPER = {
    512: "352x704 384x672 416x640 448x608 512x512 608x448 640x416 672x384 704x352",
    768: "544x1088 576x1024 640x960 672x896 768x768 896x672 960x640 1024x576 1088x544",
    1024: "736x1472 768x1376 832x1248 864x1152 1024x1024 1152x864 1248x832 1376x768 1472x736",
}
MINIATURE = (Bucket(32, 32), Bucket(24, 40), Bucket(40, 24), Bucket(24, 48), Bucket(48, 24))


def sides(bucket):
    return (bucket.height, bucket.width)


def test_the_27_buckets_are_the_papers():
    published = [tuple(map(int, size.split("x"))) for base in (512, 768, 1024) for size in PAPER[base].split()]
    assert [(bucket.width, bucket.height) for bucket in LENS_BUCKETS] == published


@pytest.mark.parametrize(("base", "table"), [("1024", LENS_BUCKETS[18:]), ("1440", LENS_1440_BUCKETS)])
def test_tables_are_the_released_ones_in_ratio_order(base, table):
    golden = json.loads((Path(__file__).parents[1] / "golden" / "resolution_buckets.json").read_text())["buckets"]
    assert {f"{w}:{h}": list(sides(bucket)) for (w, h), bucket in zip(LENS_RATIOS, table, strict=True)} == golden[base]


def test_the_papers_facts_hold():
    tokens = [bucket.tokens() for bucket in LENS_BUCKETS]
    assert [(min(t), max(t)) for t in (tokens[:9], tokens[9:18], tokens[18:])] == [
        (968, 1064),
        (2304, 2400),
        (3888, 4232),
    ]
    assert all(side % 32 == 0 for bucket in LENS_BUCKETS for side in sides(bucket))
    assert [bucket.aspect > 1 for bucket in LENS_BUCKETS[:9]] == [False] * 5 + [True] * 4


@pytest.mark.parametrize(("rank", "base"), [(0, 512), (1, 768), (2, 1024)])
def test_the_rule_makes_the_papers_table(rank, base):
    assert make_buckets(base) == LENS_BUCKETS[9 * rank : 9 * rank + 9]


def test_the_rule_does_not_make_the_1440_table_and_says_so():
    made = make_buckets(1440, multiple=16)
    assert made != LENS_1440_BUCKETS
    assert sides(made[0]) == (2048, 1024)
    assert "2048 x 1024" in " ".join(make_buckets.__doc__.split())


@given(
    st.integers(8, 40), st.sampled_from([1, 2, 4]), st.sampled_from(LENS_RATIOS), st.sampled_from([0.06, 0.1, 0.3, 1.0])
)
def test_a_made_bucket_is_the_best_of_all_canvases(cells, multiple, ratio, tolerance):
    base = cells * multiple
    best = None
    for height in range(multiple, 4 * base, multiple):
        for width in range(multiple, 4 * base, multiple):
            if abs(height * width - base**2) <= tolerance * base**2:
                off = abs(math.log(width * ratio[1] / height / ratio[0]))
                if off <= tolerance:
                    best = off if best is None else min(best, off)
    if best is None:
        with pytest.raises(ValueError, match="tolerance"):
            make_buckets(base, ratios=[ratio], multiple=multiple, tolerance=tolerance)
        return
    (bucket,) = make_buckets(base, ratios=[ratio], multiple=multiple, tolerance=tolerance)
    assert bucket.height % multiple == bucket.width % multiple == 0
    assert abs(bucket.height * bucket.width / base**2 - 1) <= tolerance
    assert abs(math.log(bucket.aspect * ratio[1] / ratio[0])) == pytest.approx(best, abs=1e-8)


def slow_assign(height, width, groups, small):
    """One image, exactly: groups from the largest base to the smallest, aspects compared as fractions."""

    def nearest(group):
        def distance(item):
            ratio = Fraction(width * item[1].height, height * item[1].width)
            return max(ratio, 1 / ratio), item[1].aspect

        return min(group, key=distance)

    for group in groups:
        index, bucket = nearest(group)
        if height >= bucket.height and width >= bucket.width:
            return index
    return {"drop": -1, "upscale": nearest(groups[-1])[0]}[small]


LENS_GROUPS = [list(enumerate(LENS_BUCKETS))[start : start + 9] for start in (18, 9, 0)]
EDGES = sorted({side + shift for bucket in LENS_BUCKETS for side in sides(bucket) for shift in (-1, 0, 1)})


@given(
    st.lists(st.tuples(*[st.one_of(st.integers(1, 4000), st.sampled_from(EDGES))] * 2), min_size=1, max_size=60),
    st.sampled_from(["drop", "upscale"]),
)
@example([(1024, 1024), (1023, 1024), (1, 1), (736, 1472), (1472, 736), (9000, 20)], "drop")
def test_assignment_is_the_slow_reference(images, small):
    heights, widths = zip(*images, strict=True)
    indices = assign_buckets(heights, widths, LENS_BUCKETS, small=small)
    assert indices.dtype == np.int64
    assert indices.tolist() == [slow_assign(h, w, LENS_GROUPS, small) for h, w in images]


@given(st.permutations(range(27)), st.integers(0, 999))
def test_the_order_of_the_buckets_does_not_matter(order, seed):
    sizes = np.random.default_rng(seed).integers(1, 2000, (2, 50))
    shuffled = [LENS_BUCKETS[index] for index in order]
    straight = assign_buckets(*sizes, LENS_BUCKETS, small="drop").tolist()
    mixed = assign_buckets(*sizes, shuffled, small="drop").tolist()
    assert [index if index < 0 else order[index] for index in mixed] == straight


def test_every_bucket_is_its_own():
    heights, widths = zip(*map(sides, LENS_BUCKETS), strict=True)
    assert assign_buckets(heights, widths, LENS_BUCKETS).tolist() == list(range(27))


def test_a_tie_goes_to_the_narrower_bucket():
    # 4:4 and 16:4 are equally far from 8:4; one pixel more decides.
    buckets = [Bucket(4, 16), Bucket(8, 8)]
    assert assign_buckets([40, 400, 400], [80, 801, 799], buckets).tolist() == [1, 0, 1]


def test_images_of_many_chunks_are_assigned_one_by_one():
    sizes = np.random.default_rng(0).integers(1, 3000, (2, 100_003))
    whole = assign_buckets(*sizes, LENS_BUCKETS, small="drop")
    some = np.random.default_rng(1).choice(100_003, 2000, replace=False)
    assert whole[some].tolist() == [slow_assign(*map(int, sizes[:, i]), LENS_GROUPS, "drop") for i in some]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint64])
def test_narrow_integers_do_not_overflow(dtype):
    heights, widths = np.array([200, 99, 24], dtype), np.array([250, 200, 48], dtype)
    assert assign_buckets(heights, widths, MINIATURE).tolist() == [0, 3, 3]


def test_small_images_follow_the_rule_that_is_asked_for():
    sizes = ([1024, 300, 350], [1024, 300, 2000])
    with pytest.raises(ValueError, match="2 of 3 images are smaller than every bucket, first number 1 with 300 x 300"):
        assign_buckets(*sizes, LENS_BUCKETS)
    assert assign_buckets(*sizes, LENS_BUCKETS, small="drop").tolist() == [22, -1, -1]
    assert assign_buckets(*sizes, LENS_BUCKETS, small="upscale").tolist() == [22, 4, 8]


def test_bases_may_be_named():
    buckets = [Bucket(32, 32), Bucket(36, 36)]
    with pytest.raises(ValueError, match="share an aspect"):
        assign_buckets([40], [40], buckets)
    assert assign_buckets([40, 33], [40, 50], buckets, bases=[7, 5]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bucket(0, 4), "positive sides"),
        (lambda: Bucket(24, 40).tokens(16), "divisor of 24 and 40"),
        (lambda: make_buckets(0), "positive numbers"),
        (lambda: make_buckets(512, ratios=[(1, 0)]), "ratios"),
        (lambda: make_buckets(32, multiple=32, ratios=[(2, 1)]), "raise tolerance"),
        (lambda: assign_buckets([1], [1, 2], MINIATURE), "widths: expected as many"),
        (lambda: assign_buckets([1.5], [2.0], MINIATURE), "heights: expected integers"),
        (lambda: assign_buckets([0], [2], MINIATURE), "positive pixels"),
        (lambda: assign_buckets([1], [2], MINIATURE, small="keep"), "small"),
        (lambda: assign_buckets([1], [2], []), "at least one"),
        (lambda: assign_buckets([1], [2], MINIATURE, bases=[1]), "one label for each of 5"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_images_are_no_error():
    assert assign_buckets([], [], LENS_BUCKETS).shape == (0,)


def test_millions_of_images_take_a_fraction_of_a_second():
    sizes = np.random.default_rng(0).integers(200, 2500, (2, 1_000_000))
    start = time.process_time()
    assign_buckets(*sizes, LENS_BUCKETS, small="drop")
    # About 0.03 s on an idle core; the bound leaves room for a busy one.
    assert time.process_time() - start < 0.5
