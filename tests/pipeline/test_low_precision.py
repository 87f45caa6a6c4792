"""fp8 and CUDA graphs: the rounding against a written-out one, who is quantised, and clear refusals without a GPU."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.packed import Layout
from lensmini.pipeline import draw_noise, paint_packed
from lensmini.pipeline.graphs import cuda_graph
from lensmini.pipeline.low_precision import block_linears, emulate_fp8, fp8_linear, quantize_fp8, round_rows
from lensmini.pipeline.passes import FastEngine
from tests.nn.test_golden import error
from tests.pipeline.test_call import features, tiny_transformer
from tests.strategies import seeds, tensor


def e4m3(value):
    """Round one number to a sign, four exponent bits (bias 7) and three mantissa bits, ties to even."""
    if value == 0:
        return 0.0
    exponent = max(math.frexp(abs(value))[1] - 1, -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)


@given(seed=seeds(), power=st.integers(-6, 6))
def test_rows_round_to_e4m3_with_their_own_scale(seed, power):
    values = tensor((3, 5), seed) * 2.0**power
    values[1] *= 1000
    scale = values.abs().amax(1, keepdim=True) / 448
    expected = [
        [e4m3(x) * s for x in row] for row, s in zip((values / scale).tolist(), scale[:, 0].tolist(), strict=True)
    ]
    assert torch.allclose(round_rows(values), torch.tensor(expected), rtol=1e-6, atol=0)
    # Between 256 and 448 neighbours are 32 apart.
    assert float(((round_rows(values) - values).abs() / scale).max()) <= 16 * (1 + 1e-5)


def test_a_linear_rounds_input_and_weight_and_adds_the_bias_unrounded():
    x, weight, bias = tensor((2, 3, 8), 0), tensor((4, 8), 1), tensor((4,), 2)
    expected = torch.einsum("abi,oi->abo", round_rows(x), round_rows(weight)) + bias
    assert error(fp8_linear(x, weight, bias), expected) < 1e-6
    assert error(fp8_linear(x, weight, bias), x @ weight.T + bias) > 1e-4
    assert fp8_linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="hidden_states"):
        fp8_linear(x[..., :7], weight)


def test_every_linear_of_the_blocks_is_chosen_but_none_that_modulates():
    names = [name for name, _ in block_linears(tiny_transformer())]
    parts = ["attn.img_qkv", "attn.txt_qkv", "attn.to_out.0", "attn.to_add_out"]
    parts += [f"{stream}_mlp.{w}" for stream in ("img", "txt") for w in ("w1", "w2", "w3")]
    assert sorted(names) == sorted(f"transformer_blocks.{index}.{part}" for index in range(2) for part in parts)


def test_emulated_pictures_move_by_the_rounding_and_no_more():
    noise, text = draw_noise([(2, 3)], 16, seeds=[0]), [features(3)]
    plain = paint_packed(tiny_transformer(), noise, text, num_steps=2)[0]
    rounded = paint_packed(emulate_fp8(tiny_transformer()), noise, text, num_steps=2, engine=FastEngine())[0]
    assert 1e-4 < error(rounded, plain) < 0.2


def test_what_needs_a_gpu_says_so():
    with pytest.raises(
        ValueError, match=r"fp8: expected a CUDA GPU of compute capability 8\.9 or more, got a model on cpu"
    ):
        quantize_fp8(tiny_transformer())
    with pytest.raises(ValueError, match="cuda_graph: expected tensors on a CUDA device, got cpu"):
        FastEngine(wrap=cuda_graph)(tiny_transformer(), features(0), Layout.build([(1, 1)]), torch.ones(1, 1))(
            0, torch.zeros(1, 16)
        )


@pytest.mark.parametrize(
    ("capability", "kind", "message"),
    [((8, 6), ValueError, "got compute capability 8.6"), ((9, 0), ImportError, r"lensmini\[fp8\]")],
)
def test_an_old_gpu_and_a_missing_package_are_named(monkeypatch, capability, kind, message):
    class OnGpu:
        class img_in:
            class weight:
                device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(kind, match=message):
        quantize_fp8(OnGpu())


def test_a_wrapped_pass_gets_tensors_of_unchanging_shapes():
    seen = []

    def wrap(function):
        def called(*tensors):
            seen.append([tuple(x.shape) for x in tensors])
            return function(*tensors)

        return called

    model, inputs = tiny_transformer(), (draw_noise([(2, 3)], 16, seeds=[0]), [features(3)], [features(0)])
    options = {"num_steps": 3, "guidance_scale": 4.0}
    found = paint_packed(model, *inputs, engine=FastEngine(wrap=wrap), **options)[0]
    assert error(found, paint_packed(model, *inputs, **options)[0]) < 1e-5
    assert seen == [[(12, 16), (2, 2, 6, 32), (2, 2, 6, 32), (2, 2, 32)]] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [False, True])
def test_a_graph_replays_the_same_pictures(guided):
    model = tiny_transformer().cuda()
    inputs = (draw_noise([(2, 3)], 16, seeds=[0]), [features(3)], [features(0)] if guided else None)
    options = {"num_steps": 3, "guidance_scale": 4.0 if guided else 1.0}
    found = paint_packed(model, *inputs, engine=FastEngine(wrap=cuda_graph), **options)[0]
    assert error(found, paint_packed(model, *inputs, **options)[0]) < 1e-5
