"""Laws of the pixel filters: closed forms, other libraries, scale and batch."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lensmini.data.filters import (
    FILTER_CAUSES,
    Thresholds,
    filter_area,
    filter_clarity,
    filter_entropy,
    filter_luminance,
    judge,
    pixel_scores,
)
from lensmini.data.filters.pixels import to_gray
from tests.strategies import seeds

color = pytest.importorskip("skimage.color")
measure = pytest.importorskip("skimage.measure")
ndimage = pytest.importorskip("scipy.ndimage")
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry", "hubble_deep_field")


def picture(height, width, seed, *, smooth=False):
    """Noise, or noise enlarged, which has structure at every scale."""
    generator = torch.Generator().manual_seed(seed)
    if not smooth:
        return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    coarse = torch.rand((1, 3, 7, 5), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (fine[0] * 255).to(torch.uint8)


def photo(name):
    import skimage.data

    return torch.from_numpy(np.ascontiguousarray(getattr(skimage.data, name)()[..., :3])).permute(2, 0, 1).contiguous()


def gray_picture(values):
    """A picture of one gray channel ``[h, w]`` of integers."""
    return torch.as_tensor(values).to(torch.uint8).expand(3, *values.shape)


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=40, deadline=None)
@given(sizes, seeds())
def test_gray_is_the_luma_of_rec_601_to_a_level(size, seed):
    image = picture(*size, seed)
    pil = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")).astype(int)
    assert np.abs(to_gray(image).numpy() - pil).max() <= 1
    level = torch.full((3, 1, 1), seed % 256, dtype=torch.uint8)
    assert to_gray(level).item() == seed % 256


@settings(max_examples=40, deadline=None)
@given(sizes, seeds(), st.booleans())
def test_entropy_and_luminance_are_those_of_scikit_image(size, seed, smooth):
    image = picture(*size, seed, smooth=smooth)
    entropy = measure.shannon_entropy(to_gray(image).numpy(), base=2)
    assert filter_entropy(image).item() == pytest.approx(entropy, abs=1e-5)
    value = color.rgb2hsv(image.permute(1, 2, 0).numpy())[..., 2].mean()
    assert filter_luminance(image).item() == pytest.approx(value, rel=1e-6, abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(seeds(), st.booleans(), st.booleans())
def test_clarity_is_the_variance_of_scipys_laplacian(seed, smooth, tall):
    # At the scale of the measure nothing is resized.
    image = picture(*((300, 256) if tall else (256, 300)), seed, smooth=smooth)
    laplacian = ndimage.laplace(to_gray(image).numpy().astype(float))[1:-1, 1:-1]
    assert filter_clarity(image).item() == pytest.approx(laplacian.var(), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 700), st.integers(2, 700), seeds())
def test_the_scale_of_clarity_is_pillows_resize_of_the_gray_picture(height, width, seed):
    image = picture(height, width, seed, smooth=True)
    scale = 256 / min(height, width)
    size = (max(256, round(width * scale)), max(256, round(height * scale)))
    gray = Image.fromarray(to_gray(image).numpy())
    resized = np.asarray(gray.resize(size, Image.Resampling.BILINEAR)).astype(float)
    expected = ndimage.laplace(resized)[1:-1, 1:-1].var()
    assert filter_clarity(image).item() == pytest.approx(expected, rel=0.1, abs=0.6)


def test_closed_forms_of_entropy():
    flat = torch.zeros(256, 256)
    assert filter_entropy(gray_picture(flat)).item() == 0
    for bits in range(9):
        levels = torch.arange(2**bits).repeat(2 ** (8 - bits) * 3).reshape(3, 256)
        assert filter_entropy(gray_picture(levels)).item() == pytest.approx(bits, abs=1e-6)
    quarter = torch.tensor([[0, 0, 0, 200]])
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert filter_entropy(gray_picture(quarter)).item() == pytest.approx(expected, rel=1e-6)


def test_closed_forms_of_clarity():
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    assert filter_clarity(gray_picture(0 * y + 77)).item() == 0
    assert filter_clarity(gray_picture(y)).item() == filter_clarity(gray_picture(255 - x)).item() == 0  # ramps
    board = torch.where((y + x) % 2 == 0, 10, 0)
    # Every inner pixel's Laplacian is +-4 * 10.
    assert filter_clarity(gray_picture(board)).item() == pytest.approx(1600.0, rel=1e-3)
    stripes = torch.where(x % 2 == 0, 10, 0)
    assert filter_clarity(gray_picture(stripes)).item() == pytest.approx(400.0, rel=1e-3)
    dot = torch.zeros(256, 256)
    dot[100, 90] = 50
    assert filter_clarity(gray_picture(dot)).item() == pytest.approx((16 + 4) * 50**2 / 254**2, rel=1e-3)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", PHOTOS[:4])
def test_clarity_does_not_depend_on_the_stored_size(name, factor):
    image = photo(name)[:, :300, :300]
    enlarged = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    assert filter_clarity(enlarged).item() == pytest.approx(filter_clarity(image).item(), rel=0.3)
    raw = [ndimage.laplace(to_gray(pixels).numpy().astype(float)).var() for pixels in (image, enlarged)]
    assert raw[1] < 0.65 * raw[0]  # which is what the scale is fixed for


@pytest.mark.parametrize(
    ("rgb", "value"), [((255, 0, 0), 1.0), ((0, 51, 0), 0.2), ((0, 0, 0), 0.0), ((10, 102, 102), 0.4)]
)
def test_luminance_of_a_pure_colour_is_its_largest_channel(rgb, value):
    image = torch.tensor(rgb, dtype=torch.uint8).reshape(3, 1, 1).expand(3, 7, 5)
    assert filter_luminance(image).item() == pytest.approx(value, abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=4), seeds())
def test_a_picture_scores_the_same_alone_and_among_others(shapes, seed):
    images = [picture(*shape, seed + index) for index, shape in enumerate(shapes)]
    together = pixel_scores(images)
    functions = {"clarity": filter_clarity, "entropy": filter_entropy}
    functions |= {"luminance": filter_luminance, "area": filter_area}
    for name, function in functions.items():
        assert together[name].dtype == torch.float32 and together[name].shape == (len(images),)
        assert together[name].equal(torch.cat([function(image) for image in images]))
    assert together["area"].tolist() == [height * width for height, width in shapes]
    stacked = torch.stack([images[0], images[0].flip(2)])
    assert pixel_scores(stacked)["entropy"].equal(pixel_scores(list(stacked))["entropy"])
    assert pixel_scores(images[0].float() / 255)["clarity"].equal(together["clarity"][:1])


def test_no_picture_is_changed_by_looking_at_it():
    image = picture(40, 50, 0)
    before = image.clone()
    pixel_scores(image)
    assert image.equal(before)


@pytest.mark.parametrize("name", PHOTOS)
def test_our_thresholds_keep_photographs_and_drop_their_ruins(name):
    image, ours = photo(name), Thresholds(min_area=None)

    def verdict(pixels):
        scores = pixel_scores(pixels)
        return judge({key: values.item() for key, values in scores.items()}, ours)

    assert verdict(image) is None
    side = min(image.shape[1:]) * 2 / 256
    blurred = ndimage.gaussian_filter(image.numpy(), (0, side, side))
    assert verdict(torch.from_numpy(blurred)) == "clarity"
    assert verdict((image * 0.02).to(torch.uint8)) in ("clarity", "entropy", "luminance")
    assert filter_entropy((image * 0.02 + 100).to(torch.uint8)).item() < ours.min_entropy
    assert filter_luminance((image * 0.02).to(torch.uint8)).item() < ours.min_luminance
    assert filter_luminance((253 + image * 0.01).to(torch.uint8)).item() > ours.max_luminance


def test_compression_does_not_hide_blur():
    image = photo("coffee")
    blurred = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, 5, 5)))
    file = io.BytesIO()
    Image.fromarray(blurred.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=70)
    again = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert filter_clarity(again).item() < Thresholds().min_clarity < filter_clarity(image).item()


ORDER = {
    "area": 10.0,
    "nsfw": 0.9,
    "aesthetic": 1.0,
    "watermark": 0.9,
    "clarity": 0.0,
    "entropy": 0.0,
    "luminance": 0.0,
}


def test_the_first_cause_in_the_papers_order_is_named():
    scores = dict(reversed(ORDER.items()))
    for cause in FILTER_CAUSES[:-1]:
        assert judge(scores, Thresholds()) == cause
        del scores[cause]
    assert judge({}, Thresholds()) is None
    assert judge({"area": 384.0**2, "aesthetic": 3.0, "luminance": 0.98}, Thresholds()) is None
    assert judge({"luminance": 0.99}, Thresholds()) == "luminance"
    off = {name: None for name in Thresholds.__slots__ if name != "max_duplicate_cosine"}
    assert judge(ORDER, Thresholds(**off)) is None
    with pytest.raises(ValueError, match="sharpness"):
        judge({"sharpness": 1.0}, Thresholds())


@pytest.mark.parametrize("name", FILTER_CAUSES[:-1])
def test_a_score_that_is_no_number_never_passes(name):
    assert judge({"area": 1e6, name: float("nan")}, Thresholds()) == "not a number"


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(4, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.int32),
        torch.full((3, 8, 8), 1.5),
        torch.full((3, 8, 8), float("nan")),
    ],
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match=r"images\[1\]"):
        pixel_scores([torch.zeros(3, 4, 4, dtype=torch.uint8), image])


def test_a_line_of_pixels_costs_no_memory():
    assert filter_clarity(picture(1, 60_000, 0)).item() == 0.0
