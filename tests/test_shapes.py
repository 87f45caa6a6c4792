import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.shapes import check_shape

NAMES = st.sampled_from(["b", "c", "h", "w", "n"])
SIZES = st.dictionaries(NAMES, st.integers(0, 5), min_size=5, max_size=5)


@given(SIZES, st.lists(NAMES, max_size=6), st.data())
def test_a_pattern_accepts_the_shape_it_describes_and_binds_every_name(sizes, axes, data):
    given_names = data.draw(st.sets(NAMES))
    known = {name: sizes[name] for name in given_names}
    tensor = torch.empty([sizes[axis] for axis in axes])
    assert check_shape("x", tensor, " ".join(axes), **known) == {name: sizes[name] for name in given_names | {*axes}}


@given(SIZES, st.lists(NAMES, max_size=3), st.lists(NAMES, max_size=3), st.lists(st.integers(0, 5), max_size=3))
def test_dots_stand_for_any_axes_at_their_place(sizes, front, behind, middle):
    shape = [*(sizes[axis] for axis in front), *middle, *(sizes[axis] for axis in behind)]
    bound = check_shape("x", torch.empty(shape), " ".join([*front, "...", *behind]))
    assert bound == {name: sizes[name] for name in {*front, *behind}}


@given(SIZES, st.lists(NAMES, min_size=1, max_size=5), st.data())
def test_one_wrong_size_is_refused_wherever_it_stands(sizes, axes, data):
    shape = [sizes[axis] for axis in axes]
    place = data.draw(st.integers(0, len(axes) - 1))
    shape[place] += 1
    with pytest.raises(ValueError, match="x: expected shape"):
        check_shape("x", torch.empty(shape), " ".join(axes), **sizes)
    numbers = " ".join(str(sizes[axis]) for axis in axes)
    with pytest.raises(ValueError, match="x: expected shape"):
        check_shape("x", torch.empty(shape), numbers)


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ((2, 3), "b"),
        ((2, 3), "b c h"),
        ((), "b"),
        ((2,), ""),
        ((2, 3), "n n"),
        ((2, 3, 4), "n ... n"),
        ((), "b ..."),
        ((3,), "b ... c"),
        ((2, 3), "... 4"),
        ((2, 3), "4 ..."),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(shape, pattern):
    with pytest.raises(ValueError, match="latents"):
        check_shape("latents", torch.empty(shape), pattern)


def test_the_error_names_argument_pattern_shape_and_known_sizes():
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        check_shape("text_mask", torch.empty(2, 7), "b l", b=3)
    assert str(caught.value) == "text_mask: expected shape [b l] with b=3, got [2, 7]"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_shape("t", torch.empty(2, 7), "b")
    assert str(caught.value) == "t: expected shape [b], got [2, 7]"


def test_the_sizes_given_are_not_modified():
    known = {"b": 2}
    check_shape("x", torch.empty(2, 3), "b c", **known)
    assert known == {"b": 2}


def test_checking_compiles_into_the_graph():
    def double(x):
        check_shape("x", x, "b ... c", b=2)
        return 2 * x

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2, 3, 4)).sum() == 48
    with pytest.raises(Exception, match="x: expected shape"):
        compiled(torch.ones(3, 3, 4))
