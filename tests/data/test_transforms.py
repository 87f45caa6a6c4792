"""Laws of resizing and cropping, against Pillow and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lensmini.data import Bucket, crop_fraction, resize_and_crop

SIDES = st.integers(8, 90)


def picture(height, width, seed=0, dtype=torch.uint8):
    values = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return values.to(torch.uint8) if dtype == torch.uint8 else (values / 255).to(dtype)


def ramp(height, width):
    """A picture whose channels are its own coordinates: what is at a place tells where it came from."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([y, x]).double()


@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.bfloat16]))
def test_the_result_has_the_buckets_size_and_the_images_type(height, width, to_height, to_width, dtype):
    image = picture(height, width, dtype=dtype)
    before = image.clone()
    result = resize_and_crop(image, Bucket(to_height, to_width))
    assert result.shape == (3, to_height, to_width)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert torch.equal(image, before)


@given(*[st.integers(24, 90)] * 4, st.sampled_from(["center", "random"]))
def test_nothing_is_distorted(height, width, to_height, to_width, crop):
    generator = torch.Generator().manual_seed(height)
    result = resize_and_crop(
        ramp(height, width), Bucket(to_height, to_width), crop=crop, mode="bilinear", generator=generator
    )
    # A scaled ramp is a ramp; its slope away from the border, where the kernel is cut, is the local scale, and equal
    # along both axes up to the rounding of one side to a whole pixel.
    scale = max(to_height / height, to_width / width)
    for axis, side in enumerate((to_height, to_width)):
        along = result[axis].select(1 - axis, 0)
        slope = float(along[3 * side // 4] - along[side // 4]) / (3 * side // 4 - side // 4)
        assert slope * scale == pytest.approx(1, abs=1.2 / min(to_height, to_width))


@given(SIDES, SIDES, SIDES, SIDES)
def test_the_crop_is_as_small_as_it_can_be_and_centred(height, width, to_height, to_width):
    result = resize_and_crop(ramp(height, width), Bucket(to_height, to_width), mode="bilinear")
    scale = max(to_height / height, to_width / width)
    middle = [float(channel.mean()) for channel in result]
    # The window's middle shows the image's middle, up to half a canvas pixel of rounding on either side.
    assert middle == pytest.approx([height / 2, width / 2], abs=1.1 / scale)
    shown = min(1, to_height / (height * scale)) * min(1, to_width / (width * scale))
    assert crop_fraction(height, width, Bucket(to_height, to_width)) == pytest.approx(1 - shown, abs=1e-9)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "bucket"), [((120, 90), (40, 30)), ((61, 90), (32, 32)), ((30, 40), (60, 80))])
def test_it_is_pillows_antialiased_resize(mode, size, bucket):
    image = picture(*size, seed=3)
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    height, width = round(size[0] * scale), round(size[1] * scale)
    kernel = Image.Resampling.BICUBIC if mode == "bicubic" else Image.Resampling.BILINEAR
    resized = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), kernel))
    top, left = (height - bucket[0]) // 2, (width - bucket[1]) // 2
    expected = torch.from_numpy(resized[top : top + bucket[0], left : left + bucket[1]].copy()).permute(2, 0, 1).int()
    as_bytes = resize_and_crop(image, Bucket(*bucket), mode=mode)
    assert (as_bytes.int() - expected).abs().max() <= 1
    # Pillow rounds and clamps bytes between its two passes; on floats it does not, and neither may we.
    floats = Image.fromarray(image[0].float().numpy()).resize((width, height), kernel)
    expected = torch.from_numpy(np.asarray(floats)[top : top + bucket[0], left : left + bucket[1]].copy())
    result = resize_and_crop(image.float(), Bucket(*bucket), mode=mode)[0]
    assert torch.allclose(result, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_an_image_of_the_buckets_size_is_kept(dtype, crop):
    image = picture(24, 40, dtype=dtype)
    assert torch.equal(resize_and_crop(image, Bucket(24, 40), crop=crop, generator=torch.Generator()), image)


@example(8, 86, 60, 61, torch.float32)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([torch.uint8, torch.float32]))
def test_a_mirrored_image_gives_the_mirrored_result_up_to_an_odd_pixel(height, width, to_height, to_width, dtype):
    image, bucket = picture(height, width, dtype=dtype), Bucket(to_height, to_width)
    scale = max(to_height / height, to_width / width)
    if (round(width * scale) - to_width) % 2 == 0:
        one, other = (resize_and_crop(x, bucket).double() for x in (image, image.flip(2)))
        # torch places the samples in float32: a part in 8 million of the scaled width, in pixels.
        assert (one - other.flip(2)).abs().max() <= (1 if dtype == torch.uint8 else 1e-4)


def test_random_windows_reach_every_place_and_repeat_by_seed():
    image = torch.arange(20.0).expand(1, 4, 20)

    def lefts(seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            int(resize_and_crop(image, Bucket(4, 16), crop="random", generator=generator)[0, 0, 0]) for _ in range(200)
        ]

    assert set(lefts(0)) == {0, 1, 2, 3, 4}
    assert lefts(0) == lefts(0) != lefts(1)


def test_bytes_are_clamped_and_a_flat_image_stays_flat():
    edge = torch.zeros(1, 32, 32, dtype=torch.uint8)
    edge[:, :, 16:] = 255
    result = resize_and_crop(edge, Bucket(13, 13))
    assert result[0, 0, 0] == 0 and result[0, 0, -1] == 255
    assert (result[0].int().diff(dim=1) >= 0).all()
    flat = torch.full((2, 50, 70), 77, dtype=torch.uint8)
    assert resize_and_crop(flat, Bucket(32, 24)).unique().tolist() == [77]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives(dtype):
    image = picture(61, 90, dtype=dtype)
    result = resize_and_crop(image.cuda(), Bucket(32, 40))
    assert result.is_cuda and result.dtype == dtype
    bound = {torch.uint8: 1, torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype]
    assert (result.cpu().double() - resize_and_crop(image, Bucket(32, 40)).double()).abs().max() <= bound


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resize_and_crop(torch.zeros(4, 4), Bucket(2, 2)), r"image: expected shape \[c h w\]"),
        (lambda: resize_and_crop(torch.zeros(3, 4, 4, dtype=torch.int32), Bucket(2, 2)), "int32"),
        (lambda: resize_and_crop(torch.zeros(3, 0, 4), Bucket(2, 2)), "non-empty"),
        (lambda: resize_and_crop(torch.zeros(3, 4, 4), Bucket(2, 2), crop="top"), "'top'"),
        (lambda: resize_and_crop(torch.zeros(3, 4, 4), Bucket(2, 2), mode="nearest"), "'nearest'"),
        (lambda: resize_and_crop(torch.zeros(3, 4, 4), Bucket(2, 2), crop="random"), "generator"),
        (lambda: crop_fraction(0, 4, Bucket(2, 2)), "positive pixels"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
