"""Legal sizes: the published tables, the rule between them, and the nearest legal size to any other."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.pipeline.canvas import bucket_size, check_size, nearest_size, picture_sizes
from tests.golden_cases import golden

pixels = st.integers(-5, 4000)
AREA = 2080 * 1040


def legal(height, width):
    aspect_fits = 1 / 2 <= (width / height if height > 0 and width > 0 else 0) <= 2
    return height % 16 == width % 16 == 0 and aspect_fits and height * width <= AREA


def test_the_published_table():
    _, meta = golden("resolution_buckets")
    for base, row in meta["buckets"].items():
        for aspect, size in row.items():
            assert list(bucket_size(aspect, int(base))) == size
            check_size(*size)


@given(pixels, pixels)
@example(1040, 2080)
@example(2096, 1040)
@example(1456, 1456)
@example(1472, 1472)
@example(512, 1024)
@example(512, 1040)
def test_a_size_is_legal_by_the_rule_or_refused_with_a_legal_one(height, width):
    if legal(height, width):
        check_size(height, width)
    else:
        with pytest.raises(ValueError, match="nearest legal size is (.*) x (.*)") as caught:
            check_size(height, width)
        named = [int(side) for side in str(caught.value).rsplit("is ", 1)[1].split(" x ")]
        assert legal(*named)


@given(st.integers(1, 2400), st.integers(1, 2400))
def test_the_nearest_size_is_legal_and_none_of_its_neighbours_is_nearer(height, width):
    best = nearest_size(height, width)

    def distance(size):
        return math.hypot(math.log(size[0] / height), math.log(size[1] / width))

    assert legal(*best)
    steps = [(a, b) for a in (-16, 0, 16) for b in (-16, 0, 16)]
    around = [(best[0] + a, best[1] + b) for a, b in steps if best[0] + a > 0 and best[1] + b > 0]
    assert all(distance(size) >= distance(best) - 1e-12 for size in around if legal(*size))
    assert not legal(height, width) or best == (height, width)


def test_sizes_for_all_or_for_each():
    assert picture_sizes(2) == [(1024, 1024)] * 2
    assert picture_sizes(2, aspect_ratio=["16:9", "1:2"], base=1440) == [(1088, 1936), (2080, 1040)]
    assert picture_sizes(2, height=[512, 768], width=640) == [(512, 640), (768, 640)]
    with pytest.raises(ValueError, match="width: expected one value or one for each of 2 prompts, got 3"):
        picture_sizes(2, height=512, width=[1, 2, 3])
