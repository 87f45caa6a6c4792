"""Laws of MXFP4: the published values exactly, and the standard's meaning of every code and every scale."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.checkpoints.mxfp4 import unpack_mxfp4
from tests.golden_cases import golden
from tests.strategies import seeds


def random_bytes(shape: tuple[int, ...], seed: int, high: int = 256) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def slow_value(byte: int, nibble: int, scale: int) -> float:
    """One number by the standard's definition, in Python's exact binary arithmetic."""
    code = byte & 15 if nibble == 0 else byte >> 4
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = math.ldexp(mantissa / 2, 0) if exponent == 0 else math.ldexp(1 + mantissa / 2, exponent - 1)
    return math.copysign(math.ldexp(magnitude, scale - 127), -1 if code & 8 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_published_values_exactly(dtype):
    tensors, _ = golden("mxfp4_a")
    weight = unpack_mxfp4(tensors["inputs.blocks"], tensors["inputs.scales"], dtype=dtype)
    assert weight.dtype == dtype
    assert weight.double().equal(tensors["outputs.weight"].double())


@given(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3), seeds())
@example(0, 1, 1, 0)
def test_every_element_is_its_code_times_two_to_its_scale(experts, outputs, groups, seed):
    blocks = random_bytes((experts, outputs, groups, 16), seed)
    scales = random_bytes((experts, outputs, groups), seed + 1, high=253)
    weight = unpack_mxfp4(blocks, scales)
    assert weight.shape == (experts, 32 * groups, outputs) and weight.is_contiguous()
    for expert in range(experts):
        for output in range(outputs):
            for column in range(32 * groups):
                group, byte, nibble = column // 32, column % 32 // 2, column % 2
                expected = slow_value(
                    int(blocks[expert, output, group, byte]), nibble, int(scales[expert, output, group])
                )
                assert weight[expert, column, output].item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_at_every_scale(dtype):
    blocks = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16)
    scales = torch.arange(255).to(torch.uint8).view(1, 255, 1).expand(1, 255, 16)
    weight = unpack_mxfp4(blocks, scales, dtype=dtype)[0]
    largest = float(torch.finfo(torch.float32).max)
    for scale in range(255):
        exact = [slow_value(byte, nibble, scale) for byte in range(256) for nibble in range(2)]
        expected = [value if abs(value) <= largest else math.copysign(math.inf, value) for value in exact]
        assert weight[:, scale].tolist() == expected


def test_the_scale_that_stands_for_no_number_gives_none():
    weight = unpack_mxfp4(torch.arange(16).view(1, 1, 1, 16).byte(), torch.full((1, 1, 1), 255).byte())
    assert weight.isnan().all()


def test_agrees_with_transformers():
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_bytes((2, 6, 4, 16), 0), random_bytes((2, 6, 4), 1, high=60) + 100
    expected = integration.convert_moe_packed_tensors(blocks, scales)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert unpack_mxfp4(blocks, scales).equal(expected.cpu())


def test_inputs_stay_as_they_are():
    blocks, scales = random_bytes((1, 2, 1, 16), 0), random_bytes((1, 2, 1), 1)
    before = blocks.clone(), scales.clone()
    unpack_mxfp4(blocks, scales)
    assert blocks.equal(before[0]) and scales.equal(before[1])


BLOCKS, SCALES = torch.zeros(1, 2, 1, 16).byte(), torch.zeros(1, 2, 1).byte()


@pytest.mark.parametrize(
    ("blocks", "scales", "options", "name"),
    [
        (BLOCKS[..., :8], SCALES, {}, "blocks"),
        (BLOCKS[0], SCALES, {}, "blocks"),
        (BLOCKS, SCALES[:, :1], {}, "scales"),
        (BLOCKS.int(), SCALES, {}, "blocks"),
        (BLOCKS, SCALES.float(), {}, "scales"),
        (BLOCKS, SCALES, {"dtype": torch.int32}, "dtype"),
        (BLOCKS, SCALES, {"dtype": torch.float8_e4m3fn}, "dtype"),
        (BLOCKS, SCALES.to("meta"), {}, "scales"),
    ],
)
def test_wrong_input_is_named(blocks, scales, options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        unpack_mxfp4(blocks, scales, **options)
